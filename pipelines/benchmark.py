"""A reward model on benchmark files: does the best response of every prompt score highest?"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.records import Ranking
from data.render import Renderer, render_all
from pipelines.stage import StageJob
from reward.benchmark import benchmark_metrics

# A ranking with the token ids of its responses.
RenderedRanking = tuple[Ranking, list[list[int]]]
PREFIX = "benchmark."


def measure_benchmark(
    job: StageJob, renderer: Renderer, score: Callable[[Sequence[RenderedRanking]], Tensor]
) -> dict[str, float]:
    """Return the accuracies on ``data.benchmark``, without its prompts that are too long.

    Args:
        score: rankings to the scores of all their responses, flat.

    Raises:
        DataError: too many prompts cannot be tokenised.
    """
    subsets: list[str] = []
    rankings: list[RenderedRanking] = []
    for section, data in job.data.items():
        if not section.startswith(PREFIX):
            continue
        rows = [row for row in data.train if isinstance(row, Ranking)]
        kept, dropped = render_all(
            rows, lambda row: (row, [renderer.response(row.messages, r) for r in row.responses])
        )
        job.check_dropped(section, len(kept), dropped)
        rankings += kept
        subsets += [row.subset or section.removeprefix(PREFIX) for row, _ in kept]
    if not rankings:
        return {}
    scores = score(rankings).split([len(answers) for _, answers in rankings])
    right = [_right(row, found) for (row, _), found in zip(rankings, scores, strict=True)]
    return benchmark_metrics(subsets, torch.tensor(right))


def _right(ranking: Ranking, scores: Tensor) -> bool:
    """Say whether a best response scores higher than all that are worse; equal is wrong."""
    targets = torch.tensor(ranking.scores, dtype=torch.float64)
    best = targets == targets.max()
    return bool(scores[best].max() > scores[~best].max())
