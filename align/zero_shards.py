"""The optimiser of weights that ZeRO 3 shares out, for a training loop that is our own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from align import group
from align.state import State
from align.zero_layers import ZeroLayers


class ShardOptimizer:
    """ZeRO 3 around an optimiser of PyTorch's: each process changes its part of every weight.

    A layer's gradients are summed over the processes, each of which keeps its part of the sum, when
    a backward pass has left the layer: they are never whole for all layers (Rajbhandari et al.
    2020, section 5.2). Those of adapters, heads and embeddings add up whole until the step.

    Args:
        optimizer: of float32 parameters; from here on it holds this process's part of each.
        layers: which share the weights out.
        max_grad_norm: of the whole gradient.
        offload: keep parts, gradients and the optimiser's states in main memory.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layers: ZeroLayers,
        max_grad_norm: float,
        *,
        offload: bool,
    ) -> None:
        self._optimizer, self._layers, self._max_grad_norm = optimizer, layers, max_grad_norm
        self._parts: dict[nn.Parameter, nn.Parameter] = {}
        for settings in optimizer.param_groups:
            for weight in settings["params"]:
                kept: Tensor = weight.ds_tensor.data  # what DeepSpeed puts the whole together from
                self._parts[weight] = nn.Parameter(kept.cpu() if offload else kept)
            settings["params"] = [self._parts[weight] for weight in settings["params"]]
        layers.before_parting = self._take

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient; all processes have to do so equally often."""
        loss.backward()

    def holders(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return this process's part of each parameter, with its part of the gradient's sum."""
        self._take(self._layers.outside)
        return [self._parts[parameter] for parameter in parameters]

    def step(self, trained: Sequence[nn.Parameter]) -> float:
        """Clip the gradients, update, and clear them; return their norm before.

        Where that is not finite nothing is updated.
        """
        parts = [self._parts[weight] for weight in trained]
        gradients = [part.grad for part in parts if part.grad is not None]
        own = torch.nn.utils.get_total_norm(gradients).double()
        norm = math.sqrt(sum(group.gather(float(own.square()))))
        if not math.isfinite(norm):
            return norm
        torch.nn.utils.clip_grads_with_norm_(parts, self._max_grad_norm, torch.tensor(norm))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._hand_over()
        self._layers.renew()
        return norm

    def state(self) -> State:
        """Return nothing: no two processes have the same."""
        return {}

    def share(self) -> State:
        """Return this process's part of the optimiser's states."""
        state: State = self._optimizer.state_dict()
        return state

    def load(self, state: State, share: State) -> None:
        """Go on from what ``share`` has returned, and from the whole weights as they are now."""
        for weight, part in self._parts.items():
            first = group.rank() * part.numel()
            own = weight.detach().flatten()[first : first + part.numel()]
            part.data[: own.numel()].copy_(own)
        self._hand_over()
        self._optimizer.load_state_dict(share)

    def _take(self, weights: Sequence[nn.Parameter]) -> None:
        """Move the gradients of whole weights to the parts: of each the sum over the processes."""
        from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

        found = [weight for weight in weights if weight.grad is not None]
        if not found:
            return
        means = reduce_scatter_coalesced([w.grad.contiguous() for w in found if w.grad is not None])
        for weight, mean in zip(found, means, strict=True):
            part = self._parts[weight]
            if part.grad is None:
                part.grad = torch.zeros_like(part)
            part.grad[: mean.numel()].add_(mean.to(part.device), alpha=group.size())
            weight.grad = None

    def _hand_over(self) -> None:
        """Give DeepSpeed the parts as they are now, where they are not its own tensors."""
        for weight, part in self._parts.items():
            kept: Tensor = weight.ds_tensor  # type: ignore[attr-defined]
            if kept.data_ptr() != part.data_ptr():
                kept.data.copy_(part.data)
