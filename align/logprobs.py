"""Log-probabilities and entropies straight from hidden states, a few tokens at a time.

The logits of a batch are its largest tensor by far (tokens x vocabulary). They exist here for one
chunk of tokens only, in the forward pass and, where the head is trained, in the backward pass.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Numbers in the logits of a chunk, 8 MB in float32: fewer make the products with the head thin.
CHUNK_ELEMENTS = 2**21


class TokenLogprobs(NamedTuple):
    """Both ``[N]`` float32; ``entropy`` in nats, None where it was not asked for."""

    logprobs: Tensor
    entropy: Tensor | None


def head_logprobs(
    hidden: Tensor,
    head: nn.Module,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """Return the log-probability of each token, and the entropy of the choice it was made from.

    Args:
        hidden: ``[N, H]``, the states that predict the tokens.
        head: the linear output embedding: ``weight [V, H]`` and perhaps ``bias [V]``.
        token_ids: ``[N]`` long.
        temperature: at which tokens are sampled; logits are divided by it.

    Returns:
        Gradients flow to ``hidden`` and, where it is trained, to the head.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    logprobs, entropy = _HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, token_ids, temperature, with_entropy, torch.is_grad_enabled()
    )
    return TokenLogprobs(logprobs, entropy if with_entropy else None)


class _HeadLogprobs(Function):
    """With ``z = (W h + b) / T`` and ``p = softmax(z)``:

    d log p_token / dz = onehot(token) - p          d entropy / dz = -p (log p + entropy)

    A frozen head needs no logits for the gradient: ``W' (dy / dz) / T``, one vector per token, is
    computed while the logits are there. A trained head computes them once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: float,
        with_entropy: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        ctx.trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        slopes = []
        if with_gradient and not ctx.trained:
            slopes = [torch.empty_like(hidden) for _ in range(1 + with_entropy)]
        for rows in _chunks(len(hidden), len(weight)):
            ids = token_ids[rows, None]
            p, log_p, chosen = _softmax(hidden[rows], weight, bias, temperature, ids, with_entropy)
            logprobs[rows] = chosen
            if log_p is not None:
                entropy[rows] = -(p * log_p).sum(1)
            if slopes:
                found = _slopes(p, log_p, ids, entropy[rows, None])
                for slope, dz in zip(slopes, found, strict=True):
                    slope[rows] = dz.to(weight.dtype) @ weight
        for slope in slopes:
            slope /= temperature
        if ctx.trained:
            ctx.save_for_backward(hidden, weight, bias, token_ids, entropy)
        else:
            ctx.save_for_backward(*slopes)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        d_weight = d_bias = None
        if ctx.trained:
            d_hidden, d_weight, d_bias = _with_head(ctx, d_logprobs, d_entropy)
        else:
            slopes = ctx.saved_tensors
            d_hidden = d_logprobs[:, None] * slopes[0]
            if ctx.with_entropy:
                d_hidden = d_hidden + d_entropy[:, None] * slopes[1]
            d_hidden = d_hidden.to(slopes[0].dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def _with_head(
    ctx: Any, d_logprobs: Tensor, d_entropy: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients for the hidden states, the head's weight and its bias."""
    hidden, weight, bias, token_ids, entropy = ctx.saved_tensors
    d_logprobs, d_entropy = d_logprobs / ctx.temperature, d_entropy / ctx.temperature
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    d_bias = torch.zeros_like(bias) if bias is not None else None
    for rows in _chunks(len(hidden), len(weight)):
        ids = token_ids[rows, None]
        p, log_p, _ = _softmax(hidden[rows], weight, bias, ctx.temperature, ids, ctx.with_entropy)
        dz, *of_entropy = _slopes(p, log_p, ids, entropy[rows, None])
        dz *= d_logprobs[rows, None]
        for slope in of_entropy:
            dz += slope.mul_(d_entropy[rows, None])
        dz = dz.to(weight.dtype)
        d_hidden[rows] = dz @ weight
        d_weight.addmm_(dz.T, hidden[rows])
        if d_bias is not None:
            d_bias += dz.sum(0)
    return d_hidden, d_weight, d_bias


def _softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    ids: Tensor,
    with_log: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return ``p [n, V]``, ``log p`` where it is asked for, and ``log p`` of the ids ``[n]``.

    In the memory of the logits: beside the product with the head, every pass over them counts.
    """
    z = F.linear(hidden, weight, bias).float()
    if temperature != 1:
        z /= temperature
    z -= z.amax(1, keepdim=True)
    chosen = z.gather(1, ids)
    p = z.exp() if with_log else z.exp_()
    total = p.sum(1, keepdim=True)
    log_total = total.log()
    p /= total
    return p, z.sub_(log_total) if with_log else None, (chosen - log_total)[:, 0]


def _slopes(p: Tensor, log_p: Tensor | None, ids: Tensor, entropy: Tensor) -> list[Tensor]:
    """Return d logprob / dz and, with ``log_p``, d entropy / dz; they take the place of both."""
    of_entropy = [log_p.add_(entropy).mul_(p).neg_()] if log_p is not None else []
    of_logprob = p.neg_().scatter_add_(1, ids, torch.ones_like(ids, dtype=p.dtype))
    return [of_logprob, *of_entropy]


def _chunks(count: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
