"""Scoring many rows: order, batches and padding change nothing."""

import pytest
import torch
from torch import Tensor

from reward.scorer import pad_rows, score_rows


def mean_id(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A score that would show any padding it sees."""
    return (input_ids * attention_mask).sum(1) / attention_mask.sum(1)


ROWS = [([5], [3]), ([2, 2, 2], [6]), ([9], []), ([1, 1], [1, 1, 11]), ([4, 4], [4, 0])]
MEANS = [4.0, 3.0, 9.0, 3.0, 3.0]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("pad_id", [0, 1, 300])
def test_scores_come_in_the_order_of_the_rows(batch_size: int, pad_id: int) -> None:
    scores = score_rows(mean_id, ROWS, batch_size=batch_size, pad_id=pad_id)
    assert scores.tolist() == MEANS


def test_longest_rows_come_first() -> None:
    widths = []

    def score(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        widths.append(input_ids.shape[1])
        return input_ids[:, 0].float()

    score_rows(score, ROWS, batch_size=2, pad_id=0)
    assert widths == [5, 4, 1]


def test_no_gradient_is_kept() -> None:
    weight = torch.ones(1, requires_grad=True)
    scores = score_rows(lambda ids, mask: ids[:, 0] * weight, ROWS, batch_size=2, pad_id=0)
    assert not scores.requires_grad


def test_no_rows_give_no_scores() -> None:
    assert score_rows(mean_id, [], batch_size=2, pad_id=0).shape == (0,)


def test_masks_come_from_lengths() -> None:
    input_ids, attention_mask = pad_rows([[7, 0], [0, 0, 0]], pad_id=0)
    assert input_ids.tolist() == [[7, 0, 0], [0, 0, 0]]
    assert attention_mask.tolist() == [[True, True, False], [True, True, True]]
