"""Disks that are full or read-only: a stage ends with what to do, or only its tracking does."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipelines.sft
from align import manifest
from align.checkpoints import FOLDER
from align.manifest import FILE, METRICS
from pipelines import stage
from tests.faults import Server, facts

pytestmark = pytest.mark.slow

RUN = "runs/miniature-smoke"


def mount(*words: str) -> None:
    """Call mount; the test is skipped where that is not allowed."""
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    server = Server(tmp_path_factory.mktemp("disk"))
    yield server
    server.close()


@pytest.fixture
def disk(server: Server) -> Iterator[Path]:
    """The runs of the server on a disk of their own, of 64 MiB."""
    runs = server.home / "runs"
    runs.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(runs))
    yield runs
    subprocess.run(["umount", "-l", str(runs)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Write a file that leaves so many bytes of the disk; return it."""
    there = os.statvfs(disk)
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(max(0, there.f_bavail * there.f_frsize - leave)))
    return ballast


def test_a_full_disk_ends_the_stage_and_space_lets_it_go_on(server: Server, disk: Path) -> None:
    whole = server.run("pretrain")
    assert whole.code == 0, whole.output
    expected = facts(server.folder("pretrain"))
    folder = server.folder("pretrain")
    (folder / FILE).unlink()
    killed = server.run("pretrain", "--force", fault=(2, "after", "log"))
    assert killed.code == -signal.SIGKILL
    newest = max((folder / FOLDER).glob("step-*"))
    ballast = fill(disk, leave=8192)
    full = server.run("pretrain")
    assert full.code == 1, full.output
    assert "Traceback" not in full.output
    assert "No space left on device" in full.output
    assert "Free some space; the same command goes on" in full.output
    assert newest.is_dir()
    assert not (folder / FILE).exists()
    ballast.unlink()
    done = server.run("pretrain")
    assert done.code == 0, done.output
    assert "goes on after step" in done.output
    assert facts(folder) == expected


@pytest.mark.parametrize("backend", ["tensorboard", "wandb"])
def test_a_full_disk_under_the_tracker_ends_the_tracking_only(
    server: Server, disk: Path, backend: str
) -> None:
    small = disk / "miniature-smoke" / backend
    small.mkdir(parents=True)
    mount("-t", "tmpfs", "-o", "size=4k", "tmpfs", str(small))
    fill(small, leave=0)
    done = server.run("pretrain", "tracking.mode=auto", f"tracking.backend={backend}")
    subprocess.run(["umount", "-l", str(small)], check=True)
    assert done.code == 0, done.output
    if backend == "tensorboard":  # W&B's client shows stack traces of its own log files
        assert "tracking is off: tensorboard did not start: OSError: [Errno 28]" in done.output
        assert "Traceback" not in done.output
    lines = (server.folder("pretrain") / METRICS).read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 8


def test_a_read_only_run_directory_is_named(server: Server, disk: Path) -> None:
    """Before anything is trained; what is there stays as it is."""
    before = disk / "miniature-smoke" / "kept"
    before.parent.mkdir()
    before.write_text("as it is")
    mount("-o", "remount,ro", str(disk))
    done = server.run("pretrain")
    assert done.code == 1, done.output
    assert "Read-only file system" in done.output
    assert RUN in done.output
    assert "Traceback" not in done.output
    assert before.read_text() == "as it is"


SMALL = ("tracking.mode=disabled", "run.threads=1", "run.checkpoint_steps=1")


def sft(runs: Path) -> int:
    return stage.main(["sft", "miniature/smoke", f"run.root={runs}", *SMALL, "sft.samples=4"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a finished sft stage, and its parent."""
    runs = tmp_path_factory.mktemp("finished")
    steps = "pretrain.steps=2"
    assert stage.main(["pretrain", "miniature/smoke", f"run.root={runs}", *SMALL, steps]) == 0
    assert sft(runs) == 0
    return runs / "miniature-smoke"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (pipelines.sft, "save_trained"),
        (stage.StageJob, "sample"),
        (manifest, "write_manifest"),
    ],
    ids=["model", "samples", "manifest"],
)
def test_a_disk_that_is_full_at_the_end(
    finished: Path,
    tmp_path: Path,
    place: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Filled up right before this write, on a real disk."""
    runs = tmp_path / "runs"
    runs.mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(runs))
    try:
        shutil.copytree(finished / "pretrain", runs / "miniature-smoke/pretrain")
        write = getattr(place, name)

        def on_a_full_disk(*arguments: Any, **named: Any) -> Any:
            fill(runs, leave=0)
            return write(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, on_a_full_disk)
            assert sft(runs) == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert "No space left on device" in said
        assert "Free some space; the same command goes on from the last checkpoint" in said
        folder = runs / "miniature-smoke/sft"
        assert not (folder / FILE).exists()
        last = max((folder / FOLDER).glob("step-*"))
        (runs / "ballast").unlink()
        assert sft(runs) == 0
        assert f"goes on after step {int(last.name[5:])}," in capsys.readouterr().err.replace(
            "\n", " "
        )
        assert facts(folder) == facts(finished / "sft")
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=True)
