"""Losses that are scaled for float16: what is lost without, left out, and remembered."""

import pytest
import torch
from torch import nn

from align import loss_scale
from align.engine import Engine
from align.errors import TrainingError
from align.loss_scale import LossScale, needs_scaling
from align.recipe_ppo import Ppo
from tests.tiny import llama

SECTION = Ppo(
    reward="align.functions:none",
    lr=1e-2,
    batch_size=4,
    minibatch_size=4,
    steps=4,
    max_new_tokens=4,
    schedule="linear",
    warmup_ratio=0.0,
)


def small_loss(weight):
    """A loss whose gradient is 2^-26 at a float16 tensor, which has no such number: it ends at
    2^-24. The weight's own is five times that.
    """
    return (weight.half() * 5).float().sum() * 2.0**-26


def test_a_small_gradient_is_lost_without_and_exact_with_a_scale():
    weight = nn.Parameter(torch.ones(3))
    small_loss(weight).backward()
    assert not weight.grad.any()
    weight.grad = None
    scale = LossScale([weight])
    loss = scale.scaled(small_loss(weight))
    assert torch.equal(loss, small_loss(weight))
    loss.backward()
    assert weight.grad.tolist() == [5 * 2.0**-26] * 3


def test_gradients_add_up_at_different_scales_as_they_are():
    weight = nn.Parameter(torch.ones(1))
    scale = LossScale([weight])
    scale.scaled(small_loss(weight)).backward()
    scale.update(is_finite=False)
    scale.scaled(small_loss(weight)).backward()
    assert weight.grad.item() == 10 * 2.0**-26
    (alone,) = torch.autograd.grad(scale.scaled(small_loss(weight)), [weight])
    assert alone.item() == 5 * 2.0**-26


def test_the_scale_halves_at_once_and_doubles_after_2000_good_steps():
    scale = LossScale([])
    assert scale.value == 65536  # as in torch.amp.GradScaler, and the other numbers here
    scale.update(is_finite=True)
    scale.update(is_finite=False)
    assert scale.value == 32768
    for _ in range(1999):
        scale.update(is_finite=True)
    assert scale.value == 32768
    other = LossScale([])
    other.load(scale.state())
    for one in (scale, other):
        one.update(is_finite=True)
        assert one.value == 65536
        one.update(is_finite=True)
        assert one.value == 65536


def test_what_is_not_finite_without_a_scale_stops():
    scale = LossScale([])
    for _ in range(16):
        scale.update(is_finite=False)
    assert scale.value == 1
    with pytest.raises(TrainingError, match=r"too large for float16.*bfloat16, float32"):
        scale.update(is_finite=False)


def test_which_models_need_it():
    class Four(nn.Linear):
        compute_dtype = torch.float16

    assert not needs_scaling(llama())
    assert not needs_scaling(llama().bfloat16())
    assert needs_scaling(llama().half())
    assert needs_scaling(nn.Sequential(nn.Linear(2, 2), Four(2, 2)))
    Four.compute_dtype = torch.bfloat16
    assert not needs_scaling(Four(2, 2))


def test_a_step_that_was_scaled_too_far_is_left_out(monkeypatch):
    """Nothing has happened then, and the next one is AdamW's first."""
    monkeypatch.setattr(loss_scale, "_START", 2.0**17)  # beyond float16, whose end is 65504
    weight, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    engine = Engine([([weight], 1e-2)], SECTION, 4, in_float16=True)

    engine.backward(weight.half().float().sum() * 0.5)
    assert engine.step([weight]) == torch.inf
    assert engine.loss_scale.value == 2.0**16
    assert weight.tolist() == [1.0] * 3
    assert weight.grad is None
    assert engine.lr == 1e-2
    engine.backward(weight.half().float().sum() * 0.5)
    adamw = torch.optim.AdamW([other], lr=1e-2, eps=1e-5, weight_decay=0.0)
    other.grad = torch.full((3,), 0.5)
    nn.utils.clip_grad_norm_([other], 1.0)
    adamw.step()
    assert engine.step([weight]) == pytest.approx(0.5 * 3**0.5)
    assert torch.equal(weight, other)


def test_an_engine_goes_on_with_its_scale():
    weight = nn.Parameter(torch.ones(1))
    engine = Engine([([weight], 1e-2)], SECTION, 4, in_float16=True)
    engine.backward((weight * torch.inf).sum())
    engine.step([weight])
    again = Engine([([nn.Parameter(torch.ones(1))], 1e-2)], SECTION, 4, in_float16=True)
    again.load(engine.state(), engine.share())
    assert again.loss_scale.value == engine.loss_scale.value == 32768
