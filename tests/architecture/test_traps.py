"""The README promises a test for each of the 33 numerical traps, named after its number."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_every_trap_has_a_test() -> None:
    names = [name for path in TESTS.rglob("test_*.py") for name in _test_names(path)]
    numbers = {int(match[1]) for name in names if (match := re.match(r"test_t(\d+)_", name))}
    assert numbers == set(range(1, 34))


def _test_names(path: Path) -> list[str]:
    return re.findall(r"^\s*def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
