"""A decoder's last layer, computed for the tokens alone whose states are read.

Nothing reads the last states of a prompt: of its tokens the last layer owes keys and values to the
others, but no attention of their own and no MLP. Exact.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from align.attention import KeysOnly, KeysTaken, Layout, WantedOnly
from align.trunk import layer_list


def narrow_last_layer(backbone: nn.Module) -> None:
    """Have the last layer heed ``Layout.wanted``: states of other positions are 0 after it.

    A backbone whose layers cannot be found is left as it is, and computes all states.
    """
    found = layer_list(backbone)
    if found is not None:
        layer = found[1][-1]
        layer.forward = MethodType(_forward, layer)


def _forward(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    plain, layout = type(layer).forward, kwargs.get("layout")
    if not isinstance(layout, Layout) or layout.wanted is None:
        return plain(layer, hidden_states, *args, **kwargs)
    count, device = hidden_states.shape[1], hidden_states.device
    wanted = torch.cat([torch.arange(*span) for span in layout.wanted]).to(device)
    is_other = torch.ones(count, dtype=torch.bool, device=device)
    is_other[wanted] = False
    others = is_other.nonzero()[:, 0]
    if len(others) == 0 or not _per_token((args, kwargs), count):
        return plain(layer, hidden_states, *args, **kwargs)

    def run(tokens: Tensor, layout: KeysOnly | WantedOnly) -> Tensor:
        more = _at(kwargs, tokens) | {"layout": layout}  # the tokens' positions, or rotations
        output: Tensor = plain(layer, hidden_states[:, tokens], *_at(args, tokens), **more)
        return output

    try:
        run(others, KeysOnly())
        raise AssertionError("the layer has no attention of ours")
    except KeysTaken as taken:
        keys, values = taken.args
    order = torch.cat([others, wanted]).argsort()
    output = run(wanted, WantedOnly(layout, keys, values, order))
    return output.new_zeros(hidden_states.shape).index_copy(1, wanted, output)


def _per_token(value: Any, count: int) -> bool:
    """Return whether every tensor in ``value`` is ``[1, count, ...]``, as the states are."""
    if isinstance(value, Tensor):
        return value.ndim > 1 and value.shape[:2] == (1, count)
    if isinstance(value, dict):
        value = tuple(value.values())
    return not isinstance(value, tuple) or all(_per_token(part, count) for part in value)


def _at(value: Any, tokens: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[:, tokens]
    if isinstance(value, dict):
        return {key: _at(part, tokens) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_at(part, tokens) for part in value)
    return value
