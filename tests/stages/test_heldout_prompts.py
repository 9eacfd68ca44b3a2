"""PPO and evaluation without held-out prompts, or with some that cannot be tokenised."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.verify import verify_run
from pipelines import stage
from tests.finished import sft_run

RECIPE = """
name: x
base: {id: base/model}
adapter: {r: 4, alpha: 8.0}
data:
  max_prompt_tokens: 64
  max_dropped: %s
  prompts: {train: [{path: prompts.jsonl, rows: 16}], heldout: %s}
ppo:
  lr: 1.0e-3
  steps: 1
  batch_size: 4
  minibatch_size: 4
  max_new_tokens: 4
  probe_prompts: 4
  reward: "rewards.py:short"
evaluate: {prompts: 4, max_new_tokens: 4, batch_size: 4, bootstrap: 10}
tracking: {mode: disabled}
run: {threads: 1, parents: {sft: runs/x/sft}}
"""
UNUSABLE = "\U000f0000"  # a private-use character: renderers keep those for themselves
ONE_IN_FOUR = "[{path: heldout.jsonl}]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("heldout")
    sft_run(home)
    (home / "rewards.py").write_text(
        "def short(prompts, responses): return [-len(text) for text in responses]\n"
    )
    for name, prompts in (
        ("prompts", [f"Say {i}." for i in range(20)]),
        ("heldout", ["one", UNUSABLE, "two", "three", "four"]),
        ("unusable", [UNUSABLE, UNUSABLE * 2]),
    ):
        rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
        (home / f"{name}.jsonl").write_text("".join(rows))
    return home


@pytest.fixture
def home(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def run(name: str, heldout: str = ONE_IN_FOUR, max_dropped: float = 0.01) -> int:
    Path("r.yaml").write_text(RECIPE % (max_dropped, heldout))
    return stage.main([name, "r.yaml", "--force"])


def tokenised(folder: Path) -> list[dict[str, Any]]:
    facts = json.loads((folder / "stage.json").read_text())["data"]
    return [fact for fact in facts if fact["id"].endswith("as tokens")]


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ppo_finishes_without_held_out_prompts(home: Path) -> None:
    assert run("ppo", heldout="[]") == 0
    outputs = json.loads(Path("runs/x/ppo/stage.json").read_text())["outputs"]
    assert {name.partition("/")[0] for name in outputs} == {"policy", "value"}
    assert verify_run(Path("runs/x"))[0]["ppo"].state == "ok"


def test_ppo_does_not_probe_with_prompts_that_cannot_be_tokenised(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ppo", max_dropped=0.06) == 0
    said = "ppo  prompts  dropped as tokens: private_use_characters 1 (heldout.jsonl row 2)"
    assert said in capsys.readouterr().err.splitlines()
    samples = Path("runs/x/ppo/samples.jsonl").read_text().splitlines()
    probed = {json.loads(row)["prompt"][0]["content"] for row in samples}
    assert probed == {"one", "two", "three"}
    # 16 prompts to train on and 4 to probe with; the fifth held-out one has no use here.
    assert [(f["rows"], f["kept"], f["dropped"]) for f in tokenised(Path("runs/x/ppo"))] == [
        (20, 19, {"private_use_characters": 1})
    ]


@pytest.mark.parametrize(
    ("heldout", "max_dropped", "message"),
    [
        (
            ONE_IN_FOUR,
            0.04,
            "data.prompts: 1 of 20 rows are unusable as tokens: private_use_characters 1"
            " (heldout.jsonl row 2); data.max_dropped=0.04 allows 0; fix the rows",
        ),
        (
            "[{path: unusable.jsonl}]",
            1.0,
            "data.prompts: all 2 rows are unusable as tokens: private_use_characters 2"
            " (unusable.jsonl rows 1, 2); fix them",
        ),
    ],
)
def test_too_many_of_them_are_refused_before_the_old_result_goes(
    home: Path, heldout: str, max_dropped: float, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ppo", heldout="[]") == 0
    before = content(home / "runs")
    assert run("ppo", heldout, max_dropped) == 2
    assert message in capsys.readouterr().err
    assert content(home / "runs") == before


def test_evaluation_counts_the_rows_that_it_measures_on(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ppo", heldout="[{path: heldout.jsonl, rows: 1}]") == 0
    assert run("evaluate", max_dropped=0.24) == 2
    assert "data.prompts: 1 of 4 rows are unusable as tokens" in capsys.readouterr().err
    assert not Path("runs/x/evaluate").exists()
    assert run("evaluate", max_dropped=0.25) == 0
    assert [(f["rows"], f["kept"]) for f in tokenised(Path("runs/x/evaluate"))] == [(4, 3)]
