"""Runs stages in forked processes that are killed where the test says; libraries are loaded once.

    python -m tests.fault_server

A line of JSON on the standard input is a stage to run, a line on the standard output what became of
it. A fault point is a call by which something reaches the disk: the process is killed before,
during (files are written by half) or after the nth one.
"""

import importlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import time
from typing import Any

POINTS = ("before", "during", "after")


def main() -> None:
    """Answer commands until the input ends."""
    from pipelines.process import quiet_libraries

    quiet_libraries()
    for name in ("pretrain", "sft", "reward_model", "ppo", "stage"):
        importlib.import_module(f"pipelines.{name}")
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(command: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    log = pathlib.Path(command["log"])
    child = os.fork()
    if child == 0:
        _child(command, log)
    if command.get("seconds") is not None:
        time.sleep(command["seconds"])
        os.kill(child, command.get("signal", signal.SIGKILL))
    _, status = os.waitpid(child, 0)
    points = pathlib.Path(f"{log}.points")
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - started,
        "points": int(points.read_text()) if points.is_file() else None,
        "output": log.read_text(encoding="utf-8", errors="replace"),
    }


def _child(command: dict[str, Any], log: pathlib.Path) -> None:
    """Run the stage and end the process, whatever happens."""
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(command["cwd"])
        os.environ.update(command.get("env", {}))
        if command.get("file_bytes") is not None:  # like a full disk: no file grows beyond it
            resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_bytes"],) * 2)
        faults = _Faults(command.get("fault"), command.get("signal", signal.SIGKILL))
        stage = importlib.import_module("pipelines.stage")
        code = stage.main(command["arguments"])
        pathlib.Path(f"{log}.points").write_text(str(faults.count))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Faults:
    """Counts the calls that write, and kills the process at one of them."""

    def __init__(self, fault: list[Any] | None, signum: int) -> None:
        self.count = 0
        self._at, self._point, *only = fault if fault is not None else (None, "")
        self._only = only[0] if only else None
        self._signum = signum
        checkpoints = importlib.import_module("align.checkpoints")
        state = importlib.import_module("align.state")
        metrics = importlib.import_module("align.metrics")
        self._wrap(os, "fsync")
        self._wrap(os, "truncate")
        self._wrap(pathlib.Path, "rename")
        self._wrap(pathlib.Path, "replace")
        self._wrap(pathlib.Path, "unlink")
        self._wrap(pathlib.Path, "write_text", _half_a_text)
        self._wrap(state, "save_file", _half_a_file)
        self._wrap(shutil, "rmtree", _half_a_folder)
        self._wrap(checkpoints, "sha256_file")
        self._wrap(metrics.MetricsLog, "log")

    def _wrap(self, place: Any, name: str, half: Any = None) -> None:
        whole = getattr(place, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            counts = self._only in (None, name)
            mine = counts and self.count == self._at
            self.count += counts
            if mine and self._point == "before":
                self._kill()
            if mine and self._point == "during" and half is not None:
                half(whole, *arguments, **named)
                self._kill()
            result = whole(*arguments, **named)
            if mine:
                self._kill()
            return result

        setattr(place, name, wrapped)

    def _kill(self) -> None:
        os.kill(os.getpid(), self._signum)


def _half_a_text(whole: Any, path: pathlib.Path, text: str, **named: Any) -> None:
    whole(path, text[: len(text) // 2], **named)


def _half_a_file(whole: Any, tensors: Any, path: pathlib.Path) -> None:
    whole(tensors, path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _half_a_folder(whole: Any, path: pathlib.Path, **named: Any) -> None:
    files = sorted(pathlib.Path(path).rglob("*")) if pathlib.Path(path).is_dir() else []
    for file in random.Random(0).sample(files, len(files) // 2):
        if file.is_file():
            os.unlink(file)


if __name__ == "__main__":
    main()
