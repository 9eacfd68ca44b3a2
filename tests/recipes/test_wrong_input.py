"""What a user does wrong: one message that says where, exit code 2, soon, and nothing written."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

GOOD = """\
name: x
base: {id: some/model}
data:
  sft: {train: [{world: demonstrations}]}
sft:
  lr: 1e-3
  batch_size: 2
"""


def align(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def processor_seconds() -> float:
    """Return what the processes that have ended took; a busy machine does not stretch it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def refused(cwd: Path, *words: str) -> str:
    before = sorted(cwd.rglob("*"))
    started = processor_seconds()
    done = align(cwd, *words)
    assert processor_seconds() - started < 5
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout in ("", "sft: running (no finished result yet)\n")
    assert "Traceback" not in done.stderr
    assert sorted(cwd.rglob("*")) == before
    return done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD.replace("lr:", "lrr:"), "error: r.yaml:6: sft.lrr=0.001: unknown key; did you mean"),
        (GOOD.replace("2\n", "two\n"), "error: r.yaml:7: sft.batch_size=two: found 'two' (text); "),
        (GOOD + "name: y\n", "error: r.yaml:8: name: given twice, first in line 1; keep one"),
        (GOOD.replace("  lr", "\tlr"), "error: r.yaml:6: not YAML: a tab; YAML is indented with"),
        (GOOD[: GOOD.index("]}")], "error: r.yaml:4: not YAML: "),
        (GOOD.replace("data:", "data: !!python/object/apply:os.system [ls]\nx:"), "!!python/obj"),
        ("", "error: r.yaml: the file is empty"),
        ("- 1\n", "error: r.yaml:1: found a list; allowed: sections"),
        (GOOD.replace("name: x", "name: '[bold]x[/bold]'"), "found '[bold]x[/bold]' (text)"),
    ],
)
def test_a_wrong_recipe(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert expected in refused(tmp_path, "run", "r.yaml")


def test_the_good_recipe_is_good(tmp_path: Path) -> None:
    """Or the tests above would show nothing."""
    (tmp_path / "r.yaml").write_text(GOOD)
    assert align(tmp_path, "run", "r.yaml", "--dry-run").returncode == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "none.yaml"], "error: none.yaml: no such file and no shipped recipe"),
        (["run", "folder"], "error: folder: is a directory"),
        (["run", "miniatur"], "did you mean miniature or"),
        (["run", "r.yaml", "sft.lr=big"], "error: sft.lr=big: found 'big' (text); allowed: a num"),
        (["run", "r.yaml", "sft.lr"], "error: sft.lr: not an override; allowed: section.key=value"),
        (["run", "r.yaml", "sft=null"], "error: r.yaml: has no section of a stage"),
        (["run", "r.yaml", "adapter.method=top_layers"], "adapter.top_layers: how many layers are"),
        (["ppo", "r.yaml"], "error: r.yaml: makes no ppo stage; its stages: sft"),
        (["eval", "folder"], "error: folder: not a run directory: recipe.yaml is missing"),
        (["verify", "folder"], "error: folder: not a run directory"),
        (["verify", "runs/none"], "error: runs/none: no such run; allowed: a run directory"),
        (["eval", "runs/none"], "error: runs/none: no such run; allowed: a run directory"),
        (["report", "folder"], "error: folder: not a run directory"),
        (["recipes", "--json", "show", "miniature"], "--json goes with list; show has none"),
        (["recipes", "show", "none"], "error: none: no such file and no shipped recipe"),
        (["recipes", "copy", "miniature", "no/r.yaml"], "error: no/r.yaml: there is no folder no"),
        (["recipes", "copy", "miniature", "r.yaml"], "error: r.yaml: exists already"),
        (["compare", "runs/r", "--to", "x"], "error: align compare is planned but not built"),
        (["train"], "No such command 'train'"),
        (["run", "r.yaml", "--fast"], "No such option: --fast"),
    ],
)
def test_wrong_words(tmp_path: Path, words: list[str], expected: str) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    (tmp_path / "folder").mkdir()
    assert expected in refused(tmp_path, *words)


def test_several_problems_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD.replace("1e-3", "-1").replace("name: x", "nam: x"))
    errors = refused(tmp_path, "run", "r.yaml", "sft.epochs=no").splitlines()
    assert [line.split(": ")[1] for line in errors] == [
        "r.yaml:1",
        "r.yaml:6",
        "sft.epochs=no",
        "r.yaml:1",
    ]
    assert all(line.startswith("error: ") for line in errors)


def test_debug_shows_where(tmp_path: Path) -> None:
    done = align(tmp_path, "run", "none.yaml", "--debug")
    assert "Traceback" in done.stderr
    assert done.returncode == 2


def test_somebody_elses_data_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.py").touch()
    errors = refused(tmp_path, "--help")
    assert errors.startswith(f"error: `import data` finds {tmp_path / 'data.py'}, not ")


GOOD_ROW = (
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n'
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "rows.jsonl: no such file"),
        ("directory", "rows.jsonl: is a directory"),
        ("", "rows.jsonl: the file is empty"),
        (GOOD_ROW + GOOD_ROW[:40], "rows.jsonl:2"),
        (GOOD_ROW + '{"messages": null}\n', "rows.jsonl:2: messages"),
        (GOOD_ROW.replace('"Yo"', "null") + GOOD_ROW, "rows.jsonl:1: messages[1].content"),
        (GOOD_ROW + GOOD_ROW.replace('"user"', '"bot"'), "rows.jsonl:2: messages[0].role"),
    ],
    ids=["missing", "directory", "empty", "truncated", "null", "null content", "unknown role"],
)
def test_wrong_data(tmp_path: Path, content: str | None, expected: str) -> None:
    (tmp_path / "r.yaml").write_text(GOOD.replace("world: demonstrations", "path: rows.jsonl"))
    rows = tmp_path / "rows.jsonl"
    if content == "directory":
        rows.mkdir()
    elif content is not None:
        rows.write_text(content)
    message = refused(tmp_path, "sft", "r.yaml")
    assert expected in message
    assert message.count("error: ") <= 1


@pytest.mark.parametrize("broken", ["sft", "prompts"])
def test_wrong_data_of_a_later_stage(tmp_path: Path, broken: str) -> None:
    """No stage starts: neither the one before it, nor its own."""
    recipe = (ROOT / "pipelines" / "recipes" / "miniature" / "smoke.yaml").read_text()
    (tmp_path / "r.yaml").write_text(recipe)
    (tmp_path / "rows.jsonl").write_text(GOOD_ROW + GOOD_ROW[:40])
    change = f"data.{broken}.train=[{{path: rows.jsonl}}]"
    assert refused(tmp_path, "run", "r.yaml", change).startswith("data: rows.jsonl:2: broken JSON")
