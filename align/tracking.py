"""Trackers, as guests of a training run: whatever happens to them, it goes on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from align.manifest import METRICS
from align.recipe import Recipe, StageName
from align.tensorboard import FOLDER, EventFile
from align.wandb_run import start_wandb


class Guest(Protocol):
    """What a tracker can do; any of it may raise.

    ``id`` is of the W&B run, if it is one; ``behind``: it may lack steps that are logged already.
    """

    @property
    def id(self) -> str | None: ...

    @property
    def behind(self) -> bool: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def record(self, manifest: dict[str, Any], folder: Path) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class RunTracker:
    """The tracker of one stage. After its first failure it is silent; the files have everything."""

    def __init__(self, guest: Guest | None) -> None:
        """Wrap a started tracker, or None for no tracking."""
        self._guest = guest
        self.id = guest.id if guest is not None else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the values of one step."""
        self._try(lambda guest: guest.log(step, values))

    def record(self, manifest: dict[str, Any], folder: Path) -> None:
        """Send the manifest of the finished stage, and what else its folder has for the tracker."""
        self._try(lambda guest: guest.record(manifest, folder))

    def finish(self, exit_code: int) -> None:
        """End the tracking; 0 marks the stage as finished, anything else as failed."""
        self._try(lambda guest: guest.finish(exit_code))
        self._guest = None

    def _try(self, action: Callable[[Guest], None]) -> None:
        if self._guest is None:
            return
        try:
            action(self._guest)
        except Exception as error:  # a guest's failure must not end the training it watches
            self._guest = None
            _warn(f"tracking stopped: {type(error).__name__}: {error}")


def start_tracker(
    recipe: Recipe, stage: StageName, directory: Path, run_id: str | None = None
) -> RunTracker:
    """Start the tracking of one stage.

    Args:
        directory: the run directory; what a tracker writes goes to a folder of its name there.
        run_id: of the W&B run to continue, None for a new one.

    Returns:
        A tracker; one that does nothing if tracking is off or cannot be started.
    """
    backend = recipe.tracking.backend
    if recipe.tracking.mode == "disabled":
        return RunTracker(None)
    try:
        if backend == "tensorboard":
            guest: Guest | None = EventFile(directory / FOLDER / stage)
        else:
            guest = start_wandb(recipe, stage, directory, run_id)
        if guest is not None and guest.behind:
            _catch_up(guest, directory / stage / METRICS)
        return RunTracker(guest)
    except ImportError as error:
        _warn(f"tracking is off: {backend} cannot be imported ({error}); pip install {backend}")
    except Exception as error:  # as above
        _warn(f"tracking is off: {backend} did not start: {type(error).__name__}: {error}")
    return RunTracker(None)


def _catch_up(guest: Guest, metrics: Path) -> None:
    """Log again what a resumed stage has logged up to its checkpoint."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        guest.log(values.pop("step"), values)


def _warn(text: str) -> None:
    print(text, file=sys.stderr)
