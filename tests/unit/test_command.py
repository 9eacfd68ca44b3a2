"""The commands that Align starts: exact arguments and environment."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from launch.command import (
    KEEP_MEMORY,
    RETURN_MEMORY,
    Python,
    check_data_command,
    export_command,
    report_command,
    stage_command,
)

HOUSE = Python("/env/bin/python", Path("/house"), {})


def test_stage_command() -> None:
    command = stage_command(HOUSE, "sft", Path("a b.yaml"), ["seed=7", "name=x y"], force=True)
    assert command.argv == (
        "/env/bin/python",
        "-m",
        "pipelines.stage",
        "sft",
        "a b.yaml",
        "seed=7",
        "name=x y",
        "--force",
    )
    assert command.env == {"PYTHONSAFEPATH": "1", "PYTHONPATH": "/house"} | KEEP_MEMORY
    line = command.shell_line()
    assert line.startswith("PYTHONSAFEPATH=1 PYTHONPATH=/house MALLOC_")
    assert shlex.split(line)[len(command.env) :] == list(command.argv)


def test_a_stage_that_is_to_spare_memory_gives_large_tensors_back() -> None:
    env = stage_command(HOUSE, "sft", Path("r.yaml"), spare_memory=True).env
    assert {key: env[key] for key in env if key.startswith("MALLOC")} == RETURN_MEMORY


def test_check_data_command() -> None:
    command = check_data_command(HOUSE, ["sft", "ppo"], Path("r.yaml"), ["seed=7"], debug=True)
    words = ["-m", "pipelines.check_data", "r.yaml", "seed=7", "--stages", "sft", "ppo", "--debug"]
    assert list(command.argv[1:]) == words


def test_report_command() -> None:
    assert report_command(HOUSE, Path("runs/x")).argv[1:] == ("-m", "pipelines.report", "runs/x")


def test_export_command() -> None:
    recipe, out = Path("runs/x/recipe.yaml"), Path("runs/x/export/ppo")
    command = export_command(HOUSE, "ppo", recipe, ["name=y"], out)
    words = ["-m", "pipelines.export", "ppo", "runs/x/recipe.yaml", "name=y", "--out", str(out)]
    assert list(command.argv[1:]) == words
    options = {"dtype": "float32", "max_drift": 1e-05, "debug": True}
    command = export_command(HOUSE, "ppo", recipe, ["name=y"], out, **options)
    added = ["--dtype", "float32", "--max-drift", "1e-05", "--debug"]
    assert list(command.argv[1:]) == words + added


def test_our_packages_come_before_an_inherited_path() -> None:
    inherited = os.pathsep.join(["/mine", "", "/house"])
    python = Python("python", Path("/house"), {"PYTHONPATH": inherited, "SECRET": "x"})
    env = stage_command(python, "ppo", Path("r.yaml")).env
    assert env["PYTHONPATH"] == f"/house{os.pathsep}/mine"
    assert "SECRET" not in env


def test_what_the_user_says_about_memory_holds() -> None:
    python = Python("python", Path("/house"), {"MALLOC_TOP_PAD_": "5"})
    env = stage_command(python, "ppo", Path("r.yaml")).env
    assert env.keys() & KEEP_MEMORY.keys() == KEEP_MEMORY.keys() - {"MALLOC_TOP_PAD_"}


def test_a_data_module_in_the_working_directory_does_not_win(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("raise SystemExit('the wrong data')")
    root = Path(__file__).resolve().parents[2]
    command = Python(sys.executable, root, {}).module("data.records", [])
    done = subprocess.run(
        command.argv, env=os.environ | command.env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
