"""A process of a group ends with its own exit code, whatever gloo's threads are doing."""

import torch
from torch import distributed

from align import group
from tests.two_processes import run_in_two

kept: list[distributed.ProcessGroup | None] = []


def test_processes_end_well_while_tensors_are_on_their_way() -> None:
    run_in_two(__name__)


def process() -> None:
    """What each of the two does: end without having waited for what it sends.

    As DeepSpeed does, somebody keeps the group: otherwise its end would wait for the threads.
    """
    group.join(deepspeed=False, timeout=60.0)
    kept.append(distributed.distributed_c10d._get_default_group())
    works = []
    for _ in range(200):
        sent, received = torch.ones(1000), [torch.ones(1000) for _ in range(group.size())]
        works.append(distributed.all_gather(received, sent, async_op=True))
    del works
    distributed.destroy_process_group()
