"""What PPO must not change, the base, the reference and the reward models: watched on its way."""

import torch
from torch import nn

from align.errors import TrainingError


class Frozen:
    """A number for each tensor of a model that is not trained, to see whether any changes.

    Args:
        model: with its trained parameters marked as such, all of them whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        self._before = self._sums()

    def check(self, step: int) -> None:
        """Compare with what the tensors were.

        Raises:
            TrainingError: names some of those that are not what they were.
        """
        now = self._sums()
        changed = [name for name, before in self._before.items() if now[name] != before]
        if changed:
            raise TrainingError(
                f"step {step}: the base, the reference or a reward model is not what it was:"
                f" {len(changed)} of {len(now)} frozen tensors have changed, like {changed[:2]};"
                " the likely cause is an optimiser that was given more than policy and critic, or"
                " an adapter that was added to the weights and not taken out"
            )

    @torch.no_grad()
    def _sums(self) -> dict[str, float]:
        return {name: float(p.sum(dtype=torch.float64)) for name, p in self._tensors.items()}
