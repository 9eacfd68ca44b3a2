"""Copies of the policy that training makes beside it: the best one so far, and a moving average."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from align.recipe_ppo import Ppo
from align.roles import Roles
from align.state import State
from pipelines.best_copy import BestCopy
from pipelines.probe import Probe
from pipelines.shaping import Outcome, ScoreScaler, worth


class PolicyEma:
    """An exponential moving average of the parameters, which starts as what they are now.

    In float32, whatever the parameters are: in bfloat16 steps as small as ``1 - decay`` would be
    rounded away. Of a LoRA role the factors are averaged, not their product.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._averages: list[Tensor] = [p.detach().float().clone() for p in self._parameters]
        self._average = get_ema_multi_avg_fn(decay)

    def state(self) -> list[Tensor]:
        """Return the averages."""
        return self._averages

    def load(self, state: list[Tensor]) -> None:
        """Go on from what ``state`` has returned."""
        for average, saved in zip(self._averages, state, strict=True):
            average.copy_(saved)

    def update(self) -> None:
        """Take note of the parameters: ``average = decay * average + (1 - decay) * parameter``."""
        self._average(self._averages, [p.detach().float() for p in self._parameters], None)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the averages into the parameters, for good."""
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the parameters for a while, for a look at the averaged policy."""
        trained = [p.detach().clone() for p in self._parameters]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, trained, strict=True):
                    parameter.copy_(value)


class KeptPolicy:
    """Which policy a run ends with: the last one, the best one (``keep``), or their average.

    Args:
        probe: looks at the policy that would be kept if training ended now.
        scaler: of the scores that training sees.
    """

    def __init__(self, section: Ppo, roles: Roles, probe: Probe, scaler: ScoreScaler) -> None:
        self._section, self._probe, self._scaler = section, probe, scaler
        policy, value = roles.role_parameters("policy"), roles.role_parameters("value")
        self._best = BestCopy(policy + value) if section.keep == "best" else None
        self._best_seen: Outcome | None = None
        self._best_metrics: dict[str, float] = {}
        self._ema = PolicyEma(policy, section.ema) if section.ema is not None else None

    def state(self) -> State:
        """Return the copies, and what the best one was judged by."""
        return {
            "best": self._best.state() if self._best is not None else None,
            "best_seen": asdict(self._best_seen) if self._best_seen is not None else None,
            "best_metrics": self._best_metrics,
            "ema": self._ema.state() if self._ema is not None else None,
        }

    def load(self, state: State) -> None:
        """Go on from what ``state`` has returned."""
        if self._best is not None:
            self._best.load(state["best"])
        seen = state["best_seen"]
        self._best_seen = Outcome(**seen) if seen is not None else None
        self._best_metrics = state["best_metrics"]
        if self._ema is not None:
            self._ema.load(state["ema"])

    def after_update(self) -> None:
        """Take note of the policy after the updates of a rollout."""
        if self._ema is not None:
            self._ema.update()

    def look(self, step: int, metrics: dict[str, float], kl_coef: float) -> dict[str, float]:
        """Return the step's metrics with what the probe says; keep the policy if it is the best.

        What a policy is worth on the held-out prompts is what PPO maximises on the others. Scaling
        and the KL coefficient may move from look to look, so the one kept so far is judged again.

        Args:
            metrics: of the step, without the probe's.
            kl_coef: as it stands.
        """
        with self._ema.applied() if self._ema is not None else nullcontext():
            seen, found = self._probe.look(step)
        metrics = metrics | seen
        if self._best is not None and found is not None:
            judge = partial(worth, section=self._section, kl_coef=kl_coef, scaler=self._scaler)
            if self._best_seen is not None:
                self._best.value = judge(self._best_seen)
            if self._best.offer(step, judge(found)):
                self._best_seen, self._best_metrics = found, metrics
        return metrics

    def settle(self, metrics: dict[str, float]) -> dict[str, float]:
        """Put the policy to keep into the parameters; return the metrics of its step.

        Args:
            metrics: of the last step; where another is the best, ``best_step`` says which.
        """
        if self._ema is not None:
            self._ema.apply()
        if self._best is None or self._best.step is None:
            return metrics
        self._best.restore()
        return self._best_metrics | {"best_step": float(self._best.step)}
