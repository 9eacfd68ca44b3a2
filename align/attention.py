"""Causal attention on packed rows, and on one new token per row against a cache.

Registered with transformers as the attention implementation ``align``: the models' own code runs
everything else. A batch of texts is one row ``[1, N]`` of all their tokens, without padding;
attention alone looks at where each text begins and ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

NAME = "align"


@dataclass
class KeyValueCache:
    """Keys and values of every layer, in buffers that are filled in place.

    A row's prompt ends at column ``width``, wherever it begins; new tokens follow in the same
    columns for all rows. So one write and one slice serve the whole batch.
    """

    lengths: list[int]  # tokens of each row's prompt, of all rows at the start
    max_new_tokens: int
    filled: int = 0  # columns in use
    keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B, heads, columns, d]
    values: dict[int, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None  # [B, 1, 1, columns], -inf before a row's first token

    @property
    def width(self) -> int:
        """Columns of the longest prompt."""
        return max(self.lengths)

    def start(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the packed prompts' keys and values ``[1, heads, N, d]`` of one layer."""
        shape = (len(self.lengths), keys.shape[1], self.width + self.max_new_tokens, keys.shape[3])
        for buffers, packed in ((self.keys, keys), (self.values, values)):
            # Zeros, not garbage: a masked NaN would still be NaN after the softmax.
            buffers[layer] = packed.new_zeros(shape)
            for row, part in enumerate(packed[0].split(self.lengths, dim=1)):
                buffers[layer][row, :, self.width - part.shape[1] : self.width] = part

    def finish_prompts(self, device: torch.device, dtype: torch.dtype) -> None:
        """Mark the prompts' columns as filled, and the gaps before short prompts as empty."""
        self.filled = self.width
        if min(self.lengths) < self.width:
            columns = torch.arange(self.width + self.max_new_tokens, device=device)
            first = self.width - torch.tensor(self.lengths, device=device)
            empty = columns < first[:, None]
            bias = torch.zeros(empty.shape, dtype=dtype, device=device)
            self.bias = bias.masked_fill(empty, -torch.inf)[:, None, None, :]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one new token per row ``[B, heads, 1, d]``; return all keys and values so far."""
        rows, column = len(keys), self.filled
        result = []
        for buffers, new in ((self.keys, keys), (self.values, values)):
            buffers[layer][:rows, :, column] = new[:, :, 0]
            result.append(buffers[layer][:rows, :, : column + 1])
        return result[0], result[1]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, whose order stays: what is finished costs nothing any more."""
        for buffer in (*self.keys.values(), *self.values.values()):
            buffer[: len(rows), :, : self.filled] = buffer[rows, :, : self.filled]
        if self.bias is not None:
            self.bias = self.bias[rows]


Spans = Sequence[tuple[int, int]]  # of each text: the first position, and the one after the last


@dataclass(frozen=True)
class Layout:
    """How the tokens of a forward pass belong together.

    Either ``lengths`` of packed texts, whose keys go into ``cache`` if there is one; or none, and
    the batch is one new token per row of ``cache``.
    """

    lengths: Sequence[int] | None = None
    cache: KeyValueCache | None = None
    wanted: Spans | None = None  # positions whose last states are read; None: all
    # Of each text, how many tokens come before it that are not in it: the first ones of the last
    # text above it of which this is 0. None: of none.
    repeated: Sequence[int] | None = None


@dataclass(frozen=True)
class KeysOnly:
    """The layout of tokens of which a layer needs keys and values, and nothing else."""


class LayoutLost(Exception):
    """A model has this attention, but does not hand on ``layout`` to it."""


class KeysTaken(Exception):
    """Ends a layer's pass under ``KeysOnly``; ``args`` are keys and values ``[1, heads, n, d]``."""


@dataclass(frozen=True)
class WantedOnly:
    """The layout of the wanted tokens alone; the keys and values of the others are at hand."""

    whole: Layout
    keys: Tensor  # [1, heads, n, d] of the other tokens
    values: Tensor
    order: Tensor  # [N] where each token of the row stands in others + wanted


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Layout | KeysOnly | WantedOnly | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each text; the signature is that of transformers' attention functions.

    Args:
        query: ``[1, heads, N, d]`` of packed texts, or ``[B, heads, 1, d]`` while decoding.
        key, value: the same with fewer heads where queries share them.

    Returns:
        ``[1, N, heads, d]`` or ``[B, 1, heads, d]``, and None for the weights.

    Raises:
        KeysTaken: the layout asks for keys and values only.
        LayoutLost: there is no layout.
    """
    if layout is None:
        raise LayoutLost("the pass was given no layout, or the model has not handed it on")
    spans: Spans | None = None
    if isinstance(layout, KeysOnly):
        raise KeysTaken(key, value)
    if isinstance(layout, WantedOnly):
        key = torch.cat([layout.keys, key], dim=2)[:, :, layout.order]
        value = torch.cat([layout.values, value], dim=2)[:, :, layout.order]
        layout = layout.whole
        spans = layout.wanted
    if layout.lengths is not None:
        if layout.cache is not None:
            layout.cache.start(_layer(module), key, value)
        settings = {"scale": scaling, "dropout_p": dropout}
        lengths = list(layout.lengths)
        if layout.repeated is not None and any(layout.repeated):
            return _branched(query, key, value, lengths, layout.repeated, settings), None
        return _packed(query, key, value, lengths, spans, settings), None
    assert layout.cache is not None
    keys, values = layout.cache.append(_layer(module), key, value)
    bias = layout.cache.bias
    if bias is not None:
        bias = bias[..., : keys.shape[2]]
    # Queries that share a key head stand side by side, as rows of one small matrix.
    rows, heads, size = query.shape[0], query.shape[1], query.shape[3]
    grouped = query.reshape(rows, keys.shape[1], heads // keys.shape[1], size)
    output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scaling)
    return output.reshape(rows, 1, heads, size), None


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    spans: Spans | None,
    settings: dict[str, Any],
) -> Tensor:
    keys, values = key.split(lengths, dim=2), value.split(lengths, dim=2)
    settings = settings | {"enable_gqa": query.shape[1] != key.shape[1]}
    outputs = []
    if spans is None:
        for q, k, v in zip(query.split(lengths, dim=2), keys, values, strict=True):
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings))
    else:
        queries = query.split([after - first for first, after in spans], dim=2)
        starts = [0, *accumulate(lengths)][:-1]
        for q, k, v, span, start in zip(queries, keys, values, spans, starts, strict=True):
            first, end = span[0] - start, span[1] - start
            seen = None
            if end - first > 1:
                seen = torch.ones(end - first, end, dtype=torch.bool, device=q.device).tril(first)
            k, v = k[:, :, :end], v[:, :, :end]
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **settings))
    return _joined(outputs)


def _branched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    repeated: Sequence[int],
    settings: dict[str, Any],
) -> Tensor:
    """Attend within each text, and from it to what of an earlier one it goes on from."""
    settings = settings | {"enable_gqa": query.shape[1] != key.shape[1]}
    outputs = []
    parts = (x.split(lengths, dim=2) for x in (query, key, value))
    for q, k, v, before in zip(*parts, repeated, strict=True):
        if before == 0:
            whole = k, v
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings))
            continue
        k = torch.cat([whole[0][:, :, :before], k], dim=2)
        v = torch.cat([whole[1][:, :, :before], v], dim=2)
        shape = q.shape[2], k.shape[2]
        seen = torch.ones(shape, dtype=torch.bool, device=q.device).tril(before)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **settings))
    return _joined(outputs)


def _joined(outputs: list[Tensor]) -> Tensor:
    """Put the outputs ``[1, heads, n, d]`` of texts after one another, ``[1, N, heads, d]``."""
    # Heads beside each other, as the kernel leaves them and the model's output projection reads
    # them: joined otherwise, every tensor would be written twice in each direction.
    parts = [output.transpose(1, 2) for output in outputs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _layer(module: nn.Module) -> int:
    index = module.layer_idx
    assert isinstance(index, int)
    return index


def set_attention(model: PreTrainedModel) -> str | None:
    """Give a model this attention; return why it cannot have it, or None if it has it now."""
    before, reason = model.config._attn_implementation, why_not_packed(model.config)
    if reason is not None or is_packed(model):
        return reason
    model.set_attn_implementation(NAME)  # a warning at most, where the model cannot
    if not is_packed(model):
        return "its attention is not transformers' interface"
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad():
            model(input_ids=token, use_cache=False, layout=Layout([1]))
    except (LayoutLost, TypeError):
        model.set_attn_implementation(before)
        return "its attention is not told which tokens belong together"
    return None


def can_be_packed(model: PreTrainedModel) -> bool:
    """Whether a model can have this attention; it keeps the one that it has."""
    with packed_attention(model) as possible:
        return possible


def is_packed(model: PreTrainedModel) -> bool:
    """Whether a model has this attention now, and its passes need a ``layout``."""
    return bool(model.config._attn_implementation == NAME)


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[bool]:
    """Give a model this attention for a while; yield whether it could have it.

    If so, its passes need a ``layout`` meanwhile.
    """
    before = model.config._attn_implementation
    possible = set_attention(model) is None
    try:
        yield possible
    finally:
        if possible:
            model.set_attn_implementation(before)


@contextmanager
def attention_set(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Give a model an attention implementation by its name for a while."""
    before = model.config._attn_implementation
    if before == name:  # what is set anew is looked at anew, with warnings
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def why_not_packed(config: PretrainedConfig) -> str | None:
    """Return why a model of this configuration cannot run on packed rows, or None if it can."""
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "its attention sees a sliding window only"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "some of its layers have no full attention"
    if getattr(config, "attn_logit_softcapping", None):
        return "its configuration sets attn_logit_softcapping"
    return None


AttentionInterface.register(NAME, attention)
