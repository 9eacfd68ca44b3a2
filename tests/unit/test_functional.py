"""The maths of PPO against hand arithmetic, published vectors and naive loops."""

import math

import pytest
import torch

from align.functional import (
    Moments,
    add_moments,
    explained_variance,
    gae,
    kl_estimate,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    masked_whiten,
    next_kl_coef,
    penalise_missing_eos,
    standardise,
    token_entropy,
    token_logprobs,
    token_rewards,
)
from tests.tensors import close, random

T, F = True, False


def garbage(x, mask, value):
    return torch.where(mask, x, torch.full_like(x, value))


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


def test_t13_kl_k2_is_half_the_squared_log_ratio():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    half = 0.5 * math.log(2) ** 2
    close(kl_k2(p.log(), q.log()), [half, 0.0, half])


def test_t13_kl_is_zero_where_the_policies_agree_and_named_as_it_is_computed():
    p, q = random(2, 3), random(2, 3, seed=1)
    for name, estimator in (("k1", kl_k1), ("k2", kl_k2), ("k3", kl_k3)):
        close(kl_estimate(name, p, p), torch.zeros(2, 3))
        close(kl_estimate(name, p, q), estimator(p, q))


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


def naive_gae(rewards, values, length, gamma, lam, last_value):
    """One row, token by token from the end, in Python's floats."""
    advantages, following, next_value = [0.0] * length, 0.0, last_value
    for t in reversed(range(length)):
        following = rewards[t] + gamma * next_value - values[t] + gamma * lam * following
        advantages[t], next_value = following, values[t]
    return advantages


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 200])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.99, 0.0)])
def test_t18_gae_is_that_of_a_naive_loop_at_every_length(width, gamma, lam):
    lengths = [width, 1, 0, max(1, width // 2), max(0, width - 1)]
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rewards, values = random(5, width), random(5, width, seed=1)
    last_values = random(5, seed=2)
    dirty = (garbage(rewards, mask, math.nan), garbage(values, mask, math.inf))
    advantages, returns = gae(*dirty, mask, gamma=gamma, lam=lam, last_values=last_values)
    for row, length in enumerate(lengths):
        expected = naive_gae(
            rewards[row].tolist(), values[row].tolist(), length, gamma, lam, float(last_values[row])
        )
        close(advantages[row], expected + [0.0] * (width - length), atol=1e-4)
        # T19: returns are the advantages before whitening plus the values.
        close(
            returns[row, :length],
            torch.tensor(expected) + values[row, :length],
            atol=1e-4,
        )
        assert not returns[row, length:].any()


def test_t17_only_rows_with_a_last_value_are_bootstrapped():
    mask = torch.tensor([[T, T, F], [T, T, F]])
    rewards, values = torch.zeros(2, 3), torch.full((2, 3), 0.5)
    last = torch.tensor([0.0, 0.8])
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=1.0, last_values=last)
    # ended: 0.9 * 0 - 0.5; truncated: 0.9 * 0.8 - 0.5; one step before: 0.9 * 0.5 - 0.5 more
    close(advantages, [[-0.05 - 0.45, -0.5, 0.0], [-0.05 + 0.9 * 0.22, 0.22, 0.0]])
    without, _ = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    close(without[1], advantages[0])


# T8, T27: what a missing stop token costs.
def test_t27_missing_eos_is_subtracted_or_replaced_only_where_the_response_did_not_end():
    scores, ended = torch.tensor([2.0, 2.0, -1.0]), torch.tensor([T, F, F])
    close(penalise_missing_eos(scores, ended, mode="subtract", value=1.0), [2.0, 1.0, -2.0])
    close(penalise_missing_eos(scores, ended, mode="replace", value=-1.0), [2.0, -1.0, -1.0])


# T25: the offset and scale of scores.
def test_t25_moments_of_batches_are_those_of_all_values_together():
    batches = [random(7) * 3 + 100, random(1, seed=1), random(64, seed=2) - 40]
    moments = Moments()
    for i, batch in enumerate(batches, start=1):
        moments = add_moments(moments, batch)
        seen = torch.cat(batches[:i]).double()
        assert moments.num_values == len(seen)
        assert moments.mean == pytest.approx(float(seen.mean()), rel=1e-12)
        assert moments.std == pytest.approx(float(seen.std(correction=0)), rel=1e-12)


def test_t25_moments_survive_many_batches_far_from_zero():
    moments = Moments()
    for _ in range(10_000):
        moments = add_moments(moments, torch.tensor([10_000.0, 10_001.0]))
    assert (moments.mean, moments.std) == pytest.approx((10_000.5, 0.5), rel=1e-9)


def test_t25_standardised_scores():
    close(standardise(torch.tensor([1.0, 5.0, 3.0]), mean=3.0, std=2.0), [-1.0, 1.0, 0.0])
    close(standardise(torch.tensor([4.0, 4.0]), mean=4.0, std=0.0), [0.0, 0.0])
    assert Moments().std == 0.0


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
