"""Padding and masks, by hand; pad ids among the real tokens must not count as padding."""

from data.collate import (
    collate_demonstrations,
    left_padded_mask,
    pad_left,
    pad_right,
    right_padded_mask,
)
from data.render import Tokens

ROWS = [[5, 0], [0, 7, 0], [3]]  # 0 is also the pad id


def test_right():
    assert pad_right(ROWS, 0).tolist() == [[5, 0, 0], [0, 7, 0], [3, 0, 0]]
    assert right_padded_mask(ROWS).tolist() == [
        [True, True, False],
        [True, True, True],
        [True, False, False],
    ]


def test_left():
    assert pad_left(ROWS, 9).tolist() == [[9, 5, 0], [0, 7, 0], [9, 9, 3]]
    assert left_padded_mask(ROWS).tolist() == [
        [False, True, True],
        [True, True, True],
        [False, False, True],
    ]


def test_empty_rows():
    assert pad_right([[], [4]], 1).tolist() == [[1], [4]]
    assert left_padded_mask([[], [4]]).tolist() == [[False], [True]]
    assert pad_right([], 1).shape == (0, 0)


def test_demonstrations():
    batch = collate_demonstrations([Tokens([4, 1], [-100, 1]), Tokens([1, 6, 1], [-100, 6, 1])], 1)
    assert batch["input_ids"].tolist() == [[4, 1, 1], [1, 6, 1]]
    assert batch["attention_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["labels"].tolist() == [[-100, 1, -100], [-100, 6, 1]]
