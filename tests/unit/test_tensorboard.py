"""TensorBoard's event files, read back by TensorBoard itself; and every way in which they fail."""

import builtins
import json
import struct
import sys
from pathlib import Path

import pytest

from align.errors import RecipeError
from align.metrics import MetricsLog
from align.recipe import Recipe
from align.recipe_io import load_recipe
from align.tensorboard import EventFile
from align.tracking import RunTracker, start_tracker
from tests.tensorboard_events import scalars


def recipe() -> Recipe:
    return load_recipe("miniature/smoke", ["tracking.backend=tensorboard"])


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def log_rows(run: Path, rows: list[dict], console) -> RunTracker:
    """Log rows as a stage does, to the file and to the tracker."""
    tracker = start_tracker(recipe(), "sft", run)
    log = MetricsLog(run / "sft", tracker, console, "sft")
    for row in rows:
        log.log(row["step"], {key: value for key, value in row.items() if key != "step"})
    return tracker


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").touch()
    return tmp_path


@pytest.fixture
def console():
    from rich.console import Console

    return Console(stderr=True, quiet=True)


ROWS = [{"step": 0, "probe/gold": 0.25}] + [
    {"step": step, "loss": 1 / step, "kl/mean": 0.1 * step} for step in range(1, 7)
]


def test_events_are_the_rows_of_the_log(run, console):
    log_rows(run, ROWS, console).finish(0)
    lines = (run / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert scalars(run / "tensorboard" / "sft") == {
        "probe/gold": [(0, 0.25)],
        "loss": [(step, float32(1 / step)) for step in range(1, 7)],
        "kl/mean": [(step, float32(0.1 * step)) for step in range(1, 7)],
    }


@pytest.mark.parametrize("clock", [+3600.0, -3600.0], ids=["later", "earlier"])
def test_a_resumed_stage_has_every_step_once(run, console, monkeypatch, clock):
    """Killed after step 5, of which the last checkpoint covers 3; the clock may go back."""
    import time

    log_rows(run, ROWS[:6], console)  # without an end, as a kill leaves it
    metrics = run / "sft" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:4]))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + clock)
    log_rows(run, ROWS[4:], console).finish(0)
    found = scalars(run / "tensorboard" / "sft")
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert found["probe/gold"] == [(0, 0.25)]


def test_a_tensorboard_that_is_looking_sees_every_step_once(run, console, monkeypatch):
    """What it has read of the removed file is forgotten."""
    import time

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_rows(run, ROWS[:6], console)
    looking = EventAccumulator(str(run / "tensorboard" / "sft"))
    looking.Reload()
    assert len(looking.Scalars("loss")) == 5
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 5.0)
    log_rows(run, ROWS[6:], console).finish(0)
    looking.Reload()
    assert [event.step for event in looking.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_other_files_of_the_folder_stay(run, console):
    folder = run / "tensorboard" / "sft"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    log_rows(run, ROWS, console).finish(0)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failure_in_the_middle_ends_the_tracking_only(run, console, capsys):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    guest = EventFile(run / "tensorboard" / "sft")
    log = MetricsLog(run / "sft", tracker := RunTracker(guest), console)
    log.log(1, {"loss": 1.0})
    guest._writer = Full()
    log.log(2, {"loss": 0.5})
    log.log(3, {"loss": 0.25})
    tracker.finish(0)
    assert capsys.readouterr().err == (
        "tracking stopped: OSError: [Errno 28] No space left on device\n"
    )
    assert len((run / "sft" / "metrics.jsonl").read_text().splitlines()) == 3
    assert scalars(run / "tensorboard" / "sft") == {"loss": [(1, 1.0)]}


def test_a_folder_that_cannot_be_made_costs_the_tracking_only(run, console, capsys):
    (run / "tensorboard").write_text("a file in its place")
    log_rows(run, ROWS, console).finish(0)
    error = capsys.readouterr().err
    assert error.startswith("tracking is off: tensorboard did not start: ")
    assert len(error.splitlines()) == 1
    assert len((run / "sft" / "metrics.jsonl").read_text().splitlines()) == len(ROWS)


def test_without_tensorboard_a_line_says_what_to_install(run, console, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.partition(".")[0] == "tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return real(name, *rest, **named)

    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    log_rows(run, ROWS[:1], console).finish(0)
    assert "pip install tensorboard" in capsys.readouterr().err


def test_disabled_writes_nothing(tmp_path):
    off = load_recipe("miniature/smoke", ["tracking.backend=tensorboard", "tracking.mode=disabled"])
    start_tracker(off, "sft", tmp_path).finish(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("mode", "online", "auto or disabled"),
        ("entity", "me", "null"),
        ("project", "other", "align"),
    ],
)
def test_what_only_wandb_has_is_refused(key, value, allowed):
    with pytest.raises(RecipeError) as refused:
        load_recipe("miniature/smoke", ["tracking.backend=tensorboard", f"tracking.{key}={value}"])
    assert str(refused.value) == (
        f"tracking.{key}={value}: means nothing to TensorBoard; allowed with it: {allowed}"
    )
