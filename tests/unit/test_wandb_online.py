"""Weights & Biases online, with a server on this machine: one that answers, and those that do not.

The client runs in processes of its own: one that has started keeps its server for good.
"""

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import offline_wandb
from tests.wandb_server import KEY, WandbServer, wandb_server

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"

# Logs three steps for each line of the input: folder, environment, run to go on with, first step,
# overrides of the recipe.
CLIENT = """
import json, os, sys
from pathlib import Path
import wandb
from align import wandb_run
from align.recipe_io import load_recipe
from align.tracking import start_tracker

wandb_run._INIT_TIMEOUT, wandb_run._FINISH_TIMEOUT = 1.0, 1.0
for line in sys.stdin:
    folder, environment, run_id, first, words = json.loads(line)
    if os.fork() == 0:
        os.environ.update(environment)
        recipe = load_recipe("miniature/smoke", words)
        tracker = start_tracker(recipe, "sft", Path(folder), run_id)
        for step in range(first, first + 3):
            tracker.log(step, {"loss": 1 / (step + 1)})
        tracker.record({"outputs": {"model": "0" * 64}}, Path(folder))
        tracker.finish(0)
        sys.exit()
    print(os.wait()[1], flush=True)
"""


@pytest.fixture(scope="module")
def client() -> Any:
    environment = {key: v for key, v in os.environ.items() if not key.startswith("WANDB")}
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT],
        cwd=ROOT,
        env=environment | {"HF_TOKEN": SECRET},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def track(
        folder: Path,
        environment: dict,
        run_id: str | None = None,
        first: int = 0,
        words: tuple[str, ...] = (),
    ) -> None:
        process.stdin.write(json.dumps([str(folder), environment, run_id, first, words]) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n"

    yield track
    process.communicate(timeout=60)


def test_a_run_and_its_continuation_arrive(client, tmp_path):
    """The log has a step that was not sent, and three that were: each is there once."""
    with wandb_server() as server:
        client(tmp_path, server.environment())
        (run_id,) = server.runs
        lines = [{"step": step, "loss": 1 / (step + 1)} for step in range(4)]
        (tmp_path / "sft").mkdir()
        (tmp_path / "sft" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        client(tmp_path, server.environment(), run_id, 4)
    assert list(server.runs) == [run_id]
    run = server.runs[run_id]
    assert server.rows(run_id) == [
        {"step": step, "loss": pytest.approx(1 / (step + 1))} for step in range(7)
    ]
    assert any("RunResumeStatus" in request.body for request in server.requests)
    facts = {key: run.facts[key] for key in ("project", "groupName", "displayName", "jobType")}
    assert facts == {
        "project": "align",
        "groupName": "miniature-smoke",
        "displayName": "miniature-smoke/sft",
        "jobType": "sft",
    }
    assert run.config["name"] == "miniature-smoke"
    assert run.config["manifest"] == {"outputs": {"model": "0" * 64}}
    assert run.exit_code == 0
    assert_no_secrets(server, tmp_path)


def test_a_group_of_its_own(client: Any, tmp_path: Path) -> None:
    with wandb_server() as server:
        client(tmp_path, server.environment(), words=("name=member-2", "tracking.group=x"))
    (run,) = server.runs.values()
    assert (run.facts["groupName"], run.facts["displayName"]) == ("x", "member-2/sft")


def assert_no_secrets(server: WandbServer, folder: Path) -> None:
    """The key is in the header only, where files are uploaded not even there; others nowhere."""
    header = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
    for request in server.requests:
        assert request.authorization == ("" if request.path.startswith("/storage/") else header)
    sent = "".join(request.path + request.body for request in server.requests)
    assert "miniature-smoke" in sent
    assert KEY not in sent
    assert SECRET not in sent
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert KEY.encode() not in content, file
            assert SECRET.encode() not in content, file


@pytest.mark.parametrize("answers", ["500", "hang", "hang later", "refused"])
def test_a_server_that_fails_neither_blocks_nor_ends_anything(client, tmp_path, answers):
    with wandb_server(answers) as server:
        environment = server.environment()
        if answers == "refused":
            environment["WANDB_BASE_URL"] = "http://127.0.0.1:9"  # discard: nobody listens
        started = time.monotonic()
        client(tmp_path, environment)
        assert time.monotonic() - started < 30.0
    folders = [path.name.partition("-")[0] for path in (tmp_path / "wandb").glob("*run-*")]
    if answers == "hang later":
        assert folders == ["run"]
        return
    assert "offline" in folders
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [row["step"] for row in offline_wandb.history(offline)] == [0, 1, 2]


def test_offline_nothing_is_sent(client, tmp_path):
    with wandb_server() as server:
        client(tmp_path, server.environment() | {"WANDB_MODE": "offline"})
    assert server.requests == []
