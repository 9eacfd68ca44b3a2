"""When PPO ends before its last step: too far from the SFT model, collapsed, or over-optimised."""

from align.recipe_ppo import Ppo

# Metric -> what its being too high means.
_COLLAPSE = {
    "repetitive_rate": "responses repeat themselves",
    "empty_rate": "responses are empty",
}


class Stopping:
    """Watches a run's metrics for what ``ppo.kl.stop`` and ``ppo.stop`` forbid."""

    def __init__(self, section: Ppo) -> None:
        self._kl_stop, self._limits = section.kl.stop, section.stop
        self._best: tuple[float, float] | None = None  # held-out reward, and the score beside it

    def state(self) -> list[float] | None:
        """Return what later looks are compared with."""
        return list(self._best) if self._best is not None else None

    def load(self, state: list[float] | None) -> None:
        """Go on from what ``state`` has returned."""
        self._best = (state[0], state[1]) if state is not None else None

    def reason(self, step: int, metrics: dict[str, float]) -> str | None:
        """Return why training has to end at this step, or None; to be asked at every step.

        Args:
            metrics: of the step, with those of the probe where it looked.
        """
        problem = self._kl(metrics) or self._collapse(metrics) or self._divergence(metrics)
        return f"stopped at step {step}: {problem}" if problem else None

    def _kl(self, metrics: dict[str, float]) -> str | None:
        kl = metrics.get("kl/mean", 0.0)
        if self._kl_stop is None or kl <= self._kl_stop:
            return None
        return (
            f"kl/mean={kl:.2f} exceeds ppo.kl.stop={self._kl_stop}; the policy moves away from the"
            " SFT model faster than the penalty holds it: raise the coefficient in ppo.kl, or lower"
            " ppo.lr"
        )

    def _collapse(self, metrics: dict[str, float]) -> str | None:
        for key, meaning in _COLLAPSE.items():
            limit = getattr(self._limits, key)
            if limit is not None and metrics.get(key, 0.0) > limit:
                return (
                    f"{key}={metrics[key]:.3f} exceeds ppo.stop.{key}={limit}: {meaning}; read"
                    " samples.jsonl for what the reward pays for, raise the coefficient in ppo.kl,"
                    " or lower ppo.lr"
                )
        return None

    def _divergence(self, metrics: dict[str, float]) -> str | None:
        """Over-optimisation: the reward rises, what it stands for falls (Gao et al. 2022)."""
        limit = self._limits.divergence
        if limit is None or "probe/heldout_reward" not in metrics:
            return None
        heldout, score = metrics["probe/heldout_reward"], metrics["probe/score"]
        if self._best is None or heldout > self._best[0]:
            self._best = (heldout, score)
        best, score_then = self._best
        if best - heldout <= limit or score < score_then:
            return None
        return (
            f"probe/heldout_reward={heldout:.3f} is {best - heldout:.3f} below its best {best:.3f},"
            f" more than ppo.stop.divergence={limit}, while probe/score={score:.3f} is not below"
            f" the {score_then:.3f} it had then; the policy exploits the reward: keep the best"
            " policy (ppo.keep=best), raise the coefficient in ppo.kl, or train the reward model on"
            " the policy's responses"
        )
