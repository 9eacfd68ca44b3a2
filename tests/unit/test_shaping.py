"""From scores to advantages: scaling, penalties, the one place of the KL, truncated responses."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from align.errors import TrainingError
from align.recipe_ppo import Ppo, RewardScaling
from pipelines.shaping import ScoreScaler, estimate, outcome, split_kl_coef, worth

SETTINGS = {
    "lr": 1e-3,
    "batch_size": 4,
    "minibatch_size": 4,
    "steps": 4,
    "max_new_tokens": 5,
    "lam": 1.0,  # with gamma 1: the first return is the sum of the rewards
}
LENGTHS = (5, 1, 3, 5)
SCORES = (2.0, -1.0, 0.5, 4.0)


def section(**changes):
    return Ppo.model_validate(SETTINGS | changes)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rollout(scores=SCORES, ended=(True, True, True, False), **changes):
    """Rows of 5, 1, 3 and 5 tokens; the last is as long as the first, but did not end."""
    columns = {
        "scores": torch.tensor(scores),
        "ended": torch.tensor(ended),
        "mask": torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1),
        "logprobs": random(4, 5),
        "ref_logprobs": random(4, 5, seed=1),
        "values": random(4, 5, seed=2),
        "last_values": None,
    }
    return SimpleNamespace(**(columns | changes))


def scaler(mode="none", clip=None):
    return ScoreScaler(RewardScaling(mode=mode, clip=clip))


def first_returns(estimates):
    return estimates.returns[:, 0].tolist()


def sums(x, lengths=LENGTHS):
    return [float(x[row, :length].sum()) for row, length in enumerate(lengths)]


# T14: the KL counts once.
def test_t14_kl_in_the_reward_is_in_no_loss():
    r = rollout()
    result = estimate(r, section(), 0.1, scaler())
    expected = [
        s - 0.1 * kl for s, kl in zip(SCORES, sums(r.logprobs - r.ref_logprobs), strict=True)
    ]
    assert first_returns(result) == pytest.approx(expected, abs=1e-5)
    assert result.kl_loss_coef == 0.0


def test_t14_kl_in_the_loss_is_in_no_reward():
    in_loss = section(kl={"coef": 0.0, "loss_coef": 0.3, "estimator": "k2"})
    result = estimate(rollout(), in_loss, 0.3, scaler())
    assert first_returns(result) == pytest.approx(SCORES, abs=1e-5)
    assert result.kl_loss_coef == 0.3
    elsewhere = estimate(rollout(ref_logprobs=random(4, 5, seed=9)), in_loss, 0.3, scaler())
    assert torch.equal(result.advantages, elsewhere.advantages)


@pytest.mark.parametrize("kl", [{"coef": 0.2}, {"coef": 0.0, "loss_coef": 0.2, "estimator": "k3"}])
def test_t14_the_coefficient_goes_to_one_place_and_is_the_one_that_adapts(kl):
    parts = split_kl_coef(section(kl=kl).kl, 0.7)
    assert sorted(parts) == [0.0, 0.7]
    assert parts.index(0.7) == ("loss_coef" in kl)


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [("k2", lambda d: 0.5 * d**2), ("k3", lambda d: torch.exp(-d) - 1 + d)],
)
def test_t13_the_kl_in_the_reward_is_estimated_as_the_recipe_says(estimator, kl):
    r = rollout()
    result = estimate(r, section(kl={"coef": 0.1, "estimator": estimator}), 0.1, scaler())
    penalties = sums(kl(r.logprobs - r.ref_logprobs))
    expected = [s - 0.1 * p for s, p in zip(SCORES, penalties, strict=True)]
    assert first_returns(result) == pytest.approx(expected, abs=1e-4)


# T17: stopped and cut off are different ends.
def test_t17_without_bootstrapping_every_response_ends_with_its_score():
    result = estimate(rollout(), section(), 0.0, scaler())
    assert first_returns(result) == pytest.approx(SCORES, abs=1e-5)


def test_t17_the_value_after_a_truncated_response_stands_in_for_its_score():
    last_values = torch.tensor([7.0, math.nan, 7.0, 7.0])  # what ended does not look at it
    truncated = section(bootstrap_truncated=True)
    result = estimate(rollout(last_values=last_values), truncated, 0.0, scaler())
    assert first_returns(result) == pytest.approx([*SCORES[:3], 7.0], abs=1e-5)


def test_t17_a_critic_that_is_right_sees_no_advantage_in_never_ending():
    # Every response is worth 3, and the critic knows it: cut off or not, there is nothing to gain.
    r = rollout(
        scores=(3.0,) * 4,
        ended=(True, False, True, False),
        values=torch.full((4, 5), 3.0),
        last_values=torch.full((4,), 3.0),
    )
    result = estimate(r, section(bootstrap_truncated=True), 0.0, scaler())
    assert_close(result.advantages, torch.zeros(4, 5))
    assert_close(result.returns, torch.where(r.mask, 3.0, 0.0))


# T19, T20: whitened once over the rollout; returns are not.
def test_t20_advantages_are_whitened_over_the_rollout_and_returns_are_not():
    r = rollout()
    result = estimate(r, section(), 0.1, scaler())
    inside = result.advantages[r.mask]
    assert float(inside.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(inside.var(correction=0)) == pytest.approx(1.0, abs=1e-5)
    raw = (result.returns - r.values)[r.mask]
    assert_close(inside, (raw - raw.mean()) / raw.std(correction=0), rtol=1e-4, atol=1e-5)
    assert not result.advantages[~r.mask].any()


def test_t32_a_rollout_of_one_token_is_estimated():
    one = SimpleNamespace(
        scores=torch.tensor([2.0]),
        ended=torch.tensor([True]),
        mask=torch.tensor([[True]]),
        logprobs=torch.tensor([[-1.0]]),
        ref_logprobs=torch.tensor([[-1.5]]),
        values=torch.tensor([[0.5]]),
        last_values=None,
    )
    result = estimate(one, section(), 0.1, scaler("running"))
    # Its score is all there is to scale by: 0. The KL of 0.5 costs 0.05.
    assert float(result.returns) == pytest.approx(-0.05)
    assert float(result.advantages) == pytest.approx(-0.55)


# T25: the offset and scale of scores.
def test_t25_sft_scaling_removes_the_offset_and_scale_of_the_reward_model():
    plain, other = scaler("sft"), scaler("sft")
    for scores in (SCORES, (9.0, 3.0, 1.0, -2.0)):
        moved = tuple(1000 + 50 * s for s in scores)
        expected = estimate(rollout(scores), section(), 0.05, plain)
        result = estimate(rollout(moved), section(), 0.05, other)
        assert_close(result.returns, expected.returns, rtol=1e-3, atol=1e-4)


def test_t25_sft_statistics_are_those_of_the_first_rollout_for_good():
    frozen = scaler("sft")
    mean, std = 1.375, math.sqrt((0.625**2 + 2.375**2 + 0.875**2 + 2.625**2) / 4)
    for scores in (SCORES, (9.0, 3.0, 1.0, -2.0)):
        expected = [(s - mean) / std for s in scores]
        assert frozen.scale(torch.tensor(scores)).tolist() == pytest.approx(expected, rel=1e-5)


def test_t25_running_statistics_are_those_of_all_rollouts_so_far():
    running = scaler("running")
    seen = []
    for seed in range(3):
        scores = random(6, seed=seed) + 10 * seed
        seen.append(scores)
        everything = torch.cat(seen)
        expected = (scores - everything.mean()) / everything.std(correction=0)
        assert_close(running.scale(scores), expected, rtol=1e-4, atol=1e-5)


def test_scores_are_cut_after_scaling_and_the_metrics_say_so():
    # mean 0, standard deviation 2
    r = rollout(scores=(2.0, -2.0, 2.0, -2.0))
    second = rollout(scores=(10.0, -1.0, -4.0, 0.0))
    cut = scaler("sft", clip=1.5)
    estimate(r, section(), 0.0, cut)
    result = estimate(second, section(), 0.0, cut)
    assert first_returns(result) == pytest.approx([1.5, -0.5, -1.5, 0.0], abs=1e-5)
    assert result.metrics == pytest.approx(
        {
            "score/offset": 0.0,
            "score/scale": 2.0,
            "score/clip_fraction": 0.5,
            "score/scaled_mean": -0.125,
            "score/scaled_std": math.sqrt((1.625**2 + 0.375**2 + 1.375**2 + 0.125**2) / 4),
        }
    )
    assert estimate(second, section(), 0.0, scaler()).metrics == {}


def test_t25_sft_scores_without_spread_are_refused():
    equal = torch.full((4,), 0.1)
    rounded = torch.tensor([0.1, 0.1, 0.1, 0.1 + 1e-8])  # one float32 further
    assert not torch.equal(rounded, equal)
    for scores in (equal, rounded):
        with pytest.raises(TrainingError, match=r"mode=sft: all 4 scores .* are 0\.1, so there"):
            scaler("sft").scale(scores)
    assert not scaler("running").scale(equal).any()


# T27: the penalty is in units of the scaled score, and falls on what did not end, however long.
@pytest.mark.parametrize(("mode", "expected"), [("subtract", 0.5 - 3.0), ("replace", 3.0)])
def test_t27_the_missing_eos_penalty_comes_after_scaling(mode, expected):
    penalised = section(missing_eos={"mode": mode, "value": 3.0})
    # mean 3, standard deviation 2: scaled to 1, -1, 1, -1, and 4 to 0.5
    known = scaler("sft")
    known.scale(torch.tensor([5.0, 1.0, 5.0, 1.0]))
    result = estimate(rollout(scores=(5.0, 1.0, 5.0, 4.0)), penalised, 0.0, known)
    assert first_returns(result) == pytest.approx([1.0, -1.0, 1.0, expected], abs=1e-5)


# What a policy is worth is what PPO maximises: the sum of a response's rewards.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"missing_eos": {"mode": "subtract", "value": 3.0}},
        {"missing_eos": {"mode": "replace", "value": -1.0}},
        {"bootstrap_truncated": True},
    ],
    ids=str,
)
def test_worth_is_the_mean_of_what_the_responses_are_paid(changes):
    whole = section(reward_scaling={"mode": "running", "clip": 1.2}, **changes)
    seen = rollout(last_values=random(4, seed=3), kl=random(4, 5) - random(4, 5, seed=1))
    known = ScoreScaler(whole.reward_scaling)
    # With gamma and lambda 1 the first return is the sum of all rewards, and of what follows.
    paid = first_returns(estimate(seen, whole, 0.3, known))
    assert worth(outcome(seen), whole, 0.3, known) == pytest.approx(sum(paid) / 4, abs=1e-5)
