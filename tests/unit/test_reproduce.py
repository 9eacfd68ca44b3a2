"""``align reproduce``: what is equal of a run that is made twice, and what differs."""

import json
from pathlib import Path

import pytest

from tests.finished import edit_manifest
from tests.stand_ins import align, build


@pytest.fixture
def place(tmp_path: Path) -> Path:
    build(tmp_path)
    align(tmp_path, "run", "r.yaml")
    return tmp_path


def test_a_repetition_is_equal_but_for_names_and_times(place: Path) -> None:
    before = {path: path.read_bytes() for path in (place / "runs/x").rglob("*") if path.is_file()}
    output, _ = align(place, "reproduce", "runs/x")
    assert [line for line in output.splitlines() if line.endswith("equal")] == [
        *("sft/model/w: equal", "sft/metrics.jsonl: equal"),
        *("ppo/model/w: equal", "ppo/metrics.jsonl: equal"),
        *("evaluate/model/w: equal", "evaluate/metrics.jsonl: equal"),
    ]
    assert output.splitlines()[-1] == "6 of 6 files are equal, 0 facts of the manifests differ"
    again = json.loads((place / "runs/x-again/sft/stage.json").read_text())
    assert again["name"] == "x-again"
    assert {path: path.read_bytes() for path in before} == before
    output, _ = align(place, "reproduce", "runs/x")  # it is there already, and compared again
    assert "sft: up to date" in output


def test_what_differs_is_named(place: Path) -> None:
    output, _ = align(place, "reproduce", "runs/x", "--into", "second", "--json", code=1, OTHER="!")
    found = json.loads(output)
    assert (found["run"], found["again"], found["equal"]) == ("runs/x", "second", False)
    sft, ppo = found["stages"]["sft"], found["stages"]["ppo"]
    assert sft == {"outputs": {"model/w": "differs", "metrics.jsonl": "equal"}, "facts": {}}
    assert set(ppo["facts"]) == {"inputs_sha256", "parents 0 sft"}


def test_an_altered_original_is_found(place: Path) -> None:
    with (place / "runs/x/ppo/model/w").open("a") as file:
        file.write("!")
    (place / "runs/x/sft/model/w").unlink()
    output, _ = align(place, "reproduce", "r.yaml", code=1)
    assert "\nppo/model/w: altered since it was made\n" in output
    assert "\nsft/model/w: altered since it was made\n" in output
    assert "\nevaluate/model/w: equal\n" in output


def test_facts_that_differ_are_given_from_both(place: Path) -> None:
    edit_manifest(place / "runs/x/sft", versions={"torch": "1.0"}, wandb_id="a", started="then")
    edit_manifest(
        place / "runs/x/evaluate", metrics={"base/perplexity": 3.5, "tokens_per_second": 1.0}
    )
    output, _ = align(place, "reproduce", "runs/x", code=1)
    assert [line for line in output.splitlines() if "and in the repetition" in line] == [
        "sft: versions torch: 1.0, and in the repetition None",
        "evaluate: metrics base/perplexity: 3.5, and in the repetition 3.0",
        "evaluate: metrics ppo/gold/mean: None, and in the repetition 0.5",
        "evaluate: metrics ppo/kl/mean: None, and in the repetition 1.5",
    ]


def test_only_finished_stages_are_repeated(place: Path) -> None:
    (place / "runs/x/ppo/stage.json").unlink()
    (place / "runs/x/evaluate/stage.json").unlink()
    output, _ = align(place, "reproduce", "runs/x")
    assert "sft/model/w: equal" in output
    assert not (place / "runs/x-again/ppo").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["runs/none"], "runs/none: no such run"),
        (["house"], "house: not a run directory: recipe.yaml is missing"),
        (["runs/x", "--into", "runs/x"], "runs/x: is the run itself, or in it"),
        (["runs/x", "--into", "runs/x/sft"], "runs/x/sft: is the run itself, or in it"),
        (["runs/x", "--into", "house"], "house: exists, and is no repetition of runs/x"),
        (["runs/x", "--into", "r.yaml"], "r.yaml: exists, and is no repetition of runs/x"),
        (["runs/x", "--into", "runs/other"], "runs/other: exists, and is no repetition of runs/x"),
        (["runs/x", "--into", "runs/-"], "name=-: found '-' (text); allowed: at most 80 letters"),
    ],
)
def test_wrong_words(place: Path, words: list[str], expected: str) -> None:
    other = place / "runs" / "other"
    other.mkdir()
    recipe = (place / "runs/x/recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("0.001", "0.002"))
    _, errors = align(place, "reproduce", *words, code=2)
    assert expected in errors
    assert errors.startswith("error: ")


def test_a_run_without_a_finished_stage_has_nothing_to_repeat(place: Path) -> None:
    for stage in ("sft", "ppo", "evaluate"):
        (place / "runs/x" / stage / "stage.json").unlink()
    _, errors = align(place, "reproduce", "runs/x", code=2)
    assert "no stage of it is finished" in errors
