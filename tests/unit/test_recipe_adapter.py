"""Which adapter methods go with what, and how a recipe is told; nothing is loaded for any of it."""

import pytest

from align.errors import InputError, RecipeError
from align.plan import plan_recipe
from align.recipe_io import load_recipe

NO_PPO = ["ppo=null", "evaluate=null"]
HUB = ["base.id=some/model", "pretrain=null", "tokenizer.vocab_size=null", *NO_PPO]


def refused(*overrides: str) -> list[str]:
    """Return the lines of the refusal of the shipped miniature with some keys changed."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("miniature", overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["adapter.method=head_only"], "adapter.method=head_only: trains nothing in the body"),
        (["adapter.method=bottleneck"], "adapter.method=bottleneck: puts modules between layers"),
        (
            ["adapter.method=top_layers", "adapter.top_layers=1"],
            "adapter.method=top_layers: replaces layers that all roles of PPO share; allowed with",
        ),
        (["adapter.method=full"], "adapter.method=full makes none; allowed with it: separate"),
        (["adapter.method=prefix", "evaluate=null"], "adapter.method=prefix: puts keys and values"),
        (["adapter.method=prefix", "ppo=null"], "evaluate: has no pass with the prefixes"),
        (["adapter.method=top_layers"], "adapter.top_layers: how many layers are trained?"),
        (
            ["adapter.method=top_layers", "adapter.top_layers=4", *NO_PPO],
            "adapter.top_layers=4: the base has 3 layers; allowed: at most so many",
        ),
        (
            ["adapter.method=bitfit", *NO_PPO],
            "adapter.method=bitfit: trains biases, and the Llama of the pretrain stage has none",
        ),
        (["adapter.init=pissa"], "found 'pissa' (text); allowed: kaiming or gaussian"),
        (
            [*HUB, "adapter.method=full", "base.dtype=bfloat16"],
            "base.dtype=bfloat16: adapter.method=full trains weights of the base, and AdamW's small"
            " updates vanish in bfloat16 (float32 weights computed in bfloat16 are built for"
            " ppo.layout=separate only); allowed with it: float32",
        ),
        ([*HUB, "adapter.method=full", "base.dtype=float16"], "updates vanish in float16"),
        (
            [*HUB, "adapter.method=bitfit", "base.quantization=nf4"],
            "adapter.method=bitfit: trains layers of the base, which are frozen with base.quan",
        ),
        (
            [*NO_PPO, "adapter.method=prefix", "base.gradient_checkpointing=true"],
            "base.gradient_checkpointing=true: adapter.method=prefix lives in a cache",
        ),
        (
            [*NO_PPO, "adapter.method=prefix", "sft.packing=true"],
            "sft.packing=true: puts several rows behind one prefix",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(overrides, expected):
    lines = refused(*overrides)
    assert any(expected in line for line in lines), lines
    assert len(lines) == 1, lines


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.method=full", "ppo.layout=separate"],
        ["adapter.rslora=true", "adapter.dora=true", "adapter.init=gaussian"],
        [*NO_PPO, "adapter.method=prefix"],
        ["ppo=null", "adapter.method=bottleneck", "adapter.placement=pfeiffer"],
        [*HUB, "adapter.method=bottleneck", "base.quantization=nf4", "base.dtype=bfloat16"],
        [*HUB, "adapter.method=head_only", "base.quantization=int8"],
    ],
)
def test_what_goes_together_is_accepted(overrides):
    load_recipe("miniature", overrides)


@pytest.mark.parametrize("override", ["adapter.method=bottleneck", "adapter.dora=true"])
def test_what_the_plan_does_not_count_is_refused_by_name(override):
    recipe = load_recipe("miniature", ["ppo=null", override])
    with pytest.raises(InputError, match=f"{override}: align plan only knows lora without dora"):
        plan_recipe(recipe, None)
