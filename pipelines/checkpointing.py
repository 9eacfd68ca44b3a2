"""When a stage in training is secured: at step boundaries, in time or because a signal came.

And what it goes on from. Of a group of processes all decide the same.
"""

import time
from collections.abc import Callable
from pathlib import Path

from align import group
from align.checkpoints import Checkpoint, find_checkpoint, write_checkpoint
from align.errors import InputError, TrainingError
from align.recipe_run import Run
from pipelines.process import Signals

# Where the recipe does not say how often: at most once in so many seconds, and so seldom that the
# time between two checkpoints is at least so many times what writing one takes.
_LEAST_SECONDS = 60.0
_TIMES_OF_WRITING = 50.0


def find_for_all(
    directory: Path, inputs_sha256: str, say: Callable[[str], None], *, zero: int
) -> Checkpoint | None:
    """Return what every process of the group goes on from; see ``align.checkpoints``.

    Raises:
        InputError: it was made by another number of processes, or with another stage of ZeRO: its
            parts do not fit these.
    """
    found = find_checkpoint(directory, inputs_sha256, say) if group.is_first() else None
    found = group.from_first(found)
    if found is None:
        return None
    theirs, ours = (found.facts.processes, found.facts.zero), (group.size(), zero)
    if theirs != ours:
        raise InputError(
            f"{found.path}: was made with distributed.processes={theirs[0]}, zero={theirs[1]}, and"
            f" cannot be shared out to processes={ours[0]}, zero={ours[1]}; go on with the former,"
            " or begin anew with --force"
        )
    return found


class Checkpoints:
    """The checkpoints of one stage while it trains.

    Args:
        directory: the stage's folder.
        found: what training goes on from, None from nothing.
        inputs_sha256: of the stage; see ``align.stages``.
        wandb_id: of the stage's W&B run.
        signals: ask for the end of the process, after a last checkpoint.
        zero: how a group of processes shares the training out.

    What is decided here the processes of a group decide together.
    """

    def __init__(
        self,
        directory: Path,
        settings: Run,
        found: Checkpoint | None,
        *,
        inputs_sha256: str,
        wandb_id: str | None,
        signals: Signals,
        zero: int = 0,
    ) -> None:
        self._directory, self._settings = directory, settings
        self._inputs_sha256, self._wandb_id, self._signals = inputs_sha256, wandb_id, signals
        self._zero = zero
        self.found = found
        self._last_step = found.facts.step if found is not None else 0
        self.reached = self._last_step  # the last step that was made
        self._last_time = time.monotonic()
        self._last_one = False  # whether a signal ends all after the next
        self._cost = 0.0  # seconds that writing the last one took

    def boundary(self, step: int, fill: Callable[[Path], None]) -> None:
        """Write a checkpoint if it is time; to be called after every step, all of it logged.

        Args:
            fill: writes the state of the training into a folder.

        Raises:
            Stopped: a signal has asked for the end.
            TrainingError: the checkpoint cannot be written.
        """
        if self.due(step):
            self.write(step, fill)

    def due(self, step: int) -> bool:
        """Whether the boundary after ``step`` is one to write a checkpoint at, or to end at."""
        self.reached = step
        asked, due = zip(*group.gather((self._signals.asked, self._is_time(step))), strict=True)
        self._signals.asked = max(asked)  # what has reached one process is meant for all
        self._last_one = bool(self._signals.asked)
        return bool(self._signals.asked) or any(due)

    def _is_time(self, step: int) -> bool:
        settings, since = self._settings, time.monotonic() - self._last_time
        if settings.keep_checkpoints == 0:
            return False
        if settings.checkpoint_steps is not None:
            return step - self._last_step >= settings.checkpoint_steps
        if settings.checkpoint_minutes is not None:
            return since >= 60.0 * settings.checkpoint_minutes
        return since >= max(_LEAST_SECONDS, _TIMES_OF_WRITING * self._cost)

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Write a checkpoint, unless this step has one; then end the process if a signal has asked.

        Raises:
            Stopped: so it has.
            TrainingError: the checkpoint cannot be written.
        """
        if step > self._last_step and self._settings.keep_checkpoints:
            started = time.monotonic()
            try:
                write_checkpoint(
                    self._directory,
                    step,
                    fill,
                    inputs_sha256=self._inputs_sha256,
                    wandb_id=self._wandb_id,
                    keep=self._settings.keep_checkpoints,
                    zero=self._zero,
                )
            except OSError as error:
                raise TrainingError(
                    f"step {step}: the checkpoint could not be written: {error}; the one before it"
                    " is kept, and the same command goes on from there"
                ) from error
            self._last_step, self._last_time = step, time.monotonic()
            self._cost = self._last_time - started
        if self._last_one:  # the first to end would be the end of those that are still writing
            group.wait()
        self._signals.end_if_asked()
