"""The optimisers that ZeRO shares out, in two gloo processes, beside PyTorch's AdamW."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from align import group
from align.engine import Engine
from align.errors import TrainingError
from align.recipe_distributed import Distributed
from align.recipe_ppo import Ppo
from align.zero import deepspeed_settings
from align.zero_layers import ZeroLayers
from tests.two_processes import run_in_two

SECTION = Ppo(
    reward="align.functions:none",
    lr=1e-2,
    batch_size=4,
    minibatch_size=4,
    steps=9,
    max_new_tokens=4,
    schedule="constant",
    warmup_ratio=0.0,
    weight_decay=0.1,
    max_grad_norm=0.5,
)
WAYS = (
    Distributed(processes=2, zero=1),
    Distributed(processes=2, zero=2),
    Distributed(processes=2, zero=2, offload="optimizer"),
    Distributed(processes=2, zero=3),
    Distributed(processes=2, zero=3, offload="all"),
)
SHAPES = [[(5, 3), (7,)], [(4, 4)]]  # of a policy and of a critic; no two divide equally
RATES = [1e-2, 1e-3]
ROWS_OF = [[0], [1, 2]]  # of each process, a pass for each row


def test_two_processes_step_as_adamw_does() -> None:
    run_in_two(__name__)


def process() -> None:
    """What each of the two does."""
    group.join(deepspeed=True, timeout=120.0)
    for way in WAYS:
        steps_are_adamws(way)
        goes_on_bit_for_bit(way)
        stops_before_damage(way)
        leaves_out_what_was_scaled_too_far(way)
    group.leave()


def parameters() -> list[list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [[nn.Parameter(torch.randn(s, generator=generator)) for s in one] for one in SHAPES]


def engine(
    groups: list[list[nn.Parameter]], way: Distributed, *, in_float16: bool = False
) -> Engine:
    layers = None
    if way.zero == 3:  # which are of no layer: whole but for the step
        every = [p for one in groups for p in one]
        layers = ZeroLayers([], every, deepspeed_settings(way, SECTION))
    together = list(zip(groups, RATES, strict=True))
    return Engine(together, SECTION, 9, way, layers, in_float16=in_float16)


def gradients(step: int, row: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + row)
    return [torch.randn(shape, generator=generator) for one in SHAPES for shape in one]


def train(made: Engine, groups: list[list[nn.Parameter]], steps: range) -> float:
    """Steps whose loss reaches all; in the first two the policy rests. Return the last's norm."""
    norm = 0.0
    for step in steps:
        for row in ROWS_OF[group.rank()]:
            pairs = zip(made.parameters, gradients(step, row), strict=True)
            made.backward(sum(((p * g).sum() for p, g in pairs), torch.zeros(())))
        norm = made.step(groups[1] if step < 2 else made.parameters)
    return norm


def steps_are_adamws(way: Distributed) -> None:
    groups, expected = parameters(), parameters()
    made = engine(groups, way)
    together = [{"params": one, "lr": lr} for one, lr in zip(expected, RATES, strict=True)]
    adamw = torch.optim.AdamW(together, eps=1e-5, weight_decay=0.1)
    for step in range(5):
        norm = train(made, groups, range(step, step + 1))
        trained = expected[1] if step < 2 else [p for one in expected for p in one]
        rows = [gradients(step, row) for row in range(3)]
        every = [p for one in expected for p in one]
        for parameter, *parts in zip(every, *rows, strict=True):
            chosen = any(parameter is one for one in trained)
            parameter.grad = sum(parts[1:], parts[0]) if chosen else None
        # Adam and clipping hide a factor in the gradient; its norm does not.
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(trained, 0.5)), rel=1e-5)
        adamw.step()
        assert_close(groups, expected, rtol=1e-6, atol=1e-6)
    share = made.share()
    states = share["state"].values() if way.zero == 3 else share["parts"]
    held = sum(v.numel() for s in states for n, v in s.items() if n == "exp_avg")
    assert held <= (5 * 3 + 7 + 4 * 4) // 2 + 4  # half of the numbers, filled up


def goes_on_bit_for_bit(way: Distributed) -> None:
    groups, others = parameters(), parameters()
    made, again = engine(groups, way), engine(others, way)
    train(made, groups, range(3))
    train(again, others, range(7, 8))  # somewhere else
    with torch.no_grad():
        for parameter, value in zip(again.parameters, made.parameters, strict=True):
            parameter.copy_(value)
    again.load(made.state(), deepcopy(made.share()))  # as through a file
    train(made, groups, range(3, 5))
    train(again, others, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(made.parameters, again.parameters, strict=True))


def stops_before_damage(way: Distributed) -> None:
    groups = parameters()
    made = engine(groups, way)
    made.backward(groups[0][0].sum() + groups[1][0].sum())
    with pytest.raises(TrainingError, match="1 of 3 trainable tensors got no gradient"):
        made.step(made.parameters)
    for parameter in made.parameters:
        parameter.grad = torch.ones_like(parameter)
    if group.rank() == 1:  # one process's fault is everybody's
        groups[0][0].grad *= float("inf")
    before = [p.detach().clone() for p in made.parameters]
    with pytest.raises(TrainingError, match="the weights were left as they are"):
        made.step(made.parameters)
    assert all(torch.equal(p, b) for p, b in zip(made.parameters, before, strict=True))


def leaves_out_what_was_scaled_too_far(way: Distributed) -> None:
    """At the start, and again later: then as without any scale, bit for bit."""
    groups, others = parameters(), parameters()
    made, unscaled = engine(groups, way, in_float16=True), engine(others, way)
    assert made.loss_scale is not None
    for first in (0, 3):
        before = [p.detach().clone() for p in made.parameters]
        made.loss_scale.value = 2.0**127  # a gradient of 2 is beyond float32 then
        assert not math.isfinite(train(made, groups, range(first, first + 1)))
        assert all(torch.equal(p, b) for p, b in zip(made.parameters, before, strict=True))
        made.loss_scale.value = 2.0**10
        train(made, groups, range(first, first + 3))
        train(unscaled, others, range(first, first + 3))
        pairs = zip(made.parameters, unscaled.parameters, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert made.loss_scale.value == 2.0**10
