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


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy, reference) per token with low variance: ``(log p - log q)^2 / 2 >= 0``.

    (Schulman 2020.) Biased as a value; as a loss its gradient is that of the KL itself, like k1 in
    the reward (Liu et al. 2025, "Rethinking KL regularization in RLHF").
    """
    return 0.5 * (logprobs.float() - ref_logprobs.float()) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy, reference) per token with low variance: ``(q/p - 1) - log(q/p) >= 0``.

    (Schulman 2020, "Approximating KL divergence".) Unbiased as a value; as a loss its gradient is
    that of KL(reference, policy), the other direction (Tang and Munos 2025).
    """
    log_ratio = ref_logprobs.float() - logprobs.float()
    return torch.expm1(log_ratio) - log_ratio


def kl_estimate(estimator: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(policy, reference) per token by ``"k1"``, ``"k2"`` or ``"k3"``."""
    return {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[estimator](logprobs, ref_logprobs)


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


class Moments(NamedTuple):
    """Mean and spread of all values seen so far; ``m2`` sums the squared distances to the mean."""

    num_values: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """The biased standard deviation (divides by n), 0 before the first value."""
        return math.sqrt(self.m2 / self.num_values) if self.num_values else 0.0


def add_moments(moments: Moments, x: Tensor) -> Moments:
    """Return the moments of what ``moments`` has seen and of ``x`` (any shape, not empty) together.

    (Chan, Golub and LeVeque 1979.) In float64, so that long runs lose nothing.
    """
    x = x.detach().cpu().double()
    mean, m2 = float(x.mean()), float(((x - x.mean()) ** 2).sum())
    total = moments.num_values + x.numel()
    distance, share = mean - moments.mean, x.numel() / total
    return Moments(
        total,
        moments.mean + distance * share,
        moments.m2 + m2 + distance**2 * share * moments.num_values,
    )


def standardise(x: Tensor, mean: float, std: float) -> Tensor:
    """Return ``(x - mean) / (std + 1e-8)``: equal values become 0, not NaN."""
    return (x.float() - mean) / (std + 1e-8)


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
    return torch.where(_last_token(response_mask), rewards + scores.float().unsqueeze(1), rewards)


def _last_token(response_mask: Tensor) -> Tensor:
    """Return ``[B, R]`` bool, True at each row's last real token; a row without one has none."""
    last = response_mask.sum(1, keepdim=True) - 1
    return torch.arange(response_mask.shape[1], device=response_mask.device) == last


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float,
    lam: float,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages over the response tokens.

        delta_t = r_t + gamma * V_{t+1} - V_t        A_t = sum_k (gamma * lam)^k delta_{t+k}

    (Schulman et al. 2016, equations 11 to 16.) ``V_t`` is the value of the state before token t.

    Args:
        rewards: ``[B, R]``.
        values: ``[B, R]``.
        response_mask: ``[B, R]`` bool, real tokens first.
        last_values: ``[B]``, the value of the state after each row's last real token: 0 where the
            episode ended there, which is what None means for all rows.

    Returns:
        ``advantages`` and ``returns = advantages + values``, ``[B, R]`` float32, 0 outside the
        mask, not whitened, without gradient.
    """
    rewards = torch.where(response_mask, rewards.float(), 0.0)
    values = torch.where(response_mask, values.float(), 0.0)
    next_values = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), dim=1)
    if last_values is not None:
        last = _last_token(response_mask)
        next_values = torch.where(last, last_values.float().unsqueeze(1), next_values)
    # Outside the mask every delta is 0, so that a row's sum begins at its last token.
    advantages = rewards + gamma * next_values - values
    # Each round doubles the number of deltas in every sum: log2(R) rounds instead of R steps.
    span = 1
    while span < rewards.shape[1]:
        advantages[:, :-span] += (gamma * lam) ** span * advantages[:, span:]
        span *= 2
    return advantages, advantages + values


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
    dual_clip: float | None = None,
) -> Loss:
    """Return the clipped surrogate loss (Schulman et al. 2017, equation 7).

        -sum_t min(ratio_t A_t, clip(ratio_t, 1 - clip, 1 + clip) A_t) / num_tokens

    With ``dual_clip`` the summand is at least ``dual_clip * A_t`` where ``A_t < 0``: a token that
    has become many times as likely cannot dominate the step (Ye et al. 2020).

    Args:
        new_logprobs: ``[B, R]`` under the policy being updated; carries the gradient.
        logprobs: ``[B, R]`` under the policy that sampled.
        advantages: ``[B, R]``, whitened over the whole rollout.
        response_mask: ``[B, R]`` bool.
        num_tokens: response tokens of the whole optimiser step, over all micro-batches and
            processes: the sum over micro-batches is then the same however it is split.
        dual_clip: above 1.

    Returns:
        The loss and token sums ``clip_fraction``, ``approx_kl`` (half the squared log-ratio),
        ``dual_clip_fraction`` if there is such a clip, and ``ratio_max_error`` (a maximum, not a
        sum: the largest ``|ratio - 1|``).
    """
    log_ratio = torch.where(response_mask, new_logprobs.float() - logprobs.float(), 0.0)
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    objective = torch.minimum(surrogate, clipped)
    with torch.no_grad():
        sums = {
            "clip_fraction": masked_sum(clipped < surrogate, response_mask),
            "approx_kl": 0.5 * masked_sum(log_ratio**2, response_mask),
            "ratio_max_error": (ratio - 1).abs().max(),
        }
    if dual_clip is not None:
        floor = dual_clip * advantages
        below = (advantages < 0) & (objective < floor)
        objective = torch.where(below, floor, objective)
        sums["dual_clip_fraction"] = masked_sum(below, response_mask)
    return Loss(-masked_sum(objective, response_mask) / num_tokens, sums)


def ppo_value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip: float | None,
    num_tokens: Tensor | int,
) -> Loss:
    """Return the clipped value loss.

        0.5 * sum_t max((V_t - R_t)^2, (clip(V_t, Vold_t - clip, Vold_t + clip) - R_t)^2) / tokens

    Args:
        new_values: ``[B, R]`` under the critic being updated; carries the gradient.
        values: ``[B, R]`` as stored at rollout.
        returns: ``[B, R]``.
        response_mask: ``[B, R]`` bool.
        clip: None leaves the squared error as it is.
        num_tokens: see ``ppo_policy_loss``.

    Returns:
        The loss and, if values are clipped, the token sum ``value_clip_fraction``.
    """
    new_values = torch.where(response_mask, new_values.float(), 0.0)
    error = (new_values - returns) ** 2
    sums: Stats = {}
    if clip is not None:
        values = values.float()
        clipped = torch.minimum(torch.maximum(new_values, values - clip), values + clip)
        clipped_error = (clipped - returns) ** 2
        with torch.no_grad():
            sums["value_clip_fraction"] = masked_sum(clipped_error > error, response_mask)
        error = torch.maximum(error, clipped_error)
    return Loss(0.5 * masked_sum(error, response_mask) / num_tokens, sums)


def kl_loss(
    estimator: str,
    new_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    num_tokens: Tensor | int,
) -> Tensor:
    """Return the KL to the reference as a loss: the estimate's sum over tokens / ``num_tokens``.

    In place of the KL in the reward, never beside it. Unlike there, a token answers for the KL of
    its own distribution only, not for that of later ones (Tang and Munos 2025), and the gradient is
    exact only while the policy being updated is the one that sampled.

    Args:
        estimator: ``"k2"`` or ``"k3"``; the gradient of k1 averages to 0, whatever the reference.
        new_logprobs: ``[B, R]`` under the policy being updated; carries the gradient.
        ref_logprobs: ``[B, R]`` under the frozen SFT policy.
        response_mask: ``[B, R]`` bool.
        num_tokens: see ``ppo_policy_loss``.
    """
    new_logprobs = torch.where(response_mask, new_logprobs.float(), 0.0)
    ref_logprobs = torch.where(response_mask, ref_logprobs.float(), 0.0)
    return kl_estimate(estimator, new_logprobs, ref_logprobs).sum() / num_tokens


def entropy_bonus(entropy: Tensor, response_mask: Tensor, *, num_tokens: Tensor | int) -> Tensor:
    """Return what is subtracted from the loss to keep the policy exploring, in nats per token.

    (Schulman et al. 2017, equation 9.) ``entropy`` is ``[B, R]`` under the policy being updated and
    carries the gradient; ``num_tokens`` as in ``ppo_policy_loss``.
    """
    return masked_sum(entropy, response_mask) / num_tokens


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return ``1 - Var(returns - values) / Var(returns)`` over the mask; NaN if Var is 0."""
    residual = (returns.float() - values.float())[mask]
    target = returns.float()[mask]
    variance = target.var(correction=0)
    if len(target) < 2 or variance == 0:
        return math.nan
    return float(1 - residual.var(correction=0) / variance)
