"""The step at the longest lengths: what it leaves, and what it says when memory is short."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from align.errors import TrainingError
from align.recipe import Recipe
from pipelines.memory_check import check_memory

GIB = 2**30


def recipe(**changes: object) -> Recipe:
    training = {"lr": 1e-3, "batch_size": 8, "micro_batch_size": 2}
    data = {"sft": {"train": [{"world": "demonstrations"}]}}
    base = {"id": "x", "gradient_checkpointing": True}
    sections = {"name": "x", "base": base, "data": data, "sft": training} | changes
    return Recipe.model_validate(sections)


@contextmanager
def room(more: int) -> Iterator[None]:
    """Let this process have ``more`` bytes of address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_it_leaves_no_gradient_and_no_trace_in_the_random_numbers() -> None:
    layer, frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    seen = []

    def step() -> torch.Tensor:
        seen.append(torch.rand(2, 4))
        return layer(frozen(seen[0])).sum()

    parameters = [*layer.parameters(), *frozen.parameters()]
    check_memory(recipe(), "sft", parameters, step, "2 rows of up to 4 tokens")
    assert len(seen) == 1
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_too_little_memory_stops_with_the_keys_to_lower() -> None:
    layer = nn.Linear(4, 4)
    with room(GIB // 2), pytest.raises(TrainingError) as raised:
        check_memory(
            recipe(),
            "sft",
            list(layer.parameters()),
            lambda: layer(torch.zeros(GIB // 16, 4)).sum(),  # 1 GiB
            "2 rows of up to 1024 tokens",
        )
    message = str(raised.value)
    assert "memory is too short for one over 2 rows of up to 1024 tokens" in message
    assert (
        "Lower sft.micro_batch_size, data.max_prompt_tokens or data.max_response_tokens" in message
    )
    assert "set base.quantization=nf4; " in message  # checkpointing is on already
    assert "`align plan RECIPE --memory SIZE`" in message
    assert all(p.grad is None for p in layer.parameters())


def test_the_optimisers_states_need_their_place_as_well() -> None:
    """64 Mi numbers: 1/2 GiB of moments; 1/8 in eight bits, none on the GPU if they are paged.

    With ZeRO a share of them, or none.
    """
    layer = nn.Linear(2**13, 2**13, bias=False, device="meta").to_empty(device="cpu")
    parameters, step = list(layer.parameters()), lambda: None
    with room(GIB * 3 // 8):
        with pytest.raises(TrainingError, match="memory is too short"):
            check_memory(recipe(), "sft", parameters, step, "")
        for optimizer in ("adamw_8bit", "paged_adamw"):
            training = {"lr": 1e-3, "batch_size": 8, "optimizer": optimizer}
            check_memory(recipe(sft=training), "sft", parameters, step, "")
        for way in ({"zero": 2}, {"zero": 1, "offload": "optimizer", "processes": 1}):
            group = recipe(distributed={"processes": 2} | way)
            check_memory(group, "sft", parameters, step, "")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_what_python_and_a_gpu_raise_is_understood(error: Exception) -> None:
    def step() -> None:
        raise error

    with pytest.raises(TrainingError, match=type(error).__name__ if not error.args else "CUDA out"):
        check_memory(recipe(), "sft", list(nn.Linear(2, 2).parameters()), step, "1 row")


def test_other_errors_are_not_taken_for_it() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        check_memory(
            recipe(), "sft", list(layer.parameters()), lambda: layer(torch.zeros(2, 3)).sum(), ""
        )
