"""The losses of PPO against hand arithmetic and exact gradients."""

import math

import pytest
import torch

from align.functional import (
    entropy_bonus,
    kl_loss,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
    token_entropy,
)
from tests.tensors import close, random

T, F = True, False


# The clipped surrogate, by hand: clip 0.2.
def test_policy_loss_clips_only_where_it_would_help():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss, sums = ppo_policy_loss(
        ratio.log(), torch.zeros(1, 5), advantages, mask, clip=0.2, num_tokens=5
    )
    # min(r A, clip(r) A): 1.2, -1.5, 0.5, -0.8, 2.2
    close(loss, -(1.2 - 1.5 + 0.5 - 0.8 + 2.2) / 5)
    close(sums["clip_fraction"], 2.0)
    close(sums["ratio_max_error"], 0.5)


def test_policy_gradient_at_ratio_one_is_the_advantage():
    logprobs = random(2, 3).requires_grad_()
    advantages, mask = random(2, 3, seed=1), torch.tensor([[T, T, F], [T, T, T]])
    ppo_policy_loss(
        logprobs, logprobs.detach(), advantages, mask, clip=0.2, num_tokens=5
    ).loss.backward()
    close(logprobs.grad, torch.where(mask, -advantages / 5, 0.0))


# T22: the value loss, clipped around the stored values; clip 0.2.
def test_t22_value_loss_takes_the_worse_of_clipped_and_unclipped():
    new, old = torch.tensor([[1.0, 0.1, 0.5]]), torch.tensor([[0.0, 0.0, 0.0]])
    returns = torch.tensor([[1.0, 1.0, 0.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, sums = ppo_value_loss(new, old, returns, mask, clip=0.2, num_tokens=3)
    # errors 0, 0.81, 0.25; clipped to 0.2, 0.1, 0.2: errors 0.64, 0.81, 0.04
    close(loss, 0.5 * (0.64 + 0.81 + 0.25) / 3)
    close(sums["value_clip_fraction"], 1.0)


# Dual clip (Ye et al. 2020), by hand: clip 0.2, dual clip 3.
def test_dual_clip_bounds_the_loss_where_the_advantage_is_negative():
    ratio = torch.tensor([[5.0, 2.0, 5.0, 0.1]])
    advantages = torch.tensor([[-1.0, -1.0, 1.0, -2.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    logprobs = ratio.log().requires_grad_()
    loss, sums = ppo_policy_loss(
        logprobs, torch.zeros(1, 4), advantages, mask, clip=0.2, num_tokens=4, dual_clip=3.0
    )
    # max(min(r A, clip(r) A), 3 A) is -3 for -5, -2; then 1.2 and -1.6, which it leaves alone.
    close(loss.detach(), -(-3.0 - 2.0 + 1.2 - 1.6) / 4)
    close(sums["dual_clip_fraction"], 1.0)
    close(sums["clip_fraction"], 2.0)
    loss.backward()
    # Only the second token still pulls: ratio * advantage.
    close(logprobs.grad, [[0.0, 2.0 / 4, 0.0, 0.0]])


def test_dual_clip_is_silent_where_it_is_off():
    tensors = [random(2, 3, seed=s) for s in range(3)]
    mask = torch.ones(2, 3, dtype=torch.bool)
    loss, sums = ppo_policy_loss(*tensors, mask, clip=0.2, num_tokens=6)
    far, far_sums = ppo_policy_loss(*tensors, mask, clip=0.2, num_tokens=6, dual_clip=1e6)
    close(far, loss)
    assert "dual_clip_fraction" not in sums
    assert far_sums["dual_clip_fraction"] == 0


def test_value_loss_without_clip_is_half_the_mean_squared_error():
    new, returns = random(2, 3), random(2, 3, seed=1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    loss, sums = ppo_value_loss(new, random(2, 3, seed=2), returns, mask, clip=None, num_tokens=6)
    close(loss, 0.5 * torch.nn.functional.mse_loss(new, returns))
    assert sums == {}


# T13: the KL as a loss. Each token of a vocabulary of 5 counts with its probability: the sum is the
# expectation over samples of the policy.
def gradient_of_expected_loss(estimator, logits, ref_logits):
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    ref_logprobs, probs = ref_logits.log_softmax(-1), logprobs.detach().exp()
    total = sum(
        probs[i]
        * kl_loss(
            estimator,
            logprobs[i].view(1, 1),
            ref_logprobs[i].view(1, 1),
            torch.ones(1, 1, dtype=torch.bool),
            num_tokens=1,
        )
        for i in range(5)
    )
    return torch.autograd.grad(total, logits)[0]


def exact_gradient(divergence):
    logits = random(5).requires_grad_()
    return torch.autograd.grad(divergence(logits.log_softmax(-1)), logits)[0]


def test_t13_the_gradient_of_k2_as_a_loss_is_that_of_the_kl():
    ref = random(5, seed=1).log_softmax(-1)
    expected = exact_gradient(lambda logp: (logp.exp() * (logp - ref)).sum())
    close(gradient_of_expected_loss("k2", random(5), random(5, seed=1)), expected)


def test_t13_the_gradient_of_k3_as_a_loss_is_that_of_the_other_direction():
    ref = random(5, seed=1).log_softmax(-1)
    expected = exact_gradient(lambda logp: (ref.exp() * (ref - logp)).sum())
    close(gradient_of_expected_loss("k3", random(5), random(5, seed=1)), expected)


def test_t13_k1_as_a_loss_has_no_gradient_which_is_why_recipes_refuse_it():
    close(gradient_of_expected_loss("k1", random(5), random(5, seed=1)), torch.zeros(5))


def test_entropy_bonus_is_the_mean_entropy_and_carries_its_gradient():
    logits = random(1, 2, 6).requires_grad_()
    mask = torch.tensor([[T, F]])
    bonus = entropy_bonus(token_entropy(logits), mask, num_tokens=1)
    expected = torch.distributions.Categorical(logits=logits[0, 0]).entropy()
    close(bonus.detach(), expected.detach())
    (gradient,) = torch.autograd.grad(bonus, logits, retain_graph=True)
    close(gradient, torch.autograd.grad(expected, logits)[0])


# What no loss may depend on: garbage outside the mask, and how a step is cut into micro-batches.
MASK = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
LOSSES = {
    "policy": lambda new, old, target, mask: (
        ppo_policy_loss(new, old, target, mask, clip=0.2, num_tokens=11).loss
    ),
    "dual clip": lambda new, old, target, mask: (
        ppo_policy_loss(new, old, target, mask, clip=0.2, num_tokens=11, dual_clip=1.5).loss
    ),
    "value": lambda new, old, target, mask: (
        ppo_value_loss(new, old, target, mask, clip=0.2, num_tokens=11).loss
    ),
    "value without clip": lambda new, old, target, mask: (
        ppo_value_loss(new, old, target, mask, clip=None, num_tokens=11).loss
    ),
    "k2": lambda new, old, target, mask: kl_loss("k2", new, old, mask, num_tokens=11),
    "k3": lambda new, old, target, mask: kl_loss("k3", new, old, mask, num_tokens=11),
    "entropy": lambda new, old, target, mask: entropy_bonus(new, mask, num_tokens=11),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def three(seed=0):
    return [random(4, 5, seed=seed + s) for s in range(3)]


@each_loss
@pytest.mark.parametrize("value", [1e9, math.nan, math.inf, -math.inf])
def test_garbage_outside_the_mask_changes_no_loss_and_no_gradient(loss, value):
    def result(tensors):
        new, *rest = tensors
        new = new.clone().requires_grad_()
        total = loss(new, *rest, MASK)
        total.backward()
        return total.detach(), new.grad

    clean, clean_gradient = result(three())
    dirty, gradient = result([torch.where(MASK, x, value) for x in three()])
    close(dirty, clean)
    close(gradient, clean_gradient)
    assert not gradient[~MASK].any()


# T21: the mean is over the tokens of the optimiser step, however it is split.
@each_loss
@pytest.mark.parametrize("size", [1, 2, 4])
def test_t21_micro_batches_add_up_to_the_whole(loss, size):
    new, old, target = three()
    new.requires_grad_()
    (expected,) = torch.autograd.grad(loss(new, old, target, MASK), new)
    for rows in torch.arange(4).split(size):
        loss(new[rows], old[rows], target[rows], MASK[rows]).backward()
    close(new.grad, expected, atol=1e-7)


# T32: a response of no token at all gives no gradient, and no NaN.
@each_loss
def test_t32_losses_survive_rows_without_a_token(loss):
    new, old, target = (x[:2] for x in three())
    mask = torch.tensor([[F] * 5, [T] + [F] * 4])
    new = new.clone().requires_grad_()
    loss(new, old, masked_whiten(target, mask), mask).backward()
    assert torch.isfinite(new.grad).all()
    assert not new.grad[0].any()
