"""The group of processes that train one model together: who this one is, and waiting for all.

A process that was started alone is a group of one, for which nothing here does anything.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from align.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Value = TypeVar("Value")

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def rank() -> int:
    """Return this process's number in the group, from 0."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return rank() == 0


def join(*, deepspeed: bool) -> None:
    """Meet the others, and take a GPU of one's own. To be called once, before any model is loaded.

    Args:
        deepspeed: it will train.

    Raises:
        InputError: there are more processes than GPUs.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    _end_with_starter()
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(_own_gpu(torch.cuda.device_count()))
    if deepspeed:
        from deepspeed.ops import __compatible_ops__ as operations

        # On a CPU it would be compiled whenever a group is made; gloo does without it.
        operations["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def _own_gpu(gpus: int) -> int:
    """Return which of the GPUs of this machine is this process's."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    if here > gpus:
        where = "here" if here == size() else f"of which {here} on this machine"
        raise InputError(
            f"distributed.processes={size()}, {where}: each needs a GPU of its own, and there are"
            f" {gpus}"
        )
    return int(os.environ.get("LOCAL_RANK", rank()))


def _end_with_starter() -> None:
    """Have the kernel kill us when the process that has started the group is gone.

    Nobody else would end the others if one of us failed then, and they would wait for it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def wait() -> None:
    """Wait until every process of the group has come here."""
    if size() > 1:
        import torch

        torch.distributed.barrier()


def part(rows: Sequence[int]) -> Sequence[int]:
    """Return this process's part of some rows, as many as of any other; their order is kept."""
    count = len(rows) // size()
    return rows[rank() * count : (rank() + 1) * count]


def gather(value: Value) -> list[Value]:
    """Return every process's value, in their order; tensors in it have to be on the CPU."""
    if size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_first(value: Value) -> Value:
    """Return the first process's value in all; tensors in it have to be on the CPU."""
    if size() == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def add_gradients(parameters: Sequence["nn.Parameter"]) -> None:
    """Put the sum of all processes' gradients, which there have to be, in the place of each."""
    if size() == 1:
        return
    import torch

    gradients = [p.grad for p in parameters if p.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(joined)
    for gradient, total in zip(
        gradients, joined.split([g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(total.view_as(gradient))


def leave() -> None:
    """End the group when every process has come here; each is alone from then on."""
    if "WORLD_SIZE" not in os.environ:
        return
    import torch

    wait()
    torch.distributed.destroy_process_group()
