"""Calibration of a reward model's probabilities against hand arithmetic and drawn winners."""

import math

import pytest
import torch

from reward.reliability import (
    brier_score,
    calibration_error,
    cross_scaled,
    expected_calibration_error,
    fit_temperature,
    reliability,
)


def test_calibration_error_by_hand() -> None:
    """Scores ln 3 apart say 75 %; equal ones 50 %, of which half is right."""
    ln3 = math.log(3)
    groups = torch.arange(4).repeat_interleave(2)
    scores = torch.tensor([ln3, 0.0, ln3, 0.0, ln3, 0.0, ln3, 0.0])

    def error(targets: list[float], scores: torch.Tensor = scores) -> float:
        return calibration_error(scores, groups, torch.tensor(targets))

    right, wrong = [1.0, 0.0], [0.0, 1.0]
    assert error(right * 3 + wrong) == pytest.approx(0.0, abs=1e-7)
    assert error(right * 4) == pytest.approx(0.25)
    assert error(wrong * 4) == pytest.approx(0.75)
    assert error(right * 4, torch.zeros(8)) == 0.0
    # Bins of their own: 75 % said and right once of 2, 90 % said and right once of 2.
    ln9 = math.log(9)
    mixed = torch.tensor([ln3, 0.0, ln3, 0.0, ln9, 0.0, 0.0, ln9])
    assert error(right + wrong + right * 2, mixed) == pytest.approx((0.25 + 0.4) / 2)
    assert math.isnan(error([1.0] * 8))


def test_calibration_error_of_a_model_that_says_the_truth_is_small() -> None:
    """Winners drawn by Bradley-Terry; of a model too sure of itself it is large."""
    generator = torch.Generator().manual_seed(0)
    pairs = 2_000
    difference = torch.randn(pairs, generator=generator) * 2
    first_wins = torch.rand(pairs, generator=generator) < torch.sigmoid(difference)
    scores = torch.stack([difference, torch.zeros(pairs)], 1).flatten()
    targets = torch.stack([first_wins, ~first_wins], 1).flatten().float()
    groups = torch.arange(pairs).repeat_interleave(2)
    assert calibration_error(scores, groups, targets) < 0.05
    assert calibration_error(3 * scores, groups, targets) > 0.1


def test_the_diagram_by_hand() -> None:
    """75 % said three times, right twice; 90 % said once and wrong; nothing in between."""
    ln3, ln9 = math.log(3), math.log(9)
    diagram = reliability(torch.tensor([ln3, -ln9, ln3, -ln3]))
    assert [part.pairs for part in diagram] == [3, 1]
    assert diagram[0] == pytest.approx((0.75, 2 / 3, 3))
    assert diagram[1] == pytest.approx((0.9, 0.0, 1))
    error = (3 * abs(0.75 - 2 / 3) + 0.9) / 4
    assert expected_calibration_error(diagram) == pytest.approx(error)


def test_brier_score_by_hand() -> None:
    ln3 = math.log(3)
    assert brier_score(torch.tensor([ln3, ln3, -ln3])) == pytest.approx((2 * 0.25**2 + 0.75**2) / 3)
    assert brier_score(torch.zeros(5)) == 0.25


def test_the_temperature_makes_what_is_said_what_is_right() -> None:
    # All differences are 2, and 3 of 4 are right: sigmoid(2 / T) = 3 / 4 at T = 2 / ln 3.
    assert fit_temperature(torch.tensor([2.0, 2.0, 2.0, -2.0])) == pytest.approx(2 / math.log(3))
    assert fit_temperature(torch.tensor([1.0, 2.0])) == pytest.approx(0.01)
    assert fit_temperature(torch.tensor([-1.0, -2.0])) == pytest.approx(100.0)


def test_each_half_is_scaled_by_the_other() -> None:
    # Prompts 3 and 8 are the halves: T = 2 / ln 3 of the first, 4 / ln 3 of the second.
    first, second = torch.tensor([2.0, 2.0, 2.0, -2.0]), torch.tensor([4.0, 4.0, -4.0, 4.0])
    scaled = cross_scaled(torch.cat([first, second]), torch.tensor([3] * 4 + [8] * 4))
    ln3 = math.log(3)
    expected = torch.cat([first / 4 * ln3, second / 2 * ln3]).double()
    torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=0)


def test_scaling_helps_a_model_that_is_too_sure() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(2_000, generator=generator) * 2
    wins = torch.rand(2_000, generator=generator) < torch.sigmoid(truth)
    seen = torch.where(wins, truth, -truth) * 3
    assert fit_temperature(seen) == pytest.approx(3.0, rel=0.1)
    before = expected_calibration_error(reliability(seen))
    after = expected_calibration_error(reliability(cross_scaled(seen, torch.arange(2_000))))
    assert before > 0.1
    assert after < 0.05
