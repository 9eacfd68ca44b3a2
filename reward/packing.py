"""Rows of prompt and response as one without padding; a prompt that several share stands once.

The responses of one prompt follow it one after the other. Each attends to the prompt and to itself,
as it would alone, so that states are the same, and so are gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from align.attention import Layout
from align.sequences import position_ids


class Packed(NamedTuple):
    """What is computed of ``B`` rows of ``T`` tokens: ``N`` of them."""

    input_ids: Tensor  # [1, N]
    position_ids: Tensor  # [1, N], in the row that a token is from
    layout: Layout
    places: Tensor  # [B, T], where in the packed row the state of each real token stands


def pack(input_ids: Tensor, attention_mask: Tensor, repeated: Tensor | None) -> Packed:
    """Leave out the padding, and what a row repeats.

    Args:
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]`` bool, True for real tokens; padding may lie on either side.
        repeated: ``[B]``, how many of the row's first real tokens are those of the last row above
            it of which this is 0; fewer than it has. None: of none.
    """
    mask, positions = attention_mask.bool(), position_ids(attention_mask)
    if repeated is None:
        repeated = torch.zeros_like(positions[:, 0])
    own = mask & (positions >= repeated[:, None])
    lengths = own.sum(1)
    starts = lengths.cumsum(0) - lengths
    rows = torch.arange(len(lengths), device=lengths.device)
    first = torch.where(repeated == 0, rows, 0).cummax(0).values
    # A row's own tokens begin behind what it repeats.
    of_row = (starts - repeated)[:, None] + positions
    places = torch.where(own, of_row, starts[first][:, None] + positions)
    return Packed(
        input_ids[own][None],
        positions[own][None],
        Layout(lengths=lengths.tolist(), repeated=repeated.tolist()),
        places.masked_fill(~mask, 0),
    )
