"""Scoring many responses: batches of similar length, results in the order given."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# (input_ids [B, T], attention_mask [B, T] bool) -> scores [B]
ScoreFunction = Callable[[Tensor, Tensor], Tensor]
Row = tuple[list[int], list[int]]


def score_rows(
    score: ScoreFunction,
    rows: Sequence[Row],
    *,
    batch_size: int,
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Score prompts with their responses, without gradients.

    A response's score does not depend on the other rows, nor on the order, up to the rounding of
    what the model computes in (in bfloat16: 1 % and more, as batches have other shapes): padding is
    masked by length, never recognised by its id.

    Args:
        score: for example a ``RewardModel``.
        rows: token ids of prompt and response; together at least one.
        batch_size: rows per forward pass; only speed and memory depend on it.
        pad_id: what fills shorter rows; has no effect on the scores.

    Returns:
        ``[N]`` float32 on the CPU, in the order of ``rows``; of a classifier ``[N, C]``.
    """
    joined = [prompt + response for prompt, response in rows]
    # Longest first: if a batch does not fit into memory, it is the first one.
    order = sorted(range(len(joined)), key=lambda i: -len(joined[i]))
    found: list[Tensor] = []
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        input_ids, attention_mask = pad_rows([joined[i] for i in members], pad_id)
        with torch.no_grad():
            batch = score(input_ids.to(device), attention_mask.to(device))
        found.append(batch.float().cpu())
    return torch.cat(found)[torch.tensor(order).argsort()] if found else torch.empty(0)


def pad_rows(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad rows on the right: ``input_ids`` [B, T] long and ``attention_mask`` [B, T] bool."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    input_ids = pad_sequence(tensors, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return input_ids, torch.arange(input_ids.shape[1]) < lengths[:, None]
