"""The group of processes that train one model together: who this one is, and waiting for all.

A process that was started alone is a group of one, for which nothing here does anything.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from align.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Value = TypeVar("Value")

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_SECONDS_TO_ANSWER = 5.0  # between the first that has waited in vain and the last, if both do


def rank() -> int:
    """Return this process's number in the group, from 0."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return rank() == 0


def join(*, deepspeed: bool, timeout: float, nvme: bool = False) -> None:
    """Meet the others, and take a GPU of one's own. To be called once, before any model is loaded.

    Args:
        deepspeed: it will train.
        timeout: seconds that each waits for the others, whenever it does.
        nvme: DeepSpeed will keep what it offloads on a disk.

    Raises:
        InputError: there are more processes than GPUs, or nothing with which to write to the disk.
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
        if nvme and not operations["async_io"]:
            raise InputError(
                "distributed.nvme_path: DeepSpeed cannot write to a disk here without libaio;"
                " install its development files (libaio-dev), or leave the key out"
            )
    limit = timedelta(seconds=timeout)
    # Also that of the groups that DeepSpeed makes for itself: nccl's own, 10 minutes, is too short.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(torch.distributed.distributed_c10d, name, limit)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=limit)


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


def silent() -> list[int]:
    """Return the processes that do not wait in vain themselves: those that hang.

    To be asked after a wait has timed out. Takes some seconds, in which the others ask, too.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:  # torchrun's, which outlives the group
        store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=_SECONDS_TO_ANSWER))
        store.set(f"waited/{rank()}", "1")
        time.sleep(_SECONDS_TO_ANSWER)
        return [one for one in range(size()) if not store.check([f"waited/{one}"])]
    except RuntimeError:
        return []


def parts(rows: Sequence[int]) -> list[Sequence[int]]:
    """Return each process's part of some rows, equally many; their order is kept."""
    count = len(rows) // size()
    return [rows[one * count : (one + 1) * count] for one in range(size())]


def part(rows: Sequence[int]) -> Sequence[int]:
    """Return this process's part of some rows; see ``parts``."""
    return parts(rows)[rank()]


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


def end(code: int) -> NoReturn:
    """End this process with an exit code; one of a group at once, without Python's own clean-up.

    A thread of gloo's may still be letting go of a tensor. It takes Python's lock for that; if
    Python is on its way out it ends such a thread, and C++ then aborts the process, with another
    exit code ("terminate called without an active exception").
    """
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
