"""What a stage's process says when it fails: what went wrong, in which process, at which step."""

import errno
import os

from rich.console import Console

from align import group
from align.errors import AlignError
from align.metrics import show


def tell(stage: str, error: Exception, step: int | None = None) -> int:
    """Say what has gone wrong, and in which process; return the exit code.

    What is wrong with the input all of a group find; the first says it. Those that have waited in
    vain for others say who these are, by the first of them.

    Args:
        step: the last one that was made; None: none was.
    """
    code = error.exit_code if isinstance(error, AlignError) else 1
    together = group.size() > 1 and code != 2
    text = _message(error)
    if together and isinstance(error, RuntimeError) and "timed out" in text.lower():
        silent = group.silent()
        if any(rank not in silent for rank in range(group.rank())):
            return code
        if silent:
            ranks = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
            text = f"no answer from {ranks}, which hangs or waits for something else ({text})"
    if code != 2 or group.is_first():
        who = f"{stage}: rank {group.rank()}" if together else stage
        where = f", after step {step}" if together and step is not None else ""
        show(Console(stderr=True), f"{who}{where}: {text}")
    return code


def _message(error: Exception) -> str:
    text = str(error)
    if not isinstance(error, AlignError):
        text = f"{type(error).__name__}: {error} (--debug shows where)"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text += "; memory is too short: `align plan RECIPE --memory SIZE` says what makes it fit"
    if os.strerror(errno.ENOSPC) in text:  # safetensors has an error of its own for it
        text += ". Free some space; the same command goes on from the last checkpoint"
    return text
