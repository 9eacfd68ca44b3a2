"""Backward, clip, step: one optimiser over the trained roles, whole or shared out by ZeRO."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from align import group
from align.errors import TrainingError
from align.loss_scale import LossScale
from align.quantization import bitsandbytes
from align.recipe_distributed import Distributed
from align.recipe_types import Optimisation, OptimizerName
from align.state import State
from align.zero import deepspeed_settings
from align.zero_layers import ZeroLayers
from align.zero_optimizer import ZeroOptimizer
from align.zero_shards import ShardOptimizer

# The classes of bitsandbytes; "adamw" itself is PyTorch's.
_BITSANDBYTES: dict[OptimizerName, str] = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
_ALONE = Distributed()


class Engine:
    """The optimiser of a training loop that is our own.

    Args:
        groups: parameters and their learning rate.
        section: schedule, warm-up, weight decay and gradient clipping.
        num_steps: optimiser steps in all; the schedule ends there.
        distributed: whether the processes of a group share the optimiser out.
        layers: with ZeRO 3, what shares the parameters out.
        in_float16: gradients go through float16, so that losses have to be scaled.
    """

    def __init__(
        self,
        groups: Sequence[tuple[list[nn.Parameter], float]],
        section: Optimisation,
        num_steps: int,
        distributed: Distributed = _ALONE,
        layers: ZeroLayers | None = None,
        *,
        in_float16: bool = False,
    ) -> None:
        self.parameters = [p for parameters, _ in groups for p in parameters]
        # Adam with the epsilon of OpenAI's code (Huang et al. 2024, note on Adam).
        optimizer = _adamw(groups, section, eps=1e-5)
        self.scheduler = get_scheduler(
            section.schedule,
            optimizer,
            num_warmup_steps=math.ceil(section.warmup_ratio * num_steps),
            num_training_steps=num_steps,
        )
        self.optimizer: WholeOptimizer | ZeroOptimizer | ShardOptimizer
        if layers is not None:
            offload = distributed.offload != "none"
            limit = section.max_grad_norm
            self.optimizer = ShardOptimizer(optimizer, layers, limit, offload=offload)
        elif distributed.zero:
            self.optimizer = ZeroOptimizer(optimizer, deepspeed_settings(distributed, section))
        else:
            self.optimizer = WholeOptimizer(optimizer, section.max_grad_norm)
        self.loss_scale = LossScale(self.parameters) if in_float16 else None
        self.step_count = 0

    @property
    def lr(self) -> float:
        """The learning rate of the first group."""
        return float(self.scheduler.get_last_lr()[0])

    def state(self) -> State:
        """Return what every process of a group has the same; not the parameters' values."""
        return {
            "optimizer": self.optimizer.state(),
            "scheduler": self.scheduler.state_dict(),
            "loss_scale": self.loss_scale.state() if self.loss_scale is not None else None,
            "step_count": self.step_count,
        }

    def share(self) -> State:
        """Return what this process alone has of the optimiser's state."""
        return self.optimizer.share()

    def load(self, state: State, share: State) -> None:
        """Go on from what ``state`` and ``share`` have returned, and the parameters as they are."""
        self.optimizer.load(state["optimizer"], share)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.loss_scale is not None:
            self.loss_scale.load(state["loss_scale"])
        self.step_count = state["step_count"]

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient."""
        if self.loss_scale is not None:
            loss = self.loss_scale.scaled(loss)
        self.optimizer.backward(loss)

    def drop_gradients(self) -> None:
        """Forget the gradients of all parameters, as if no pass had been made."""
        for holder in self.optimizer.holders(self.parameters):
            holder.grad = None

    def step(self, trained: Sequence[nn.Parameter]) -> float:
        """Clip, update, clear the gradients; return the gradient's norm before clipping.

        The gradient is the sum over the processes, if there are several. In float16 one that is not
        finite is forgotten, and its step left out: its loss had been scaled too far.

        Args:
            trained: the parameters to update, of each group all or none; the others are left as
                they are.

        Raises:
            TrainingError: the gradient is not finite, or one of ``trained`` got none; nothing has
                been changed.
        """
        self.step_count += 1
        chosen, lost = {id(parameter) for parameter in trained}, 0
        holders = self.optimizer.holders(self.parameters)
        for parameter, holder in zip(self.parameters, holders, strict=True):
            if id(parameter) not in chosen:
                holder.grad = None
            elif holder.grad is None:
                lost += 1
        if lost:
            raise TrainingError(
                f"optimiser step {self.step_count}: {lost} of {len(trained)} trainable tensors got"
                " no gradient; a frozen or switched-off adapter is the likely cause"
            )
        norm = self.optimizer.step(trained)
        is_finite = math.isfinite(norm)
        if self.loss_scale is not None:
            self.loss_scale.update(is_finite=is_finite)
        elif not is_finite:
            raise TrainingError(
                f"optimiser step {self.step_count}: the gradient's norm is {norm}; the weights"
                " were left as they are; try a smaller lr"
            )
        if is_finite:
            self.scheduler.step()
        else:
            self.drop_gradients()
        return norm


class WholeOptimizer:
    """An optimiser that each process has whole, on accelerate; of a group all make the same step.

    Args:
        optimizer: of PyTorch or bitsandbytes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.optimizer = self._accelerator.prepare(optimizer)
        self._max_grad_norm = max_grad_norm

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to the parameters' own."""
        self._accelerator.backward(loss)

    def holders(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        """Return the tensors that have the gradients of some parameters: they themselves."""
        return parameters

    def step(self, trained: Sequence[nn.Parameter]) -> float:
        """Sum the gradients over the processes, clip, update, and clear them; return their norm.

        Where that is not finite nothing is updated.
        """
        group.add_gradients(trained)
        norm = float(self._accelerator.clip_grad_norm_(trained, self._max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> State:
        """Return the optimiser's state."""
        state: State = self.optimizer.state_dict()
        return state

    def share(self) -> State:
        """Return nothing: no process has what the others do not."""
        return {}

    def load(self, state: State, share: State) -> None:
        """Go on from what ``state`` has returned."""
        self.optimizer.load_state_dict(state)


def _adamw(
    groups: Sequence[tuple[list[nn.Parameter], float]], section: Optimisation, eps: float
) -> torch.optim.Optimizer:
    parameters = [{"params": parameters, "lr": lr} for parameters, lr in groups]
    settings: dict[str, Any] = {"eps": eps, "weight_decay": section.weight_decay}
    if section.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    library = bitsandbytes(f"optimizer={section.optimizer}").optim
    made: torch.optim.Optimizer = getattr(library, _BITSANDBYTES[section.optimizer])(
        parameters, **settings
    )
    return made
