"""Rows for the reward benchmarks, two models on the same pairs, the table. Pure functions.

A row is a JSON object as the recipe's sources read it: a ranking with its scores, or a pair.
"""

import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.recipe import World
from data.records import Ranking
from data.world import world_records
from tests.benchmarks import common

RankingRow = dict[str, Any]  # prompt, responses, scores (higher is better)


class Difference(NamedTuple):
    """How much more often the first of two models is right, with a 95 % interval."""

    mean: float
    low: float
    high: float


class Result(NamedTuple):
    """What was measured of one training: the setting it belongs to, its seed, the figures."""

    setting: dict[str, Any]
    seed: int
    measures: dict[str, float]


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table with a row per setting: mean +- standard deviation over the seeds."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(result.setting), []).append(result)
    rows = []
    for group in groups.values():
        measures = {
            key: common.mean_and_spread([result.measures[key] for result in group])
            for key in group[0].measures
        }
        rows.append(group[0].setting | {"seeds": len(group)} | measures)
    return common.table(rows)


def world_rankings(world: World, split: str, sizes: Sequence[int]) -> list[RankingRow]:
    """Return the world's rankings of each of these numbers of responses, from other prompts each.

    ``world.ranked_prompts`` and ``world.heldout_rows`` count those of one number.
    """
    rows = []
    for size in sizes:
        changed = {"responses_per_ranking": size, "seed": 1000 * world.seed + size}
        for record in world_records(world.model_copy(update=changed), "rankings", split):
            assert isinstance(record, Ranking)
            rows.append(
                {
                    "prompt": record.messages[-1].content,
                    "responses": list(record.responses),
                    "scores": list(record.scores),
                }
            )
    return rows


def single_pairs(rows: Sequence[RankingRow]) -> list[dict[str, str]]:
    """Return every pair of the rankings that has a winner as a row of its own."""
    pairs = []
    for row in rows:
        judged = list(zip(row["responses"], row["scores"], strict=True))
        for (first, first_score), (second, second_score) in combinations(judged, 2):
            if first_score == second_score:
                continue
            chosen, rejected = (first, second) if first_score > second_score else (second, first)
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def prefer_length(rows: Sequence[RankingRow], share: float, seed: int) -> list[RankingRow]:
    """Return the rankings with this share of them, drawn at random, ordered by length alone."""
    rng = random.Random(seed)
    return [
        row | {"scores": [float(len(text)) for text in row["responses"]]}
        if rng.random() < share
        else row
        for row in rows
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSONL; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def paired_bootstrap(
    ours: Sequence[float], theirs: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Compare two models' outcomes on the same pairs (Efron 1979, percentile interval).

    Args:
        ours, theirs: ``M`` outcomes each, in the same order: 1 right, 0 wrong, between for a tie or
            a mean over seeds.
        resamples: how often the M pairs are drawn anew, with replacement.
    """
    gaps = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    generator = np.random.default_rng(seed)
    means = [gaps[generator.integers(len(gaps), size=len(gaps))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(float(gaps.mean()), float(low), float(high))
