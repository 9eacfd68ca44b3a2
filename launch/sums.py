"""``SHA256SUMS`` of a run: the hash of every file that no manifest names, as sha256sum has them.

A stage's manifest holds the hashes of its outputs. The manifest itself, recipes, logs, the report,
exports and W&B's files stand here, each since the process that wrote it has ended. So every byte of
a finished run has a hash, and ``sha256sum -c SHA256SUMS`` checks this part without Align. Links,
which hold nothing, are left out.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from align.errors import InputError
from align.manifest import find_manifest, sha256_file

FILE = "SHA256SUMS"
_LINE = re.compile("([0-9a-f]{64})  (.+)")


def read_sums(run: Path) -> dict[str, str]:
    """Return the hashes by path, relative to the run; none if they were not written yet.

    Raises:
        InputError: it is not what ``add_sums`` writes; the message names the line.
    """
    path = run / FILE
    if not path.is_file():
        return {}
    sums = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        found = _LINE.fullmatch(line.decode("utf-8", errors="replace"))
        if found is None or found[2] in sums:
            raise InputError(_altered(path, number))
        sums[found[2]] = found[1]
    if lines[-1]:
        raise InputError(_altered(path, len(lines)))
    return sums


def _altered(path: Path, line: int) -> str:
    return (
        f"{path}:{line}: is altered: found no hash, two spaces and a path that comes once; put a"
        " copy back, or remove the file: `align run` writes it anew, from what lies there then"
    )


def add_sums(run: Path, names: Sequence[str], *, only_new: bool = False) -> None:
    """Write down the hashes of files, and of those in folders; of a stage's, not its outputs.

    Args:
        only_new: what stands there already stays as it is.
    """
    before = read_sums(run)
    sums = _without(before, names)
    for name in names:
        path = run / name
        manifest = find_manifest(path)
        outputs = {path / output for output in manifest.outputs} if manifest is not None else set()
        for file in plain_files(path):
            known = before.get(file.relative_to(run).as_posix()) if only_new else None
            if file not in outputs:
                sums[file.relative_to(run).as_posix()] = known or sha256_file(file)
    _write(run, sums)


def drop_sums(run: Path, names: Sequence[str]) -> dict[str, str]:
    """Forget these files and folders, which are about to be written; return their hashes."""
    if not (run / FILE).is_file():
        return {}
    before = read_sums(run)
    after = _without(before, names)
    _write(run, after)
    return {name: before[name] for name in before.keys() - after.keys()}


def put_back_sums(run: Path, dropped: dict[str, str]) -> None:
    """Undo ``drop_sums``: nothing was written after all."""
    if dropped:
        _write(run, read_sums(run) | dropped)


def plain_files(path: Path) -> list[Path]:
    """Return a file, or all in a folder; links are none."""
    found = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sorted(file for file in found if file.is_file() and not file.is_symlink())


def _without(sums: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    starts = tuple(f"{name}/" for name in names)
    return {n: s for n, s in sums.items() if n not in names and not n.startswith(starts)}


def _write(run: Path, sums: dict[str, str]) -> None:
    temporary = run / (FILE + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{sums[name]}  {name}\n" for name in sorted(sums))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run / FILE)
