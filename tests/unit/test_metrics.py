"""The metrics log: file, plain lines, progress bar."""

import io
import json

import pytest
from rich.console import Console

from align.errors import TrainingError
from align.metrics import MetricsLog


def make(tmp_path, *, terminal=False, tracker=None):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    return MetricsLog(tmp_path, tracker, console, "sft"), out


class Recorder:
    def __init__(self):
        self.rows = []

    def log(self, step, values):
        self.rows.append((step, dict(values)))


def test_rows_go_to_file_and_tracker(tmp_path):
    recorder = Recorder()
    log, _ = make(tmp_path, tracker=recorder)
    log.log(1, {"loss": 2.5, "ppo/clip_fraction": 0.1})
    log.log(2, {"loss": 2.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 2.5, "ppo/clip_fraction": 0.1},
        {"step": 2, "loss": 2.0},
    ]
    assert recorder.rows == [(1, {"loss": 2.5, "ppo/clip_fraction": 0.1}), (2, {"loss": 2.0})]


def test_plain_lines_without_a_terminal(tmp_path):
    log, out = make(tmp_path)
    log.start(120)
    log.advance(39)
    log.log(40, {"lr": 0.001, "loss": 1.23412, "grad_norm": 3.0})
    log.note("[red]as it is[/red]")
    log.close()
    assert out.getvalue() == "sft  40/120  loss 1.234  lr 1.0e-03\n[red]as it is[/red]\n"


def test_progress_bar_on_a_terminal(tmp_path):
    log, out = make(tmp_path, terminal=True)
    log.start(120)
    log.log(40, {"loss": 1.23412})
    log.close()
    shown = out.getvalue()
    assert "40/120" in shown
    assert "loss 1.234" in shown
    log.close()  # a second time does no harm


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stop_the_run(tmp_path, value):
    log, _ = make(tmp_path)
    with pytest.raises(TrainingError, match="step 7: not a finite number: loss="):
        log.log(7, {"loss": value, "lr": 1.0})
    assert not (tmp_path / "metrics.jsonl").exists()
