"""A process of a group that hangs or has no memory left ends all, and is named."""

import os
import signal
import time
from pathlib import Path

import pytest

from pipelines.last_words import tell
from tests.stages.test_llama2_recipes import base
from tests.stages.test_several_processes import in_training, lives, rank

# Read by Python when it starts: rank 1 has no memory left for its third step.
NO_MEMORY = """
import os
if os.environ.get("RANK") == "1":
    import torch
    left, step = iter(range(2)), torch.optim.AdamW.step
    def short(*arguments, **more):
        if next(left, None) is None:
            raise MemoryError("planted")
        return step(*arguments, **more)
    torch.optim.AdamW.step = short
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("failures")
    base(root, 4)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_a_process_that_hangs_is_named(root: Path, zero: int) -> None:
    settings = ["distributed.timeout_minutes=0.2", f"distributed.zero={zero}"]
    settings += ["run.checkpoint_steps=1"]
    name = f"hangs-{zero}"
    with in_training(root, name, *settings) as process:
        stopped = rank(1, process.pid)
        os.kill(stopped, signal.SIGSTOP)
        since = time.monotonic()
        assert process.stderr is not None
        errors = process.stderr.read()
        assert process.wait() == 1
    # Half a minute, and what a busy machine takes to end a process.
    assert time.monotonic() - since < 0.2 * 60 + 30 + 15
    assert "sft: rank 0, after step " in errors
    assert "no answer from rank 1, which hangs or waits for something else" in errors
    assert not lives(stopped)
    folder = root / "runs" / name / "sft"
    assert not (folder / "stage.json").exists()
    assert list((folder / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_process_without_memory_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_MEMORY)
    with in_training(root, "memory", "distributed.zero=0", path=str(tmp_path)) as process:
        since = time.monotonic()
        assert process.stderr is not None
        errors = process.stderr.read()
        assert process.wait() == 1
    assert time.monotonic() - since < 30
    assert "sft: rank 1, after step 2: MemoryError: planted" in errors
    assert "memory is too short: `align plan" in errors


def test_only_the_first_of_those_that_wait_says_who_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("Timed out waiting 12000ms for recv operation to complete")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("align.group.silent", lambda: [0, 2])
    for number, said in (("3", False), ("1", True)):
        monkeypatch.setenv("RANK", number)
        assert tell("ppo", error, 7) == 1
        errors = " ".join(capsys.readouterr().err.split())
        assert ("ppo: rank 1, after step 7: no answer from ranks 0, 2" in errors) == said
        assert bool(errors) == said
