"""Read the history back from the file that an offline W&B run leaves behind."""

import json
import struct
import time
from pathlib import Path

_BLOCK, _HEADER, _RECORD = 32768, 7, 7
_FULL, _LAST = 1, 4


def records(path: Path) -> list[bytes]:
    """Return the raw records of a ``run-*.wandb`` file: LevelDB log blocks after a file header."""
    content, position = path.read_bytes(), _HEADER
    found, parts = [], []
    while position + _RECORD <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD:  # a block's rest that no record header fits in is padding
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + _RECORD])
        position += _RECORD
        parts.append(content[position : position + length])
        position += length
        if kind in (_FULL, _LAST):
            found.append(b"".join(parts))
            parts = []
    return found


def history(directory: Path) -> list[dict]:
    """Return the rows logged by the only run under ``directory``: step and values."""
    return _parsed(directory, "history")


def table(directory: Path, row: dict, name: str) -> tuple[list[str], list[list]]:
    """Return a table's columns and data: a row of the history says where it lies."""
    (file,) = directory.rglob(row[f"{name}/path"])
    content = json.loads(file.read_text())
    return content["columns"], content["data"]


def config(directory: Path) -> str:
    """Return the configuration of the only run under ``directory``, as JSON text."""
    return "".join(_parsed(directory, "config"))


def _complete(path: Path) -> list:
    """Return all records once the last one is there: W&B writes them in a process of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 60
    while True:
        found = [Record.FromString(raw) for raw in records(path)]
        if any(record.HasField("exit") for record in found):
            return found
        assert time.monotonic() < deadline, f"{path}: the run has not ended"
        time.sleep(0.1)


def _parsed(directory: Path, kind: str) -> list:
    (path,) = directory.rglob("*.wandb")
    rows: list = []
    for record in _complete(path):
        if kind == "config" and record.HasField("run"):
            rows += [f"{item.key}={item.value_json}\n" for item in record.run.config.update]
        if kind == "config" and record.HasField("config"):
            for item in record.config.update:
                key = "/".join(item.nested_key) or item.key
                rows.append(f"{key}={item.value_json}\n")
        if kind == "history" and record.HasField("history"):
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            step = items.pop("_step")
            values = {key: value for key, value in items.items() if not key.startswith("_")}
            rows.append({"step": step} | values)
    return rows
