"""Rows and comparisons of the reward benchmarks: hand-made rankings, a formula for the spread."""

import math

import pytest

from align.recipe import World
from tests.benchmarks.reward_rows import (
    Result,
    paired_bootstrap,
    prefer_length,
    single_pairs,
    table,
    world_rankings,
)

RANKING = {"prompt": "p", "responses": ["a", "bbb", "cc"], "scores": [1.0, 0.0, 1.0]}


def test_a_ranking_becomes_its_pairs_without_the_ties() -> None:
    assert single_pairs([RANKING]) == [
        {"prompt": "p", "chosen": "a", "rejected": "bbb"},
        {"prompt": "p", "chosen": "cc", "rejected": "bbb"},
    ]


def test_the_planted_share_is_ordered_by_length_and_the_rest_is_as_it_was() -> None:
    rows = prefer_length([RANKING] * 1000, 0.3, 0)
    by_length = [row for row in rows if row["scores"] == [1.0, 3.0, 2.0]]
    assert len(by_length) == pytest.approx(300, abs=60)  # 4 standard deviations
    assert [row for row in rows if row not in by_length] == [RANKING] * (1000 - len(by_length))
    assert prefer_length([RANKING], 0.0, 0) == [RANKING]
    assert RANKING["scores"] == [1.0, 0.0, 1.0]


def test_the_world_gives_rankings_of_each_size_from_prompts_of_their_own() -> None:
    world = World(ranked_prompts=5, heldout_rows=2)
    rows = world_rankings(world, "train", [4, 6])
    assert [len(row["responses"]) for row in rows] == [4] * 5 + [6] * 5
    assert len({row["prompt"] for row in rows}) == 10
    assert all(len(row["scores"]) == len(row["responses"]) for row in rows)
    assert len(world_rankings(world, "heldout", [9])) == 2
    others = world_rankings(World(seed=1, ranked_prompts=5), "train", [4])
    assert not {row["prompt"] for row in others} & {row["prompt"] for row in rows}


def test_the_paired_bootstrap_knows_that_the_pairs_are_the_same() -> None:
    # 1000 pairs: 300 that the first alone has right, 100 the second alone, 600 that both have.
    ours, theirs = [1.0] * 300 + [0.0] * 100 + [1.0] * 600, [0.0] * 300 + [1.0] * 700
    found = paired_bootstrap(ours, theirs)
    assert found.mean == pytest.approx(0.2)
    half = 1.96 * math.sqrt((0.3 + 0.1 - 0.2**2) / 1000)  # the mean of the differences is normal
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.002)
    assert paired_bootstrap(theirs, theirs) == (0.0, 0.0, 0.0)
    assert paired_bootstrap(ours, theirs) == found


def test_the_table_has_a_row_per_setting() -> None:
    rows = [Result({"noise": n}, seed, {"accuracy": n + seed}) for n in (0, 1) for seed in (1, 3)]
    lines = table(rows).splitlines()
    assert [" ".join(line.split()) for line in lines[2:]] == [
        "| 0 | 2 | 2.000 +- 1.414 |",
        "| 1 | 2 | 3.000 +- 1.414 |",
    ]
