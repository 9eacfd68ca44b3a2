"""The state of a training as files: tensors as safetensors, all else as JSON; random generators."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import group

# Nested dicts (keys: text and whole numbers), lists, tensors, numbers, text, booleans and None.
State = dict[str, Any]

_STATE = "state"  # what the files are called
_TENSOR, _DICT = "tensor", "dict"


def save_state(folder: Path, state: Mapping[str, Any], name: str = _STATE) -> None:
    """Write a state to ``folder``. Tuples come back as lists, and tensors on the CPU.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    rest = _without_tensors(state, "", tensors)
    path = folder / f"{name}.safetensors"
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # a full disk, too, is one of these
        raise OSError(f"{path}: {error}") from error
    (folder / f"{name}.json").write_text(json.dumps(rest), encoding="utf-8")


def load_state(folder: Path, name: str = _STATE) -> State:
    """Read what ``save_state`` has written, bit for bit."""
    rest = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    state = _with_tensors(rest, load_file(folder / f"{name}.safetensors"))
    assert isinstance(state, dict)
    return state


def generators_state() -> State:
    """Return the states of every global random generator: of Python, NumPy, torch and the GPUs."""
    twister = numpy.random.get_state(legacy=False)
    assert isinstance(twister, dict)
    state = twister["state"] | {"key": twister["state"]["key"].tolist()}
    return {
        "python": random.getstate(),
        "numpy": twister | {"state": state},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators_state(state: State) -> None:
    """Put every global random generator into the state that ``generators_state`` has returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into those of the same name and shape.

    Raises:
        ValueError: names or shapes differ.
    """
    shapes = {name: tensor.shape for name, tensor in targets.items()}
    if shapes != {name: tensor.shape for name, tensor in saved.items()}:
        raise ValueError("the saved tensors are not those of this model")
    for name, target in targets.items():
        target.copy_(saved[name])


def own_state_name() -> str:
    """Return the name under which each process of a group keeps what is its own."""
    return f"rank-{group.rank()}"


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` for JSON: dicts as pairs, whose keys may be numbers; tensors by name."""
    if isinstance(value, Tensor):
        # A copy: safetensors takes no two tensors that share their memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        pairs = value.items()
        return {_DICT: [[k, _without_tensors(v, f"{name}/{k}", tensors)] for k, v in pairs]}
    if isinstance(value, list | tuple):
        return [_without_tensors(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    return {key: _with_tensors(item, tensors) for key, item in value[_DICT]}
