"""A function of a test in two gloo processes, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_in_two(module: str, *arguments: str) -> None:
    """Call ``process`` of a module with the arguments in two processes; both have to end well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environment = os.environ | settings | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = f"import sys; from align import group; from {module} import process;"
    call += " process(*sys.argv[1:]); group.end(0)"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", call, *arguments],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank, "DS_ACCELERATOR": "cpu"},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
