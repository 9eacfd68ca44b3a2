"""The group of processes that train one model together: who this one is, and waiting for all.

A process that was started alone is a group of one, for which nothing here does anything.
"""

import os

from align.errors import InputError


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
    import torch

    gpus = torch.cuda.device_count()
    if torch.cuda.is_available():
        if size() > gpus:
            raise InputError(
                f"distributed.processes={size()}: each needs a GPU of its own, and there are {gpus}"
            )
        torch.cuda.set_device(rank())
    if deepspeed:
        from deepspeed.ops import __compatible_ops__ as operations

        # On a CPU it would be compiled whenever a group is made; gloo does without it.
        operations["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def wait() -> None:
    """Wait until every process of the group has come here."""
    if size() > 1:
        import torch

        torch.distributed.barrier()


def leave() -> None:
    """End the group when every process has come here; each is alone from then on."""
    if "WORLD_SIZE" not in os.environ:
        return
    import torch

    wait()
    torch.distributed.destroy_process_group()
