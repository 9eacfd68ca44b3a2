"""Which losses of the reward model go together, and what is subtracted for a label's strength."""

import pytest

from align.errors import InputError, RecipeError
from align.models import new_bert
from align.plan import plan_recipe, pretrained_shape
from align.recipe_io import load_recipe
from align.recipe_reward import Reward
from align.stages import parent_stages
from data.records import Message, Ranking
from pipelines.ranked_tokens import RankedTokens
from pipelines.reward_loss import check_columns, margin_of

PAIR = ((Message("user", "hi"),), ("a", "b"), (1.0, 0.0))

MASKED = ["pretrain.objective=masked", "pretrain.model.num_kv_heads=null"]
CLASSES = ["reward.classes={labels: [a, b]}", "reward.loss=classes", "reward.center_on=none"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["reward.loss=listwise", "reward.margin=column"],
            "reward.margin=column: is a matter of pairs, and loss=listwise has none",
        ),
        (
            ["reward.loss=listwise", "reward.label_smoothing=0.1"],
            "reward.label_smoothing=0.1: is a matter of pairs",
        ),
        (
            ["reward.margin=small", "reward.soft_labels=true"],
            "reward.soft_labels=true: found margin and soft_labels: they say different things",
        ),
        (
            ["reward.label_smoothing=0.1", "reward.soft_labels=true"],
            "reward.soft_labels=true: found label_smoothing and soft_labels",
        ),
        (["reward.label_smoothing=0.5"], "reward.label_smoothing=0.5: "),
        (["reward.margin=true"], "allowed: none, column, small or large"),
        (["reward.loss=lists"], "allowed: pairs, listwise or classes"),
        (["reward.loss=classes"], "reward.classes: goes with loss=classes, and loss=classes needs"),
        (["reward.classes={labels: [a, b]}"], "reward.classes: goes with loss=classes"),
        ([*CLASSES[1:], "reward.classes={labels: [a]}"], "reward.classes.labels: names one class"),
        (
            [*CLASSES[1:], "reward.classes={labels: [a, b, a]}"],
            "names 'a' twice; allowed: every label",
        ),
        ([*CLASSES[1:], "reward.classes={labels: [a, '']}"], "holds an empty label"),
        (
            [*CLASSES[:2], "reward.center_on=demonstrations"],
            "center_on=demonstrations: is a matter of",
        ),
        ([*CLASSES, "reward.margin=small"], "reward.margin=small: is a matter of ranked responses"),
        ([*CLASSES, "reward.soft_labels=true"], "reward.soft_labels=true: is a matter of ranked"),
        ([*CLASSES, "reward.centering_coef=0.1"], "reward.centering_coef=0.1: is a matter of"),
        ([*CLASSES, "reward.aux_lm_coef=0.1"], "reward.aux_lm_coef=0.1: is a matter of ranked"),
        ([*CLASSES, "ppo=null", "distributed.processes=2"], "reward.loss=classes: not built: a"),
        (CLASSES, "ppo.reward: the model is a classifier; allowed: a reward model, or as a"),
        (["reward.centering_coef=-1.0"], "reward.centering_coef=-1.0: "),
        (
            ["ppo=null", "adapter.method=head_only", "reward.aux_lm_coef=0.1"],
            "reward.aux_lm_coef=0.1: moves the backbone alone, of which adapter.method=head_only",
        ),
        (
            ["reward.base={id: bert}", "reward.aux_lm_coef=0.1"],
            "reward.aux_lm_coef=0.1: reads output embeddings, which the encoder of reward.base has",
        ),
        (
            ["reward.base={id: bert}", "ppo=null", "evaluate=null", "adapter.method=prefix"],
            "adapter.method=prefix: an encoder has no cache for keys and values; give reward.base",
        ),
        (
            ["reward.base={id: bert, adapter: {method: prefix}}"],
            "an encoder has no cache for keys and values; allowed for it: any other",
        ),
        (["reward.base={id: bert, pooling: last}"], "allowed: cls or mean"),
        (["reward.head.depth=0"], "reward.head.depth=0: "),
        (["reward.head.width=8"], "reward.head.width=8: is of the states between two maps"),
        (
            ["reward.base={id: bert}", "reward.head.depth=2"],
            "reward.head.depth=2: pooling=cls has the head of transformers' classifier; allowed",
        ),
        (
            ["reward.center_on=none", "reward.scale_on=demonstrations"],
            "reward.scale_on=demonstrations: needs center_on=demonstrations; allowed without it:",
        ),
        (
            [*CLASSES, "reward.scale_on=demonstrations"],
            "reward.scale_on=demonstrations: is a matter of ranked",
        ),
        (
            ["reward.base={id: pretrain}"],
            "pretrain.objective: causal makes a decoder; allowed with reward.base.id=pretrain",
        ),
        (
            ["reward.base={id: pretrain}", "pretrain=null", "tokenizer.vocab_size=null"],
            "reward.base.id=pretrain: needs a pretrain section or run.parents.pretrain",
        ),
        (
            MASKED,
            "base.id=pretrain: pretrain.objective=masked makes an encoder, which cannot write",
        ),
        (
            ["pretrain.objective=masked"],
            "pretrain.model.num_kv_heads=4: an encoder has none of its own; allowed: null",
        ),
        (
            ["pretrain.next_sentence=true"],
            "pretrain.next_sentence=true: objective=causal reads no pairs; allowed: false",
        ),
        (
            [*MASKED, "pretrain.next_sentence=true", "pretrain.sequence_length=5"],
            "pretrain.sequence_length=5: has no room for [CLS] A [SEP] B [SEP]; allowed with"
            " next_sentence=true: at least 6",
        ),
        (
            ["reward.base={id: bert}", "distributed.processes=2", "run.keep_checkpoints=0"],
            "an encoder is trained by one process alone so far; make it by another recipe",
        ),
    ],
)
def test_what_means_nothing_is_refused_by_name(overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("miniature", overrides)
    assert expected in str(caught.value)


def test_an_encoder_needs_no_sft_and_goes_with_every_layout_of_ppo() -> None:
    encoder = "reward.base={id: bert, adapter: {method: full}}"
    assert load_recipe("miniature", [encoder]).ppo is not None
    assert load_recipe("miniature", [encoder, "ppo.layout=separate"]).ppo is not None
    alone = ["ppo=null", "sft=null", "evaluate=null", "data.sft=null", "reward.center_on=none"]
    recipe = load_recipe("miniature", [encoder, *alone])
    assert parent_stages(recipe, "reward") == ()
    with pytest.raises(RecipeError, match="starts from sft: needs an sft section"):
        load_recipe("miniature", alone)


def test_plan_counts_the_encoder_that_the_recipe_makes_and_says_that_it_knows_no_other() -> None:
    recipe = load_recipe("miniature", ["reward.base={id: bert}"])
    with pytest.raises(InputError, match=r"reward.base=bert: align plan only knows encoders that"):
        plan_recipe(recipe, None)
    made = load_recipe("hh-rlhf/encoder")
    bert = new_bert(made.pretrain.model, _Tokens(), seed=0)  # type: ignore[union-attr,arg-type]
    assert pretrained_shape(made).parameters == bert.base_model.num_parameters()
    pretrain, reward = plan_recipe(made, None)
    (model,) = (item for item in reward.kept if item.name == "model: reward")
    assert model.bytes == 4 * bert.base_model.num_parameters()
    assert pretrain.peak > reward.sum("weights")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_plan_counts_the_pooler_and_the_second_segment(pooling: str) -> None:
    plain = load_recipe("hh-rlhf/encoder", [f"reward.base.pooling={pooling}"])
    made = load_recipe(
        "hh-rlhf/encoder", ["pretrain.next_sentence=true", f"reward.base.pooling={pooling}"]
    )
    assert made.pretrain is not None
    bert = new_bert(made.pretrain.model, _Tokens(), seed=0, next_sentence=True)  # type: ignore[arg-type]
    assert pretrained_shape(made).parameters == bert.base_model.num_parameters()
    pretrain, reward = plan_recipe(made, None)
    (model,) = (item for item in pretrain.kept if item.name == "model")
    assert model.bytes == 4 * bert.base_model.num_parameters()
    (model,) = (item for item in reward.kept if item.name == "model: reward")
    if pooling == "mean":
        bert.base_model.pooler = None
    assert model.bytes == 4 * bert.base_model.num_parameters()
    # Rows are padded: a mask of a byte, and each of four layers' own of four.
    extra = pretrain.peak - plan_recipe(plain, None)[0].peak
    weights = 4 * (192 * 192 + 192 + 192)
    assert extra == 4 * weights + 16 * 256**2 * (1 + 4 * 4)


def test_plan_counts_a_head_for_every_class_and_a_row_for_every_text() -> None:
    labels = "reward.classes={labels: [a, b, c]}"
    recipe = load_recipe("miniature", [*CLASSES[1:], labels, "ppo=null"])
    plans = {plan.stage: plan for plan in plan_recipe(recipe, None)}
    width = recipe.pretrain.model.hidden_size  # type: ignore[union-attr]
    (head,) = (item for item in plans["reward"].kept if item.name == "head: reward")
    assert head.bytes == 4 * (2 * 3 * width + 2)
    ranked = {plan.stage: plan for plan in plan_recipe(load_recipe("miniature"), None)}
    assert plans["reward"].peak < ranked["reward"].peak


class _Tokens:
    """As many tokens as the recipe's tokenizer has."""

    pad_token_id = 0

    def __len__(self) -> int:
        return 4096


@pytest.mark.parametrize(
    ("margin", "by_strength"),
    [
        # Touvron et al. 2023, table 27: from "negligibly better" to "significantly better".
        ("small", [0.0, 1 / 3, 2 / 3, 1.0]),
        ("large", [0.0, 1.0, 2.0, 3.0]),
    ],
)
def test_margins_are_llama_2s(margin: str, by_strength: list[float]) -> None:
    section = Reward.model_validate({"lr": 1.0, "batch_size": 1, "margin": margin})
    words = ("negligibly better", "slightly better", "better", "significantly better")
    rankings = [Ranking(*PAIR, 0.5, strength) for strength in words]
    assert [margin_of(section, ranking) for ranking in rankings] == by_strength
    assert margin_of(section, Ranking(*PAIR, 0.5)) is None


def test_the_column_is_taken_as_it_is_and_only_when_asked_for() -> None:
    ranking = Ranking(*PAIR, 0.5, "better")
    column, none = Reward(lr=1.0, batch_size=1, margin="column"), Reward(lr=1.0, batch_size=1)
    assert margin_of(column, ranking) == 0.5
    assert margin_of(none, ranking) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"margin": "column"}, "reward.margin=column: no row of data.reward.train has a margin"),
        ({"margin": "large"}, "reward.margin=large: no row of data.reward.train has a strength"),
        ({"soft_labels": True}, "reward.soft_labels=true: no row of data.reward.train has votes"),
    ],
)
def test_a_loss_without_its_column_is_refused(settings: dict[str, object], expected: str) -> None:
    section = Reward.model_validate({"lr": 1.0, "batch_size": 1} | settings)
    with_all = [Ranking(*PAIR, 0.5, "better", votes=True), Ranking(*PAIR)]
    check_columns(
        section, [RankedTokens([2], ([3], [4]), r, margin_of(section, r)) for r in with_all]
    )
    without = RankedTokens([2], ([3], [4]), Ranking(*PAIR))
    with pytest.raises(InputError, match=expected):
        check_columns(section, [without])
