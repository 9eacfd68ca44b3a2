"""Stages that are killed at fault points, and what has to be equal afterwards."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# Of the logged metrics, those that depend on the clock and on the machine's memory.
CLOCK = (
    "memory/peak_bytes",
    "time/rollout",
    "time/score",
    "time/update",
    "tokens_per_second",
)
# Every kind of state at least once: sums between two lines of the log, more than one epoch,
# accumulation, dropout, warm-ups, averages, an adaptive coefficient, running statistics.
SETTINGS: dict[str, tuple[str, ...]] = {
    "pretrain": ("pretrain.steps=8", "pretrain.log_every=3", "pretrain.micro_batch_size=4"),
    "sft": ("sft.epochs=1.6", "sft.log_every=3", "sft.micro_batch_size=8", "sft.samples=4"),
    "reward": ("reward.epochs=1.4", "reward.log_every=3", "reward.micro_batch_size=4"),
    "ppo": (
        "ppo.steps=4",
        "ppo.schedule=linear",
        "ppo.kl.target=1.0",
        "ppo.reward_scaling.mode=running",
        "ppo.value.warmup_steps=1",
        "ppo.ema=0.9",
        "ppo.ptx.coef=0.1",
        "ppo.ptx.batch_size=2",
    ),
}
COMMON = (
    "adapter.dropout=0.1",
    "run.threads=1",
    "run.checkpoint_steps=1",
    "tracking.mode=disabled",
)


class Done(NamedTuple):
    """What became of a stage's process."""

    code: int
    output: str
    points: int | None  # calls that wrote, where it ended by itself
    seconds: float


class Server:
    """``tests.fault_server`` as a process, working in ``home``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        # W&B's service of this process would hold a killed stage's run as one that goes on.
        inherited = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault_server"],
            cwd=ROOT,
            env=inherited | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(
        self,
        stage: str,
        *more: str,
        fault: tuple[int, str] | tuple[int, str, str] | None = None,
        seconds: float | None = None,
        signum: int = signal.SIGKILL,
        file_bytes: int | None = None,
        env: dict[str, str] | None = None,
    ) -> Done:
        """Run a stage of the smallest recipe.

        Args:
            fault: the number of a fault point, and ``before``, ``during`` or ``after`` it; with a
                name only calls of that name count.
            seconds: or the time after which the signal is sent.
            file_bytes: no file can be larger, as if the disk were full.
            env: added to the stage's environment.
        """
        given = {word.partition("=")[0] for word in more}
        usual = (*COMMON, *SETTINGS[stage])
        settings = [word for word in usual if word.partition("=")[0] not in given] + [*more]
        command = {
            "arguments": [stage, "miniature/smoke", *settings],
            "cwd": str(self.home),
            "log": str(self.home / "log"),
            "fault": fault,
            "seconds": seconds,
            "signal": int(signum),
            "file_bytes": file_bytes,
            "env": env or {},
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Done(answer["code"], answer["output"], answer["points"], answer["seconds"])

    def folder(self, stage: str) -> Path:
        """Return a stage's folder."""
        return self.home / "runs" / "miniature-smoke" / stage

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def facts(folder: Path) -> dict[str, Any]:
    """Return what has to be equal: hashes of weights and samples, and the log without the clock."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix == ".safetensors" or path.name == "samples.jsonl"
    }
    found["metrics.jsonl"] = without_clock((folder / "metrics.jsonl").read_text().splitlines())
    manifest = json.loads((folder / "stage.json").read_text())
    found["metrics"] = _timeless(manifest["metrics"])
    return found


def without_clock(lines: Iterable[str]) -> list[dict[str, float]]:
    """Return the lines of a log without what the clock decides."""
    return [_timeless(json.loads(line)) for line in lines]


def _timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key not in CLOCK}
