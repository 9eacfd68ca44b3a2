"""The support matrix is what recipes say that are read from files, and every refusal helps."""

import json
import random
import re
from pathlib import Path

import pytest

from align.errors import RecipeError
from align.recipe import Recipe
from align.recipe_io import load_recipe
from launch.matrix import Cell, cells, matrix, print_matrix

ALL = cells()


def said_of_the_file(cell: Cell, file: Path) -> list[str]:
    """Return what is wrong with the cell's recipe, read as YAML."""
    file.write_text(json.dumps(cell.values, indent=1))
    try:
        load_recipe(file)
    except RecipeError as error:
        return [line.partition(": ")[2] for line in str(error).splitlines()]
    return []


def test_every_combination_is_a_cell() -> None:
    ways = 1 + 4 * 3  # one process; ZeRO x offload
    assert len(set(ALL)) == len(ALL) == ways + 3 * 7 * 4 * ways


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_a_cell_is_what_its_recipe_does(stage: str, tmp_path: Path) -> None:
    of_stage = [cell for cell in ALL if cell.stage == stage]
    for cell in random.Random(0).sample(of_stage, min(len(of_stage), 30)):
        found = said_of_the_file(cell, tmp_path / "r.yaml")
        assert sorted(found) == sorted(set(cell.refused)), cell


@pytest.mark.slow
def test_all_cells_are_what_their_recipes_do(tmp_path: Path) -> None:
    for cell in ALL:
        found = said_of_the_file(cell, tmp_path / "r.yaml")
        assert sorted(found) == sorted(set(cell.refused)), cell


def test_known_cells() -> None:
    """What the README's table of several processes says."""
    nothing = "none"
    assert Cell("sft", "lora", nothing, 2, 3, "all").refused == ()
    assert Cell("ppo", "lora", nothing, 2, 2, nothing).refused == ()
    assert Cell("sft", "bottleneck", "nf4", 1, 0, nothing).refused == ()
    assert Cell("sft", "full", "nf4", 1, 0, nothing).refused != ()
    assert Cell("pretrain", None, None, 2, 3, "all").refused == ()
    assert Cell("pretrain", None, None, 2, 0, "all").refused != ()


def test_a_refusal_names_two_keys_and_what_is_allowed() -> None:
    sections = Recipe.model_fields
    for text in {text for cell in ALL for text in cell.refused}:
        key, _, reason = text.partition("=")
        section = key.partition(".")[0]
        keys = {
            f"{name}.{part}"
            for name in sections
            for part in getattr(Recipe.model_fields[name].annotation, "model_fields", {})
        }
        own = {part.partition(".")[2] for part in keys if part.startswith(f"{section}.")}
        others = (keys | own | {"ppo section"}) - {key, key.partition(".")[2]}
        assert any(re.search(rf"\b{re.escape(other)}\b", reason) for other in others), text
        assert "allowed" in reason, text


def test_the_print_holds_every_reason_once(capsys: pytest.CaptureFixture[str]) -> None:
    print_matrix(matrix())
    said = capsys.readouterr().out
    for line in ("lora        none nf4 fp4  yes", "pretrain", "  a  distributed.offload="):
        assert line in said
    _, _, reasons = said.partition("because\n")
    lines = [line for line in reasons.splitlines() if re.match(r"  [a-z]  ", line)]
    shapes = [re.sub(r"=[\w|]+", "=", line[5:]) for line in lines]
    assert len(shapes) == len(set(shapes))
    assert len(shapes) == len(
        {re.sub(r"(?<=\w)=\w+", "=", text) for cell in ALL for text in cell.refused}
    )
    assert max(map(len, said.partition("yes:")[0].splitlines())) < 160


def test_the_hybrid_engine_is_named_and_no_recipe_can_ask_for_it(tmp_path: Path) -> None:
    cell = Cell("sft", "lora", "none", 2, 2, "none")
    values = cell.values
    values["distributed"]["hybrid_engine"] = True
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    with pytest.raises(RecipeError, match=r"distributed\.hybrid_engine=true: unknown key"):
        load_recipe(tmp_path / "r.yaml")


def test_the_hybrid_engine_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    print_matrix(matrix())
    assert "hybrid engine is not used" in capsys.readouterr().out
