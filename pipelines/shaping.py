"""From scores to advantages: what a rollout says about each of its tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from align.errors import TrainingError
from align.functional import (
    Moments,
    add_moments,
    gae,
    kl_estimate,
    masked_whiten,
    penalise_missing_eos,
    standardise,
    token_rewards,
)
from align.recipe_ppo import Kl, Ppo, RewardScaling
from pipelines.rollout import Rollout

# A spread below this, relative to the scores' size, is float32 rounding and not a scale.
_SMALLEST_STD = 1e-6


@dataclass(frozen=True, slots=True)
class Estimates:
    """What a rollout is worth, per token: ``[B, R]`` each."""

    advantages: Tensor  # whitened over the rollout
    returns: Tensor
    kl_loss_coef: float  # weight of the KL in the loss; 0 where it is in the rewards
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of each response of a rollout, ``[B]`` each: enough to say what it is worth."""

    scores: Tensor
    ended: Tensor
    kl: Tensor
    last_values: Tensor | None


def outcome(rollout: Rollout) -> Outcome:
    """Keep of a rollout what does not depend on scaling and coefficients."""
    kl = torch.where(rollout.mask, rollout.kl, 0.0).sum(1)
    return Outcome(rollout.scores, rollout.ended, kl, rollout.last_values)


class ScoreScaler:
    """Brings scores to mean 0 and spread 1, and cuts outliers off, as ``ppo.reward_scaling`` says.

    Reward models have an arbitrary offset and scale. Mode ``sft`` measures them on the first
    rollout, which the SFT model sampled, and freezes them; ``running`` on all rollouts so far.
    """

    def __init__(self, section: RewardScaling) -> None:
        self._section = section
        self._moments = Moments()

    def state(self) -> list[float]:
        """Return the statistics as they stand."""
        return list(self._moments)

    def load(self, state: list[float]) -> None:
        """Go on from what ``state`` has returned."""
        self._moments = Moments(*state)

    def scale(self, scores: Tensor) -> Tensor:
        """Take note of a rollout's scores, ``[B]``, and return them scaled; once per rollout.

        Raises:
            TrainingError: mode ``sft``, and the first scores are all equal: they have no scale.
        """
        mode = self._section.mode
        if mode == "running" or (mode == "sft" and self._moments.num_values == 0):
            self._moments = add_moments(self._moments, scores)
        mean, std = self._moments.mean, self._moments.std
        if mode == "sft" and std <= _SMALLEST_STD * max(1.0, abs(mean)):
            raise TrainingError(
                f"ppo.reward_scaling.mode=sft: all {len(scores)} scores of the first rollout are"
                f" {mean:.6g}, so there is no spread to scale by; use mode=running or none, or look"
                " at what the reward gives the SFT model's responses"
            )
        return self.scaled(scores)

    def scaled(self, scores: Tensor) -> Tensor:
        """Return scores by the statistics as they stand, without taking note of these."""
        if self._section.mode != "none":
            scores = standardise(scores, self._moments.mean, self._moments.std)
        clip = self._section.clip
        return scores.clamp(-clip, clip) if clip is not None else scores

    def metrics(self, scores: Tensor, scaled: Tensor) -> dict[str, float]:
        """Return what scaling did to a rollout's scores; nothing if it is off."""
        metrics: dict[str, float] = {}
        if self._section.mode != "none":
            metrics["score/offset"] = self._moments.mean
            metrics["score/scale"] = self._moments.std
        if self._section.clip is not None:
            metrics["score/clip_fraction"] = float(
                (scaled.abs() >= self._section.clip).float().mean()
            )
        if metrics:
            metrics["score/scaled_mean"] = float(scaled.mean())
            metrics["score/scaled_std"] = float(scaled.std(correction=0))
        return metrics


def split_kl_coef(section: Kl, coef: float) -> tuple[float, float]:
    """Return the KL's weight in the reward and in the loss: it counts in one of them, never both.

    Args:
        coef: as it stands, which an adaptive controller moves.
    """
    return (0.0, coef) if section.loss_coef > 0 else (coef, 0.0)


def estimate(rollout: Rollout, section: Ppo, kl_coef: float, scaler: ScoreScaler) -> Estimates:
    """Turn scores and KL into token rewards, and those into advantages and returns.

    In this order: scores are scaled and cut; responses without a stop token are penalised; the KL
    penalty is spread over the tokens; advantages are estimated, and whitened over the rollout.
    """
    scores = scaler.scale(rollout.scores)
    metrics = scaler.metrics(rollout.scores, scores)
    scores, last_values = _at_the_end(scores, rollout.ended, rollout.last_values, section)
    kl = kl_estimate(section.kl.estimator, rollout.logprobs, rollout.ref_logprobs)
    reward_coef, loss_coef = split_kl_coef(section.kl, kl_coef)
    advantages, returns = gae(
        token_rewards(scores, kl, rollout.mask, reward_coef),
        rollout.values,
        rollout.mask,
        gamma=section.gamma,
        lam=section.lam,
        last_values=last_values,
    )
    return Estimates(masked_whiten(advantages, rollout.mask), returns, loss_coef, metrics)


def worth(seen: Outcome, section: Ppo, kl_coef: float, scaler: ScoreScaler) -> float:
    """Return what PPO maximises, as a mean over responses: scores as in ``estimate``, less the KL.

    By statistics and coefficient as they stand, which both may move: compare values of one moment.
    """
    scores, last_values = _at_the_end(
        scaler.scaled(seen.scores), seen.ended, seen.last_values, section
    )
    if last_values is not None:
        scores = scores + section.gamma * last_values
    return float((scores - kl_coef * seen.kl).mean())


def _at_the_end(
    scores: Tensor, ended: Tensor, last_values: Tensor | None, section: Ppo
) -> tuple[Tensor, Tensor | None]:
    """Return what a response is paid at its last token, and the value of the state after it."""
    if section.missing_eos is not None:
        penalty = section.missing_eos
        scores = penalise_missing_eos(scores, ended, mode=penalty.mode, value=penalty.value)
    if not section.bootstrap_truncated:
        return scores, None
    assert last_values is not None
    # The value of what would have followed, the score among it, in place of the score of half a
    # response: with both, a response would be paid twice for not coming to an end.
    return torch.where(ended, scores, 0.0), torch.where(ended, 0.0, last_values)
