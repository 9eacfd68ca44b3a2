"""Single bytes changed anywhere in a run, and whether ``align verify`` finds them."""

import random
from pathlib import Path

import pytest

from launch import verify
from launch.verify import verify_run


def flip(file: Path, rng: random.Random) -> str:
    """Change one bit; return what was changed."""
    content = bytearray(file.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"{file}: bit {bit} of byte {place}"


def check_flips(run: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Change one byte after the other anywhere in a finished run; return how many were found.

    Fails if one is not.
    """
    stages, beside = verify_run(run)
    assert not [c.problems for c in (*stages.values(), beside) if c.problems or c.notes]
    # What lies outside the run has nothing to do with it, and would take most of the time.
    monkeypatch.setattr(verify, "_inputs", lambda directory, manifest: ([], []))
    files = sorted(f for f in run.rglob("*") if f.is_file() and f.stat().st_size)
    # No links, wherever they lead: a tracker's go to its logs.
    files = [f for f in files if f.resolve() == run.resolve() / f.relative_to(run)]
    rng, missed = random.Random(7), []
    for _ in range(count):
        # Half of the changes by file, else the large ones would get them all; half by byte.
        sizes = [f.stat().st_size for f in files]
        file = rng.choice(files) if rng.random() < 0.5 else rng.choices(files, sizes)[0]
        before = file.read_bytes()
        what = flip(file, rng)
        stages, beside = verify_run(run)
        if not any(check.problems for check in (*stages.values(), beside)):
            missed.append(what)
        file.write_bytes(before)
    assert missed == []
    return count - len(missed)
