"""What the benchmarks share: the other program's environment, processes on one thread, tables."""

import argparse
import importlib.util
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.process import quiet_libraries

ROOT = Path(__file__).resolve().parents[2]


def one_thread() -> dict[str, str]:
    """Return the environment of a measured process: one thread, our packages first, no network."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }


def run(
    command: Sequence[str | Path], log: Path, settings: Mapping[str, str] | None = None
) -> None:
    """Run a process on one thread, its output in the file ``log``; stop if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    line = shlex.join(map(str, command))
    with log.open("w", encoding="utf-8") as file:
        env = one_thread() | dict(settings or {})
        done = subprocess.run(list(command), env=env, stdout=file, stderr=file, cwd=ROOT)
    if done.returncode:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        sys.exit(f"failed with code {done.returncode}: {line}\n{end}\n(all of it: {log})")


def align(arguments: Sequence[str | Path], log: Path) -> None:
    """Run the ``align`` command of this interpreter."""
    run([sys.executable, "-m", "launch", *arguments], log)


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Add where the workload's code lies and what is common to all of its uses."""
    parser.add_argument(
        "--bench",
        type=Path,
        default=ROOT.parent / "shared" / "bench",
        help="folder with workload.py and trl_ppo.py (default: %(default)s)",
    )
    parser.add_argument("--size", choices=("xs", "s", "m"), default="s")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--batch", type=int, default=64, help="responses per update")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--updates", type=int, default=4, help="the first is warm-up, not counted")


def load_workload(bench: Path) -> ModuleType:
    """Import ``workload.py`` of a bench folder."""
    path = bench / "workload.py"
    if not path.is_file():
        sys.exit(f"{path}: no such file; --bench names the folder that holds the workload")
    spec = importlib.util.spec_from_file_location("bench_workload", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    quiet_libraries()  # one of them reports on the standard output otherwise
    spec.loader.exec_module(module)
    return module


def add_trl_options(parser: argparse.ArgumentParser, *, make_venv: bool = False) -> None:
    """Add which Python runs TRL: a given one, or one in an environment to be made."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--trl-python", type=Path, metavar="PATH", help="python of an environment with trl 1.12"
    )
    if make_venv:
        group.add_argument(
            "--make-venv",
            type=Path,
            metavar="DIR",
            help="make that environment with the packages that the bench folder's README names",
        )


def make_venv(folder: Path, bench: Path) -> Path:
    """Make the environment of the README's ``pip install`` line; return its Python."""
    python = folder / "bin" / "python"
    if python.is_file():
        return python
    readme = (bench / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if "pip install" in line]
    if len(lines) != 1:
        sys.exit(f"{bench}/README.md: found {len(lines)} lines with `pip install`, one is needed")
    packages = shlex.split(lines[0].partition("pip install")[2])
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def say(text: str) -> None:
    """Tell what is going on; results go to the standard output."""
    print(text, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; numbers are given three digits."""
    keys = list(rows[0])
    cells = [[_cell(row[key]) for key in keys] for row in rows]
    widths = [max(len(key), *(len(row[i]) for row in cells)) for i, key in enumerate(keys)]
    lines = [keys, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def mean_and_spread(values: Sequence[float]) -> str:
    """Return ``mean +- standard deviation`` (of the sample)."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} +- {spread:.3f}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)
