"""Text as blocks of equal length, for pretraining: no padding, nothing but a rest is left out."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.errors import InputError
from align.recipe_pretrain import Pretrain
from data.records import Record
from data.render import Renderer, render_all

_NO_LIMIT = 2**31


def documents(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], Counter[str]]:
    """Return each record's ids, the end token last, and why records were dropped.

    Text never becomes a special token, whatever it holds.
    """
    renderer = Renderer(tokenizer, _NO_LIMIT, _NO_LIMIT)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else renderer.end_ids[0]
    kept, dropped = render_all(records, renderer.document)
    return [row if row[-1:] == [end] else [*row, end] for row in kept], dropped


def pack(rows: Sequence[list[int]], length: int) -> Tensor:
    """Join rows to one stream and cut it into ``[N, length]`` blocks; the rest is left out."""
    stream = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long)
    whole = len(stream) // length
    return stream[: whole * length].view(whole, length)


def enough_blocks(blocks: Tensor, section: Pretrain) -> None:
    """Refuse a text of which there is not even one batch.

    Raises:
        InputError: says how much there is, and what can be made smaller.
    """
    if len(blocks) < section.batch_size:
        raise InputError(
            f"data.pretrain: gives {len(blocks)} blocks of sequence_length="
            f"{section.sequence_length} tokens, fewer than batch_size={section.batch_size};"
            " give more text, or make one of the two smaller"
        )
