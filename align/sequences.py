"""Prompts and responses as one batch: packed without padding, or padded for plain transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """A batch of ``B`` prompts, each directly followed by its response, in one row of tokens.

    Masks and indices come from lengths, never from token ids: a pad-valued token inside a text
    stays real.
    """

    input_ids: Tensor  # [N] long, text after text
    prompt_lengths: tuple[int, ...]  # tokens of each prompt, at least 1
    lengths: tuple[int, ...]  # tokens of each prompt and response together; they sum to N
    # [N, H], what the layers below the lowest adapter make of the tokens, if that is known already.
    trunk: Tensor | None = None

    @cached_property
    def position_ids(self) -> Tensor:
        """Position of each token in its own text, ``[N]`` long."""
        return self._index([(0, length) for length in self.lengths])

    @property
    def starts(self) -> list[int]:
        """Where each text begins in the row."""
        return [0, *accumulate(self.lengths)][:-1]

    @property
    def response_spans(self) -> list[tuple[int, int]]:
        """Of each text the positions in the row before its response tokens, from and up to."""
        texts = zip(self.starts, self.prompt_lengths, self.lengths, strict=True)
        return [(start + prompt - 1, start + length - 1) for start, prompt, length in texts]

    @property
    def end_spans(self) -> list[tuple[int, int]]:
        """The position in the row of each text's last token, as a span of one."""
        ends = accumulate(self.lengths)
        return [(end - 1, end) for end in ends]

    @cached_property
    def before_response(self) -> Tensor:
        """Where the states before each response token stand in the row, text after text, long."""
        return self._index(self.response_spans)

    def _index(self, spans: Sequence[tuple[int, int]]) -> Tensor:
        index = torch.cat([torch.arange(*span) for span in spans])
        return index.to(self.input_ids.device)

    @cached_property
    def response_mask(self) -> Tensor:
        """Which response tokens are real, ``[B, R]`` bool; the stop token is one."""
        lengths = [n - p for n, p in zip(self.lengths, self.prompt_lengths, strict=True)]
        return _below(lengths, max(1, *lengths), self.input_ids.device)

    @cached_property
    def response_tokens(self) -> Tensor:
        """The response tokens alone, text after text: those that ``before_response`` predicts."""
        return self.input_ids[self.before_response + 1]

    def per_response(self, values: Tensor) -> Tensor:
        """Arrange one value per response token as ``[B, R]``, 0 outside the mask."""
        filled = values.new_zeros(self.response_mask.shape)
        return filled.masked_scatter(self.response_mask, values)

    def padded(self, pad_id: int = 0) -> tuple[Tensor, Tensor]:
        """Return the texts padded on the right, ``[B, T]`` long, and which tokens are real."""
        mask = _below(self.lengths, max(self.lengths), self.input_ids.device)
        ids = torch.full(mask.shape, pad_id, device=self.input_ids.device)
        return ids.masked_scatter(mask, self.input_ids), mask

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, index: Sequence[int]) -> "Sequences":
        """Return some of the texts, in the order of ``index``."""

        def choose(packed: Tensor) -> Tensor:
            texts = packed.split(self.lengths)
            return torch.cat([texts[i] for i in index])

        return Sequences(
            choose(self.input_ids),
            tuple(self.prompt_lengths[i] for i in index),
            tuple(self.lengths[i] for i in index),
            choose(self.trunk) if self.trunk is not None else None,
        )

    def to(self, device: torch.device) -> "Sequences":
        """Return the batch on another device."""
        trunk = self.trunk.to(device) if self.trunk is not None else None
        return Sequences(self.input_ids.to(device), self.prompt_lengths, self.lengths, trunk)


def _below(lengths: Sequence[int], width: int, device: torch.device) -> Tensor:
    columns = torch.arange(width, device=device)
    return columns < torch.tensor(lengths, device=device)[:, None]


def position_ids(attention_mask: Tensor) -> Tensor:
    """Count real tokens from 0 in each row; padding gets 0 on the left, the last count on the
    right. Models with learned positions give wrong results without it.
    """
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def join(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Sequences:
    """Join token ids into a batch.

    Args:
        prompts: one list of ids per text, not empty.
        responses: one list of ids per text, the stop token included where there is one.
    """
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.long)
    return Sequences(ids, tuple(map(len, prompts)), tuple(map(len, texts)))


def micro_batches(
    lengths: Sequence[int], *, rows: int | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Cut a batch into consecutive groups of at most so many rows, or so many tokens.

    A row longer than ``tokens`` makes a group of its own.

    Returns:
        Indices into ``lengths``, in order.
    """
    groups: list[list[int]] = []
    used = 0
    for index, length in enumerate(lengths):
        full = not groups or (rows is not None and len(groups[-1]) == rows)
        if full or (tokens is not None and used + length > tokens):
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += length
    return groups
