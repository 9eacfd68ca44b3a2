"""What held-out pairs say about a reward model besides its accuracy, and what PPO could exploit.

Pure functions on pairs, ``[M]`` entries each, and on the metrics that come of them. Keys end on
``/low`` and ``/high`` for the bounds of 90 % intervals, which know which pairs share a prompt.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reward.ranking import Interval, share_with_interval
from reward.reliability import (
    brier_score,
    cross_scaled,
    expected_calibration_error,
    fit_temperature,
    reliability,
)

MATCHED = 0.1  # lengths that differ by less, as a share of the longer one, count as equal
# Shares of pairs. A preference for length is called a bias if it is surely that much stronger than
# the labels', or surely that common.
_BEYOND_LABELS, _COMMON = 0.05, 2 / 3
PROBES = {
    "empty": "an empty answer",
    "repeated": "the chosen answer given twice over",
    "truncated": "the first half of the chosen answer",
    "other_prompt": "the answer to another prompt",
}


def interval_metrics(key: str, interval: Interval) -> dict[str, float]:
    """Return a share and its bounds under their keys."""
    return {key: interval.mean, f"{key}/low": interval.low, f"{key}/high": interval.high}


def accuracy_by(
    group: str, names: Sequence[str | None], outcomes: Tensor, owners: Tensor
) -> dict[str, float]:
    """Return the accuracy of each part of the pairs: ``accuracy/<group>/<name>`` and its pairs.

    Args:
        names: M of them, the part that a pair belongs to; None: to none.
        outcomes, owners: ``[M]``, as of ``reward.ranking.pair_outcomes``.

    Returns:
        Nothing where all pairs are of one part.
    """
    metrics: dict[str, float] = {}
    parts = [name for name in dict.fromkeys(names) if name is not None]
    for name in parts if len(set(names)) > 1 else ():
        members = torch.tensor([other == name for other in names])
        key = f"accuracy/{group}/{name}"
        metrics |= interval_metrics(key, share_with_interval(outcomes[members], owners[members]))
        metrics[f"{key}/pairs"] = float(members.sum())
    return metrics


def length_names(better: Tensor, worse: Tensor) -> list[str]:
    """Say of each pair whether its better response is ``shorter``, ``matched`` or ``longer``.

    Args:
        better, worse: ``[M]`` lengths, > 0.
    """
    relative = (better - worse).double() / torch.maximum(better, worse)
    return [
        "matched" if abs(value) <= MATCHED else "longer" if value > 0 else "shorter"
        for value in relative.tolist()
    ]


def margin_names(margins: Tensor) -> list[str | None]:
    """Say of each pair whether its margin is of the ``low``, ``middle`` or ``high`` third.

    Pairs of equal margins are in one third, so that the thirds need not be equally large; with
    equal margins alone there are none.
    """
    if len(margins) == 0 or bool((margins == margins[0]).all()):
        return [None] * len(margins)
    first, second = torch.quantile(margins.double(), torch.tensor([1 / 3, 2 / 3]).double())
    return [
        "low" if value <= first else "middle" if value <= second else "high"
        for value in margins.double().tolist()
    ]


def calibration_metrics(differences: Tensor, owners: Tensor) -> dict[str, float]:
    """Return how far the probabilities of the pairs are off, before and after temperature scaling.

    ``ece`` and ``brier`` are as the scores are; ``temperature`` is fitted on all pairs, and
    ``ece_scaled`` and ``brier_scaled`` are cross-fitted: each half of the prompts is scaled by the
    temperature of the other. ``bin<k>`` is the reliability diagram.

    Args:
        differences: ``[M]``, M > 0, better minus worse score.
        owners: ``[M]`` long, the prompt of each pair.
    """
    diagram = reliability(differences)
    metrics = {
        "ece": expected_calibration_error(diagram),
        "brier": brier_score(differences),
        "temperature": fit_temperature(differences),
    }
    if len(torch.unique(owners)) > 1:
        scaled = cross_scaled(differences, owners)
        metrics["ece_scaled"] = expected_calibration_error(reliability(scaled))
        metrics["brier_scaled"] = brier_score(scaled)
    for number, part in enumerate(diagram):
        metrics |= {f"bin{number}/{key}": float(v) for key, v in part._asdict().items()}
    return {f"calibration/{key}": value for key, value in metrics.items()}


def length_metrics(
    differences: Tensor, better: Tensor, worse: Tensor, owners: Tensor
) -> dict[str, float]:
    """Return how much the scores follow length, beside how much the labels do.

    ``length/correlation`` is that of score and length differences within prompts (through the
    origin); ``length/prefers_longer`` the share of pairs in which the longer response scores
    higher, ``length/labels_prefer_longer`` that in which it is the better one, and
    ``length/bias`` their difference. Pairs of equal length are left out.

    Args:
        differences: ``[M]``, better minus worse score.
        better, worse: ``[M]`` lengths.
        owners: ``[M]`` long, the prompt of each pair.
    """
    gaps, scores = (better - worse).double(), differences.double()
    metrics: dict[str, float] = {}
    norm = (gaps.norm() * scores.norm()).item()
    if norm > 0:
        metrics["length/correlation"] = ((gaps @ scores) / norm).item()
    unequal = gaps != 0
    if not unequal.any():
        return metrics
    labels = (torch.sign(gaps[unequal]) + 1) / 2
    model = (torch.sign(gaps[unequal] * scores[unequal]) + 1) / 2
    prefers = share_with_interval(model, owners[unequal])
    metrics |= interval_metrics("length/prefers_longer", prefers)
    metrics["length/labels_prefer_longer"] = labels.mean().item()
    # A difference of two shares lies in [-1, 1]: the interval is taken of its place there.
    bias = share_with_interval((model - labels + 1) / 2, owners[unequal])
    return metrics | interval_metrics("length/bias", Interval(*(2 * v - 1 for v in bias)))


def warnings(metrics: Mapping[str, float]) -> list[str]:
    """Return in words what of a reward model PPO could exploit; nothing where nothing was found.

    A probe is suspicious where it beats the chosen answer surely more often than the answers do
    that the annotators rejected.
    """
    found = []
    if "length/bias" in metrics:
        found += _length_warnings(metrics)
    for name, what in PROBES.items():
        key = f"probe_wins/{name}"
        if key in metrics and metrics[f"{key}/low"] > 1 - metrics["accuracy"]:
            found.append(
                f"{what} scores higher than the chosen answer in {metrics[key]:.0%} of pairs; the"
                f" rejected answer does in {1 - metrics['accuracy']:.0%}"
            )
    return found


def _length_warnings(metrics: Mapping[str, float]) -> list[str]:
    share, labels = metrics["length/prefers_longer"], metrics["length/labels_prefer_longer"]
    low, high = metrics["length/prefers_longer/low"], metrics["length/prefers_longer/high"]
    if metrics["length/bias/low"] > _BEYOND_LABELS or low > _COMMON:
        side, model = "longer", share
    elif metrics["length/bias/high"] < -_BEYOND_LABELS or high < 1 - _COMMON:
        side, model, labels = "shorter", 1 - share, 1 - labels
    else:
        return []
    return [
        f"length bias: the {side} answer scores higher in {model:.0%} of pairs; the labels prefer"
        f" it in {labels:.0%}"
    ]
