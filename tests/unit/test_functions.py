"""Functions that a recipe names by their file."""

import pytest

from align.errors import RecipeError
from align.functions import load_function


def test_a_file_may_hold_dataclasses_with_postponed_annotations(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Weights:\n"
        "    length: float = 2.0\n"
        "def score(prompts, responses):\n"
        "    return [Weights().length * len(text) for text in responses]\n"
    )
    assert load_function(f"{file}:score")([[]], ["abc"]) == [6.0]


def test_a_file_that_is_named_twice_runs_once(tmp_path, monkeypatch):
    file = tmp_path / "rewards.py"
    file.write_text(
        "from pathlib import Path\n"
        "with Path(__file__).with_name('runs').open('a') as f: f.write('x')\n"
        "def score(prompts, responses): return [1.0]\n"
        "def category(prompts): return ['a']\n"
    )
    monkeypatch.chdir(tmp_path)
    names = (f"{file}:score", f"{file}:category", "rewards.py:score")
    functions = [load_function(name) for name in names]
    assert (tmp_path / "runs").read_text() == "x"
    assert functions[0] is functions[2]


def test_files_of_one_name_in_two_folders_are_two(tmp_path):
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "rewards.py"
        file.write_text(f"def score(prompts, responses): return [{number}]\n")
    assert load_function(f"{tmp_path}/a/rewards.py:score")([], []) == [0]
    assert load_function(f"{tmp_path}/b/rewards.py:score")([], []) == [1]


def test_a_file_that_fails_is_run_again(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text("1 / 0\n")
    with pytest.raises(RecipeError, match="ZeroDivisionError"):
        load_function(f"{file}:score")
    file.write_text("def score(prompts, responses): return [1.0]  # longer than before\n")
    assert load_function(f"{file}:score")([], []) == [1.0]
