"""The maths of PPO for language models, as pure functions on tensors.

No configuration objects, no devices, no logging. Everything is computed in float32, whatever comes
in. Shapes: ``B`` responses, ``R`` response tokens (padded), ``V`` vocabulary. ``response_mask`` is
``[B, R]`` bool, True for a real response token, the stop token included; it is the only mask the
maths sees, and what stands outside it never changes a result.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

Stats = dict[str, Tensor]


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum ``x`` where ``mask`` is True; NaN and infinity outside the mask do not matter."""
    return torch.where(mask, x.float(), 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average ``x`` where ``mask`` is True; 0 if it is True nowhere."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale ``x`` to variance 1 over the mask, and to mean 0 unless ``shift_mean`` is False.

        (x - mean) / sqrt(var + 1e-8)          var is the biased one (divides by n)

    (Ziegler et al. 2019.) To be called once on a whole rollout, never on a micro-batch.

    Args:
        x: any shape.
        mask: the same shape, True for what counts.
        shift_mean: True removes the mean; False keeps it: only the spread is scaled.

    Returns:
        The whitened values, 0 outside the mask. With fewer than two values, ``x`` unchanged.
    """
    count = mask.sum()
    x = torch.where(mask, x.float(), 0.0)
    if count < 2:
        return x
    mean = x.sum() / count
    variance = torch.where(mask, (x - mean) ** 2, 0.0).sum() / count
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities of given tokens when sampling at ``temperature``.

    Args:
        logits: ``[B, R, V]``, already shifted to predict ``token_ids``.
        token_ids: ``[B, R]`` long.

    Returns:
        ``[B, R]`` float32.
    """
    logits = logits.float() / temperature
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy in nats of each next-token distribution, ``[B, R, V]`` to ``[B, R]``."""
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy, reference) per token, unbiased: ``log p - log q`` for samples of p.

    Single values may be negative; their mean over samples of the policy is not, up to noise.
    """
    return logprobs.float() - ref_logprobs.float()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy, reference) per token with low variance: ``(q/p - 1) - log(q/p) >= 0``.

    (Schulman 2020, "Approximating KL divergence".) For reporting, not for the reward.
    """
    log_ratio = ref_logprobs.float() - logprobs.float()
    return torch.expm1(log_ratio) - log_ratio


def next_kl_coef(
    coef: float, kl: float, *, target: float, horizon: int, num_responses: int
) -> float:
    """Move the KL coefficient towards the target (Ziegler et al. 2019, section 2.2).

    coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_responses / horizon)

    Args:
        kl: mean KL of the rollout in nats per response.
        num_responses: responses in the rollout, over all processes.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * num_responses / horizon)


def penalise_missing_eos(scores: Tensor, ended: Tensor, *, mode: str, value: float) -> Tensor:
    """Penalise responses that ran into the length limit.

    Args:
        scores: ``[B]``.
        ended: ``[B]`` bool, True where the response holds a stop token; from the generator.
        mode: ``"subtract"`` takes ``value`` off the score, ``"replace"`` puts ``value`` in its
            place.
    """
    penalised = scores - value if mode == "subtract" else torch.full_like(scores, value)
    return torch.where(ended, scores, penalised)


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Spread score and KL penalty over the response tokens.

        r_t = -kl_coef * kl_t          plus the score at the last real token

    so that each row sums to ``score - kl_coef * sum(kl)`` (Stiennon et al. 2020, section 3.4).

    Args:
        scores: ``[B]``, one per response.
        kl: ``[B, R]``, per token.
        response_mask: ``[B, R]`` bool.

    Returns:
        ``[B, R]`` float32, 0 outside the mask.
    """
    rewards = torch.where(response_mask, -kl_coef * kl.float(), 0.0)
    last = response_mask.sum(1, keepdim=True) - 1
    at_last = torch.arange(rewards.shape[1], device=rewards.device) == last
    rewards += torch.where(at_last, scores.float().unsqueeze(1), 0.0)
    return rewards


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Estimate advantages over the response tokens.

        delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}

    (Schulman et al. 2016, equations 11 to 16.) ``V_t`` is the value of the state before token t.
    The value after the last real token is 0: the episode ends there.

    Args:
        rewards: ``[B, R]``.
        values: ``[B, R]``.
        response_mask: ``[B, R]`` bool, real tokens first.

    Returns:
        ``advantages`` and ``returns = advantages + values``, ``[B, R]`` float32, 0 outside the
        mask, not whitened.
    """
    rewards = torch.where(response_mask, rewards.float(), 0.0)
    values = torch.where(response_mask, values.float(), 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        # Outside the mask everything is 0, so the recursion starts anew at each row's last token.
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(response_mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        advantages[:, t] = next_advantage
        next_value = values[:, t]
    return advantages, torch.where(response_mask, advantages + values, 0.0)


class Loss(NamedTuple):
    """A scalar to minimise, and sums over tokens of what is worth watching."""

    loss: Tensor
    sums: Stats


def ppo_policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip: float,
    num_tokens: Tensor | int,
) -> Loss:
    """Return the clipped surrogate loss (Schulman et al. 2017, equation 7).

        -sum_t min(ratio_t A_t, clip(ratio_t, 1 - clip, 1 + clip) A_t) / num_tokens

    Args:
        new_logprobs: ``[B, R]`` under the policy being updated; carries the gradient.
        logprobs: ``[B, R]`` under the policy that sampled.
        advantages: ``[B, R]``, whitened over the whole rollout.
        response_mask: ``[B, R]`` bool.
        num_tokens: response tokens of the whole optimiser step, over all micro-batches and
            processes: the sum over micro-batches is then the same however it is split.

    Returns:
        The loss and token sums ``clip_fraction``, ``approx_kl`` (half the squared log-ratio) and
        ``ratio_max_error`` (a maximum, not a sum: the largest ``|ratio - 1|``).
    """
    log_ratio = torch.where(response_mask, new_logprobs.float() - logprobs.float(), 0.0)
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_sum(torch.minimum(surrogate, clipped), response_mask) / num_tokens
    with torch.no_grad():
        sums = {
            "clip_fraction": masked_sum((clipped < surrogate).float(), response_mask),
            "approx_kl": 0.5 * masked_sum(log_ratio**2, response_mask),
            "ratio_max_error": (ratio - 1).abs().max(),
        }
    return Loss(loss, sums)


def ppo_value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip: float,
    num_tokens: Tensor | int,
) -> Loss:
    """Return the clipped value loss.

        0.5 * sum_t max((V_t - R_t)^2, (clip(V_t, Vold_t - clip, Vold_t + clip) - R_t)^2) / tokens

    Args:
        new_values: ``[B, R]`` under the critic being updated; carries the gradient.
        values: ``[B, R]`` as stored at rollout.
        returns: ``[B, R]``.
        response_mask: ``[B, R]`` bool.
        num_tokens: see ``ppo_policy_loss``.

    Returns:
        The loss and the token sum ``value_clip_fraction``.
    """
    new_values, values = new_values.float(), values.float()
    clipped = torch.minimum(torch.maximum(new_values, values - clip), values + clip)
    error, clipped_error = (new_values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_sum(torch.maximum(error, clipped_error), response_mask) / num_tokens
    with torch.no_grad():
        sums = {"value_clip_fraction": masked_sum((clipped_error > error).float(), response_mask)}
    return Loss(loss, sums)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return ``1 - Var(returns - values) / Var(returns)`` over the mask; NaN if Var is 0."""
    residual = (returns.float() - values.float())[mask]
    target = returns.float()[mask]
    variance = target.var(correction=0)
    if len(target) < 2 or variance == 0:
        return math.nan
    return float(1 - residual.var(correction=0) / variance)
