"""Several rewards made one, by hand arithmetic."""

import math

import pytest
import torch

from reward.combine import (
    disagreement,
    ensemble_score,
    scale_warnings,
    source_metrics,
    weighted_sum,
)


def test_a_weighted_sum_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.0], [10.0, -20.0, 3.0]])
    # 0.5 * 1 - 2 * 10,  0.5 * 2 + 2 * 20,  0 - 2 * 3
    assert weighted_sum(scores, [0.5, -2.0]).tolist() == [-19.5, 41.0, -6.0]


def test_a_weight_of_one_changes_nothing_and_scores_become_float32() -> None:
    scores = torch.tensor([[0.1, -3.0]], dtype=torch.float64)
    total = weighted_sum(scores, [1.0])
    assert total.dtype == torch.float32
    assert total.tolist() == pytest.approx([0.1, -3.0])


def test_sums_are_taken_in_float32() -> None:
    # In bfloat16 256 + 1 is 256.
    scores = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    assert weighted_sum(scores, [1.0, 1.0]).tolist() == [257.0]
    assert ensemble_score(scores).tolist() == [128.5]


def test_every_source_needs_a_weight() -> None:
    with pytest.raises(AssertionError, match="1 weights for 2 sources"):
        weighted_sum(torch.zeros(2, 3), [1.0])


def test_an_ensemble_by_hand() -> None:
    # Columns 1 2 3: mean 2, variance (1 + 0 + 1) / 3. Column 0 0 6: mean 2, (4 + 4 + 16) / 3 = 8.
    scores = torch.tensor([[1.0, 0.0, 5.0], [2.0, 0.0, 5.0], [3.0, 6.0, 5.0]])
    spread = [math.sqrt(2 / 3), math.sqrt(8), 0.0]
    assert disagreement(scores).tolist() == pytest.approx(spread)
    expected = [2 - 0.5 * spread[0], 2 - 0.5 * spread[1], 5.0]
    assert ensemble_score(scores, std_penalty=0.5).tolist() == pytest.approx(expected)
    assert ensemble_score(scores).tolist() == [2.0, 2.0, 5.0]


def test_minimum_and_variance_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0, 5.0], [2.0, 0.0, 5.0], [3.0, 6.0, 5.0]])
    assert ensemble_score(scores, "minimum").tolist() == [1.0, 0.0, 5.0]
    expected = [2 - 0.3 * 2 / 3, 2 - 0.3 * 8, 5.0]
    assert ensemble_score(scores, variance_penalty=0.3).tolist() == pytest.approx(expected)


def test_one_model_agrees_with_itself() -> None:
    """The unbiased standard deviation of one number is not a number."""
    assert ensemble_score(torch.tensor([[1.5, -2.0]]), std_penalty=10.0).tolist() == [1.5, -2.0]


def test_order_of_the_models_does_not_matter_and_responses_stay_apart() -> None:
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    combined = ensemble_score(scores, std_penalty=1.3)
    assert ensemble_score(scores.flip(0), std_penalty=1.3).tolist() == pytest.approx(
        combined.tolist()
    )
    for row in range(6):
        alone = ensemble_score(scores[:, row : row + 1], std_penalty=1.3)
        assert alone.tolist() == pytest.approx(combined[row : row + 1].tolist())


def test_metrics_of_sources_by_hand() -> None:
    metrics = source_metrics(
        {
            "short": torch.tensor([[1.0, 2.0, 6.0]]),
            "ensemble": torch.tensor([[0.0, 4.0], [2.0, 4.0]]),
        }
    )
    # Disagreement: 1 on the first response, 0 on the second.
    scales = metrics.pop("score/ensemble/scales")
    assert metrics == {"score/short": 3.0, "score/ensemble": 2.5, "score/ensemble/std": 0.5}
    assert scales == 2.0  # the models' scores are 4 and 2 apart


def test_models_of_different_scales_are_named() -> None:
    alike = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 3.5]])  # the second spreads 1.5 times as far
    metrics = source_metrics(
        {
            "alike": alike,
            "wide": alike * torch.tensor([[4.0], [1.0]]),  # 4 / 1.5
            "single": alike[:1],
            "constant": torch.tensor([[1.0, 1.0], [0.0, 9.0]]),
        }
    )
    found = {key for key in metrics if key.endswith("/scales")}
    assert found == {"score/alike/scales", "score/wide/scales"}
    assert metrics["score/alike/scales"] == pytest.approx(1.5)
    assert metrics["score/wide/scales"] == pytest.approx(4 / 1.5)
    (warning,) = scale_warnings(metrics | {"lr/scales": 9.0, "score/wide/std": 9.0})
    assert warning.startswith("wide: one model's scores spread 2.7 times as far as another's")
    assert "reward.scale_on: demonstrations" in warning
