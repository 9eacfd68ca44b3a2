"""The simulated annotator of the miniature world: mostly right, often careless, a little vain.

What she prefers is what the gold judge prefers, plus a liking for long and flattering answers that
is the same in every comparison, plus noise that is not. One number, her carelessness, scales both;
it is set so that she agrees with the judge on the share of comparisons that the world asks for.
"""

import math
import random
from collections.abc import Sequence
from itertools import combinations

from data import lexicon

FLATTERY_LIKING = 0.12  # in units of gold, at carelessness 1
LENGTH_LIKING = 0.01  # per word, likewise
NOISE = 0.35  # scale of the Gumbel noise: rankings then follow Plackett and Luce


def rank(
    responses: Sequence[Sequence[str]],
    golds: Sequence[Sequence[float]],
    agreement: float,
    rng: random.Random,
) -> list[tuple[float, ...]]:
    """Return the annotator's ranks, best = K - 1, worst = 0, for every prompt's K responses.

    Args:
        responses, golds: per prompt the responses and their gold scores.
        agreement: share of the comparisons with different gold that she orders as gold does.
    """
    whims = [[_whim(text, rng) for text in row] for row in responses]
    carelessness = _carelessness(golds, whims, agreement)
    return [_ranks(gold, whim, carelessness) for gold, whim in zip(golds, whims, strict=True)]


def _whim(response: str, rng: random.Random) -> float:
    """Return what draws the annotator to this response besides its quality."""
    flattering = any(phrase in response for phrase in lexicon.FLATTERY)
    noise = -NOISE * math.log(-math.log(rng.random() or 0.5))
    return FLATTERY_LIKING * flattering + LENGTH_LIKING * len(response.split()) + noise


def _carelessness(
    golds: Sequence[Sequence[float]], whims: Sequence[Sequence[float]], agreement: float
) -> float:
    """Return the scale of the whims at which the agreement is as asked, by bisection."""
    pairs = [
        (abs(g[i] - g[j]), (w[i] - w[j]) * math.copysign(1, g[i] - g[j]))
        for g, w in zip(golds, whims, strict=True)
        for i, j in combinations(range(len(g)), 2)
        if g[i] != g[j]
    ]
    low, high = 0.0, 64.0
    for _ in range(40):
        middle = (low + high) / 2
        agreed = sum(gap + middle * whim > 0 for gap, whim in pairs)
        if agreed >= agreement * len(pairs):
            low = middle
        else:
            high = middle
    return low


def _ranks(gold: Sequence[float], whim: Sequence[float], carelessness: float) -> tuple[float, ...]:
    order = sorted(range(len(gold)), key=lambda i: gold[i] + carelessness * whim[i])
    ranks = [0.0] * len(gold)
    for place, index in enumerate(order):
        ranks[index] = float(place)
    return tuple(ranks)
