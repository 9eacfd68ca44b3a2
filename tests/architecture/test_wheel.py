"""What a wheel installs: five packages, every recipe and template, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"align", "data", "launch", "pipelines", "reward"}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build a wheel from a copy of the sources and return the names in it."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in (*PACKAGES, "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", place, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = place.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_top_level_names(names: set[str]) -> None:
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES


def test_every_module_recipe_and_template_is_inside(names: set[str]) -> None:
    modules = {
        file.relative_to(ROOT).as_posix() for name in PACKAGES for file in (ROOT / name).rglob("*")
    }
    needed = {name for name in modules if name.endswith((".py", ".yaml", ".html"))}
    assert any(name.startswith("pipelines/recipes/") for name in needed)
    assert any(name.startswith("pipelines/templates/") for name in needed)
    assert needed <= names


def test_the_licence_and_the_command_are_inside(names: set[str]) -> None:
    assert any(name.endswith("/LICENSE") for name in names)
    assert any(name.endswith("/entry_points.txt") for name in names)
