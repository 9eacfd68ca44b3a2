"""What a recipe may not ask of PPO, and how it is told; nothing is loaded for any of it."""

import pytest

from align.errors import RecipeError
from align.recipe_io import load_recipe


def refused(*overrides: str) -> list[str]:
    """Return the lines of the refusal of the shipped miniature with some keys changed."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("miniature", overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ppo.minibatch_size=24"], "ppo.minibatch_size=24: does not divide batch_size=64"),
        (["ppo.temperature=0"], "ppo.temperature=0: "),
        (
            ["ppo.kl.loss_coef=0.1", "ppo.kl.estimator=k3"],
            "ppo.kl.loss_coef=0.1: the KL would count twice, in the reward (coef=0.1) and in the",
        ),
        (
            ["ppo.kl.coef=0.0", "ppo.kl.loss_coef=0.1"],
            "ppo.kl.estimator: k1 in the loss has a gradient of mean 0",
        ),
        (["ppo.kl.coef=0.0", "ppo.kl.target=6.0"], "ppo.kl.target=6.0: adapts a coefficient"),
        (["ppo.top_p=0.9"], "ppo.top_p"),
        (
            ["ppo.max_new_tokens=100"],
            "ppo.max_new_tokens=100: with data.max_prompt_tokens=80 exceeds the base's 160",
        ),
        (
            ["ppo.micro_batch_size=8", "ppo.max_tokens_per_microbatch=512"],
            "ppo.max_tokens_per_microbatch=512: micro_batch_size=8 says how batches are cut",
        ),
        (
            ["ppo.bootstrap_truncated=true"],
            "ppo.bootstrap_truncated=true: missing_eos treats a response at the limit",
        ),
        (["ppo.ema=0.9", "ppo.keep=best"], "ppo.keep=best: ema saves the average"),
        (["ppo.stop.divergence=0.1"], "ppo.stop.divergence=0.1: needs ppo.heldout_reward"),
        (["ppo.value.warmup_steps=24"], "ppo.value.warmup_steps=24: leaves no step of steps=24"),
        (["ppo.heldout_reward=reward"], "ppo.heldout_reward=reward: is trained on as well"),
        (["ppo.dual_clip=1.0"], "ppo.dual_clip=1.0"),
        (["ppo.reward=[{weight: 1.0}]"], "found none of them; allowed: exactly one of model"),
        (["ppo.reward=[{ensemble: [a]}]"], "names one model; allowed: two or more"),
        (["ppo.reward=[{model: a, std_penalty: 1.0}]"], "needs an ensemble"),
        (["ppo.reward=[{model: a, combine: minimum}]"], "needs an ensemble; allowed without"),
        (
            ["ppo.reward=[{ensemble: [a, b], combine: minimum, variance_penalty: 1.0}]"],
            "is of the mean; allowed with combine=minimum: 0",
        ),
        (
            ["ppo.reward=[{ensemble: [a, b], std_penalty: 1.0, variance_penalty: 1.0}]"],
            "std_penalty is given as well; allowed: one of the two",
        ),
        (["ppo.reward=[{modle: a}]"], "ppo.reward.0.modle=a: unknown key; did you mean"),
        (["ppo.reward=[]"], "found an empty list; allowed: model, or a Python function as"),
        (
            ["ppo.layout=separate", "base.quantization=nf4"],
            "ppo.layout=separate: trains all weights, and those of base.quantization=nf4",
        ),
        (
            ["ppo.value={trunk: own, layout: separate}", "base.quantization=nf4"],
            "ppo.value.layout=separate: trains all weights, and those of base.quantiz",
        ),
        (
            ["ppo.value.layout=separate", "ppo.value.trunk=policy"],
            "ppo.value.layout=separate: value.trunk=policy is a head on the",
        ),
        (
            ["data.prompts.heldout=[]", "ppo.keep=best"],
            "ppo.keep=best: is decided by held-out prompts",
        ),
    ],
)
def test_wrong_set_ups_are_refused_by_name(overrides, expected):
    lines = refused(*overrides)
    assert any(expected in line for line in lines), lines
    assert len(lines) == 1


def test_sources_of_the_reward():
    recipe = load_recipe(
        "miniature", ["ppo.reward=[{model: reward, weight: 0.5}, {function: 'a.b:score'}]"]
    )
    first, second = recipe.ppo.reward_sources
    assert (first.models, first.weight) == (("reward",), 0.5)
    assert (second.function, second.weight) == ("a.b:score", 1.0)
    assert recipe.ppo.needs_reward_stage
    function_only = load_recipe("miniature", ["ppo.reward=a:b"]).ppo
    assert not function_only.needs_reward_stage
    assert load_recipe("miniature").ppo.reward_sources[0].model == "reward"
