"""Numbers that compare answers: shares with their bootstrap interval, wins, repetition.

No models here, only lists of numbers: how certain a result is does not depend on what made it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.9  # of every interval that Align prints


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the bounds of its interval."""

    mean: float
    low: float
    high: float

    def metrics(self, prefix: str, mean_key: str = "mean") -> dict[str, float]:
        """Return ``{prefix/mean_key, prefix/low, prefix/high}``; no ``mean_key``: ``prefix``."""
        name = f"{prefix}/{mean_key}" if mean_key else prefix
        return {name: self.mean, f"{prefix}/low": self.low, f"{prefix}/high": self.high}


def bootstrap(
    values: Sequence[float],
    *,
    resamples: int,
    seed: int,
    weights: Sequence[float] | None = None,
    level: float = LEVEL,
) -> Estimate:
    """Estimate a mean and its percentile bootstrap interval (Efron 1979).

    With ``weights`` the estimate is ``sum(values) / sum(weights)``: give each prompt's number of
    wins and of comparisons, and whole prompts are drawn, because a prompt's comparisons share its
    difficulty and are not independent.

    Args:
        values: one number per independent unit (prompt), at least one.
        resamples: how often as many units as there are get drawn with replacement.
        seed: of the draws; equal seeds give equal intervals.
        weights: one positive number per unit; null: 1 each.
        level: the share of resampled means inside the interval, in (0, 1).

    Raises:
        ValueError: there are no values, or there is not one weight per value.
    """
    if not values:
        raise ValueError("bootstrap needs at least one value")
    if weights is not None and len(weights) != len(values):
        raise ValueError(f"{len(values)} values but {len(weights)} weights")
    numerators = np.asarray(values, dtype=np.float64)
    denominators = np.ones_like(numerators) if weights is None else np.asarray(weights, np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # one draw at a time: 1,000 x 2,000 indices need not fit in memory
        drawn = generator.integers(0, len(numerators), len(numerators))
        means[i] = numerators[drawn].sum() / denominators[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(numerators.sum() / denominators.sum()), float(low), float(high))


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return per pair 1 where our number is higher, 0 where theirs is, and 0.5 for a tie."""
    return [_win(a, b) for a, b in zip(ours, theirs, strict=True)]


def agreements(predicted: Sequence[float], truth: Sequence[float]) -> tuple[float, int]:
    """Compare two scorings of one prompt's responses, pair by pair.

    Args:
        predicted: one score per response, higher is better.
        truth: likewise; pairs that it calls equal are left out.

    Returns:
        How many pairs ``predicted`` orders as ``truth`` does (its ties count one half), and how
        many pairs were compared: ``(0.0, 0)`` where ``truth`` prefers nothing.
    """
    agreeing, compared = 0.0, 0
    for i in range(len(truth)):
        for j in range(len(truth)):
            if truth[i] > truth[j]:
                agreeing += _win(predicted[i], predicted[j])
                compared += 1
    return agreeing, compared


def repeated_share(ids: Sequence[int], n: int = 4) -> float:
    """Return the share of an answer's ``n``-grams that stood in it before; 0 if it has none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def perplexity(negative_logprob_sum: float, num_tokens: int) -> float:
    """Return ``exp`` of the mean negative log-probability per token (natural logarithm)."""
    return math.exp(negative_logprob_sum / num_tokens)


def _win(ours: float, theirs: float) -> float:
    return 0.5 if ours == theirs else float(ours > theirs)
