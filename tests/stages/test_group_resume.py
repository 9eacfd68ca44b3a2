"""Stages of two and of four processes that are interrupted and go on, bit for bit."""

import json
import os
import signal
import subprocess
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.faults import without_clock
from tests.stages.test_llama2_recipes import base
from tests.stages.test_several_processes import (
    IN_FLOAT32,
    LORA,
    LORA_IN_FLOAT32,
    PPO,
    ROOT,
    align,
    alone,
    command,
    parent,
    rank,
    run,
)

EVERY_STEP = "run.checkpoint_steps=1"
LONG = {"sft": "sft.epochs=8.0", "reward": "reward.epochs=8.0", "ppo": "ppo.steps=6"}
# With the recipe's dropout, which draws from generators that differ between the processes.
TRAINING = ("base.dtype=float32", "evaluate=null", "ppo=null")
WAYS = [
    ["distributed.zero=0"],
    ["distributed.zero=1"],
    ["distributed.zero=2", "distributed.offload=optimizer"],
    ["distributed.zero=3"],
    ["distributed.zero=3", "distributed.offload=all"],
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("group")
    base(root, 4)
    return root


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    return alone(root, "one", LORA, ("sft", "reward"), *LORA_IN_FLOAT32, "run.keep_checkpoints=0")


def interrupted(
    root: Path, stage: str, name: str, *more: str, by: signal.Signals, processes: int = 2
) -> tuple[int, str]:
    """Send a signal when some checkpoints have been written; return the exit code and the errors.

    To the launcher, which passes it on; SIGKILL to one of the processes, which is the end of all.
    """
    with subprocess.Popen(
        command(root, stage, LORA, name, LONG[stage], *more, EVERY_STEP, "--nproc", str(processes)),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        folder = root / "runs" / name / stage / "checkpoints"
        while not list(folder.glob("step-*[2-9]")):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(rank(1, process.pid) if by is signal.SIGKILL else process.pid, by)
        assert process.stderr is not None
        errors = process.stderr.read()
    return process.wait(), errors


def check_goes_on(
    root: Path, stage: str, *settings: str, by: signal.Signals, processes: int = 2
) -> str:
    """Compare a run that was interrupted with one that was not; return what it said then."""
    name = f"{stage}-{processes}-{by.name}-{sha256(' '.join(settings).encode()).hexdigest()[:12]}"
    given = [*settings, LONG[stage], EVERY_STEP, "--nproc", str(processes)]
    whole = align(root, stage, LORA, f"{name}-whole", *given) / stage
    code, errors = interrupted(root, stage, name, *settings, by=by, processes=processes)
    assert code == (1 if by is signal.SIGKILL else 128 + by), errors
    found = root / "runs" / name / stage
    assert not (found / "stage.json").exists()
    said = run(root, stage, LORA, name, *given)
    assert said.returncode == 0, said.stderr
    assert said.stderr.count("goes on after step ") == 1
    assert lines(found) == lines(whole)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert files
    for file in files:
        ours, theirs = load_file(found / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in theirs), file
    assert not list(found.rglob("checkpoints"))
    return errors


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return a stage's metrics without what depends on the clock, and its samples."""
    found: list[dict[str, Any]] = list(
        without_clock((folder / "metrics.jsonl").read_text().splitlines())
    )
    samples = folder / "samples.jsonl"
    if samples.is_file():
        found += [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_group_goes_on_bit_for_bit(root: Path, processes: int) -> None:
    settings = [*TRAINING, "distributed.zero=2"]
    errors = check_goes_on(root, "sft", *settings, by=signal.SIGTERM, processes=processes)
    assert errors.count("stopping after this step") == 1  # one process speaks


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=" ".join)
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_by_every_way_and_killed(root: Path, one: Path, stage: str, way: list[str]) -> None:
    from_sft = parent(one) if stage == "reward" else ()
    settings = [*TRAINING, *way, *from_sft]
    check_goes_on(root, stage, *settings, by=signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "by"),
    [
        (["distributed.zero=0"], signal.SIGKILL),
        (["distributed.zero=0"], signal.SIGINT),
        (["distributed.zero=1"], signal.SIGKILL),
        (["distributed.zero=2", "distributed.offload=optimizer"], signal.SIGKILL),
        (["distributed.zero=3"], signal.SIGKILL),
        (["distributed.zero=3", "ppo.layout=separate"], signal.SIGKILL),
    ],
)
def test_ppo_goes_on(root: Path, one: Path, way: list[str], by: signal.Signals) -> None:
    steps = [word for word in PPO if not word.startswith("ppo.steps")]
    settings = [*steps, *IN_FLOAT32, "evaluate=null", "ppo.kl.target=0.5", "ppo.ema=0.9"]
    settings += [*parent(one), f"run.parents.reward={one / 'reward'}", "reward=null"]
    settings += ["ppo.value.warmup_steps=1", "ppo.weight_decay=0.1"]
    check_goes_on(root, "ppo", *settings, *way, by=by)


@pytest.mark.slow
def test_another_group_is_refused(root: Path) -> None:
    settings = [*TRAINING, "distributed.zero=2"]
    interrupted(root, "sft", "other", *settings, by=signal.SIGTERM)
    for more, ours in (
        (["distributed.zero=1", "--nproc", "2"], "processes=2, zero=1"),
        (["distributed.zero=0", "--nproc", "1"], "processes=1, zero=0"),
    ):
        done = run(root, "sft", LORA, "other", *TRAINING, LONG["sft"], *more)
        assert done.returncode == 2, done.stderr
        assert "was made with distributed.processes=2, zero=2, and cannot" in done.stderr
        assert ours in done.stderr
        assert list((root / "runs/other/sft/checkpoints").glob("step-*"))
