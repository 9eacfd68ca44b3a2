"""Prompts and responses joined into one batch: the only place where PPO pads."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sequences:
    """A batch of prompts, padded on the left, followed by responses, padded on the right.

    All prompts end at column ``P``, so that the response starts in the same column in every row.
    Masks come from lengths, never from token ids: a pad-valued token inside a text stays real.
    """

    input_ids: Tensor  # [B, P + R] long
    attention_mask: Tensor  # [B, P + R] bool, True for real tokens
    response_mask: Tensor  # [B, R] bool, True for real response tokens, stop token included

    @property
    def prompt_width(self) -> int:
        """``P``, the padded length of the prompts."""
        return self.input_ids.shape[1] - self.response_mask.shape[1]

    @property
    def response_ids(self) -> Tensor:
        """The response part of ``input_ids``, ``[B, R]``."""
        return self.input_ids[:, self.prompt_width :]

    @property
    def position_ids(self) -> Tensor:
        """Position of each token counted from the row's first real token, ``[B, P + R]``."""
        return position_ids(self.attention_mask)

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: Tensor | slice) -> "Sequences":
        """Return some of the rows, at the same padded width."""
        return Sequences(
            self.input_ids[index], self.attention_mask[index], self.response_mask[index]
        )

    def to(self, device: torch.device) -> "Sequences":
        """Return the batch on another device."""
        return Sequences(
            self.input_ids.to(device), self.attention_mask.to(device), self.response_mask.to(device)
        )


def position_ids(attention_mask: Tensor) -> Tensor:
    """Count real tokens from 0 in each row; padding gets 0 on the left, the last count on the
    right. Models with learned positions give wrong results without it.
    """
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def join(prompts: list[list[int]], responses: list[list[int]], pad_id: int) -> Sequences:
    """Join token ids into a batch.

    Args:
        prompts: one list of ids per row, not empty.
        responses: one list of ids per row, the stop token included where there is one.
        pad_id: what fills the rest; its value has no effect on any result.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    width = max(map(len, prompts))
    length = max(1, *map(len, responses)) if responses else 1
    shape = (len(prompts), width + length)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = width - len(prompt), width + len(response)
        input_ids[row, start:end] = torch.tensor(prompt + response, dtype=torch.long)
        attention_mask[row, start:end] = True
    return Sequences(input_ids, attention_mask, attention_mask[:, width:])
