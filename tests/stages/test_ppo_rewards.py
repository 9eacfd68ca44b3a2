"""PPO and its evaluation with every kind of reward at once, each stage in its own process.

The reward stages are real ones with random weights: this recipe's, another run's on its base, and
two on another base with another tokenizer and template.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.verify import verify_run
from tests import tiny
from tests.finished import (
    edit_manifest,
    foreign_tokenizer,
    plain,
    pretrain_stage,
    reward_stage,
    rewarded_run,
)

REPOSITORY = Path(__file__).parents[2]
RECIPE = """
name: x
base: {id: base/model}
adapter: {r: 4, alpha: 8.0}
data:
  max_prompt_tokens: 192
  world: {prompt_rows: 16, heldout_rows: 8}
  prompts: {train: [{world: prompts}], heldout: [{world: prompts, split: heldout}]}
ppo:
  lr: 1.0e-3
  steps: 2
  batch_size: 8
  minibatch_size: 4
  max_new_tokens: 16
  probe_every: 1
  probe_prompts: 4
  reward:
    - {model: reward, weight: 2.0}
    - {ensemble: [reward, runs/other/reward, runs/far/reward], std_penalty: 0.5}
    - {function: "rewards.py:short", weight: 0.01}
  heldout_reward: runs/farther/reward
evaluate: {prompts: 4, max_new_tokens: 16, batch_size: 4, bootstrap: 20}
tracking: {mode: disabled}
run: {threads: 1, parents: {sft: runs/x/sft, reward: runs/x/reward}}
"""


def stage(home: Path, name: str) -> str:
    """Run a stage; return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.stage", name, "r.yaml", "--debug"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("rewards")
    rewarded_run(home)
    theirs = foreign_tokenizer()
    there = pretrain_stage(home / "runs/far/pretrain", tiny.gpt2(290), theirs)
    for seed, name in enumerate(("far", "farther"), 3):
        reward_stage(home / "runs" / name / "reward", there, tiny.gpt2(290), theirs, seed)
    (home / "rewards.py").write_text(
        "def short(prompts, responses): return [-len(text) for text in responses]\n"
    )
    (home / "r.yaml").write_text(RECIPE)
    for name in ("ppo", "evaluate"):
        (home / f"{name}.txt").write_text(stage(home, name))
    return home


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_score_of_every_step_is_the_weighted_sum_of_its_sources(home: Path) -> None:
    steps = rows(home / "runs/x/ppo/metrics.jsonl")
    (evaluation,) = rows(home / "runs/x/evaluate/metrics.jsonl")
    found = [(step, "score") for step in steps if step["step"] > 0]
    found += [(step, "probe/score") for step in steps]
    found += [(evaluation, f"{model}/score") for model in ("base", "sft", "ppo")]
    assert len(found) == 8
    for metrics, key in found:
        expected = 2.0 * metrics[f"{key}/reward"] + 0.01 * metrics[f"{key}/short"]
        expected += metrics[f"{key}/ensemble"] - 0.5 * metrics[f"{key}/ensemble/std"]
        assert metrics[f"{key}/ensemble/std"] > 0.01
        total = metrics["probe/score"] if key == "probe/score" else metrics[f"{key}/mean"]
        assert total == pytest.approx(expected, abs=1e-4)


def test_an_ensemble_without_a_common_scale_is_warned_of_once(home: Path) -> None:
    first = rows(home / "runs/x/ppo/metrics.jsonl")[1]
    ratio = first["score/ensemble/scales"]
    assert ratio > 1.5
    said = (home / "ppo.txt").read_text().split("warning: ensemble: one model's scores spread ")
    assert len(said) == 2
    assert said[1].startswith(f"{ratio:.1f} times")


def test_manifests_and_verify_know_the_reward_models_of_other_runs(home: Path) -> None:
    parents = json.loads((home / "runs/x/ppo/stage.json").read_text())["parents"]
    found = [(p["stage"], p["path"]) for p in parents]
    assert found == [
        ("sft", "../sft"),
        ("reward", "../reward"),
        ("reward", "../../other/reward"),
        ("reward", "../../far/reward"),
        ("reward", "../../farther/reward"),
    ]
    copy = home.with_name(f"{home.name}-copy")
    shutil.copytree(home, copy)
    assert verify_run(copy / "runs/x")[0]["ppo"].state == "ok"
    edit_manifest(copy / "runs/far/reward", outputs={})
    check = verify_run(copy / "runs/x")[0]["ppo"]
    assert check.state == "differs"
    assert [p for p in check.problems if "../../far/reward" in p] == check.problems


def test_the_held_out_reward_judges_the_probes_text(home: Path) -> None:
    samples = rows(home / "runs/x/ppo/samples.jsonl")
    assert len(samples) == 12  # 4 prompts at steps 0, 1 and 2
    tokenizer, base = foreign_tokenizer(), home / "runs/far/pretrain/model"
    for sample in samples:
        (turn,) = sample["prompt"]
        text = f"<s>[user]\n{turn['content']}\n[assistant]\n{sample['response']}</s>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = plain(home / "runs/farther/reward", base, ids)
        assert sample["heldout_reward"] == pytest.approx(expected, abs=1e-4)
    for step in rows(home / "runs/x/ppo/metrics.jsonl"):
        looks = [s["heldout_reward"] for s in samples if s["step"] == step["step"]]
        assert step["probe/heldout_reward"] == pytest.approx(sum(looks) / 4, abs=1e-4)
