"""Who may import whom, and what must start without torch."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ALLOWED = {
    "align": {"align"},
    "data": {"data", "align"},
    "reward": {"reward", "align"},
    "pipelines": {"pipelines", "align", "data", "reward"},
    "launch": {"launch", "align"},
}

# Of align, the launcher uses only what answers at once.
LAUNCHER_MAY_USE = {
    "align",
    "align.checkpoints",
    "align.errors",
    "align.inputs",
    "align.lock",
    "align.manifest",
    "align.places",
    "align.plan",
    "align.plan_changes",
    "align.plan_items",
    "align.plan_memory",
    "align.plan_model",
    "align.plan_scale",
    "align.plan_time",
    "align.published",
    "align.recipe",
    "align.recipe_adapter",
    "align.recipe_distributed",
    "align.recipe_io",
    "align.seeds",
    "align.stages",
    "align.zero",
}

WITHOUT_TORCH = [
    "align",
    "align.checkpoints",
    "align.errors",
    "align.fingerprints",
    "align.inputs",
    "align.lock",
    "align.manifest",
    "align.places",
    "align.plan",
    "align.plan_changes",
    "align.recipe",
    "align.recipe_distributed",
    "align.recipe_io",
    "align.stages",
    "align.tracking",
    "align.zero",
    "data.judge",
    "data.load",
    "data.records",
    "data.shapes",
    "data.sources",
    "data.world",
    "launch.cli",
    "launch.doctor",
    "launch.matrix",
    "launch.plan",
    "pipelines.stage",
]

HEAVY = {"torch", "transformers", "datasets", "numpy", "wandb", "matplotlib"}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(file: Path) -> list[tuple[int, str]]:
    """Return line and absolute name of every import; relative ones as a leading dot."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "align":
                found += [(node.lineno, f"align.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_downwards_only(package: str) -> None:
    assert files(package)
    forbidden = (set(ALLOWED) | {"tests"}) - ALLOWED[package]
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in files(package)
        for line, name in imports(file)
        if name.startswith(".") or name.split(".")[0] in forbidden
    ]
    assert wrong == []


def test_the_launcher_uses_the_quick_part_of_align_only() -> None:
    attributes = {"align.__version__"}
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in files("launch")
        for line, name in imports(file)
        if name.split(".")[0] == "align" and name not in LAUNCHER_MAY_USE | attributes
    ]
    assert wrong == []


def test_the_walk_finds_a_planted_violation(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    import data.load\n    from . import y\nfrom align import roles\n"
    )
    assert sorted(imports(file)) == [(2, "data.load"), (3, "."), (4, "align.roles")]


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_these_modules_start_without_torch() -> None:
    """One process for all: each would be slow, and none may bring torch in anyway."""
    loaded = modules_after(f"import {', '.join(WITHOUT_TORCH)}")
    assert set(WITHOUT_TORCH) <= loaded
    assert loaded & (HEAVY - {"numpy"}) == set()


def test_the_command_starts_without_any_heavy_library() -> None:
    assert modules_after("import launch.cli") & HEAVY == set()


# A part of the standard library that takes half as long as our --help, wherever both are started.
STANDARD = (
    "import asyncio, unittest.mock, http.server, xmlrpc.client, multiprocessing.pool, pydoc,"
    " decimal, sqlite3"
)


def processor_seconds(*arguments: str) -> float:
    """Measure a new process of this Python: what else runs takes from the caches, not from this."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_takes_less_than_half_a_second() -> None:
    """Once in four times; on a machine that is slow or busy just then, by as much more."""
    seconds = [
        (processor_seconds("-m", "launch", "--help"), processor_seconds("-c", STANDARD))
        for _ in range(4)
    ]
    assert any(ours < max(0.5, 2.6 * standard) for ours, standard in seconds), seconds
