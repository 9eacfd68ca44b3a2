"""When PPO ends early, and what the person reads then."""

import pytest

from align.recipe_ppo import Ppo
from pipelines.stopping import Stopping

SETTINGS = {"lr": 1e-3, "batch_size": 4, "minibatch_size": 4, "steps": 4, "max_new_tokens": 5}
FINE = {"kl/mean": 3.0, "repetitive_rate": 0.1, "empty_rate": 0.0}


def stopping(**changes):
    return Stopping(Ppo.model_validate(SETTINGS | changes))


def probe(heldout, score):
    return FINE | {"probe/heldout_reward": heldout, "probe/score": score}


def test_nothing_stops_a_run_whose_recipe_sets_no_limit():
    awful = {"kl/mean": 1e6, "repetitive_rate": 1.0, "empty_rate": 1.0}
    assert stopping().reason(1, awful | {"probe/heldout_reward": -9.0, "probe/score": 9.0}) is None


@pytest.mark.parametrize(
    ("limits", "key", "limit"),
    [
        ({"kl": {"stop": 10.0}}, "kl/mean", "ppo.kl.stop=10.0"),
        ({"stop": {"repetitive_rate": 0.5}}, "repetitive_rate", "ppo.stop.repetitive_rate=0.5"),
        ({"stop": {"empty_rate": 0.2}}, "empty_rate", "ppo.stop.empty_rate=0.2"),
    ],
)
def test_a_metric_above_its_limit_stops_and_one_at_it_does_not(limits, key, limit):
    watch, value = stopping(**limits), float(limit.split("=")[1])
    assert watch.reason(1, FINE) is None
    assert watch.reason(2, FINE | {key: value}) is None
    reason = watch.reason(3, FINE | {key: value + 0.25})
    assert reason is not None
    assert reason.startswith(f"stopped at step 3: {key}={value + 0.25}")
    assert f"exceeds {limit}" in reason
    assert "ppo.lr" in reason  # what a person can do


DIVERGENCE = {"heldout_reward": "judge:gold", "stop": {"divergence": 0.5}}


def test_divergence_stops_when_the_heldout_reward_falls_while_the_score_does_not():
    watch = stopping(**DIVERGENCE)
    looks = [(1.0, 0.0), (2.0, 1.0), (1.6, 2.0), (1.5, 3.0)]
    assert [watch.reason(i, probe(*look)) for i, look in enumerate(looks)] == [None] * 4
    reason = watch.reason(4, probe(1.25, 3.0))
    assert reason is not None
    assert "probe/heldout_reward=1.250 is 0.750 below its best 2.000" in reason
    assert "ppo.stop.divergence=0.5" in reason
    assert "probe/score=3.000 is not below the 1.000" in reason


def test_no_divergence_where_both_fall_or_the_probe_did_not_look():
    watch = stopping(**DIVERGENCE)
    assert watch.reason(0, probe(2.0, 1.0)) is None
    assert watch.reason(1, probe(0.0, 0.9)) is None
    assert watch.reason(2, FINE) is None
    assert watch.reason(3, probe(0.0, 1.0)) is not None


def test_a_new_best_is_compared_with_the_score_it_had():
    watch = stopping(**DIVERGENCE)
    assert watch.reason(0, probe(1.0, 5.0)) is None
    assert watch.reason(1, probe(3.0, 2.0)) is None
    assert watch.reason(2, probe(2.0, 4.0)) is not None
