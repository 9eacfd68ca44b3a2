"""Loss on whole conversations: the mean over all learned tokens, whatever the batches."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from align.functional import masked_sum
from align.roles import Role, Roles
from align.sequences import join
from data.collate import collate_demonstrations, pad_right
from data.render import IGNORED, Tokens


def heldout_loss(
    model: PreTrainedModel, rows: Sequence[Tokens], pad_id: int, batch_size: int
) -> float:
    """Return the mean negative log-likelihood of the learned tokens, in nats.

    Rows weigh by their number of learned tokens; their first token is never predicted. The model
    is left in the mode (training or evaluation) that it was in.

    Raises:
        ValueError: there is no learned token in ``rows``.
    """
    total, count = 0.0, 0
    training = model.training
    model.eval()
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    with torch.no_grad():
        for start in range(0, len(by_length), batch_size):
            batch = collate_demonstrations(by_length[start : start + batch_size], pad_id)
            labels = batch.pop("labels")[:, 1:]
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            learned = labels != IGNORED
            targets = labels[learned].to(model.device)
            chosen = logits[learned.to(model.device)].float()
            total += F.cross_entropy(chosen, targets, reduction="sum").item()
            count += targets.numel()
    model.train(training)
    if not count:
        raise ValueError("no learned token in the held-out rows")
    return total / count


def role_loss(roles: Roles, role: Role, rows: Sequence[Tokens], batch_size: int) -> float:
    """Return the same of a role: the mean negative log-likelihood of the learned tokens, in nats.

    Raises:
        ValueError: there is no learned token in ``rows``.
    """
    total, count = 0.0, 0
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    with torch.no_grad():
        for start in range(0, len(by_length), batch_size):
            logprobs, learned = learned_logprobs(roles, role, by_length[start : start + batch_size])
            total -= float(masked_sum(logprobs, learned))
            count += int(learned.sum())
    if not count:
        raise ValueError("no learned token in the held-out rows")
    return total / count


def learned_logprobs(roles: Roles, role: Role, rows: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """Return a role's log-probabilities of rows' tokens at temperature 1, and which are learned.

    Returns:
        ``[B, R]`` float32 and bool: each row from its first learned token on; its very first token
        is never predicted.
    """
    starts = [
        next((i for i, label in enumerate(row.labels) if i > 0 and label != IGNORED), 1)
        for row in rows
    ]
    pairs = list(zip(rows, starts, strict=True))
    sequences = join(
        [row.input_ids[:start] for row, start in pairs],
        [row.input_ids[start:] for row, start in pairs],
    )
    learned = pad_right([row.labels[start:] for row, start in pairs], IGNORED) != IGNORED
    device = roles.device
    return roles.logprobs(role, sequences.to(device)), learned.to(device)


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, at most the largest float."""
    return math.exp(min(loss, 709.0))
