"""An optimiser whose states DeepSpeed shares out, for a training loop that is our own.

And a process's share of the states, for checkpoints; that of a Trainer's optimiser as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from align import group
from align.state import State


class ZeroOptimizer:
    """ZeRO 1 or 2 around an optimiser of PyTorch's: what its process does of a step.

    DeepSpeed is told of the trained parameters only, not of the model: they stay whole, and may be
    used as if nothing were. Gradients add up in each process until the step. There DeepSpeed adds
    those of all, in the order of the parameters: how many passes a process has made, and through
    which roles, does not matter to the others. With ZeRO 2, too, a process so holds the gradients
    of all it trains; after every pass DeepSpeed could share them out only if all made as many.

    Args:
        optimizer: of float32 parameters; from here on it holds this process's share of them, one
            flat tensor per group.
        settings: see ``align.zero``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> None:
        import deepspeed

        self._groups: list[list[nn.Parameter]] = [g["params"] for g in optimizer.param_groups]
        self._parameters = [p for parameters in self._groups for p in parameters]
        self._inner = optimizer
        self._engine, *_ = deepspeed.initialize(
            model=nn.ParameterList(self._parameters),
            optimizer=optimizer,
            config=dict(settings),
            dist_init_required=False,
        )

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to the parameters' own.

        Not by ``loss.backward``, at which DeepSpeed would begin to add up those of all processes.
        """
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
            else:
                parameter.grad += gradient

    def holders(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Return the tensors that have the gradients of some parameters: they themselves."""
        return parameters

    def step(self, trained: Sequence[nn.Parameter]) -> float:
        """Sum the gradients over the processes, clip, update, and clear them; return their norm.

        Where that is not finite nothing is updated.

        Args:
            trained: the parameters to update, of each group all or none; only they have gradients.
        """
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad *= group.size()  # DeepSpeed takes the mean
        with self._engine.coalesce_grad_reduction():
            pass  # on the way out it takes the gradients that it finds
        with self._others_resting(trained):
            self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def state(self) -> State:
        """Return nothing: no two processes have the same."""
        return {}

    def share(self) -> State:
        """Return this process's share of the optimiser's states; see ``states_share``."""
        return states_share(self._engine.optimizer)

    def load(self, state: State, share: State) -> None:
        """Go on from what ``share`` has returned, and from the parameters as they are now."""
        self._engine.optimizer.refresh_fp32_params()
        load_states_share(self._engine.optimizer, share)

    @contextmanager
    def _others_resting(self, trained: Sequence[nn.Parameter]) -> Iterator[None]:
        """Hide the other groups: Adam's moments would move even parameters without a gradient."""
        chosen = {id(parameter) for parameter in trained}
        flat = [settings["params"] for settings in self._inner.param_groups]
        for settings, parameters in zip(self._inner.param_groups, self._groups, strict=True):
            if not any(id(parameter) in chosen for parameter in parameters):
                settings["params"] = []
        try:
            yield
        finally:
            for settings, parts in zip(self._inner.param_groups, flat, strict=True):
                settings["params"] = parts


def states_share(optimizer: Any) -> State:
    """Return this process's share of an optimiser's states: of every flat part, what belongs to it.

    Beside it, the groups' settings: the rate of the next step is one. The values of the parameters
    are not in it.

    Args:
        optimizer: DeepSpeed's; the one of PyTorch that it drives is its ``optimizer``.
    """
    inner = optimizer.optimizer
    return {
        "groups": [
            {name: value for name, value in settings.items() if name != "params"}
            for settings in inner.param_groups
        ],
        "parts": [dict(inner.state[part]) for part in _flat_parts(optimizer)],
    }


def load_states_share(optimizer: Any, saved: State) -> None:
    """Go on from what ``states_share`` has returned in this process of as large a group."""
    inner = optimizer.optimizer
    for settings, kept in zip(inner.param_groups, saved["groups"], strict=True):
        settings.update(kept)
    for part, values in zip(_flat_parts(optimizer), saved["parts"], strict=True):
        # As torch places them: the count of steps stays on the CPU, unless a kernel reads it.
        inner.state[part] = {
            name: value.to(part.device) if value.ndim or inner.defaults.get("fused") else value
            for name, value in values.items()
        }


def _flat_parts(optimizer: Any) -> list[Tensor]:
    """Return the flat tensors for which ZeRO has the optimiser keep its state here."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")  # ZeRO 3; 1 and 2
    parts: list[Tensor] = next(getattr(optimizer, n) for n in names if hasattr(optimizer, n))
    return parts
