"""The zero of the scores: InstructGPT centres them on the demonstrations before PPO. Its file.

A ranking loss leaves a reward model's scores free up to a constant. PPO does not: a response that
does not end gets a fixed score, and the critic has to learn the mean first.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from align.errors import ParentError, TrainingError

SCORE_FILE = "score.json"


class RewardModelError(ParentError):
    """A saved reward model is incomplete or not what its files say."""


class Calibration(NamedTuple):
    """What turns raw scores into the model's: ``(raw - shift) / scale``."""

    shift: float
    scale: float


def center_on(raw_scores: Tensor, *, unit_spread: bool = False) -> Calibration:
    """Return the calibration under which these scores average 0 (Ouyang et al. 2022, app. C.2).

        mean((raw - shift) / scale) = 0   <=>   shift = mean(raw)

    ``scale`` is 1: the spread stays in the unit of the ranking loss, where a difference d between
    two responses means that the better one wins with probability sigmoid(d), and where margins
    and the KL coefficient are meant. Or, with ``unit_spread``, it is the standard deviation (the
    biased one, of exactly these scores), so that theirs becomes 1.

    Args:
        raw_scores: ``[N]``, N > 0, under shift 0 and scale 1.

    Raises:
        TrainingError: all scores are the same, and have no spread.
    """
    raw = raw_scores.double()
    scale = raw.std(correction=0).item() if unit_spread else 1.0
    if scale == 0:
        raise TrainingError(
            f"reward.scale_on=demonstrations: all {len(raw)} scores are {raw[0].item():g}, without"
            " a spread; use scale_on=none"
        )
    return Calibration(raw.mean().item(), scale)


def write_calibration(
    folder: Path,
    shift: float,
    scale: float,
    labels: Sequence[str],
    widths: Sequence[int],
    **form: object,
) -> None:
    """Write ``score.json``.

    Args:
        labels: of a classifier, in the order of its logits.
        widths: inside a deep head.
        form: what else has to be known to read a score; an encoder has such facts.
    """
    named = {"labels": list(labels)} if labels else {}
    deep = {"head_widths": list(widths)} if widths else {}
    text = json.dumps({"shift": shift, "scale": scale} | named | deep | form, indent=2)
    (folder / SCORE_FILE).write_text(text + "\n", encoding="utf-8")


def read_calibration(folder: str | Path) -> Calibration:
    """Return the shift and scale in a saved reward model's ``score.json``.

    Raises:
        RewardModelError: it is missing, or does not hold a finite shift and a positive scale.
    """
    path, content = Path(folder) / SCORE_FILE, _read(folder)
    try:
        shift, scale = float(content["shift"]), float(content["scale"])
    except (ValueError, KeyError, TypeError) as error:
        raise RewardModelError(f"{path}: no shift and scale here: {error!r}") from None
    if not (math.isfinite(shift) and math.isfinite(scale) and scale > 0):
        raise RewardModelError(f"{path}: shift={shift} scale={scale}; finite, scale > 0 needed")
    return Calibration(shift, scale)


def read_widths(folder: str | Path) -> tuple[int, ...]:
    """Return the widths inside a deep head, from ``score.json``; () for a linear one.

    Raises:
        RewardModelError: the file is missing, or they are no list of positive whole numbers.
    """
    widths = _read(folder).get("head_widths", [])
    if not isinstance(widths, list) or not all(type(w) is int and w > 0 for w in widths):
        found = f"head_widths={widths}; a list of positive whole numbers is needed"
        raise RewardModelError(f"{Path(folder) / SCORE_FILE}: {found}")
    return tuple(widths)


def read_labels(folder: str | Path) -> tuple[str, ...]:
    """Return the labels in ``score.json``, in the order of a classifier's logits; () for scores.

    Raises:
        RewardModelError: the file is missing, or they are no list of text.
    """
    labels = _read(folder).get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        path = Path(folder) / SCORE_FILE
        raise RewardModelError(f"{path}: labels={labels}; a list of text is needed")
    return tuple(labels)


def _read(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / SCORE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RewardModelError(f"{path}: cannot be read: {error!r}") from None
    if not isinstance(content, dict):
        raise RewardModelError(f"{path}: cannot be read: a JSON object is needed")
    return content
