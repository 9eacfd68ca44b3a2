"""How far a model is from its copy on the same tokens: what merging and rounding have changed."""

from collections.abc import Iterable

import torch
from torch import Tensor


def logit_drift(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Compare the next-token distributions of a model ``p`` and its copy ``q``.

        KL = sum_v p_v (log p_v - log q_v)

    Args:
        pairs: logits of both at the same positions, ``[n, V]`` each, a part of the positions at a
            time.

    Returns:
        ``kl/mean`` and ``kl/max`` in nats per token, ``logits/mean`` and ``logits/max`` of the
        absolute difference of the logits. Not a number where a logit is none.
    """
    kls, sums, largest, count = [], [], [], 0
    for ours, theirs in pairs:
        log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (ours, theirs))
        kls.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
        difference = (ours.double() - theirs.double()).abs()
        sums.append(difference.sum())
        largest.append(difference.max())
        count += difference.numel()
    kl = torch.cat(kls)
    return {
        "kl/mean": float(kl.mean()),
        "kl/max": float(kl.max()),
        "logits/mean": float(torch.stack(sums).sum()) / count,
        "logits/max": float(torch.stack(largest).max()),
    }


def score_drift(scores: Tensor, others: Tensor) -> dict[str, float]:
    """Compare two models' scores of the same texts, ``[B]`` each, or logits ``[B, C]``.

    Returns:
        ``score/mean`` and ``score/max`` of the absolute difference.
    """
    difference = (scores.double() - others.double()).abs()
    return {"score/mean": float(difference.mean()), "score/max": float(difference.max())}
