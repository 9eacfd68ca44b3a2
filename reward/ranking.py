"""Losses and accuracies of ranked responses: pure functions on scores.

Responses lie flat, the ones of a prompt next to each other or not: ``scores[i]`` belongs to the
prompt ``groups[i]`` and ``targets[i]`` says how good its annotator found it (higher is better,
equal is a tie). So prompts may have unequal numbers of responses and nothing is ever padded.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Z90 = 1.6448536269514722  # the normal distribution holds 90 % within +- so many deviations
_ROUNDING = 1e-12  # of the variance: less of it between prompts is none
_FEW = 128  # responses that are compared all with all sooner than sorted by prompt


class Interval(NamedTuple):
    """A share with the bounds of its 90 % interval."""

    mean: float
    low: float
    high: float


def strict_pairs(groups: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return every pair of one prompt's responses that has a winner.

    Args:
        groups: ``[N]`` long, the prompt of each response, counted from 0.
        targets: ``[N]``, higher is better. Pairs of equal targets are ties and left out.

    Returns:
        ``better`` and ``worse``, both ``[M]`` long: indices into the ``[N]`` responses, ordered by
        ``better``, then by ``worse``.
    """
    if len(groups) <= _FEW:
        same = groups[:, None] == groups[None, :]
        better, worse = (same & (targets[:, None] > targets[None, :])).nonzero(as_tuple=True)
        return better, worse
    # Each response beside the K of its prompt alone: [N, K], K those of the longest ranking.
    by_prompt = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups)
    starts = counts.cumsum(0) - counts
    places = torch.arange(int(counts.max()), device=groups.device)
    beside = by_prompt[(starts[groups][:, None] + places).clamp(max=len(groups) - 1)]
    wins = (places < counts[groups][:, None]) & (targets[:, None] > targets[beside])
    better, place = wins.nonzero(as_tuple=True)
    return better, beside[better, place]


def pair_losses(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, share: Tensor | None = None
) -> Tensor:
    """Return the negative log-likelihood of every pair's outcome, in float32.

        d = chosen - rejected - margin
        loss = -share log sigmoid(d) - (1 - share) log sigmoid(-d)

    By Bradley-Terry the chosen response wins with probability sigmoid(d); ``margin`` is Llama 2's
    (Touvron et al. 2023, eq. 2). With a ``share`` below 1 the loss is least at
    d = log(share / (1 - share)), not at infinity. Two equal scores give ln 2.

    Args:
        chosen, rejected: ``[M]`` scores.
        margin: ``[M]``, how far apart the scores of a pair should at least be; None: 0.
        share: ``[M]`` in [0, 1], how often the chosen response is the better one; None: always.

    Returns:
        ``[M]`` float32.
    """
    difference = chosen.float() - rejected.float()
    if margin is not None:
        difference = difference - margin.float()
    if share is None:
        return -F.logsigmoid(difference)
    return -share * F.logsigmoid(difference) - (1 - share) * F.logsigmoid(-difference)


def ranking_loss(
    scores: Tensor,
    groups: Tensor,
    targets: Tensor,
    *,
    margins: Tensor | None = None,
    votes: Tensor | None = None,
    label_smoothing: float = 0.0,
    num_rankings: int | Tensor | None = None,
    pairs: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the ranking loss of InstructGPT (Ouyang et al. 2022, eq. 1).

        loss = 1/G sum_g  1/|pairs_g| sum_(b, w) in pairs_g  -log sigmoid(s_b - s_w - m_g)

    All pairs of a prompt belong to one batch element and share its weight, so a prompt with nine
    responses does not count 36 times. Ties are no pairs; G counts the prompts that have a pair.

    Args:
        scores: ``[N]``, any dtype; computed in float32.
        groups, targets: ``[N]``, see ``strict_pairs``.
        margins: ``[number of prompts]``, each subtracted in the pairs whose better response is its
            prompt's best; NaN counts as 0.
        votes: ``[N]``, how many annotators preferred each response, in any unit. The better one of
            a pair then wins ``v_b / (v_b + v_w)`` of the time; NaN: always.
        label_smoothing: the share of labels that are wrong: the better one wins so much less often
            (Mitchell 2023, "A note on DPO with noisy preferences": conservative DPO).
        num_rankings: G of the whole optimiser step, where ``scores`` are only a part of it; the
            parts' losses then add up to the loss of the whole. None: G of these scores.
        pairs: what ``strict_pairs`` says of them, where that is known.

    Returns:
        A scalar. Without any pair it is 0 and its gradient is 0.
    """
    better, worse = strict_pairs(groups, targets) if pairs is None else pairs
    owner = groups[better]
    margin = share = None
    if margins is not None:
        at_the_top = ~torch.isin(better, worse)
        margin = torch.nan_to_num(margins.float())[owner] * at_the_top
    if votes is not None:
        both = votes[better] + votes[worse]
        share = torch.nan_to_num(votes[better] / both, nan=1.0).float()
    elif label_smoothing:
        share = torch.full_like(better, 1 - label_smoothing, dtype=torch.float32)
    losses = pair_losses(scores[better], scores[worse], margin, share)
    return mean_by_prompt(losses, owner, num_rankings)


def listwise_loss(
    scores: Tensor,
    groups: Tensor,
    targets: Tensor,
    *,
    num_rankings: int | Tensor | None = None,
) -> Tensor:
    """Return the negative log-likelihood of every prompt's order (Plackett 1975, Luce 1959).

        loss = 1/G sum_g  1/n_g sum_i  -log( exp s_i / (exp s_i + sum_(j worse than i) exp s_j) )

    Each response has to win against all that are worse, at once; n_g counts those that have a worse
    one, K - 1 without ties, so that a pair has the loss of ``pair_losses`` and long rankings do not
    count more. Tied responses do not compete with each other: each of them competes with the worse
    ones, as if the others it is tied with were absent.

    Args:
        scores, groups, targets, num_rankings: as for ``ranking_loss``.

    Returns:
        A scalar. Without any response that has a worse one it is 0 and its gradient is 0.
    """
    values = scores.float()
    worse = (groups[:, None] == groups[None, :]) & (targets[:, None] > targets[None, :])
    winners = worse.any(1).nonzero(as_tuple=True)[0]
    competing = worse[winners]
    competing[torch.arange(len(winners), device=winners.device), winners] = True
    field = torch.where(competing, values[None, :], -torch.inf)
    losses = torch.logsumexp(field, 1) - values[winners]
    return mean_by_prompt(losses, groups[winners], num_rankings)


def centering_penalty(
    scores: Tensor,
    groups: Tensor,
    targets: Tensor,
    *,
    num_rankings: int | Tensor | None = None,
) -> Tensor:
    """Return the mean of ``(s_b + s_w)^2`` over the pairs of a prompt, then over the prompts.

    A ranking loss leaves the scores free up to a constant; this term keeps them around 0
    (Eisenstein et al. 2023, "Helping or Herding?", eq. 2).

    Args:
        scores, groups, targets, num_rankings: as for ``ranking_loss``.
    """
    better, worse = strict_pairs(groups, targets)
    squares = (scores[better].float() + scores[worse].float()) ** 2
    return mean_by_prompt(squares, groups[better], num_rankings)


def mean_by_prompt(
    values: Tensor, owners: Tensor, num_rankings: int | Tensor | None = None
) -> Tensor:
    """Return the mean over prompts of the mean of each prompt's values.

    Args:
        values: ``[M]``.
        owners: ``[M]`` long, the prompt of each value.
        num_rankings: what the prompts' means are divided by; None: how many prompts have a value.

    Returns:
        A scalar; without any value it is 0, and so is its gradient.
    """
    counts = torch.bincount(owners, minlength=1)
    if num_rankings is None:
        num_rankings = (counts > 0).sum().clamp(min=1)
    return (values / counts[owners]).sum() / num_rankings


def count_rankings(groups: Tensor, targets: Tensor) -> Tensor:
    """Return how many prompts have a pair with a winner: the G of ``ranking_loss``, a scalar."""
    better, _ = strict_pairs(groups, targets)
    return (torch.bincount(groups[better], minlength=1) > 0).sum()


def pair_outcomes(
    scores: Tensor,
    groups: Tensor,
    targets: Tensor,
    *,
    pairs: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return for every strict pair whether ``scores`` order it as the annotator did.

    With the responses' lengths as ``scores`` this is the outcome of the rule "longer wins".

    Args:
        scores, groups, targets, pairs: as for ``ranking_loss``.

    Returns:
        ``outcomes`` ``[M]`` float32: 1 right, 0 wrong, 0.5 where the two scores are equal; and
        ``owners`` ``[M]`` long: the prompt of each pair.
    """
    better, worse = strict_pairs(groups, targets) if pairs is None else pairs
    order: Tensor = torch.sign(scores[better] - scores[worse]).float()
    return (order + 1) / 2, groups[better]


def mean_margin(
    scores: Tensor,
    groups: Tensor,
    targets: Tensor,
    *,
    pairs: tuple[Tensor, Tensor] | None = None,
) -> float:
    """Return the mean of better minus worse score over all strict pairs; NaN without a pair.

    Args:
        scores, groups, targets, pairs: as for ``ranking_loss``.
    """
    better, worse = strict_pairs(groups, targets) if pairs is None else pairs
    return (scores[better].double() - scores[worse].double()).mean().item()


def share_with_interval(outcomes: Tensor, owners: Tensor) -> Interval:
    """Return the mean of the outcomes with a 90 % Wilson interval that knows their groups.

    Pairs of one prompt share responses, so M pairs tell less than M independent ones. Wilson's
    interval (1927) is taken at the effective number of pairs

        n = p (1 - p) / var(p),    var(p) = sum_g (sum_(i in g) (x_i - p))^2 / M^2

    (the cluster-robust variance; Korn and Graubard 1998 build intervals for surveys so), never
    above M. Where the formula has nothing to measure, because all prompts have the same share of
    right pairs, n is the number of prompts.

    Args:
        outcomes: ``[M]`` in [0, 1].
        owners: ``[M]`` long, the prompt of each outcome.

    Returns:
        The mean and both bounds, within [0, 1]; three NaNs without an outcome.
    """
    count = outcomes.numel()
    if count == 0:
        return Interval(math.nan, math.nan, math.nan)
    values = outcomes.double()
    p = values.mean().item()
    n = _effective_count(values - p, owners, p * (1 - p))
    center = (p + Z90**2 / (2 * n)) / (1 + Z90**2 / n)
    half = Z90 / (1 + Z90**2 / n) * math.sqrt(p * (1 - p) / n + Z90**2 / (4 * n * n))
    return Interval(p, max(0.0, min(p, center - half)), min(1.0, max(p, center + half)))


def _effective_count(deviations: Tensor, owners: Tensor, variance: float) -> float:
    count = deviations.numel()
    _, index = torch.unique(owners, return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=deviations.device)
    sums.index_add_(0, index, deviations)
    spread = float((sums**2).sum()) / count**2
    # Prompts of the same share leave of 0 what the rounding of p makes of it.
    if spread <= _ROUNDING * variance:
        return float(sums.numel())
    return min(float(count), max(1.0, variance / spread))


def ranking_metrics(
    scores: Tensor, groups: Tensor, targets: Tensor, lengths: Tensor
) -> dict[str, float]:
    """Return what held-out rankings say about a reward model, under the keys of the metrics log.

    ``accuracy`` is over strict pairs, with its 90 % interval; ``accuracy/longer_wins`` is that of
    preferring the longer response, on the same pairs; ``margin/mean`` is better minus worse score.

    Args:
        scores, groups, targets: ``[N]``, see ``ranking_loss``.
        lengths: ``[N]``, the responses' lengths.

    Returns:
        Nothing if there is no strict pair.
    """
    pairs = strict_pairs(groups, targets)
    outcomes, owners = pair_outcomes(scores, groups, targets, pairs=pairs)
    if outcomes.numel() == 0:
        return {}
    accuracy = share_with_interval(outcomes, owners)
    longer, _ = pair_outcomes(lengths, groups, targets, pairs=pairs)
    return {
        "loss": ranking_loss(scores, groups, targets, pairs=pairs).item(),
        "accuracy": accuracy.mean,
        "accuracy/low": accuracy.low,
        "accuracy/high": accuracy.high,
        "accuracy/longer_wins": longer.double().mean().item(),
        "margin/mean": mean_margin(scores, groups, targets, pairs=pairs),
    }
