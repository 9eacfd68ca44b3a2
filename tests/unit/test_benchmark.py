"""Benchmarks of reward models: RewardBench's weights by hand, and which rows count as right."""

from types import SimpleNamespace

import pytest
import torch

from align.errors import DataError, RecipeError
from align.recipe import Base, Data, Recipe, TokenizerSection
from align.recipe_io import load_recipe
from align.stages import recipe_sha256
from data.load import load_records
from data.render import Renderer
from data.tokenizer import prepare_tokenizer
from pipelines.benchmark import measure_benchmark
from reward.benchmark import SECTIONS, benchmark_metrics
from tests import tiny
from tests.unit.test_data_rankings import lines

PAIR = {"prompt": "hi", "chosen": "Paris", "rejected": "Tom"}


def of(accuracies: dict[str, float], prompts: int = 4) -> dict[str, float]:
    """Measure subsets of so many prompts each, of which these shares are right."""
    subsets = [name for name in accuracies for _ in range(prompts)]
    right = [i < share * prompts for share in accuracies.values() for i in range(prompts)]
    return benchmark_metrics(subsets, torch.tensor(right))


def test_there_are_the_published_numbers_of_prompts() -> None:
    sums = [sum(SECTIONS[name].values()) for name in ("chat", "chat_hard", "safety", "reasoning")]
    # 447 of the last are mathematics and stand for 984.
    assert sums == [358, 456, 740, 1431 - 447 + 984]
    assert sum(sums) - 984 + 447 == 2985


def test_a_section_is_weighted_by_prompts_and_the_score_by_sections() -> None:
    shares = dict.fromkeys((name for parts in SECTIONS.values() for name in parts), 1.0)
    shares |= {"alpacaeval-easy": 0.0, "math-prm": 0.5, "shp": 0.0}
    found = of(shares)
    chat, reasoning, prior = 258 / 358, 0.75, 0.75
    assert found["benchmark/section/chat"] == pytest.approx(chat)
    assert found["benchmark/section/reasoning"] == pytest.approx(reasoning)
    score = (chat + 1 + 1 + reasoning + 0.5 * prior) / 4.5
    assert found["benchmark/score"] == pytest.approx(score)
    del shares["shp"]
    found = of(shares)
    assert "benchmark/section/prior_sets" not in found
    assert found["benchmark/score"] == pytest.approx((chat + 1 + 1 + reasoning) / 4)


# EXAMPLE_COUNTS of rewardbench/constants.py, and the sums of its sections.
@pytest.mark.parametrize(
    ("section", "total", "prompts"),
    [
        (
            "chat",
            358,
            {
                "alpacaeval-easy": 100,
                "alpacaeval-length": 95,
                "alpacaeval-hard": 95,
                "mt-bench-easy": 28,
                "mt-bench-med": 40,
            },
        ),
        (
            "chat_hard",
            456,
            {
                "mt-bench-hard": 37,
                "llmbar-natural": 100,
                "llmbar-adver-neighbor": 134,
                "llmbar-adver-GPTInst": 92,
                "llmbar-adver-GPTOut": 47,
                "llmbar-adver-manual": 46,
            },
        ),
        (
            "safety",
            740,
            {
                "refusals-dangerous": 100,
                "refusals-offensive": 100,
                "xstest-should-refuse": 250,
                "xstest-should-respond": 154,
                "donotanswer": 136,
            },
        ),
        (
            "reasoning",
            1968,
            {
                "math-prm": 984,
                "hep-cpp": 164,
                "hep-go": 164,
                "hep-java": 164,
                "hep-js": 164,
                "hep-python": 164,
                "hep-rust": 164,
            },
        ),
        (
            "prior_sets",
            4,
            {"anthropic_helpful": 1, "anthropic_hhh": 1, "shp": 1, "summarize": 1},
        ),
    ],
)
def test_a_subset_alone_moves_its_section_by_its_prompts(
    section: str, total: int, prompts: dict[str, int]
) -> None:
    for name, count in prompts.items():
        found = of({other: float(other == name) for other in prompts})
        assert found[f"benchmark/section/{section}"] == pytest.approx(count / total), name


def test_a_part_of_a_section_does_not_go_by_its_name() -> None:
    found = of({"llmbar-natural": 0.75, "mine": 0.25})
    assert found["benchmark/subset/llmbar-natural"] == 0.75
    assert found["benchmark/subset/llmbar-natural/prompts"] == 4
    assert found["benchmark/subset/mine/low"] < 0.25 < found["benchmark/subset/mine/high"]
    assert found["benchmark/accuracy"] == 0.5
    assert not [key for key in found if "section" in key or "score" in key]


def recipe(root, **benchmark) -> Recipe:
    data = Data.model_validate({"root": str(root), "benchmark": benchmark})
    return Recipe.model_construct(name="x", base=Base(id="some/model"), data=data)


def measure(root, scores, **benchmark):
    """Measure with these scores of all responses, flat."""
    loaded = load_records(recipe(root, **benchmark), "evaluate")
    counted = []
    job = SimpleNamespace(data=loaded, check_dropped=lambda *given: counted.append(given))
    renderer = Renderer(prepare_tokenizer(tiny.tokenizer(), TokenizerSection()), 64, 64)
    return measure_benchmark(job, renderer, lambda rows: torch.tensor(scores)), counted


def test_the_best_response_has_to_win_alone(tmp_path) -> None:
    best_of_three = {"prompt": "hi", "responses": ["Tom", "Paris", "Hello"], "scores": [0, 1, 0.5]}
    (tmp_path / "a.jsonl").write_text(f"{lines(PAIR, PAIR | {'chosen': 'x'})}")
    (tmp_path / "b.jsonl").write_text(lines(best_of_three, best_of_three))
    scores = [1.0, 0.5, 2.0, 2.0, 0.1, 0.3, 0.2, 0.1, 0.3, 0.4]
    found, counted = measure(
        tmp_path, scores, easy={"path": "a.jsonl"}, three={"path": "b.jsonl", "shape": "ranking"}
    )
    # Equal scores are no win; the third response beats the best one in the last row.
    assert found["benchmark/subset/easy"] == 0.5
    assert found["benchmark/subset/three"] == 0.5
    assert [(section, kept) for section, kept, _ in counted] == [
        ("benchmark.easy", 2),
        ("benchmark.three", 2),
    ]


def test_rows_may_name_their_own_subset(tmp_path) -> None:
    rows = [PAIR | {"subset": "hep-go"}, PAIR | {"subset": "donotanswer"}, PAIR]
    (tmp_path / "a.jsonl").write_text(lines(*rows))
    found, _ = measure(tmp_path, [1.0, 0.0, 0.0, 1.0, 1.0, 0.0], rest={"path": "a.jsonl"})
    names = ("hep-go", "donotanswer", "rest")
    assert [found[f"benchmark/subset/{name}"] for name in names] == [1.0, 0.0, 1.0]


def test_no_benchmark_no_metrics(tmp_path) -> None:
    assert measure(tmp_path, []) == ({}, [])


def test_what_is_no_comparison_is_refused_by_subset(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "hi"}))
    with pytest.raises(DataError) as caught:
        load_records(recipe(tmp_path, mine={"path": "a.jsonl"}), "evaluate")
    assert str(caught.value) == (
        "data.benchmark.mine (a.jsonl) holds prompts only; the evaluate stage needs ranked"
        " responses"
    )


def test_a_benchmark_concerns_the_evaluation_alone() -> None:
    plain = load_recipe("miniature")
    source = "data.benchmark={my-pairs: {world: pairs, split: heldout}}"
    tested = load_recipe("miniature", [source])
    same = [recipe_sha256(plain, s) == recipe_sha256(tested, s) for s in ("reward", "evaluate")]
    assert same == [True, False]
    with pytest.raises(RecipeError, match="exactly one of path, hub and world"):
        load_recipe("miniature", ["data.benchmark={a: {path: x, hub: y}}"])
    nothing = [source, "reward=null", "ppo=null", "evaluate=null"]
    with pytest.raises(RecipeError, match=r"data\.benchmark.*: tests a reward model"):
        load_recipe("miniature", nothing)


def test_a_benchmark_that_no_evaluation_would_read_is_refused() -> None:
    source = "data.benchmark={mine: {world: pairs, split: heldout}}"
    with pytest.raises(RecipeError) as caught:
        load_recipe("miniature", [source, "evaluate=null"])
    assert str(caught.value).splitlines() == [
        f"{source}: data.benchmark: is read by the evaluate stage alone: needs an evaluate section;"
        " allowed without one: {}"
    ]


# An encoder learns to score without SFT.
ENCODER = (
    "ppo=null",
    "sft=null",
    "data.sft=null",
    "reward.center_on=none",
    "reward.base={id: bert}",
    "pretrain=null",
    "base.id=x",
    "tokenizer.vocab_size=null",
)


def test_an_evaluation_without_sft_is_refused_before_anything_is_trained() -> None:
    problem = "evaluate: compares with sft: needs an sft section or run.parents.sft"
    for more in ((), ("data.benchmark={mine: {world: pairs, split: heldout}}",)):
        with pytest.raises(RecipeError) as caught:
            load_recipe("miniature", [*ENCODER, *more])
        (line,) = str(caught.value).splitlines()
        assert line.endswith(problem)
    load_recipe("miniature", [*ENCODER, "evaluate=null"])
    load_recipe("miniature", [*ENCODER, "run.parents.sft=/a/sft"])
