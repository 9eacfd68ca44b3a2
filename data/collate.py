"""Rows of different lengths to tensors. Masks come from the lengths, never from the ids.

A real token may have the pad token's id (many tokenizers pad with the end of text); comparing ids
would mask it out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.render import IGNORED, Tokens


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return ``[B, T]`` long: the rows, filled up with ``value`` behind; T is the longest row."""
    width = max((len(row) for row in rows), default=0)
    result = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        result[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return result


def right_padded_mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return ``[B, T]`` bool, True where ``pad_right(rows)`` holds a real token."""
    return pad_right([[1] * len(row) for row in rows], 0).bool()


def collate_demonstrations(rows: Sequence[Tokens], pad_id: int) -> dict[str, Tensor]:
    """Return a batch to learn from: ``input_ids``, ``attention_mask`` (bool), ``labels``.

    All are ``[B, T]``, padded on the right; labels are -100 where nothing is learned.
    """
    ids = [row.input_ids for row in rows]
    return {
        "input_ids": pad_right(ids, pad_id),
        "attention_mask": right_padded_mask(ids),
        "labels": pad_right([row.labels for row in rows], IGNORED),
    }
