"""A copy of what is trained, as it was when it did best on held-out data."""

from collections.abc import Callable, Sequence, Sized
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.errors import InputError
from align.metrics import MetricsLog
from align.recipe_types import Watched
from align.state import State


class BestCopy:
    """Keeps the parameters as they were when their value was highest, in main memory."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._kept: list[Tensor] = []
        self.step: int | None = None  # when the kept copy was taken
        self.value = -float("inf")

    def offer(self, step: int, value: float) -> bool:
        """Keep the parameters as they stand if ``value`` is above all before; return if so."""
        if not value > self.value:
            return False
        self.step, self.value = step, value
        self._kept = [p.detach().to("cpu", copy=True) for p in self._parameters]
        return True

    def state(self) -> State:
        """Return the kept copy, and what is known of it."""
        return {"step": self.step, "value": self.value, "kept": self._kept}

    def load(self, state: State) -> None:
        """Go on from what ``state`` has returned."""
        self.step, self.value, self._kept = state["step"], state["value"], state["kept"]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept values back into the parameters; before the first offer, change nothing."""
        if self.step is None:
            return
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(kept)


def check_heldout(stage: str, section: Watched, rows: Sized) -> None:
    """Refuse looks at held-out rows that were all lost as tokens.

    Raises:
        InputError: there are none.
    """
    if section.heldout_every is not None and len(rows) == 0:
        raise InputError(
            f"data.{stage}.heldout: no row is left once tokenised; {stage}.heldout_every needs some"
        )


class HeldoutLooks(TrainerCallback):
    """Has a trainer measure held-out rows now and then, and end with the weights that did best.

    Args:
        section: says how often, and whether the best or the last weights are kept.
        parameters: that are trained.
        metric: by which the best is chosen: ``loss``, of which the lowest is the best, or
            ``accuracy``.
        measure: returns it, and what else the log should have; draws no random numbers, so that
            training is the same without it.
    """

    def __init__(
        self,
        section: Watched,
        log: MetricsLog,
        parameters: Sequence[nn.Parameter],
        metric: Literal["loss", "accuracy"],
        measure: Callable[[], dict[str, float]],
    ) -> None:
        self._every, self._log = section.heldout_every, log
        self._key, self._sign = f"heldout/{metric}", -1.0 if metric == "loss" else 1.0
        self._measure = measure
        self._best = BestCopy(parameters) if section.keep == "best" else None

    def state(self) -> State | None:
        """Return what a checkpoint has to keep."""
        return self._best.state() if self._best is not None else None

    def load(self, state: State | None) -> None:
        """Go on from what ``state`` has returned."""
        if self._best is not None and state is not None:
            self._best.load(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any
    ) -> None:
        """Look, if it is time; the last step has a look always, if there are any."""
        if self._every is None:
            return
        step = state.global_step
        if step % self._every == 0 or step >= state.max_steps:
            found = {f"heldout/{name}": value for name, value in self._measure().items()}
            self._log.log(step, found)
            if self._best is not None:
                self._best.offer(step, self._sign * found[self._key])

    def settle(self) -> None:
        """Put the weights to keep into the parameters."""
        if self._best is not None:
            self._best.restore()

    @property
    def kept(self) -> dict[str, float]:
        """The step of the best weights, the first of equal ones, if they are what is kept."""
        if self._best is None or self._best.step is None:
            return {}
        return {"best_step": float(self._best.step), self._key: self._sign * self._best.value}
