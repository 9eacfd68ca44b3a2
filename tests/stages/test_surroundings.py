"""What surrounds a stage: no network, secrets in the environment, a clock that goes back."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from align.errors import TrainingError
from align.metrics import MetricsLog
from pipelines import record, stage
from tests.faults import ROOT, facts

SECRET = "hf_" + "PlantedSecretThatNobodyMaySee"
SETTINGS = ("pretrain.steps=4", "pretrain.log_every=1", "run.threads=1", "run.checkpoint_steps=1")


def pretrain(root: Path, *more: str) -> int:
    return stage.main(["pretrain", "miniature/smoke", f"run.root={root}", *SETTINGS, *more])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No connection leaves the machine; the addresses that were asked for."""
    asked: list[Any] = []
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            connect(self, address)  # W&B's own service
            return
        asked.append(address)
        raise OSError(f"no network: {address}")

    def look_up(host: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(host)
        raise OSError(f"no network: {host}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_a_stage_asks_no_network_and_keeps_no_token(
    tmp_path: Path,
    offline: list[Any],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "x"))
    assert pretrain(tmp_path, f"tracking.mode={mode}") == 0
    assert offline == []
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) == (mode == "offline")
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("words", [["plan", "miniature/smoke", "--json"], ["doctor", "--json"]])
def test_the_command_shows_no_token(tmp_path: Path, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_TOKEN": SECRET},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert json.loads(done.stdout)
    assert SECRET not in done.stdout + done.stderr


def test_a_clock_that_goes_back_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert pretrain(whole, "tracking.mode=disabled") == 0
    log = MetricsLog.log

    def stop(self: MetricsLog, step: int, values: dict[str, float]) -> None:
        if step == 3:
            raise TrainingError("stopped by the test")
        log(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", stop)
        assert pretrain(resumed, "tracking.mode=disabled") == 1
    for path in resumed.rglob("*"):  # written in what will be the future
        os.utime(path, (time.time() + 86_400,) * 2)
    real, began = time.time, record.now()
    monkeypatch.setattr(time, "time", lambda: real() - 86_400)
    monkeypatch.setattr(record, "now", lambda: "2001-01-01T00:00:00+00:00")  # at the stage's end
    assert pretrain(resumed, "tracking.mode=disabled") == 0
    folders = [root / "miniature-smoke/pretrain" for root in (whole, resumed)]
    assert facts(folders[0]) == facts(folders[1])
    manifest = json.loads((folders[1] / "stage.json").read_text())
    assert manifest["finished"] >= manifest["started"] >= began
