"""Every shipped recipe, found by looking: it loads, reads back equal, dry-runs, and is planned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.recipe_io import dump_recipe, find_recipe, load_recipe, shipped_recipes
from align.stages import planned_stages

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "pipelines" / "recipes").rglob("*.y*ml"))


def align(*words: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_there_are_recipes() -> None:
    assert FILES
    assert {path.resolve() for path in shipped_recipes().values()} == set(FILES)
    assert "miniature" in shipped_recipes()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_recipe(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe

    plan = json.loads(align("run", str(file), "--dry-run", "--json", cwd=tmp_path))
    assert tuple(plan["stages"]) == planned_stages(recipe)
    assert planned_stages(recipe)
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith("# "), "say first what the recipe is for"
    assert first.endswith("."), "`align recipes` prints the first line: a sentence, and whole"
    if recipe.base.id == "pretrain":  # else the hub is asked for its configuration
        plan = json.loads(align("plan", str(file), "--json", cwd=tmp_path))
        assert tuple(plan["stages"]) == planned_stages(recipe)
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_recipe_is_listed_shown_and_copied_by_name(name: str, tmp_path: Path) -> None:
    assert name in align("recipes", "list", cwd=tmp_path)
    listed = [
        json.loads(align("recipes", *words, cwd=tmp_path))
        for words in (["--json"], ["list", "--json"], ["--json", "list"])
    ]
    assert listed[0][name].endswith(".")
    assert listed[0] == listed[1] == listed[2]
    shown = align("recipes", "show", name, cwd=tmp_path)
    copy = tmp_path / align("recipes", "copy", name, cwd=tmp_path).strip()
    assert copy.read_text(encoding="utf-8") == shown
    assert load_recipe(copy) == load_recipe(find_recipe(name))
