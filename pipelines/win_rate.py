"""Numbers that compare answers: shares with their bootstrap interval, wins, repetition.

No models here, only lists of numbers: how certain a result is does not depend on what made it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.9  # of every interval that Align prints
# A response is called repetitive when more than this share of its 4-grams stood in it before.
REPETITIVE = 0.25


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the bounds of its interval."""

    mean: float
    low: float
    high: float

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return ``{prefix/mean, prefix/low, prefix/high}``."""
        return {f"{prefix}/mean": self.mean, f"{prefix}/low": self.low, f"{prefix}/high": self.high}


def bootstrap(
    values: Sequence[float], *, resamples: int, seed: int, level: float = LEVEL
) -> Estimate:
    """Estimate a mean and its percentile bootstrap interval (Efron 1979).

    Args:
        values: one number per independent unit (prompt), at least one.
        resamples: how often as many values as there are get drawn with replacement.
        seed: of the draws; equal seeds give equal intervals.
        level: the share of resampled means inside the interval, in (0, 1).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("bootstrap needs at least one value")
    numbers = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # one draw at a time: a matrix of all indices need not fit in memory
        means[i] = numbers[generator.integers(0, len(numbers), len(numbers))].mean()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(numbers.mean()), float(low), float(high))


def wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return per pair 1 where our number is higher, 0 where theirs is, and 0.5 for a tie."""
    return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]


def repetitive_rate(responses: Sequence[Sequence[int]]) -> float:
    """Return the share of responses that repeat themselves."""
    return sum(repeated_share(ids) > REPETITIVE for ids in responses) / len(responses)


def repeated_share(ids: Sequence[int], n: int = 4) -> float:
    """Return the share of an answer's ``n``-grams that stood in it before; 0 if it has none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
