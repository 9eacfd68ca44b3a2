"""Several rewards made one: weighted sums, and ensembles that distrust what their models dispute.

Pure functions on scores ``[M, B]``: of M sources or models, for B responses. Computed in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

# Models of one scale on demonstrations mostly spread by less than this on other responses.
_SAME_SCALE = 1.5


def weighted_sum(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """Add up the scores of several sources.

        sum over m of weights[m] * scores[m, b]

    The scores are taken as they come: a source whose scores spread twice as far weighs twice.

    Args:
        scores: ``[M, B]``.
        weights: M of them, of either sign.

    Returns:
        ``[B]`` float32.
    """
    assert len(weights) == len(scores), f"{len(weights)} weights for {len(scores)} sources"
    per_source = torch.tensor(weights, dtype=torch.float32, device=scores.device)
    return (per_source[:, None] * scores.float()).sum(0)


def ensemble_score(
    scores: Tensor,
    combine: Literal["mean", "minimum"] = "mean",
    *,
    std_penalty: float = 0.0,
    variance_penalty: float = 0.0,
) -> Tensor:
    """Make one score of those of several models, which counts less where they disagree.

        mean:     mean over m of scores[m, b]
                  - std_penalty * disagreement[b]  - variance_penalty * disagreement[b]^2
        minimum:  min over m of scores[m, b]

    Coste et al. 2023 have the mean, the minimum (worst-case) and the penalty on the variance
    (uncertainty-weighted); one on the standard deviation has the unit of the scores.

    Args:
        scores: ``[M, B]``.
        std_penalty, variance_penalty: not negative; of the mean only.

    Returns:
        ``[B]`` float32.
    """
    scores = scores.float()
    if combine == "minimum":
        return scores.min(0).values
    spread = disagreement(scores)
    return scores.mean(0) - std_penalty * spread - variance_penalty * spread**2


def disagreement(scores: Tensor) -> Tensor:
    """Return the standard deviation over the models, ``[M, B]`` to ``[B]`` float32.

    The biased one (divides by M): the spread of exactly these models, 0 for a single one.
    """
    return scores.float().std(0, correction=0)


def source_metrics(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what each source gave on average.

    Args:
        scores: by the source's name, ``[M, B]`` of its M models; M is 1 for a plain source.

    Returns:
        ``score/<name>``, the mean over responses and models, before weight and penalty, and
        for ensembles ``score/<name>/std``, the mean disagreement, and ``score/<name>/scales``,
        how many times as far as another's one model's scores spread.
    """
    metrics = {f"score/{name}": float(rows.float().mean()) for name, rows in scores.items()}
    for name, rows in scores.items():
        if len(rows) > 1:
            metrics[f"score/{name}/std"] = float(disagreement(rows).mean())
            spread = rows.float().std(1, correction=0)
            if float(spread.min()) > 0:
                metrics[f"score/{name}/scales"] = float(spread.max() / spread.min())
    return metrics


def scale_warnings(metrics: Mapping[str, float]) -> list[str]:
    """Return what to say of ensembles whose models have no common scale.

    Args:
        metrics: what ``source_metrics`` returns, among others.
    """
    return [
        f"{key.split('/')[1]}: one model's scores spread {ratio:.1f} times as far as another's, and"
        " the ensemble takes that for disagreement; reward.scale_on: demonstrations gives all"
        " models one scale on demonstrations"
        for key, ratio in metrics.items()
        if key.startswith("score/") and key.endswith("/scales") and ratio > _SAME_SCALE
    ]
