"""The best policy and the average one: copies that training does not move."""

import math

import pytest
import torch
from torch import nn

from pipelines.policy_copies import BestPolicy, PolicyEma


def parameters(*values, dtype=torch.float32):
    return [nn.Parameter(torch.full((2, 3), float(v), dtype=dtype)) for v in values]


def set_to(params, value):
    with torch.no_grad():
        for p in params:
            p.fill_(value)


def read(params):
    assert all((p == p.flatten()[0]).all() for p in params)
    return [p.flatten()[0].item() for p in params]


def test_the_best_policy_comes_back_whatever_came_after():
    params = parameters(0, 0)
    best = BestPolicy(params)
    looks = [(1, 0.5), (2, 2.0), (3, 2.0), (4, math.nan), (5, 1.0)]
    kept = []
    for step, value in looks:
        set_to(params, step)
        kept.append(best.offer(step, value))
    assert kept == [True, True, False, False, False]
    assert (best.step, best.value) == (2, 2.0)
    best.restore()
    assert read(params) == [2.0, 2.0]


def test_the_best_policy_keeps_values_and_not_the_parameters_themselves():
    params = parameters(1)
    params[0].requires_grad_()
    best = BestPolicy(params)
    best.offer(0, -3.0)
    params[0].data.add_(1)
    handle = params[0]
    best.restore()
    assert params[0] is handle
    assert handle.requires_grad
    assert read(params) == [1.0]
    set_to(params, 9)
    best.restore()  # the kept copy has not been moved either
    assert read(params) == [1.0]


def test_without_a_look_the_policy_stays_as_it_is():
    params = parameters(4)
    best = BestPolicy(params)
    best.restore()
    assert read(params) == [4.0]
    assert best.step is None


def test_the_average_is_the_weighted_sum_of_all_past_parameters():
    params = parameters(1, 10)
    ema = PolicyEma(params, decay=0.9)
    expected = [1.0, 10.0]
    for value in (2.0, 5.0, -3.0):
        set_to(params, value)
        ema.update()
        expected = [0.9 * e + 0.1 * value for e in expected]
    assert read(params) == [-3.0, -3.0]  # training does not notice
    ema.apply()
    assert read(params) == pytest.approx(expected, rel=1e-6)


def test_a_look_at_the_average_leaves_the_trained_policy_as_it_was():
    params = parameters(1)
    ema = PolicyEma(params, decay=0.5)
    set_to(params, 3)
    ema.update()
    with ema.applied():
        assert read(params) == [2.0]
    assert read(params) == [3.0]
    with pytest.raises(RuntimeError, match="probe"), ema.applied():
        raise RuntimeError("probe")
    assert read(params) == [3.0]
    ema.update()  # the look was no step of the average
    ema.apply()
    assert read(params) == [2.5]


def test_the_average_of_bfloat16_parameters_moves_by_small_steps():
    params = parameters(1, dtype=torch.bfloat16)
    ema = PolicyEma(params, decay=0.999)
    set_to(params, 2)
    for _ in range(693):  # half-way: 0.999 ** 693 = 0.49990
        ema.update()
    ema.apply()
    assert params[0].dtype == torch.bfloat16
    assert read(params) == [1.5]
