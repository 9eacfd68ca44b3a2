"""The report of a reward model: what it gets right, where, how sure it is, and what fools it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align.errors import InputError
from pipelines.ranked_tokens import RankedTokens
from reward.analysis import (
    PROBES,
    accuracy_by,
    calibration_metrics,
    interval_metrics,
    length_metrics,
    length_names,
    margin_names,
)
from reward.baseline import NEEDS, TextPair, bag_of_words_outcomes
from reward.ranking import pair_outcomes, ranking_metrics, share_with_interval, strict_pairs
from reward.scorer import Row

TRAIN_ACCURACY_ROWS = 512  # rankings that show how much was learned by heart
# Held-out rankings whose best answer is probed: a share of 200 is known to 6 points.
PROBED_ROWS = 200
BASELINE_PAIRS = 20_000  # that the bag of words learns from: seconds

Score = Callable[[Sequence[Row]], Tensor]


def measure(
    score: Score,
    train: Sequence[RankedTokens],
    heldout: Sequence[RankedTokens],
    *,
    max_response_tokens: int,
    note: Callable[[str], None],
) -> dict[str, float]:
    """Return the metrics of a trained reward model, flat.

    Args:
        score: rows to scores.
        max_response_tokens: probes are no longer than that, as PPO's answers are.
        note: is told what could not be measured.
    """
    some = train[:TRAIN_ACCURACY_ROWS]
    scores, groups, targets, lengths = _flat(score, some)
    on_train = ranking_metrics(scores, groups, targets, lengths)
    metrics = {"accuracy/train": on_train["accuracy"]} if on_train else {}
    if not heldout:
        return metrics
    scores, groups, targets, lengths = _flat(score, heldout)
    found = ranking_metrics(scores, groups, targets, lengths)
    if not found:
        return metrics
    better, worse = strict_pairs(groups, targets)
    outcomes, owners = pair_outcomes(scores, groups, targets, pairs=(better, worse))
    differences = scores[better] - scores[worse]
    metrics |= found | {"pairs": float(len(better))}
    rankings = [heldout[owner].ranking for owner in owners.tolist()]
    gaps = (targets[better] - targets[worse]).tolist()
    margins = [gap if r.margin is None else r.margin for r, gap in zip(rankings, gaps, strict=True)]
    for group, names in (
        ("source", [ranking.origin.rpartition(":")[0] for ranking in rankings]),
        ("strength", [ranking.strength for ranking in rankings]),
        ("margin", margin_names(torch.tensor(margins))),
        ("length", length_names(lengths[better], lengths[worse])),
    ):
        metrics |= accuracy_by(group, names, outcomes, owners)
    metrics |= calibration_metrics(differences, owners)
    metrics |= length_metrics(differences, lengths[better], lengths[worse], owners)
    metrics |= _bag_of_words(train, heldout, owners, note)
    return metrics | _probe_wins(score, heldout, scores, max_response_tokens)


def quick_look(score: Score, rankings: Sequence[RankedTokens]) -> dict[str, float]:
    """Return the rankings' ``loss``, in nats a pair, and the ``accuracy`` on their pairs.

    Overfitting is seen in the loss first: the accuracy does not know how sure a mistake was.

    Raises:
        InputError: they hold ties only.
    """
    found = ranking_metrics(*_flat(score, rankings))
    if not found:
        raise InputError("data.reward.heldout: holds ties only; reward.heldout_every needs pairs")
    return {key: found[key] for key in ("loss", "accuracy")}


def _flat(score: Score, rankings: Sequence[RankedTokens]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scores, groups, targets and lengths of all responses, ``[N]`` each."""
    rows = [row for ranking in rankings for row in ranking.rows()]
    counts = torch.tensor([len(ranking.responses) for ranking in rankings])
    return (
        score(rows),
        torch.arange(len(rankings)).repeat_interleave(counts),
        torch.tensor([t for ranking in rankings for t in ranking.targets], dtype=torch.float64),
        torch.tensor([len(response) for _, response in rows]),
    )


def _bag_of_words(
    train: Sequence[RankedTokens],
    heldout: Sequence[RankedTokens],
    owners: Tensor,
    note: Callable[[str], None],
) -> dict[str, float]:
    try:
        pairs = _texts(train)
        some = pairs[:: max(1, math.ceil(len(pairs) / BASELINE_PAIRS))]  # of all files
        outcomes = bag_of_words_outcomes(some, _texts(heldout))
    except ImportError as error:
        note(
            f"reward  no bag of words to compare with: scikit-learn does not import here ({error});"
            f" install it: pip install '{NEEDS}'"
        )
        return {}
    return interval_metrics("accuracy/bag_of_words", share_with_interval(outcomes, owners))


def _texts(rankings: Sequence[RankedTokens]) -> list[TextPair]:
    """Return the pairs' texts, in the order of ``strict_pairs``."""
    pairs = []
    for row in rankings:
        texts, targets = row.ranking.responses, torch.tensor(row.targets, dtype=torch.float64)
        better, worse = strict_pairs(torch.zeros(len(texts)).long(), targets)
        pairs += [(texts[b], texts[w]) for b, w in zip(better, worse, strict=True)]
    return pairs


def _probe_wins(
    score: Score, heldout: Sequence[RankedTokens], scores: Tensor, max_response_tokens: int
) -> dict[str, float]:
    """Return how often answers that are surely worse beat the best answer: ``probe_wins/<name>``.

    Args:
        scores: of all held-out responses, flat.
    """
    starts = torch.tensor([0, *(len(row.responses) for row in heldout)]).cumsum(0)
    metrics: dict[str, float] = {}
    for name in PROBES:
        made = [
            (i, probe_response(name, i, heldout, max_response_tokens))
            for i in range(min(PROBED_ROWS, len(heldout)))
        ]
        probed = [(i, response) for i, response in made if response is not None]
        if not probed:
            continue
        found = score([(heldout[i].prompt, response) for i, response in probed])
        chosen = scores[torch.tensor([int(starts[i]) + heldout[i].best for i, _ in probed])]
        wins = (torch.sign(found - chosen) + 1) / 2
        share = share_with_interval(wins, torch.tensor([i for i, _ in probed]))
        metrics |= interval_metrics(f"probe_wins/{name}", share)
    return metrics


def probe_response(
    name: str, number: int, rankings: Sequence[RankedTokens], max_response_tokens: int
) -> list[int] | None:
    """Return an answer that is worse than a ranking's best one, as token ids with their end.

    Args:
        name: of ``PROBES``.
        number: which of the rankings.

    Returns:
        None where there is none: nothing to cut in two, too long when given twice, or no other
        prompt with another answer.
    """
    row = rankings[number]
    chosen = row.responses[row.best]
    text, end = chosen[:-1], chosen[-1:]
    if name == "empty":
        return end
    if name == "truncated":
        return text[: len(text) // 2] + end if len(text) > 1 else None
    if name == "repeated":
        return text + text + end if 2 * len(text) < max_response_tokens else None
    assert name == "other_prompt", name
    others = (rankings[(number + step) % len(rankings)] for step in range(1, len(rankings)))
    answers = (other.responses[other.best] for other in others if other.prompt != row.prompt)
    return next((answer for answer in answers if answer != chosen), None)
