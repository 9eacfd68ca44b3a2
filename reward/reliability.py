"""Whether the probabilities that scores stand for are right, and the temperature that would help.

By Bradley-Terry the response with the higher score is the better one with probability
``sigmoid(difference)``. All functions here are on the differences of pairs, better minus worse, as
the annotator saw them: a negative one is a pair that the scores have wrong.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from reward.ranking import strict_pairs

BINS = 10
_LARGEST = 100.0  # temperatures are sought from its inverse to it


class Bin(NamedTuple):
    """Pairs of which the scores are about equally sure: mean probability, share right, how many."""

    said: float
    right: float
    pairs: int


def reliability(differences: Tensor, *, bins: int = BINS) -> list[Bin]:
    """Return the reliability diagram: pairs by the probability of the side that scores prefer.

    Args:
        differences: ``[M]``, better minus worse score.
        bins: how many equal parts 0.5 to 1 is cut into; those without a pair are left out.
    """
    d = differences.double()
    return reliability_of(torch.sigmoid(d.abs()), (torch.sign(d) + 1) / 2, lowest=0.5, bins=bins)


def reliability_of(said: Tensor, right: Tensor, *, lowest: float, bins: int = BINS) -> list[Bin]:
    """Return the reliability diagram of judgements by their probability.

    Args:
        said: ``[M]``, the probability of what was chosen, from ``lowest`` to 1.
        right: ``[M]``, 1 where that was right, else 0.
        bins: how many equal parts that range is cut into; empty ones are left out.
    """
    bin_of = ((said - lowest) / (1 - lowest) * bins).long().clamp(max=bins - 1)
    found = []
    for number in range(bins):
        members = bin_of == number
        count = int(members.sum())
        if count:
            found.append(Bin(said[members].mean().item(), right[members].mean().item(), count))
    return found


def expected_calibration_error(diagram: list[Bin]) -> float:
    """Return how far the probabilities are off (Guo et al. 2017, eq. 3).

        ECE = sum_b  n_b / M  |share of right pairs in b - mean p in b|

    Returns:
        0 (as often right as said) to 1; NaN without a pair.
    """
    pairs = sum(part.pairs for part in diagram)
    if not pairs:
        return math.nan
    return sum(part.pairs * abs(part.right - part.said) for part in diagram) / pairs


def calibration_error(scores: Tensor, groups: Tensor, targets: Tensor) -> float:
    """Return the expected calibration error of ranked responses: see ``reward.ranking``."""
    better, worse = strict_pairs(groups, targets)
    differences = scores[better].double() - scores[worse].double()
    return expected_calibration_error(reliability(differences))


def brier_score(differences: Tensor) -> float:
    """Return the mean squared distance of the better response's probability from 1 (Brier 1950).

    0 is perfect; 0.25 is what equal scores give.
    """
    return ((1 - torch.sigmoid(differences.double())) ** 2).mean().item()


def fit_temperature(differences: Tensor) -> float:
    """Return the T > 0 that makes the pairs likeliest: least mean -log sigmoid(difference / T).

    Temperature scaling (Guo et al. 2017, section 4.2). The loss is convex in 1 / T: the root of its
    slope is found by bisection. Where all pairs are right, or more wrong than right, there is none:
    the nearest limit is returned, 0.01 or 100.

    Args:
        differences: ``[M]``, M > 0, better minus worse score.
    """
    d = differences.double()
    low, high = -math.log(_LARGEST), math.log(_LARGEST)
    for _ in range(60):
        middle = (low + high) / 2
        # d/da of mean(softplus(-a d)), with a = 1 / T
        rises = -(d * torch.sigmoid(-math.exp(middle) * d)).mean().item() > 0
        low, high = (low, middle) if rises else (middle, high)
    return math.exp(-(low + high) / 2)


def cross_scaled(differences: Tensor, owners: Tensor) -> Tensor:
    """Return the differences over a temperature that was fitted without them.

    The prompts are split in two halves, every other one; each half is scaled by the temperature of
    the other, so that what is measured afterwards is not measured on what was fitted.

    Args:
        differences: ``[M]``.
        owners: ``[M]`` long, the prompt of each pair; of two prompts or more.

    Returns:
        ``[M]`` float64.
    """
    _, number = torch.unique(owners, return_inverse=True)
    scaled = differences.double().clone()
    for half in (0, 1):
        members = number % 2 == half
        scaled[members] /= fit_temperature(differences[~members])
    return scaled
