"""The maths of PPO against hand arithmetic, published vectors and naive loops."""

import math

import pytest
import torch
from torch.testing import assert_close

from align.functional import (
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    masked_mean,
    masked_whiten,
    next_kl_coef,
    penalise_missing_eos,
    ppo_policy_loss,
    ppo_value_loss,
    token_entropy,
    token_logprobs,
    token_rewards,
)

T, F = True, False


def close(actual, expected, atol=1e-6):
    assert_close(actual, torch.as_tensor(expected, dtype=torch.float32), rtol=1e-5, atol=atol)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# T20: whitening. The vectors are those of "The N implementation details of RLHF with PPO".
REWARDS = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])


def test_t20_whiten_without_shift_keeps_the_mean_as_published():
    whitened = masked_whiten(REWARDS, torch.ones(3, 3, dtype=torch.bool), shift_mean=False)
    close(whitened[0], [0.0508, 0.4381, 0.8254], atol=1e-4)
    close(whitened.mean(), 1.6)


def test_t20_whiten_has_mean_zero_and_biased_variance_one():
    whitened = masked_whiten(REWARDS, torch.ones(3, 3, dtype=torch.bool))
    close(whitened.mean(), 0.0)
    close(whitened.var(correction=0), 1.0)


def test_t20_whiten_sees_only_the_mask():
    mask = torch.tensor([[T, T, F], [T, F, F]])
    x = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -9.0]])
    # mean 3, variance (4 + 1 + 9) / 3
    scale = 1 / math.sqrt(14 / 3)
    close(masked_whiten(x, mask), [[-2 * scale, -scale, 0.0], [3 * scale, 0.0, 0.0]])


@pytest.mark.parametrize("mask", [[[F, F]], [[T, F]]])
def test_t32_whiten_and_mean_survive_zero_and_one_token(mask):
    x, mask = torch.tensor([[5.0, 7.0]]), torch.tensor(mask)
    close(masked_whiten(x, mask), torch.where(mask, x, 0.0))
    assert torch.isfinite(masked_mean(x, mask))


# T1: temperature divides the logits.
def test_t1_logprobs_at_a_temperature_match_the_library_softmax():
    logits, ids = random(2, 3, 7), torch.tensor([[0, 6, 3], [1, 1, 2]])
    for temperature in (1.0, 0.7, 2.0):
        expected = torch.log_softmax(logits / temperature, -1)
        expected = torch.stack([expected[b, t, ids[b, t]] for b in range(2) for t in range(3)])
        close(token_logprobs(logits, ids, temperature).flatten(), expected)


def test_t30_logprobs_of_bf16_logits_are_float32():
    logprobs = token_logprobs(random(1, 2, 50).bfloat16(), torch.tensor([[3, 4]]))
    assert logprobs.dtype == torch.float32


def test_entropy_of_a_uniform_distribution_is_log_v():
    close(token_entropy(torch.zeros(1, 2, 50)), [[math.log(50)] * 2])


# T13: estimators of the KL divergence.
def test_t13_kl_estimators_agree_with_the_exact_kl_in_expectation():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    exact = 0.5 * math.log(2.5) + 0.2 * math.log(0.4)
    close((p * kl_k1(p.log(), q.log())).sum(), exact)
    close((p * kl_k3(p.log(), q.log())).sum(), exact)
    assert (kl_k1(p.log(), q.log()) < 0).any()
    assert (kl_k3(p.log(), q.log()) >= 0).all()


# T12: reward per token.
def test_t12_token_rewards_put_the_score_at_the_last_real_token():
    mask = torch.tensor([[T, T, T], [T, F, F]])
    kl = torch.tensor([[0.5, -1.0, 2.0], [4.0, math.nan, math.inf]])
    rewards = token_rewards(torch.tensor([10.0, -3.0]), kl, mask, kl_coef=0.1)
    close(rewards, [[-0.05, 0.1, 9.8], [-3.4, 0.0, 0.0]])


def test_t12_rewards_sum_to_score_minus_weighted_kl():
    lengths = torch.tensor([4, 1, 3])
    mask = torch.arange(4) < lengths.unsqueeze(1)
    kl, scores = random(3, 4), random(3, seed=1)
    rewards = token_rewards(scores, kl, mask, kl_coef=0.05)
    for row, length in enumerate(lengths):
        close(rewards[row].sum(), scores[row] - 0.05 * kl[row, :length].sum())


# The golden episode: KL coefficient 0.05, k1, values 0.5 0.6 0.8, score 1, lambda 0.95.
def test_golden_advantages():
    mask = torch.ones(1, 3, dtype=torch.bool)
    kl, values = torch.tensor([[0.4, -0.2, 0.2]]), torch.tensor([[0.5, 0.6, 0.8]])
    rewards = token_rewards(torch.tensor([1.0]), kl, mask, kl_coef=0.05)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    close(advantages, [[0.4510, 0.3905, 0.19]], atol=1e-4)
    close(returns, [[0.9510, 0.9905, 0.99]], atol=1e-4)


# T11, T17, T18, T32: a table by hand, gamma 0.9, lambda 0.5. Row 2 is one token long.
def test_t18_gae_by_hand_restarts_at_each_rows_last_token():
    mask = torch.tensor([[T, T, T], [T, F, F]])
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 99.0, math.nan]])
    values = torch.tensor([[0.2, 0.4, 0.6], [0.5, 77.0, math.inf]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    a2 = 1.0 - 0.6
    a1 = 0.9 * 0.6 - 0.4 + 0.45 * a2
    a0 = 0.9 * 0.4 - 0.2 + 0.45 * a1
    close(advantages, [[a0, a1, a2], [1.5, 0.0, 0.0]])
    close(returns, [[a0 + 0.2, a1 + 0.4, a2 + 0.6], [2.0, 0.0, 0.0]])  # T19


def test_t19_with_lambda_and_gamma_one_returns_are_rewards_to_go():
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    rewards, values = random(3, 6), random(3, 6, seed=1)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for row, length in enumerate((6, 2, 4)):
        for t in range(length):
            close(returns[row, t], rewards[row, t:length].sum(), atol=1e-5)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.99, 1.0)])
def test_gae_is_the_discounted_sum_of_deltas(gamma, lam):
    length = 7
    mask = torch.ones(1, length, dtype=torch.bool)
    rewards, values = random(1, length), random(1, length, seed=1)
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam)
    v = [*values[0].tolist(), 0.0]
    deltas = [float(rewards[0, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
    for t in range(length):
        expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
        close(advantages[0, t], expected, atol=1e-5)


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


def garbage(x, mask, value):
    return torch.where(mask, x, torch.full_like(x, value))


@pytest.mark.parametrize("value", [1e9, math.nan, -math.inf])
def test_garbage_outside_the_mask_changes_no_loss_and_no_gradient(value):
    mask = torch.arange(4) < torch.tensor([[4], [1], [2]])
    tensors = [random(3, 4, seed=s) for s in range(4)]

    def losses(parts):
        new, old, advantages, returns = parts
        new = new.clone().requires_grad_()
        policy = ppo_policy_loss(new, old, advantages, mask, clip=0.2, num_tokens=7).loss
        critic = ppo_value_loss(new, old, returns, mask, clip=0.2, num_tokens=7).loss
        (policy + critic).backward()
        return policy.detach(), critic.detach(), garbage(new.grad, mask, 0.0)

    # Log-probabilities of padding are finite; advantages and returns are 0 there.
    new, old, advantages, returns = tensors
    dirty = [
        garbage(new, mask, 50.0 if not math.isfinite(value) else -50.0),
        garbage(old, mask, 3.0),
        garbage(advantages, mask, value),
        garbage(returns, mask, 7.0),
    ]
    for clean_part, dirty_part in zip(losses(tensors), losses(dirty), strict=True):
        close(dirty_part, clean_part)


# T21: the mean is over the tokens of the optimiser step, however it is split.
@pytest.mark.parametrize("size", [1, 2, 4])
def test_t21_micro_batches_add_up_to_the_whole(size):
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
    logprobs, advantages = random(4, 5), random(4, 5, seed=1)
    new = random(4, 5, seed=2).requires_grad_()
    whole = ppo_policy_loss(new, logprobs, advantages, mask, clip=0.2, num_tokens=11).loss
    (expected,) = torch.autograd.grad(whole, new)
    for rows in torch.arange(4).split(size):
        ppo_policy_loss(
            new[rows], logprobs[rows], advantages[rows], mask[rows], clip=0.2, num_tokens=11
        ).loss.backward()
    close(new.grad, expected, atol=1e-7)


# T8, T27: what a missing stop token costs.
def test_t27_missing_eos_is_subtracted_or_replaced_only_where_the_response_did_not_end():
    scores, ended = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([T, F, F])
    close(penalise_missing_eos(scores, ended, mode="subtract", value=1.0), [2.0, 1.0, -2.0])
    close(penalise_missing_eos(scores, ended, mode="replace", value=-1.0), [2.0, -1.0, -1.0])


# Ziegler et al. 2019: error clipped to 0.2, gain n / horizon.
@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.15), (60.0, 0.15 * 1.00512), (0.0, 0.15 * 0.99488), (6.6, 0.150384)],
)
def test_adaptive_kl_coefficient(kl, expected):
    coef = next_kl_coef(0.15, kl, target=6.0, horizon=10_000, num_responses=256)
    assert coef == pytest.approx(expected, rel=1e-6)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[T, T, T, F]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((1, 4), 2.0), returns, mask) == 0.0
    # residuals -0.5, 0.5, 0: variance 1/6 of 2/3
    values = torch.tensor([[1.5, 1.5, 3.0, 0.0]])
    assert explained_variance(values, returns, mask) == pytest.approx(0.75)
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask))
