"""Quick hashes of what a recipe names from outside: model folders and Python modules."""

import hashlib
import os
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from align.manifest import sha256_file

_OURS = ("align", "data", "launch", "pipelines", "reward")
# What a model or a tokenizer is loaded from; a README beside it changes nothing.
_SUFFIXES = (".json", ".jinja", ".model", ".py", ".safetensors", ".txt")
_WHOLE = 2**26  # files up to here are read from end to end
_HEAD, _PROBE, _NUM_PROBES = 2**20, 2**14, 64


def folder_sha256(folder: Path) -> str:
    """Hash a model's folder: names and contents, of large files the size and samples.

    A file above 64 MiB counts with its first MiB, which holds a safetensors header, and 64 places
    spread over the rest: training changes a weight nearly everywhere. So 100 GB take no longer
    than a moment, and neither a copy nor a new date makes a difference.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    digest = hashlib.sha256()
    for file in files:
        content = sha256_file(file) if file.stat().st_size <= _WHOLE else _sampled_sha256(file)
        digest.update(f"{file.name}\n{content}\n".encode())
    return digest.hexdigest()


def _sampled_sha256(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        digest.update(content.read(_HEAD))
        for place in _places(size):
            content.seek(place)
            digest.update(content.read(_PROBE))
    return digest.hexdigest()


def _places(size: int) -> Iterator[int]:
    """Yield where to look, the last bytes included."""
    last = size - _PROBE
    for i in range(1, _NUM_PROBES + 1):
        yield _HEAD + (last - _HEAD) * i // _NUM_PROBES


def module_file(module: str) -> Path | None:
    """Return the file that a module of the user's would be imported from, without importing it.

    Found as ``align.functions`` finds it: the working directory comes last. None for what is no
    file, what is not there, and Align's own modules, which its version stands for.
    """
    parts = module.split(".")
    if parts[0] in _OURS:
        return None
    here = os.getcwd()
    path = [p for p in sys.path if p and os.path.abspath(p) != here] + [here]
    origin = None
    for part in parts:
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            return None
        origin = spec.origin if spec.has_location else None
        path = list(spec.submodule_search_locations or ())
    return Path(origin) if origin else None
