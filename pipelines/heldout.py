"""Loss on held-out conversations: the mean over all learned tokens, whatever the batches."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from data.collate import collate_demonstrations
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


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, at most the largest float."""
    return math.exp(min(loss, 709.0))
