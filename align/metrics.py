"""The numbers of a stage while it runs: a file, the tracker, and something to look at.

``metrics.jsonl`` is the source of truth. A terminal shows a progress bar; anything else gets plain
lines, so that logs of batch systems stay readable. Both go to the error output: the standard
output belongs to results.
"""

import json
import math
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from align.errors import TrainingError, printable_lines
from align.manifest import METRICS

# What a progress line has room for, in this order; everything else is in the file.
_SHOWN = (
    "loss",
    "perplexity",
    "accuracy",
    "next_sentence/accuracy",
    "score/mean",
    "gold/mean",
    "kl/mean",
    "length/mean",
    "eos_rate",
    "lr",
)


class Tracker(Protocol):
    """Where metrics are sent besides the file."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send the values of one step."""


class MetricsLog:
    """Writes and shows the metrics of one stage."""

    def __init__(
        self, directory: Path | None, tracker: Tracker | None, console: Console, name: str = ""
    ) -> None:
        """Append to ``directory/metrics.jsonl``; ``name`` stands at the start of every line.

        Without a directory no file is written.
        """
        self._path = directory / METRICS if directory is not None else None
        self._tracker = tracker
        self._console = console
        self._name = name
        self._total: int | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, total: int) -> None:
        """Say how many steps there will be; on a terminal a progress bar appears."""
        self.close()
        self._total = total
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(self._name, total=total, values="")
            self._progress.start()

    def advance(self, step: int) -> None:
        """Move the progress bar, if there is one, to ``step``."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record the values of a step: in the file, in the tracker, and on the screen.

        Raises:
            TrainingError: a value is not finite. Leave a metric out where it is not defined.
        """
        wrong = [f"{key}={value}" for key, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise TrainingError(f"step {step}: not a finite number: {', '.join(wrong)}")
        line = json.dumps({"step": step} | {key: float(value) for key, value in values.items()})
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if self._tracker is not None:
            self._tracker.log(step, values)
        text = format_values(values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, values=text)
        elif text:
            of = f"{step}/{self._total}" if self._total is not None else str(step)
            self.note(f"{self._name}  {of}  {text}")

    def note(self, text: str) -> None:
        """Show a line of text; above the progress bar if there is one."""
        show(self._console, text)

    def close(self) -> None:
        """Take the progress bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def show(console: Console, text: str) -> None:
    """Show lines of text, whatever a model or a file has put into them."""
    console.print(printable_lines(text), markup=False, highlight=False, soft_wrap=True)


def format_values(values: dict[str, float]) -> str:
    """Return the values that fit on a progress line: ``loss 1.234  lr 1.0e-03``."""
    shown = [(key, values[key]) for key in _SHOWN if key in values]
    return "  ".join(
        f"{key} {value:.1e}" if key == "lr" else f"{key} {value:.3f}" for key, value in shown
    )
