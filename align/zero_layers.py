"""ZeRO 3 for roles that share weights: their models' layers, shared out to a group of processes.

The layers are whole while each process computes alone: rollouts, scores, looks at the policy. While
they train together each process keeps its part of every layer, and a layer is whole in all of them
only as long as a pass goes through it, forward and backward (Rajbhandari et al. 2020, section 5.3).
DeepSpeed parts and gathers; when, is decided here, as it runs no model whose roles share weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd import Variable
from transformers import PreTrainedModel

from align.errors import InputError
from align.trunk import layer_list


class ZeroLayers:
    """The layers of models, whose weights a group shares out; adapters in them stay whole.

    Of what is trained outside of the layers (adapters, heads, embeddings) each process has its part
    as well, beside the whole: its optimiser changes the part.

    Args:
        models: with all their adapters; the same one may stand for several roles.
        trained: the weights that an optimiser changes, wherever they are.
        settings: see ``align.zero``.

    Attributes:
        before_parting: called with the weights of a layer before they are parted; what a backward
            pass has left them, it has to take.

    Raises:
        InputError: the layers of a model cannot be found.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        trained: Sequence[nn.Parameter],
        settings: Mapping[str, Any],
    ) -> None:
        import deepspeed

        self.before_parting: Callable[[Sequence[nn.Parameter]], None] | None = None
        self._layers = [layer for model in dict.fromkeys(models) for layer in _layers(model)]
        self._weights: dict[nn.Module, list[nn.Parameter]]
        self._weights = {layer: _own_weights(layer) for layer in self._layers}
        known = {id(weight) for weights in self._weights.values() for weight in weights}
        self.outside = [weight for weight in trained if id(weight) not in known]
        self._outside = nn.ParameterList(self.outside)
        self._weights[self._outside] = self.outside
        every = [weight for weights in self._weights.values() for weight in weights]
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # it takes ours
        deepspeed.zero.Init(module=nn.ParameterList(every), config_dict_or_path=dict(settings))
        self._gathered = deepspeed.zero.GatheredParameters
        self._whole: dict[nn.Module, Any] = {}
        self._parted = False
        self._backward: nn.Module | None = None  # the layer through which a backward pass goes
        for layer in self._layers:
            layer.register_forward_pre_hook(self._before)
            layer.register_forward_hook(self._after)
        for part in self._weights:
            self._gather(part)

    @contextmanager
    def parted(self) -> Iterator[None]:
        """Keep a part of each layer in each process for a while, in which all make equal passes.

        Where one fails they stay as they are: to gather them again would take all processes.
        """
        for layer in self._layers:
            self._part(layer)
        self._parted = True
        yield
        self._parted = False
        for layer in self._layers:
            self._gather(layer)

    def renew(self) -> None:
        """Put the weights outside of the layers together again, from parts that have changed."""
        self._part(self._outside)
        self._gather(self._outside)

    def _gather(self, layer: nn.Module) -> None:
        if layer not in self._whole:
            self._whole[layer] = self._gathered(self._weights[layer])
            self._whole[layer].__enter__()

    def _part(self, layer: nn.Module) -> None:
        if layer in self._whole:
            if self.before_parting is not None:
                self.before_parting(self._weights[layer])
            self._whole.pop(layer).__exit__(None, None, None)

    def _before(self, layer: nn.Module, _args: Any) -> None:
        self._gather(layer)

    def _after(self, layer: nn.Module, _args: Any, output: Any) -> None:
        if not self._parted or layer is self._backward:  # there it has been computed once more
            return
        self._part(layer)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(partial(self._enter_backward, layer))

    def _enter_backward(self, layer: nn.Module, _gradient: Tensor) -> None:
        """Make a layer whole before its backward pass; the one above it has done its own."""
        if self._backward is None:
            engine: Any = Variable._execution_engine
            engine.queue_callback(self._leave_backward)
        else:
            self._part(self._backward)
        self._backward = layer
        self._gather(layer)

    def _leave_backward(self) -> None:
        if self._backward is not None:
            self._part(self._backward)
            self._backward = None


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    found = layer_list(model.base_model)
    if found is None:
        raise InputError(
            "distributed.zero=3: ppo cannot share this base out: its layers do not stand in one"
            " list; allowed: 0, 1, 2"
        )
    return list(found[1])


def _own_weights(layer: nn.Module) -> list[nn.Parameter]:
    """Return a layer's weights without those of adapters."""
    adapters = {
        id(weight)
        for module in layer.modules()
        if isinstance(module, BaseTunerLayer)
        for name in module.adapter_layer_names
        for weight in getattr(module, name).parameters()
    }
    return [weight for weight in layer.parameters() if id(weight) not in adapters]
