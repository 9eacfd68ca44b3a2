"""The best policy and the average one: copies that training does not move."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from align.recipe_ppo import Ppo
from pipelines.best_copy import BestCopy
from pipelines.policy_copies import KeptPolicy, PolicyEma
from pipelines.shaping import Outcome, ScoreScaler


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
    best = BestCopy(params)
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
    best = BestCopy(params)
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
    best = BestCopy(params)
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


def keeping(looks, **changes):
    """What decides about the best policy, on a probe that saw ``(scores, ended, kl)`` at each look.

    The policy is one parameter, which is the number of the look.
    """
    settings = {"lr": 1.0, "batch_size": 2, "minibatch_size": 2, "steps": 9, "max_new_tokens": 4}
    section = Ppo.model_validate(settings | {"keep": "best"} | changes)
    policy = parameters(0)
    roles = SimpleNamespace(role_parameters=lambda role: policy if role == "policy" else [])

    def look(step):
        scores, ended, kl = looks[step]
        seen = Outcome(torch.tensor(scores), torch.tensor(ended), torch.tensor(kl), None)
        return {"probe/score": sum(scores) / len(scores)}, seen

    scaler = ScoreScaler(section.reward_scaling)
    kept = KeptPolicy(section, roles, SimpleNamespace(look=look), scaler)
    return kept, policy, scaler


ENDED, CUT = (True, True), (True, False)


def best_of(looks, coefs=(0.1,) * 9, **changes):
    kept, policy, _ = keeping(looks, **changes)
    for step in range(len(looks)):
        set_to(policy, step)
        kept.look(step, {"loss": 10.0 + step}, coefs[step])
    metrics = kept.settle({"loss": -1.0})
    assert read(policy) == [metrics["best_step"]]
    return metrics


def test_the_best_policy_is_judged_as_ppo_is_paid():
    looks = [((1.0, 1.0), ENDED, (0.0, 0.0)), ((2.0, 3.0), CUT, (0.0, 0.0))]
    assert best_of(looks)["best_step"] == 1
    assert best_of(looks, missing_eos={"mode": "subtract", "value": 4.0})["best_step"] == 0
    # An outlier that is cut in training counts no more here.
    looks = [((1.0, 1.0), ENDED, (0.0, 0.0)), ((-2.0, 50.0), ENDED, (0.0, 0.0))]
    assert best_of(looks)["best_step"] == 1
    assert best_of(looks, reward_scaling={"clip": 1.5})["best_step"] == 0


def test_the_best_policy_is_judged_by_the_kl_coefficient_of_the_moment():
    # Worth 2 and 0 at first; with half the KL's weight 3 and 4.
    looks = [((4.0, 4.0), ENDED, (2.0, 2.0)), ((8.0, 8.0), ENDED, (8.0, 8.0))]
    assert best_of(looks, coefs=(1.0, 1.0))["best_step"] == 0
    assert best_of(looks, coefs=(1.0, 0.5))["best_step"] == 1
    # The one kept is judged again, too: not 4 - 0.1 * 2 of then but 4 - 2 of now.
    looks = [((4.0, 4.0), ENDED, (2.0, 2.0)), ((3.0, 3.0), ENDED, (0.0, 0.0))]
    assert best_of(looks, coefs=(0.1, 1.0))["best_step"] == 1


def test_the_final_metrics_are_those_of_the_kept_step():
    looks = [((s, s), ENDED, (0.0, 0.0)) for s in (1.0, 5.0, 2.0)]
    assert best_of(looks) == {"loss": 11.0, "probe/score": 5.0, "best_step": 1.0}


def test_the_last_policy_keeps_the_metrics_of_the_last_step():
    kept, policy, _ = keeping([((1.0, 1.0), ENDED, (0.0, 0.0))], keep="last")
    assert kept.look(0, {"loss": 10.0}, 0.1) == {"loss": 10.0, "probe/score": 1.0}
    assert kept.settle({"loss": -1.0}) == {"loss": -1.0}
    assert read(policy) == [0.0]
