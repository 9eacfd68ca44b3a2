"""Backward, clip, step: one optimiser over the trained roles, on accelerate."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from align import group
from align.errors import TrainingError
from align.quantization import bitsandbytes
from align.recipe_types import Optimisation, OptimizerName
from align.state import State

# The classes of bitsandbytes; "adamw" itself is PyTorch's.
_BITSANDBYTES: dict[OptimizerName, str] = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}


class Engine:
    """The optimiser of a training loop that is our own.

    Args:
        groups: parameters and their learning rate.
        section: schedule, warm-up, weight decay and gradient clipping.
        num_steps: optimiser steps in all; the schedule ends there.
    """

    def __init__(
        self,
        groups: Sequence[tuple[list[nn.Parameter], float]],
        section: Optimisation,
        num_steps: int,
    ) -> None:
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.parameters = [p for parameters, _ in groups for p in parameters]
        # Adam with the epsilon of OpenAI's code (Huang et al. 2024, note on Adam).
        optimizer = _adamw(groups, section, eps=1e-5)
        scheduler = get_scheduler(
            section.schedule,
            optimizer,
            num_warmup_steps=math.ceil(section.warmup_ratio * num_steps),
            num_training_steps=num_steps,
        )
        # Prepared, the schedule would move by a step for every process.
        self.optimizer, self.scheduler = self.accelerator.prepare(optimizer), scheduler
        self.max_grad_norm = section.max_grad_norm
        self.step_count = 0

    @property
    def lr(self) -> float:
        """The learning rate of the first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state(self) -> State:
        """Return the state of optimiser and schedule; the parameters' values are not in it."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "step_count": self.step_count,
        }

    def load(self, state: State) -> None:
        """Go on from what ``state`` has returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step_count = state["step_count"]

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient."""
        self.accelerator.backward(loss)

    def step(self, trained: Sequence[nn.Parameter]) -> float:
        """Clip, update, clear the gradients; return the gradient's norm before clipping.

        The gradient is the sum over the processes, if there are several.

        Args:
            trained: the parameters to update; the others are left as they are.

        Raises:
            TrainingError: the gradient is not finite, or one of ``trained`` got none; nothing has
                been changed.
        """
        self.step_count += 1
        lost = sum(p.grad is None for p in trained)
        if lost:
            raise TrainingError(
                f"optimiser step {self.step_count}: {lost} of {len(trained)} trainable tensors got"
                " no gradient; a frozen or switched-off adapter is the likely cause"
            )
        group.add_gradients(trained)
        chosen = {id(parameter) for parameter in trained}
        for parameter in self.parameters:
            if id(parameter) not in chosen:
                parameter.grad = None
        norm = float(self.accelerator.clip_grad_norm_(trained, self.max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingError(
                f"optimiser step {self.step_count}: the gradient's norm is {norm}; the weights"
                " were left as they are; try a smaller lr"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


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
