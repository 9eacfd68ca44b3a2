"""Safetensors files: damaged ones, and those of another model, are refused by name."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from align.errors import ParentError

Shapes = Mapping[str, tuple[int, ...]]


def check_files(folder: Path) -> None:
    """Refuse a folder with a damaged safetensors file. Only headers and lengths are read.

    Raises:
        ParentError: names the file and what is wrong with it.
    """
    for path in sorted(folder.glob("*.safetensors")):
        tensor_shapes(path)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a file.

    Raises:
        ParentError: it is missing, cut off, or its header is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file.

    Raises:
        ParentError: see ``tensor_shapes``.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_fits(path: Path, found: Shapes, expected: Shapes) -> None:
    """Refuse a file or folder whose tensors are not those of the model on this base.

    Raises:
        ParentError: names the first tensor that differs, and both shapes.
    """
    if found == expected:
        return
    name = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    raise ParentError(
        f"{path}: does not fit the base: {name} is {found.get(name, 'missing')} in the"
        f" file; {expected.get(name, 'nothing')} is needed. Use the same base and adapter section"
        " in all stages"
    )


def _damaged(path: Path, error: Exception) -> ParentError:
    return ParentError(
        f"{path}: cannot be read as safetensors: {error}; copy it again, or make it again"
    )
