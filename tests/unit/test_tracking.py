"""Weights & Biases: offline for real, read back; and every way in which it may fail."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from align.recipe import Recipe
from align.tracking import RunTracker, start_tracker
from align.wandb_run import WandbRun, without_secrets
from tests import offline_wandb


@pytest.fixture(autouse=True)
def _no_account(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "waiting"))


def recipe(mode="auto"):
    return Recipe.model_validate(
        {
            "name": "test",
            "base": {"id": "org/model"},
            "tokenizer": {"pad_token": "<|pad|>"},
            "data": {},
            "tracking": {"mode": mode},
        }
    )


def test_offline_run_holds_what_was_logged(tmp_path):
    tracker = start_tracker(recipe(), "sft", tmp_path)
    tracker.log(1, {"loss": 2.5, "score/mean": -1.0})
    tracker.log(20, {"loss": 2.0})
    tracker.finish(0)
    assert tracker.id
    assert offline_wandb.history(tmp_path / "wandb") == [
        {"step": 1, "loss": 2.5, "score/mean": -1.0},
        {"step": 20, "loss": 2.0},
    ]
    config = offline_wandb.config(tmp_path / "wandb")
    assert 'name="test"' in config
    assert "<|pad|>" not in config  # its name has a secret's word in it


def test_a_resumed_stage_continues_its_run(tmp_path, monkeypatch):
    """Offline every part has a file of its own, with the same id and its own steps."""
    first = start_tracker(recipe(), "sft", tmp_path / "a")
    first.log(1, {"loss": 2.5})
    first.finish(143)
    second = start_tracker(recipe(), "sft", tmp_path / "b", first.id)
    second.log(2, {"loss": 2.0})
    second.finish(0)
    assert second.id == first.id
    assert offline_wandb.history(tmp_path / "a" / "wandb") == [{"step": 1, "loss": 2.5}]
    assert offline_wandb.history(tmp_path / "b" / "wandb") == [{"step": 2, "loss": 2.0}]

    import wandb

    asked = []
    run = SimpleNamespace(id="x", starting_step=0, resumed=False)
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.append(settings) or run)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    start_tracker(recipe(), "sft", tmp_path, "x")
    start_tracker(recipe(), "sft", tmp_path)
    settings = [(s["mode"], s["id"], s["resume"]) for s in asked]
    assert settings == [("online", "x", "allow"), ("online", None, None)]


def test_secrets_stay_out():
    assert without_secrets(
        {
            "api_key": "a",
            "hub-token": "b",
            "list": [{"password": "c", "fine": 1}],
            "client.secret": "d",
            "max_new_tokens": 8,
            "tokenizer": {"id": "x"},
        }
    ) == {"list": [{"fine": 1}], "max_new_tokens": 8, "tokenizer": {"id": "x"}}


def test_disabled_writes_nothing(tmp_path):
    tracker = start_tracker(recipe("disabled"), "sft", tmp_path)
    tracker.log(1, {"loss": 1.0})
    tracker.finish(0)
    assert tracker.id is None
    assert list(tmp_path.iterdir()) == []


def test_failing_tracker_is_dropped_and_does_not_raise(capsys):
    class Broken:
        id = "x"
        starting_step = 0
        resumed = False
        calls = 0

        def log(self, values, step):
            self.calls += 1
            raise ConnectionError("gone")

    run = Broken()
    tracker = RunTracker(WandbRun(run))
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 1.0})
    tracker.finish(0)
    assert run.calls == 1
    assert capsys.readouterr().err == "tracking stopped: ConnectionError: gone\n"


def test_start_that_fails_does_not_raise(tmp_path, monkeypatch, capsys):
    import wandb

    def fail(**settings):
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = start_tracker(recipe(), "sft", tmp_path)
    tracker.log(1, {"loss": 1.0})
    assert tracker.id is None
    assert "RuntimeError: no service" in capsys.readouterr().err


def test_online_without_key_never_asks(tmp_path):
    """In a fresh process without WANDB_MODE and with nothing to read an answer from."""
    script = (
        "from pathlib import Path\n"
        "from align.recipe import Recipe\n"
        "from align.tracking import start_tracker\n"
        "recipe = Recipe.model_validate({'name': 'test', 'base': {'id': 'org/model'},"
        " 'data': {}, 'tracking': {'mode': 'online'}})\n"
        f"tracker = start_tracker(recipe, 'sft', Path({str(tmp_path)!r}))\n"
        "tracker.log(1, {'loss': 1.0})\n"
        "tracker.finish(0)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "going on offline" in done.stderr
    assert offline_wandb.history(tmp_path / "wandb") == [{"step": 1, "loss": 1.0}]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_samples_and_the_reward_over_the_kl_are_tables(tmp_path):
    """All of a stage's, whatever part of it this process has made."""
    stage = tmp_path / "ppo"
    stage.mkdir()
    turns = [{"role": "user", "content": "Tom?"}, {"role": "assistant", "content": "Yes?"}]
    samples = [
        {"step": 0, "prompt": turns, "response": "<b>a</b>\u2028", "score": 1.5},
        {"step": 2, "prompt": turns[:1], "response": "", "score": -1.0, "gold": 0.25},
    ]
    lines(stage / "samples.jsonl", samples)
    kl = [{"step": step, "kl/mean": step / 2, "score/mean": 3.0 - step} for step in (1, 2)]
    lines(stage / "metrics.jsonl", [{"step": 0, "probe/score": 1.0}, *kl])
    tracker = start_tracker(recipe(), "ppo", tmp_path)
    tracker.log(2, {"score/mean": 1.0})
    tracker.record({"stage": "ppo"}, stage)
    tracker.finish(0)
    (row,) = offline_wandb.history(tmp_path / "wandb")
    assert (row["step"], row["score/mean"]) == (2, 1.0)
    assert offline_wandb.table(tmp_path / "wandb", row, "samples") == (
        ["step", "prompt", "response", "score", "gold"],
        [
            [0, "user: Tom?\n\nassistant: Yes?", "<b>a</b>\u2028", 1.5, None],
            [2, "user: Tom?", "", -1.0, 0.25],
        ],
    )
    assert offline_wandb.table(tmp_path / "wandb", row, "reward_kl_table") == (
        ["step", "kl/mean", "score/mean"],
        [[1, 0.5, 2.0], [2, 1.0, 1.0]],
    )
    config = offline_wandb.config(tmp_path / "wandb")
    assert "reward_kl" in config
    assert "kl/mean" in config


def test_an_evaluations_samples_hold_the_answers_side_by_side(tmp_path):
    row = {
        "category": "facts",
        "prompt": [{"role": "user", "content": "Tom?"}],
        "responses": {
            "sft": {"text": "a", "score": 1.0, "ended": True},
            "ppo": {"text": "b", "score": 2.0, "ended": False},
        },
    }
    lines(tmp_path / "samples.jsonl", [row])
    tracker = start_tracker(recipe(), "evaluate", tmp_path)
    tracker.record({}, tmp_path)
    tracker.finish(0)
    (logged,) = offline_wandb.history(tmp_path / "wandb")
    columns, data = offline_wandb.table(tmp_path / "wandb", logged, "samples")
    answers = [f"responses/{m}/{key}" for m in ("sft", "ppo") for key in ("text", "score", "ended")]
    assert columns == ["category", "prompt", *answers]
    assert data == [["facts", "user: Tom?", "a", 1.0, True, "b", 2.0, False]]
