"""The scaling of losses that computing in float16 needs, or small gradients become 0 in it.

float16 has nothing between 0 and 6e-8. So the gradient is multiplied by a scale where it leaves the
loss, and divided by it where it reaches a parameter, which is float32 wherever it is trained
(Micikevicius et al. 2018, "Mixed precision training", section 3.2). What adds gradients up, over
passes or processes, clips them and steps, sees them as they are. A gradient that was too large to
scale is not finite: its step is left out, and the scale is halved.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from align.errors import TrainingError
from align.state import State

_START = 2.0**16
_STEPS_TO_GROW = 2000  # good ones in a row, after which the scale is doubled


def needs_scaling(model: nn.Module) -> bool:
    """Return whether gradients go through float16: by the weights, or as 4-bit layers compute."""
    stored = {parameter.dtype for parameter in model.parameters()}
    computed = {getattr(module, "compute_dtype", None) for module in model.modules()}
    return torch.float16 in stored | computed


class LossScale:
    """A scale that follows the largest gradients.

    Args:
        parameters: all that is trained, in float32. From here on every gradient that reaches them
            is divided by the scale: each loss has to go through ``scaled``.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.value = _START
        self._good_steps = 0  # since the scale was changed
        for parameter in parameters:
            parameter.register_hook(lambda gradient: gradient / self.value)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return a loss as it is; its gradient will be multiplied by the scale."""
        if loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * self.value)
        return loss

    def update(self, *, is_finite: bool) -> None:
        """Choose the scale of the next step.

        Args:
            is_finite: whether the gradient of this one is, summed over all processes. If not, the
                step must not be made.

        Raises:
            TrainingError: the gradient is not finite without any scaling.
        """
        if is_finite:
            self._good_steps += 1
            if self._good_steps < _STEPS_TO_GROW:
                return
            self.value *= 2
        elif self.value > 1:
            self.value /= 2
        else:
            raise TrainingError(
                "the gradient is not finite, and the scale of the loss is down to 1: what the model"
                " computes itself is too large for float16, or lr is; allowed as base.dtype and"
                " base.compute_dtype: bfloat16, float32"
            )
        self._good_steps = 0

    def state(self) -> State:
        """Return what a checkpoint keeps."""
        return {"value": self.value, "good_steps": self._good_steps}

    def load(self, state: State) -> None:
        """Go on from what ``state`` has returned."""
        self.value, self._good_steps = state["value"], state["good_steps"]
