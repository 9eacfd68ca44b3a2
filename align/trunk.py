"""The layers below the lowest adapter: the same for all roles and epochs, so computed once.

With adapters in the upper layers only, everything below is frozen and shared by policy, reference,
reward model and critic. One hidden state per token is kept; each pass starts from there. Exact.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Trunk:
    """Runs a backbone's lower layers, or its upper ones from given states.

    Args:
        backbone: a decoder whose layers stand in one ``nn.ModuleList``.
        depth: how many of them are the trunk.
    """

    def __init__(self, backbone: nn.Module, depth: int) -> None:
        found = layer_list(backbone)
        assert found is not None
        name, layers = found
        self.depth = depth
        self._backbone, self._name, self._all = backbone, name, layers
        self._gate = _Gate()
        self._lower = nn.ModuleList([*layers[:depth], self._gate])
        self._upper = nn.ModuleList([self._gate, *layers[depth:]])

    @contextmanager
    def lower(self) -> Iterator["_Gate"]:
        """Make the backbone stop after the trunk; the states are then in ``gate.states``."""
        with self._layers(self._lower, None) as gate:
            yield gate

    @contextmanager
    def upper(self, states: Tensor) -> Iterator["_Gate"]:
        """Make the backbone's upper layers continue from ``[B, T, H]`` states of the trunk."""
        with self._layers(self._upper, states) as gate:
            yield gate

    @contextmanager
    def _layers(self, layers: nn.ModuleList, states: Tensor | None) -> Iterator["_Gate"]:
        self._gate.given = states
        setattr(self._backbone, self._name, layers)
        try:
            yield self._gate
        finally:
            setattr(self._backbone, self._name, self._all)
            self._gate.given = self._gate.states = None


class _Gate(nn.Module):
    """Stands between the trunk and the layers above: notes what passes, or replaces it."""

    given: Tensor | None = None
    states: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.states = self.given if self.given is not None else hidden_states
        return self.states


def layer_list(backbone: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Return the name and the list of a decoder's layers, None where it holds none itself."""
    config: Any = backbone.config
    depth = config.num_hidden_layers
    for name, child in backbone.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return name, child
    return None


def trunk_depth(backbone: nn.Module, is_adapted: Callable[[nn.Module], bool]) -> int:
    """Return how many layers from the bottom hold no module that ``is_adapted``.

    0 where the layers cannot be found: then all of them are always computed.
    """
    found = layer_list(backbone)
    if found is None:
        return 0
    layers = found[1]
    for depth, layer in enumerate(layers):
        if any(is_adapted(module) for module in layer.modules()):
            return depth
    return len(layers)
