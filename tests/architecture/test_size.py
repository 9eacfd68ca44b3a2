"""Files that one can read in a sitting, in plain ASCII."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("align", "data", "launch", "pipelines", "reward")
FILES = sorted(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))


def test_there_are_files() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_short_and_ascii(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert text.isascii()


def test_no_module_hides_a_package() -> None:
    """Run by its path, ``pipelines/reward.py`` would be found as ``reward``."""
    stems = {file.stem for file in FILES if file.stem != "__init__"}
    clashes = [f for f in FILES if f.stem in PACKAGES]
    assert clashes == [], sorted(stems & set(PACKAGES))
