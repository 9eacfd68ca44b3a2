"""Shares, intervals and comparisons, against hand arithmetic and exact distributions."""

import itertools
import math

import pytest

from pipelines.win_rate import bootstrap, repeated_share, wins


def test_a_tie_is_half_a_win() -> None:
    assert wins([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]) == [1.0, 0.5, 0.0]


def test_wins_refuses_lists_of_different_length() -> None:
    with pytest.raises(ValueError, match="shorter"):
        wins([1.0], [])


def test_equal_values_have_an_interval_of_no_width() -> None:
    estimate = bootstrap([0.25] * 7, resamples=50, seed=3)
    assert (estimate.mean, estimate.low, estimate.high) == (0.25, 0.25, 0.25)


def test_interval_of_shares_matches_the_binomial_distribution() -> None:
    # 60 wins of 100: a resampled share is Binomial(100, 0.6) / 100. Its exact 5 % and 95 %
    # points, found by summing the probabilities, are 0.52 and 0.68.
    def point(quantile: float) -> float:
        total = 0.0
        for k in range(101):
            total += math.comb(100, k) * 0.6**k * 0.4 ** (100 - k)
            if total >= quantile:
                return k / 100
        raise AssertionError

    assert (point(0.05), point(0.95)) == (0.52, 0.68)
    estimate = bootstrap([1.0] * 60 + [0.0] * 40, resamples=4_000, seed=0)
    assert estimate.mean == pytest.approx(0.6)
    assert estimate.low == pytest.approx(0.52, abs=0.011)
    assert estimate.high == pytest.approx(0.68, abs=0.011)


def test_three_values_against_all_27_resamples() -> None:
    values = [0.0, 1.0, 5.0]
    means = sorted(sum(drawn) / 3 for drawn in itertools.product(values, repeat=3))
    # 27 equally likely means: the 5 % point is the second lowest (1/27 < 5 % < 2/27), and the
    # 95 % point lies in the run of the second highest (a mean of 11/3 has 3 of 27 chances).
    assert means[1] == pytest.approx(1 / 3)
    assert means[25] == pytest.approx(11 / 3)
    estimate = bootstrap(values, resamples=20_000, seed=1)
    assert estimate.mean == pytest.approx(2.0)
    assert estimate.low == pytest.approx(1 / 3)
    assert estimate.high == pytest.approx(11 / 3)


def test_the_seed_decides_the_interval() -> None:
    values = [float(i * i % 17) for i in range(40)]
    first = bootstrap(values, resamples=30, seed=5)
    assert first == bootstrap(values, resamples=30, seed=5)
    assert first != bootstrap(values, resamples=30, seed=6)


def test_bootstrap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([], resamples=10, seed=0)


def test_estimate_metrics_use_the_documented_keys() -> None:
    estimate = bootstrap([1.0], resamples=2, seed=0)
    assert set(estimate.metrics("ppo/win_rate")) == {
        "ppo/win_rate/mean",
        "ppo/win_rate/low",
        "ppo/win_rate/high",
    }


def test_repeated_share_counts_grams_seen_before() -> None:
    assert repeated_share([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeated_share([7] * 8) == pytest.approx(4 / 5)  # five 4-grams, all the same
    assert repeated_share([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)  # 1212 2121 1212
    assert repeated_share([1, 1, 1]) == 0.0  # too short for one
