"""The launcher around the stages: what is started, skipped, reported and stopped.

The stages themselves are stand-ins in a temporary folder: they write what a finished stage leaves.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.stand_ins import ALIGN, RECIPE, ROOT, align, build, start


@pytest.fixture
def place(tmp_path: Path) -> Path:
    build(tmp_path)
    return tmp_path


def test_run_then_run_again(place: Path) -> None:
    output, _ = align(place, "run", "r.yaml")
    lines = [line for line in output.splitlines() if "noise" not in line]
    assert lines[0] == "sft: running (no finished result yet)"
    assert [line.split(":")[0] for line in lines] == [
        *("sft", "sft", "ppo", "ppo", "evaluate", "evaluate"),
        "report",
    ]
    assert lines[-1] == "report: runs/x/report.html"

    started = time.monotonic()
    output, _ = align(place, "run", "r.yaml")
    assert time.monotonic() - started < 5
    assert output.splitlines() == [
        "sft: up to date",
        "ppo: up to date",
        "evaluate: up to date",
        "everything is up to date; --force redoes it",
        "report: runs/x/report.html",
    ]


def test_a_change_runs_what_depends_on_it(place: Path) -> None:
    align(place, "run", "r.yaml")
    output, errors = align(place, "run", "r.yaml", "ppo.lr=2e-3", "--json")
    result = json.loads(output)
    assert {stage: facts["status"] for stage, facts in result["stages"].items()} == {
        "sft": "skipped",
        "ppo": "done",
        "evaluate": "done",
    }
    assert result["stages"]["ppo"]["why"] == "its settings in the recipe have changed"
    assert result["stages"]["evaluate"]["why"] == "its parent ppo has changed"
    assert result["stages"]["ppo"]["metrics"] == {"loss": None}
    assert "ppo: running" in errors
    align(place, "run", "r.yaml", "--force")
    output, _ = align(place, "run", "r.yaml", "--force", "--json")
    assert {s["why"] for s in json.loads(output)["stages"].values()} == {"--force"}


def test_a_missing_report_is_written_again(place: Path) -> None:
    align(place, "run", "r.yaml")
    report = place / "runs" / "x" / "report.html"
    report.unlink()
    align(place, "run", "r.yaml")
    assert report.is_file()


def test_a_report_that_is_older_than_a_stage_is_written_again(place: Path) -> None:
    align(place, "run", "r.yaml")
    report = place / "runs" / "x" / "report.html"
    first = report.stat().st_mtime_ns
    align(place, "run", "r.yaml")
    assert report.stat().st_mtime_ns == first
    align(place, "eval", "runs/x", "--force")
    assert report.stat().st_mtime_ns == first
    align(place, "run", "r.yaml")
    assert report.stat().st_mtime_ns > first


def test_a_single_stage_says_that_its_parent_is_stale(place: Path) -> None:
    align(place, "run", "r.yaml")
    output, _ = align(place, "ppo", "r.yaml", "sft.lr=2e-3", "ppo.lr=2e-3")
    assert output.splitlines()[0] == (
        "warning: ppo builds on sft as it was made, which is not up to date: its settings in the"
        " recipe have changed; `align run` makes it again"
    )
    assert "ppo: running" in output
    assert "warning" not in align(place, "ppo", "r.yaml", "ppo.lr=3e-3")[0]


def test_debug_reaches_the_report(place: Path) -> None:
    align(place, "run", "r.yaml")
    script = "import sys; sys.exit(str(sys.argv[1:]))"
    (place / "house" / "pipelines" / "report.py").write_text(script)
    assert align(place, "report", "runs/x", code=1)[1] == "['runs/x']\n"
    assert align(place, "report", "runs/x", "--debug", code=1)[1] == "['runs/x', '--debug']\n"


@pytest.mark.parametrize("words", [("run", "r.yaml"), ("sft", "r.yaml", "--force")])
def test_a_folder_of_something_else_is_not_replaced(place: Path, words: tuple[str, ...]) -> None:
    package = place / "x" / "sft"
    package.mkdir(parents=True)
    (package / "model.py").write_text("precious")
    output, errors = align(place, *words, "run.root=.", code=2)
    assert errors == (
        "error: x/sft: would be replaced, and is no stage's folder: it holds model.py, but neither"
        " stage.json nor metrics.jsonl; change name or run.root\n"
    )
    assert "running" not in output
    (package / "metrics.jsonl").touch()
    align(place, "sft", "r.yaml", "run.root=.")


def test_a_failing_stage_ends_the_run_with_its_exit_code(place: Path) -> None:
    output, errors = align(place, "run", "r.yaml", code=2, FAIL="ppo")
    assert errors == "ppo: no more rows\n"
    assert "evaluate" not in output
    assert not (place / "runs" / "x" / "report.html").exists()
    output, _ = align(place, "run", "r.yaml")
    assert output.startswith("sft: up to date\nppo: running")


def test_dry_run_starts_and_writes_nothing(place: Path) -> None:
    output, _ = align(place, "run", "r.yaml", "seed=3", "--dry-run")
    lines = output.splitlines()
    assert lines[0] == "sft: would run (no finished result yet)"
    assert lines[2] == "ppo: would run (its parent sft runs before it)"
    assert lines[4] == "evaluate: would run (its parents sft and ppo run before it)"
    house = place / "house"
    words = lines[1].split()
    assert words[:2] == ["PYTHONSAFEPATH=1", f"PYTHONPATH={house}:{ROOT}"]
    started = [sys.executable, "-m", "pipelines.stage", "sft", "r.yaml", "seed=3"]
    assert words[-len(started) :] == started
    assert not (place / "runs").exists()
    plan = json.loads(align(place, "ppo", "r.yaml", "--dry-run", "--json")[0])
    assert plan["stages"]["ppo"]["argv"][1:] == ["-m", "pipelines.stage", "ppo", "r.yaml"]


def test_data_of_a_later_stage_is_looked_for_before_the_first_starts(place: Path) -> None:
    (place / "r.yaml").write_text(RECIPE.replace("world: prompts", "path: none.jsonl"))
    output, errors = align(place, "run", "r.yaml", code=2)
    assert errors.startswith("error: none.jsonl: no such file")
    assert "running" not in output
    assert not (place / "runs").exists()
    align(place, "sft", "r.yaml")


def test_rows_of_all_stages_to_run_are_judged_once_before_the_first(place: Path) -> None:
    assert align(place, "run", "r.yaml", "seed=3", code=2, FAIL="data") == ("", "")
    assert not (place / "runs").exists()
    align(place, "run", "r.yaml")
    align(place, "run", "r.yaml")
    align(place, "run", "r.yaml", "ppo.lr=2e-3", "--debug")
    align(place, "eval", "runs/x", "--force")
    assert (place / "checked").read_text().splitlines() == [
        "r.yaml seed=3 --stages sft ppo evaluate",
        "r.yaml --stages sft ppo evaluate",
        "r.yaml ppo.lr=2e-3 --stages ppo evaluate --debug",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.chat_template", "none.jinja"),
        ("ppo.reward", "none.py:score"),
        ("evaluate.gold", "none.py:gold"),
    ],
)
def test_files_that_the_recipe_names_are_looked_for_too(place: Path, key: str, value: str) -> None:
    output, errors = align(place, "run", "r.yaml", f"{key}={value}", code=2)
    assert errors.startswith(f"error: {key}")
    assert f"={value.partition(':')[0]}: no such file" in errors
    assert "running" not in output


@pytest.mark.parametrize(
    "change",
    [
        ("run.parents.reward=gone/reward", "ppo.reward=model"),
        ("ppo.reward=[{model: gone/reward}]",),
    ],
)
def test_stages_of_other_runs_are_looked_for_before_the_first_starts(
    place: Path, change: tuple[str, ...]
) -> None:
    output, errors = align(place, "run", "r.yaml", *change, code=2)
    assert "gone/reward: no finished reward stage here" in errors
    assert "running" not in output


@pytest.mark.parametrize("blocked", ["runs", "runs/x", "runs/x/ppo"])
def test_a_file_in_the_place_of_a_folder(place: Path, blocked: str) -> None:
    (place / blocked).parent.mkdir(parents=True, exist_ok=True)
    (place / blocked).write_text("precious")
    output, errors = align(place, "ppo", "r.yaml", "--dry-run", code=2)
    assert errors == (
        f"error: runs/x/ppo: cannot be made: {blocked} is a file; change name or run.root\n"
    )
    assert output == ""
    assert (place / blocked).read_text() == "precious"


def test_a_run_directory_without_permission(place: Path) -> None:
    (place / "runs").mkdir(mode=0o555)
    if os.access(place / "runs", os.W_OK):
        pytest.skip("this user, root perhaps, may write everywhere")
    _, errors = align(place, "run", "r.yaml", code=2)
    assert errors.startswith("error: runs/x/sft: cannot be made: no permission to write in runs;")


def test_a_single_stage_needs_its_parents(place: Path) -> None:
    _, errors = align(place, "ppo", "r.yaml", code=2)
    assert errors.startswith("error: runs/x/sft: no finished sft stage here")
    align(place, "sft", "r.yaml")
    align(place, "ppo", "r.yaml")
    _, errors = align(place, "reward", "r.yaml", code=2)
    assert "makes no reward stage; its stages: sft, ppo, evaluate" in errors


def test_eval_of_a_moved_and_renamed_run(place: Path) -> None:
    align(place, "run", "r.yaml")
    (place / "runs" / "x").rename(place / "moved")
    (place / "runs").rmdir()
    output, errors = align(place, "eval", "moved", "--json")
    assert json.loads(output) == {
        "base": {"perplexity": 3.0},
        "ppo": {"gold/mean": 0.5, "kl/mean": 1.5},
    }
    assert errors == "evaluate: up to date\n"
    assert not (place / "runs").exists()
    output, _ = align(place, "eval", "moved", "evaluate.prompts=3")
    assert "evaluate: running (its settings in the recipe have changed)" in output
    assert output.splitlines()[-1].split() == ["kl/mean", "1.5"]


def test_eval_without_an_evaluate_section_uses_the_defaults(place: Path) -> None:
    (place / "r.yaml").write_text(RECIPE.replace("evaluate: {}\n", ""))
    align(place, "run", "r.yaml")
    assert "perplexity" in align(place, "eval", "runs/x")[0]


def test_report_prints_where_it_lies(place: Path) -> None:
    align(place, "run", "r.yaml")
    assert align(place, "report", "runs/x")[0].splitlines()[-1] == "runs/x/report.html"
    output, _ = align(place, "report", "r.yaml", "--json")
    assert json.loads(output) == {"report": "runs/x/report.html"}


def test_export_of_a_run_wherever_it_lies(place: Path) -> None:
    align(place, "run", "r.yaml")
    (place / "runs" / "x").rename(place / "moved")
    output, errors = align(place, "export", "moved", "--json")
    facts = json.loads(output)
    assert facts == {
        "export": "moved/export/ppo",
        "argv": [
            *("ppo", "moved/recipe.yaml", 'run.root="."', 'name="moved"'),
            *("--out", "moved/export/ppo"),
        ],
        "drift": {"kl/mean": 0.1},
    }
    assert errors == "noise on standard output\n"
    options = ["--stage", "reward", "--out", "here", "--dtype", "float32", "--max-drift", "0.5"]
    output, _ = align(place, "export", "moved", *options)
    assert output == "noise on standard output\n"
    argv = json.loads((place / "here" / "export.json").read_text())["argv"]
    assert (argv[0], argv[-6:]) == ("reward", ["--out", "here", *options[4:]])


def test_a_refused_export_ends_with_its_exit_code(place: Path) -> None:
    align(place, "run", "r.yaml")
    output, errors = align(place, "export", "runs/x", "--json", code=1, FAIL="1")
    assert output == ""
    assert errors.endswith("error: the exported model is not the trained one\n")
    for wrong in (["none"], ["runs/x", "--stage", "pretrain"], ["runs/x", "--max-drift", "-1"]):
        output, errors = align(place, "export", *wrong, code=2)
        assert (output, "noise" in errors) == ("", False)


@pytest.mark.parametrize("group", [False, True])
def test_interrupt_reaches_the_stage_and_ends_with_130(place: Path, group: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ALIGN, "run", "r.yaml"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HANG": "sft"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "hanging\n"
    # A terminal signals the whole group; kill signals the launcher only.
    if group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    assert process.stderr.read() == "sft: stopped by 2\n"
    assert process.wait() == 130


def test_a_stage_has_the_time_to_upload_what_it_logged(place: Path) -> None:
    """The launcher's own signal, after the terminal's, must not cut it off."""
    process = start(place, "run", "r.yaml", HANG="sft", UPLOAD="7")
    assert process.stderr is not None
    assert process.stderr.readline() == "hanging\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (errors, process.returncode) == ("sft: stopped by 2\n", 130)


def test_a_second_interrupt_reaches_the_stage_and_ends_it_at_once(place: Path) -> None:
    process = start(place, "run", "r.yaml", HANG="sft", UPLOAD="50")
    assert process.stderr is not None
    assert process.stderr.readline() == "hanging\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)  # longer than what counts as one signal
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert "error: stopped by SIGINT" in errors
    assert process.returncode == 130


def test_a_stage_hears_an_interrupt_only_when_it_listens(place: Path) -> None:
    """Else Ctrl-C while it imports its libraries would show a stack trace."""
    (place / "house" / "pipelines" / "stage.py").write_text(
        "import os, signal, sys\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('importing', file=sys.stderr)\n"
        "from pipelines.process import signals_as_exceptions\n"
        "with signals_as_exceptions(): print('not reached', file=sys.stderr)\n"
    )
    _, errors = align(place, "run", "r.yaml", code=130)
    message = "stopped by SIGINT; the same command makes what is not finished"
    assert errors.splitlines()[-2:] == ["importing", message]


def test_a_later_interrupt_ends_a_stage_at_once(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\n"
        "from pipelines import process\n"
        "process._ONE_SIGNAL_SECONDS = 0.2\n"
        "def press(): os.kill(os.getpid(), signal.SIGINT)\n"
        "with process.signals_as_exceptions():\n"
        "    try: press()\n"
        "    except process.Stopped:\n"
        "        press(); print('one', flush=True)\n"
        "        time.sleep(0.3); press(); print('two')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "one\n", "")


def test_nohup_and_background_jobs_live_on(place: Path) -> None:
    """What the shell has set to be ignored stays so, in the launcher and in the stage."""
    (place / "house" / "pipelines" / "stage.py").write_text(
        "import os, signal, sys\n"
        "from pipelines.process import signals_as_exceptions\n"
        "with signals_as_exceptions():\n"
        "    for number in (signal.SIGINT, signal.SIGHUP):\n"
        "        os.kill(os.getpid(), number); os.kill(os.getppid(), number)\n"
        "    sys.exit('alive')\n"
    )
    main = ALIGN.replace("cli.main()", "from launch import __main__; __main__.main()")
    ignoring = "import signal; signal.signal(1, signal.SIG_IGN); signal.signal(2, signal.SIG_IGN)"
    process = subprocess.run(
        [sys.executable, "-c", f"{ignoring}\n{main}", "run", "r.yaml"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (process.returncode, process.stderr) == (1, "alive\n")


def test_an_interrupt_while_the_command_is_imported_shows_no_stack_trace(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os\nos.kill(os.getpid(), 2)\n1 / 0")
    done = subprocess.run(
        [sys.executable, "-m", "launch", "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_terminate_reaches_the_stage(place: Path) -> None:
    process = start(place, "run", "r.yaml", HANG="sft")
    assert process.stderr is not None
    assert process.stderr.readline() == "hanging\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert errors == "sft: stopped by 15\n"
    assert process.returncode == 143


def test_what_the_stage_did_not_say_the_launcher_says(place: Path) -> None:
    dies = "import sys, time; print('hanging', file=sys.stderr, flush=True); time.sleep(60)"
    (place / "house" / "pipelines" / "stage.py").write_text(dies)
    process = start(place, "run", "r.yaml")
    assert process.stderr is not None
    assert process.stderr.readline() == "hanging\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    message = "error: stopped by SIGTERM; the same command makes what is not finished\n"
    assert (errors, process.returncode) == (message, 143)


def test_a_killed_stage_is_reported(place: Path) -> None:
    killer = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    (place / "house" / "pipelines" / "stage.py").write_text(killer)
    _, errors = align(place, "run", "r.yaml", code=1)
    assert errors == (
        "error: the process was killed by SIGKILL; the machine may be out of memory\n"
    )


def test_verify_names_what_differs(place: Path) -> None:
    align(place, "run", "r.yaml")
    run = place / "runs" / "x"
    output, _ = align(place, "verify", "runs/x")
    assert output.splitlines() == [
        "pretrain: not made",
        "sft: ok (4 files)",
        "reward: not made",
        "ppo: ok (4 files)",
        "evaluate: ok (4 files)",
        "beside the stages: ok (2 files)",
    ]
    (run / "ppo" / "model" / "w").write_text("tampered")
    (run / "sft" / "model" / "extra").touch()
    (run / "evaluate" / "model" / "w").unlink()
    output, _ = align(place, "verify", "runs/x", code=1)
    assert "  sft/model/extra: is unexpected" in output
    assert "  ppo/model/w: differs from its manifest" in output
    assert "  evaluate/model/w: is missing" in output
    result = json.loads(align(place, "verify", "r.yaml", "--json", code=1)[0])
    assert result["ok"] is False
    assert result["stages"]["ppo"]["state"] == "differs"


def test_verify_notices_a_parent_that_was_redone(place: Path) -> None:
    align(place, "run", "r.yaml")
    align(place, "sft", "r.yaml", "sft.lr=2e-3")
    output, _ = align(place, "verify", "runs/x", code=1)
    assert "sft: ok" in output
    assert "  ppo/parent sft: ../sft is not what this stage was made from" in output
    (place / "runs" / "x" / "sft" / "stage.json").write_text("{")
    output, _ = align(place, "verify", "runs/x", code=1)
    assert "\n  sft/stage.json: not a manifest" in output


def test_verify_refuses_what_is_no_run(place: Path) -> None:
    _, errors = align(place, "verify", ".", code=2)
    assert errors.startswith("error: .: not a run directory")
