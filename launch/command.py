"""The exact command and environment of every process that Align starts. Pure: nothing runs here."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.recipe import StageName
from launch.nodes import Nodes


@dataclass(frozen=True, slots=True)
class Command:
    """A process to start: its arguments, and what it gets besides the caller's environment."""

    argv: tuple[str, ...]
    env: dict[str, str]

    def shell_line(self) -> str:
        """Return the line that does the same when pasted into a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*settings, shlex.join(self.argv)])


@dataclass(frozen=True, slots=True)
class Python:
    """The interpreter to start, the folder that holds our packages, and the inherited settings."""

    executable: str
    root: Path
    environ: Mapping[str, str]

    @property
    def environment(self) -> dict[str, str]:
        """The settings under which our packages win.

        ``data``, ``reward`` and the rest are common names: without PYTHONSAFEPATH a ``data.py`` in
        the user's working directory would be imported in place of ours.
        """
        inherited = self.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [str(self.root), *(p for p in inherited if p and p != str(self.root))]
        return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}

    def module(self, name: str, arguments: Sequence[str]) -> Command:
        """Return ``python -m name arguments``."""
        return Command((self.executable, "-m", name, *arguments), self.environment)


# glibc's allocator gives large tensors back to the system and takes them anew, page by page, at
# every step; told to keep them, it costs nothing. Of no effect elsewhere.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}
# What a block of a checkpointed pass leaves lies above what it has freed, so that the heap grows by
# the whole block each time: this gives every larger tensor back at once. Four times the time in the
# system for less memory, which is what gradient checkpointing is for.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def stage_command(
    python: Python,
    stage: StageName,
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    processes: int | None = None,
    nodes: Nodes | None = None,
    debug: bool = False,
    spare_memory: bool = False,
) -> Command:
    """Return the process that makes one stage, or that starts the group of those that do.

    Args:
        processes: of the group, on each node; None: the stage runs in one that is alone.
        nodes: that have processes of the group; None: this one alone.
        spare_memory: rather than time.
    """
    flags = ["--force"] * force + ["--debug"] * debug
    arguments = [stage, str(recipe), *overrides, *flags]
    if processes is None:
        command = python.module("pipelines.stage", arguments)
    else:
        places = nodes.options() if nodes is not None else []
        command = python.module("pipelines.several", [*places, str(processes), *arguments])
    settings = RETURN_MEMORY if spare_memory else KEEP_MEMORY
    memory = {name: value for name, value in settings.items() if name not in python.environ}
    return Command(command.argv, command.env | memory)


def check_data_command(
    python: Python,
    stages: Sequence[StageName],
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    debug: bool = False,
) -> Command:
    """Return the process that judges the rows of the stages."""
    options = ["--stages", *stages, *["--debug"] * debug]
    return python.module("pipelines.check_data", [str(recipe), *overrides, *options])


def report_command(python: Python, run: Path, *, debug: bool = False) -> Command:
    """Return the process that writes a run's report."""
    return python.module("pipelines.report", [str(run), *["--debug"] * debug])


def export_command(
    python: Python,
    stage: StageName,
    recipe: Path,
    overrides: Sequence[str],
    out: Path,
    *,
    dtype: str | None = None,
    max_drift: float | None = None,
    debug: bool = False,
) -> Command:
    """Return the process that exports one stage's model."""
    options = ["--out", str(out)]
    if dtype is not None:
        options += ["--dtype", dtype]
    if max_drift is not None:
        options += ["--max-drift", str(max_drift)]
    flags = ["--debug"] * debug
    return python.module("pipelines.export", [stage, str(recipe), *overrides, *options, *flags])
