"""What this machine and this installation offer, and what is wrong with them."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

from packaging.requirements import Requirement

from align import __version__
from launch.command import Python
from launch.packages import ROOT, strangers

_DISTRIBUTION = "align-rlhf"
# In a process of its own: importing torch takes seconds, and a broken one must not break us.
_ASK_TORCH = """
import json, torch
from align.machine import has_bfloat16
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
    "threads": torch.get_num_threads(),
    "bfloat16": has_bfloat16(torch.device("cuda" if cuda else "cpu")),
    "gpus": [
        {
            "name": d.name,
            "memory_gib": round(d.total_memory / 2**30, 1),
            "capability": f"{d.major}.{d.minor}",
        }
        for d in devices
    ],
}))
"""


def examine() -> dict[str, Any]:
    """Return the facts; ``problems`` lists what keeps Align from working, empty if nothing does."""
    libraries, problems = _libraries()
    torch = _torch()
    problems += [f"`import {name}` finds {where}, not ours" for name, where in strangers().items()]
    if "error" in torch:
        problems.append(f"torch cannot be imported: {torch['error']}")
    return {
        "align": __version__,
        "installed_at": str(ROOT),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": _cores(),
        "memory_gib": _memory_gib(),
        "torch": torch,
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "ninja": shutil.which("ninja"),
        "libraries": libraries,
        "problems": problems,
    }


def _libraries() -> tuple[dict[str, str | None], list[str]]:
    """Return the version of every library that we require, and which of them do not fit."""
    try:
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}, [f"{_DISTRIBUTION} is not installed here; run `make setup`"]
    versions: dict[str, str | None] = {}
    problems = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            versions[requirement.name] = None
            problems.append(f"{requirement.name} is missing: pip install '{requirement}'")
            continue
        versions[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            needed = f"Align is tested with {requirement.specifier}"
            problems.append(f"{requirement.name} {version}: {needed}")
    return versions, problems


def _torch() -> dict[str, Any]:
    ours = Python(sys.executable, ROOT, os.environ).environment
    process = subprocess.run(
        [sys.executable, "-c", _ASK_TORCH],
        env=os.environ | ours,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        return {"error": lines[-1]}
    facts: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return facts


def _cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
