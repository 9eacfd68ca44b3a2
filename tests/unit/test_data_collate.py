"""Padding and masks, by hand; pad ids among the real tokens must not count as padding."""

from data.collate import collate_demonstrations, pad_right, right_padded_mask
from data.render import Tokens

ROWS = [[5, 0], [0, 7, 0], [3]]  # 0 is also the pad id


def test_right():
    assert pad_right(ROWS, 0).tolist() == [[5, 0, 0], [0, 7, 0], [3, 0, 0]]
    assert right_padded_mask(ROWS).tolist() == [
        [True, True, False],
        [True, True, True],
        [True, False, False],
    ]


def test_empty_rows():
    assert pad_right([[], [4]], 1).tolist() == [[1], [4]]
    assert right_padded_mask([[], [4]]).tolist() == [[False], [True]]
    assert pad_right([], 1).shape == (0, 0)


def test_demonstrations():
    batch = collate_demonstrations([Tokens([4, 1], [-100, 1]), Tokens([1, 6, 1], [-100, 6, 1])], 1)
    assert batch["input_ids"].tolist() == [[4, 1, 1], [1, 6, 1]]
    assert batch["attention_mask"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["labels"].tolist() == [[-100, 1, -100], [-100, 6, 1]]
