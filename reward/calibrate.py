"""The zero of the scores: InstructGPT centres them on the demonstrations before PPO.

A ranking loss leaves a reward model's scores free up to a constant. PPO does not: a response that
does not end gets a fixed score, and the critic has to learn the mean first.
"""

from typing import NamedTuple

from torch import Tensor


class Calibration(NamedTuple):
    """What turns raw scores into the model's: ``(raw - shift) / scale``."""

    shift: float
    scale: float


def center_on(raw_scores: Tensor) -> Calibration:
    """Return the calibration under which these scores average 0 (Ouyang et al. 2022, app. C.2).

        mean((raw - shift) / scale) = 0   <=>   shift = mean(raw)

    ``scale`` is 1: the spread stays in the unit of the ranking loss, where a difference d between
    two responses means that the better one wins with probability sigmoid(d), and where margins
    and the KL coefficient are meant.

    Args:
        raw_scores: ``[N]``, N > 0, under shift 0 and scale 1.
    """
    return Calibration(raw_scores.double().mean().item(), 1.0)
