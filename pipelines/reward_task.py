"""What the reward stage learns from: rankings of responses, or rows with a label each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from align.recipe_reward import Reward
from data.records import Labelled, Ranking, Record
from data.render import Renderer
from pipelines.labelled_tokens import (
    check_classes,
    classifier_loss,
    collate_labelled,
    labelled_tokens,
    look_at_classifier,
    measure_classifier,
)
from pipelines.ranked_tokens import Batch, collate, ranked_tokens
from pipelines.reward_loss import check_columns, margin_of, reward_loss
from pipelines.reward_report import Score, measure, quick_look
from reward.classes import class_outcomes
from reward.ranking import count_rankings, pair_outcomes

Note = Callable[[str], None]
# RankedTokens or LabelledTokens: they have ``rows()`` to score, ``width`` and ``num_tokens``.
Rows = Sequence[Any]


@dataclass(frozen=True)
class Task:
    """How rows are read, learned from and measured.

    Attributes:
        tokens: a record's ids; raises Unusable.
        check: refuses training rows that nothing can be learned from.
        collate: rows to a batch, given ``pad_id`` and whether to ``share_prompts``.
        loss: of the model on a batch, with output embeddings if the loss reads them, and the rows
            of the whole step, if there are more; also returns the scores.
        count: how many rows of a batch are learned from, a scalar.
        outcomes: of the scores of a batch, 1 where they are right, 0 where wrong; flat.
        look: the loss and the accuracy of a scorer on held-out rows, while the model is trained.
        measure: the metrics of a trained model on training and held-out rows.
    """

    tokens: Callable[[Renderer, Record], Any]
    check: Callable[[Rows, Note], None]
    collate: Callable[..., Batch]
    loss: Callable[[nn.Module, Batch, nn.Module | None, int | Tensor | None], tuple[Tensor, Tensor]]
    count: Callable[[Batch], Tensor]
    outcomes: Callable[[Tensor, Batch], Tensor]
    look: Callable[[Score, Rows], dict[str, float]]
    measure: Callable[[Score, Rows, Rows, int, Note], dict[str, float]]


def reward_task(section: Reward) -> Task:
    """Return what a recipe's reward stage learns from."""
    return _rankings(section) if section.classes is None else _classes(section)


def _rankings(section: Reward) -> Task:
    def tokens(renderer: Renderer, record: Record) -> Any:
        assert isinstance(record, Ranking)
        return ranked_tokens(renderer, record, margin_of(section, record))

    return Task(
        tokens=tokens,
        check=lambda rows, note: check_columns(section, rows),
        collate=collate,
        loss=lambda model, batch, lm_head, count: reward_loss(
            section, model, batch, lm_head=lm_head, num_rankings=count
        ),
        count=lambda batch: count_rankings(batch["groups"], batch["targets"]),
        outcomes=lambda scores, batch: pair_outcomes(scores, batch["groups"], batch["targets"])[0],
        look=quick_look,
        measure=lambda score, train, heldout, longest, note: measure(
            score, train, heldout, max_response_tokens=longest, note=note
        ),
    )


def _classes(section: Reward) -> Task:
    def tokens(renderer: Renderer, record: Record) -> Any:
        assert isinstance(record, Labelled)
        return labelled_tokens(section, renderer, record)

    return Task(
        tokens=tokens,
        check=partial(check_classes, section),
        collate=lambda rows, pad_id, share_prompts: collate_labelled(rows, pad_id),
        loss=lambda model, batch, lm_head, count: classifier_loss(section, model, batch, count),
        count=lambda batch: (batch["labels"] >= 0).sum(),
        outcomes=lambda logits, batch: class_outcomes(logits, batch["labels"]),
        look=look_at_classifier,
        measure=lambda score, train, heldout, longest, note: measure_classifier(
            section, score, train, heldout, note
        ),
    )
