"""The whole loop through the real command, on the built-in world with a tiny model."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.flips import check_flips

REPOSITORY = Path(__file__).parents[2]
STAGES = ("pretrain", "sft", "reward", "ppo", "evaluate")
RECIPE = "miniature/smoke"
FAST = ("run.threads=1", "tracking.mode=disabled")

# Loads the policy by the libraries alone and answers greedily.
LOAD_POLICY = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained(".", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(".")
chat = [{"role": "user", "content": "Who has the red kite?"}]
ids = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
out = model.generate(**ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
print(json.dumps(out[0, ids["input_ids"].shape[1]:].tolist()))
"""


SECRETS = {"HF_TOKEN": "hf_" + "PlantedInTheWholeLoop", "WANDB_API_KEY": "f00d" * 10}


def align(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | SECRETS
    result = subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert not any(secret in result.stdout + result.stderr for secret in SECRETS.values())
    return result


def manifest(run: Path, stage: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / stage / "stage.json").read_text())
    return read


def metrics(run: Path, stage: str) -> list[dict[str, float]]:
    """Return the logged metrics without what depends on the clock and the machine."""
    rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "memory/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which ``align run`` has finished once."""
    home = tmp_path_factory.mktemp("loop")
    align("run", RECIPE, *FAST, cwd=home)
    return home


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """The same, elsewhere, to be changed by the test: a run tree can be moved."""
    shutil.copytree(home / "runs", tmp_path / "runs")
    return tmp_path


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    (run,) = (home / "runs").iterdir()
    return run


def test_every_stage_finishes_and_the_report_is_written(run: Path) -> None:
    for stage in STAGES:
        assert manifest(run, stage)["status"] == "finished"
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")


def test_no_file_holds_a_token(run: Path) -> None:
    files = [path for path in run.parent.rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), path


def test_ppo_starts_at_the_sft_model_and_every_rollout_at_ratio_one(run: Path) -> None:
    start, *steps = metrics(run, "ppo")
    assert start["step"] == 0
    assert start["probe/kl"] == 0.0
    assert steps[0]["kl/mean"] == 0.0
    assert [row["ppo/ratio_first_max_error"] for row in steps] == [0.0] * len(steps)
    assert all(row["ppo/approx_kl"] > 0 for row in steps)


def test_parents_are_linked_by_hash(run: Path) -> None:
    chain = {parent["stage"] for parent in manifest(run, "ppo")["parents"]}
    assert chain == {"pretrain", "sft", "reward"}
    assert align("verify", str(run), cwd=run).stdout
    (weights,) = (run / "reward" / "model").glob("*.safetensors")
    weights_before = weights.read_bytes()
    weights.write_bytes(weights_before[:-1] + bytes([weights_before[-1] ^ 1]))
    result = align("verify", str(run), cwd=run, code=1)
    weights.write_bytes(weights_before)
    assert "reward" in result.stdout
    assert weights.name in result.stdout


def test_the_policy_loads_without_our_code_and_answers_the_same(run: Path) -> None:
    from transformers import AutoTokenizer

    from align.models import load_causal_lm
    from align.recipe_io import load_recipe
    from align.roles import Roles
    from data.records import Message
    from data.render import Renderer

    policy = run / "ppo" / "policy"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD_POLICY],
        capture_output=True,
        text=True,
        cwd=policy,
        env=environment | {"PYTHONSAFEPATH": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    base = load_causal_lm(load_recipe(run / "recipe.yaml"), str(run / "pretrain" / "model"))
    roles = Roles(base, {"policy": policy})
    prompt = Renderer(AutoTokenizer.from_pretrained(policy), 64, 64).prompt(
        [Message("user", "Who has the red kite?")]
    )
    (ours,) = roles.generate(
        "policy", [prompt], max_new_tokens=8, temperature=0, end_ids=[1], pad_id=0, seed=0
    ).responses
    assert json.loads(result.stdout) == ours


def test_a_second_run_does_nothing_and_says_so_at_once(home: Path, run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    started = time.perf_counter()
    result = align("run", RECIPE, *FAST, cwd=home)
    assert time.perf_counter() - started < 5
    for stage in STAGES:
        assert f"{stage}: up to date" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_changed_ppo_key_redoes_ppo_and_what_follows_only(copied: Path, run: Path) -> None:
    output = align("run", RECIPE, *FAST, "ppo.kl.coef=0.2", "--dry-run", cwd=copied).stdout
    for stage in ("pretrain", "sft", "reward"):
        assert f"{stage}: up to date" in output
    assert "ppo: would run (its settings in the recipe have changed)" in output


# The sampling settings of a checkpoint take no part, and the same seed gives the same policy.
def test_t2_a_hostile_generation_config_changes_nothing(copied: Path, run: Path) -> None:
    there = copied / "runs" / run.name
    hostile = {"temperature": 0.1, "top_k": 3, "repetition_penalty": 1.3, "do_sample": True}
    (there / "pretrain" / "model" / "generation_config.json").write_text(json.dumps(hostile))
    align("ppo", RECIPE, *FAST, "--force", cwd=copied)
    assert metrics(there, "ppo") == metrics(run, "ppo")
    assert manifest(there, "ppo")["outputs"] == manifest(run, "ppo")["outputs"]


def test_a_python_function_can_be_the_reward(copied: Path, run: Path) -> None:
    (copied / "rewards.py").write_text(
        "def short(prompts, responses):\n"
        "    assert prompts[0][-1]['role'] == 'user'\n"
        "    return [-float(len(text)) for text in responses]\n"
    )
    align("ppo", RECIPE, *FAST, "ppo.reward=rewards:short", "ppo.steps=2", cwd=copied)
    there = copied / "runs" / run.name
    rows = metrics(there, "ppo")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["score/mean"] < 0 for row in rows[1:])
    assert {p["stage"] for p in manifest(there, "ppo")["parents"]} == {"pretrain", "sft"}


def test_ppo_stops_when_the_policy_has_moved_too_far(copied: Path, run: Path) -> None:
    result = align("ppo", RECIPE, *FAST, "ppo.kl.stop=1e-6", "ppo.lr=1e-2", cwd=copied)
    assert "exceeds ppo.kl.stop" in result.stdout + result.stderr
    assert manifest(copied / "runs" / run.name, "ppo")["metrics"]["steps"] < 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.parents.sft=runs/{run}/reward", "holds stage reward; stage sft is needed"),
        ("run.parents.reward=runs/{run}/sft", "holds stage sft; stage reward is needed"),
        ("run.parents.sft=nowhere", "no finished sft stage here"),
        ("ppo.reward=rewards:missing", "importing it fails"),
    ],
)
def test_wrong_parents_and_rewards_are_refused_and_nothing_is_touched(
    copied: Path, run: Path, override: str, message: str
) -> None:
    there = copied / "runs" / run.name
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    result = align("ppo", RECIPE, *FAST, override.format(run=run.name), cwd=copied, code=2)
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_two_runs_of_a_recipe_are_equal_file_by_file(copied: Path, run: Path) -> None:
    there = copied / "runs" / run.name
    output = align("reproduce", str(there), "--into", "second", "--json", cwd=copied).stdout
    found = json.loads(output)["stages"]
    assert tuple(found) == STAGES
    for stage, compared in found.items():
        made = manifest(there, stage)["outputs"]
        assert made == manifest(copied / "second", stage)["outputs"]
        assert set(made) <= set(compared["outputs"])
        assert set(compared["outputs"].values()) == {"equal"}
        assert compared["facts"] == {}


@pytest.mark.slow
def test_200_of_200_changed_bytes_are_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run whose PPO was tracked offline: W&B's files are in it, too."""
    shutil.copytree(run.parents[1] / "runs", tmp_path / "runs")
    there = tmp_path / "runs" / run.name
    settings = ("run.threads=1", "tracking.mode=offline")
    align("run", RECIPE, *settings, "ppo.kl.coef=0.1", cwd=tmp_path)
    assert list(there.glob("wandb/offline-run-*/*.wandb"))
    monkeypatch.chdir(tmp_path)
    assert check_flips(there, 200, monkeypatch) == 200
