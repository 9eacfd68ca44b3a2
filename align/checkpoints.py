"""Checkpoints of a stage in training: complete or absent, and found again after any interruption.

    <stage>/checkpoints/step-00000012/    what the stage wrote, facts.json, and checksums.json

A checkpoint is written beside its place, every file goes to the disk, the checksums come last, and
only then it gets its name. One that is incomplete or altered, or that was made from other inputs,
is not used. It covers the stage's logs up to a length, to which they are cut when the stage goes
on from it: no line is missing and none comes twice.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from align import group
from align.manifest import FILE, METRICS, SAMPLES, sha256_file

FOLDER = "checkpoints"
FACTS = "facts.json"
CHECKSUMS = "checksums.json"

_LOGS = (METRICS, SAMPLES)
_WRITING, _REMOVING = "writing", "removing"
_NAME = re.compile(r"step-\d{8,}")
_SUMS = TypeAdapter(dict[str, str], config=ConfigDict(defer_build=True))


class Facts(BaseModel):
    """What a checkpoint says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    step: int
    inputs_sha256: str  # as in the manifest of a finished stage
    logs: dict[str, int]  # bytes of each log that it covers
    wandb_id: str | None
    # By how many processes it was made, and how they shared the training out: by as many it can be
    # gone on from.
    processes: int = 1
    zero: int = 0


class Checkpoint(NamedTuple):
    """A checkpoint that can be gone on from."""

    path: Path
    facts: Facts


def write_checkpoint(
    directory: Path,
    step: int,
    fill: Callable[[Path], None],
    *,
    inputs_sha256: str,
    wandb_id: str | None,
    keep: int,
    zero: int = 0,
) -> None:
    """Write a checkpoint of the stage in ``directory``; older ones than the newest ``keep`` go.

    Every process of a group has to come here.

    Args:
        fill: writes the stage's own files into a folder; of a group, each process writes its part.

    Raises:
        OSError: it could not be written; those before it are untouched.
    """
    folder = directory / FOLDER
    writing = folder / _WRITING
    if group.is_first():
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    group.wait()
    try:
        fill(writing)
        group.wait()
        if group.is_first():
            logs = _synced_logs(directory)
            facts = Facts(
                step=step,
                inputs_sha256=inputs_sha256,
                logs=logs,
                wandb_id=wandb_id,
                processes=group.size(),
                zero=zero,
            )
            _complete(writing, facts)
    except OSError:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    if group.is_first():
        writing.rename(folder / f"step-{step:08d}")
        _sync(folder)
        for old in _newest_first(folder)[keep:]:
            _remove(old)


def find_checkpoint(
    directory: Path, inputs_sha256: str, say: Callable[[str], None]
) -> Checkpoint | None:
    """Return the newest checkpoint of the stage in ``directory`` that can be gone on from.

    Args:
        inputs_sha256: of the stage as it would run now.
        say: is told of every newer one why it is not used.
    """
    for path in _newest_first(directory / FOLDER):
        found = _judge(path, directory, inputs_sha256)
        if isinstance(found, Facts):
            return Checkpoint(path, found)
        say(f"{path} is not used: {found}")
    return None


def continue_folder(directory: Path, checkpoint: Checkpoint) -> None:
    """Bring a stage's folder to what it held when the checkpoint was written.

    The logs are cut to what it covers. Newer checkpoints, which were not fit for use, and what was
    made after training are removed.
    """
    (directory / FILE).unlink(missing_ok=True)
    for path in _newest_first(directory / FOLDER):
        if _step(path) > checkpoint.facts.step:
            _remove(path)
    for path in directory.iterdir():
        if path.name == FOLDER:
            continue
        if path.name in checkpoint.facts.logs:
            os.truncate(path, checkpoint.facts.logs[path.name])
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_checkpoints(directory: Path) -> None:
    """Remove all checkpoints of the stage in ``directory``."""
    folder = directory / FOLDER
    if folder.is_dir():
        shutil.rmtree(folder)


def _synced_logs(directory: Path) -> dict[str, int]:
    """Have the logs' lines on the disk; return how many bytes of each there are."""
    logs = {name: directory / name for name in _LOGS if (directory / name).is_file()}
    for log in logs.values():
        _sync(log)
    return {name: log.stat().st_size for name, log in logs.items()}


def _complete(writing: Path, facts: Facts) -> None:
    """Add the facts and, when every file is on the disk, the checksums."""
    (writing / FACTS).write_text(facts.model_dump_json(), encoding="utf-8")
    files = sorted(writing.iterdir())
    for file in files:
        _sync(file)
    sums = {file.name: sha256_file(file) for file in files}
    (writing / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    _sync(writing / CHECKSUMS)
    _sync(writing)


def _judge(path: Path, directory: Path, inputs_sha256: str) -> Facts | str:
    """Return a checkpoint's facts, or why it cannot be used."""
    if not (path / CHECKSUMS).is_file():
        return f"it is incomplete: {CHECKSUMS} is missing"
    try:
        sums = _SUMS.validate_json((path / CHECKSUMS).read_bytes())
    except ValidationError:
        return f"{CHECKSUMS} is altered"
    names = {file.name for file in path.iterdir()} - {CHECKSUMS}
    if names != set(sums):
        return f"it is incomplete or altered: {', '.join(sorted(names ^ set(sums)))}"
    # The facts first: whole models need not be read only to find that they are of something else.
    for name in sorted(sums, key=lambda name: name != FACTS):
        if sha256_file(path / name) != sums[name]:
            return f"{name} is altered: its checksum differs"
        if name == FACTS:
            facts = Facts.model_validate_json((path / FACTS).read_bytes())
            if facts.inputs_sha256 != inputs_sha256:
                return "it was made from other inputs: settings, data, parents or version differ"
    for name, size in facts.logs.items():
        log = directory / name
        found = log.stat().st_size if log.is_file() else 0
        if found < size:
            return f"{name} has {found} bytes, fewer than the {size} that it had then"
    return facts


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(named, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove(checkpoint: Path) -> None:
    """Take the name away first: what is half removed must not be found."""
    removing = checkpoint.with_name(_REMOVING)
    shutil.rmtree(removing, ignore_errors=True)
    checkpoint.rename(removing)
    shutil.rmtree(removing)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
