"""What models and files have written steers no terminal, wherever the command shows it."""

import io
from pathlib import Path

import pytest
import typer
from rich.console import Console

from align.errors import TrainingError, printable_lines
from align.metrics import MetricsLog
from launch.tables import print_table
from launch.verify import verify_run
from pipelines.last_words import tell
from pipelines.process import exit_code
from tests.finished import placeholder

# Clears the screen, sets the window's title, moves the cursor by one byte, and turns text around.
HOSTILE = "\x1b[2J \x1b]0;title\x07 \x9b1A \r \u202e"


def harmless(text: str) -> bool:
    return text != "" and all(line.isprintable() for line in text.split("\n"))


def test_lines_stay_lines_and_other_alphabets_stay_as_they_are() -> None:
    assert printable_lines("Größe 1\n日本") == "Größe 1\n日本"
    assert printable_lines("a\n\x1b[2J") == "a\n'\\x1b[2J'"


def test_notes_of_a_stage() -> None:
    shown = io.StringIO()
    MetricsLog(None, None, Console(file=shown, force_terminal=True)).note(f"reward  {HOSTILE}")
    assert harmless(shown.getvalue())
    assert "reward" in shown.getvalue()


@pytest.mark.parametrize("error", [TrainingError(HOSTILE), ValueError(HOSTILE)])
def test_what_ended_a_stage(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert tell("ppo", error) == 1
    assert harmless(capsys.readouterr().err)


def test_what_ended_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise TrainingError(HOSTILE)

    assert exit_code("report", work, debug=False) == 1
    assert harmless(capsys.readouterr().err)


def test_categories_of_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"sft": {f"gold/{HOSTILE}": 0.5, "gold/facts": 0.5}})
    shown = capsys.readouterr().out
    assert harmless(shown)
    assert len({len(line) for line in shown.splitlines()}) == 1


def test_names_of_files_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cli import verify

    stage = placeholder(tmp_path / "x" / "sft", "sft")
    (stage / "model" / "\x1b[2J\nppo: ok").touch()
    problems = verify_run(tmp_path / "x")[0]["sft"].problems
    assert any("\x1b" in problem for problem in problems)
    with pytest.raises(typer.Exit):
        verify(str(tmp_path / "x"))
    shown = capsys.readouterr().out
    assert harmless(shown)
    assert "\nppo: ok" not in shown
