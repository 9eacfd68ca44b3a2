"""The zero of the scores: InstructGPT centres them on the demonstrations before PPO. Its file.

A ranking loss leaves a reward model's scores free up to a constant. PPO does not: a response that
does not end gets a fixed score, and the critic has to learn the mean first.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from align.errors import ParentError

SCORE_FILE = "score.json"


class RewardModelError(ParentError):
    """A saved reward model is incomplete or not what its files say."""


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


def write_calibration(
    folder: Path, shift: float, scale: float, labels: Sequence[str], **form: object
) -> None:
    """Write ``score.json``.

    Args:
        labels: of a classifier, in the order of its logits.
        form: what else has to be known to read a score; an encoder has such facts.
    """
    named = {"labels": list(labels)} if labels else {}
    text = json.dumps({"shift": shift, "scale": scale} | named | form, indent=2)
    (folder / SCORE_FILE).write_text(text + "\n", encoding="utf-8")


def read_calibration(folder: str | Path) -> Calibration:
    """Return the shift and scale in a saved reward model's ``score.json``.

    Raises:
        RewardModelError: it is missing, or does not hold a finite shift and a positive scale.
    """
    path = Path(folder) / SCORE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shift, scale = float(content["shift"]), float(content["scale"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewardModelError(f"{path}: no shift and scale here: {error!r}") from None
    if not (math.isfinite(shift) and math.isfinite(scale) and scale > 0):
        raise RewardModelError(f"{path}: shift={shift} scale={scale}; finite, scale > 0 needed")
    return Calibration(shift, scale)


def read_labels(folder: str | Path) -> tuple[str, ...]:
    """Return the labels in ``score.json``, in the order of a classifier's logits; () for scores.

    Raises:
        RewardModelError: the file is missing, or they are no list of text.
    """
    path = Path(folder) / SCORE_FILE
    try:
        labels = json.loads(path.read_text(encoding="utf-8")).get("labels", [])
    except (OSError, ValueError, AttributeError) as error:
        raise RewardModelError(f"{path}: cannot be read: {error!r}") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise RewardModelError(f"{path}: labels={labels}; a list of text is needed")
    return tuple(labels)
