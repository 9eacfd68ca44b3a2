"""Labelled rows as token ids, their batches, and what a classifier says of held-out ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.errors import InputError
from align.recipe_reward import Reward
from data.records import Labelled
from data.render import Renderer
from reward.analysis import interval_metrics
from reward.baseline import NEEDS, bag_of_words_labels
from reward.classes import class_loss, class_metrics, class_outcomes, figures_by_class
from reward.ranking import share_with_interval
from reward.scorer import Row, pad_rows

Batch = dict[str, Tensor]
Score = Callable[[Sequence[Row]], Tensor]

TRAIN_ACCURACY_ROWS = 512  # that show how much was learned by heart
BASELINE_ROWS = 20_000  # that the bag of words learns from: seconds


@dataclass(frozen=True, slots=True)
class LabelledTokens:
    """One row as token ids: what is read first, what is read second or nothing, and the class."""

    first: list[int]
    second: list[int]
    label: int
    record: Labelled

    def rows(self) -> list[Row]:
        """Return the row to score."""
        return [(self.first, self.second)]

    @property
    def width(self) -> int:
        """Its tokens."""
        return len(self.first) + len(self.second)

    @property
    def num_tokens(self) -> int:
        """Its tokens: there is nothing that rows share."""
        return self.width


def labelled_tokens(section: Reward, renderer: Renderer, record: Labelled) -> LabelledTokens:
    """Render a labelled row.

    Raises:
        Unusable: see ``Renderer.labelled``.
    """
    assert section.classes is not None
    number = section.classes.numbers[record.label]
    return LabelledTokens(*renderer.labelled(record), number, record)


def collate_labelled(rows: Sequence[LabelledTokens], pad_id: int) -> Batch:
    """Return ``input_ids`` and ``attention_mask`` ``[B, T]``, and ``labels`` ``[B]`` long."""
    input_ids, attention_mask = pad_rows([row.first + row.second for row in rows], pad_id)
    labels = torch.tensor([row.label for row in rows])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def classifier_loss(
    section: Reward, model: nn.Module, batch: Batch, num_rows: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a batch's loss and its logits ``[B, C]``; see ``reward.classes.class_loss``."""
    logits: Tensor = model(batch["input_ids"], batch["attention_mask"])
    smoothing = section.label_smoothing
    loss = class_loss(logits, batch["labels"], label_smoothing=smoothing, num_rows=num_rows)
    return loss, logits


def check_classes(
    section: Reward, rows: Sequence[LabelledTokens], note: Callable[[str], None]
) -> None:
    """Refuse rows of one class alone; say of which classes there are none.

    Raises:
        InputError: names the class.
    """
    learned = {row.label for row in rows}
    if len(learned) == 1:
        name = section.labels[learned.pop()]
        raise InputError(
            f"data.reward.train: all {len(rows)} rows are of the class {name!r}; a classifier needs"
            " rows of two or more"
        )
    unseen = [name for number, name in enumerate(section.labels) if number not in learned]
    if unseen:
        note(f"reward  data.reward.train has no row of {', '.join(unseen)}: never learned")


def look_at_classifier(score: Score, rows: Sequence[LabelledTokens]) -> dict[str, float]:
    """Return the ``loss`` of rows, in nats, and the ``accuracy``: the share that is right."""
    logits, labels = _logits(score, rows)
    right = class_outcomes(logits, labels).mean().item()
    return {"loss": class_loss(logits, labels).item(), "accuracy": right}


def measure_classifier(
    section: Reward,
    score: Score,
    train: Sequence[LabelledTokens],
    heldout: Sequence[LabelledTokens],
    note: Callable[[str], None],
) -> dict[str, float]:
    """Return the metrics of a trained classifier, flat; see ``reward.classes``.

    With ``accuracy/bag_of_words``, of the rows' words alone.

    Args:
        note: is told what could not be measured.
    """
    learned = look_at_classifier(score, train[:TRAIN_ACCURACY_ROWS])
    metrics = {"accuracy/train": learned["accuracy"]}
    if not heldout:
        return metrics
    logits, labels = _logits(score, heldout)
    metrics |= class_metrics(logits, labels)
    try:
        metrics |= figures_by_class(logits.argmax(-1), labels, section.labels)
        metrics |= _bag_of_words(train, heldout, labels)
    except ImportError as error:
        note(
            "reward  no figures by class and no bag of words to compare with: scikit-learn does not"
            f" import here ({error}); install it: pip install '{NEEDS}'"
        )
    return metrics


def _bag_of_words(
    train: Sequence[LabelledTokens], heldout: Sequence[LabelledTokens], labels: Tensor
) -> dict[str, float]:
    some = train[:: math.ceil(len(train) / BASELINE_ROWS)]  # files are often sorted by label
    if len({row.label for row in some}) == 1:
        return {}
    given = bag_of_words_labels(_texts(some), [row.label for row in some], _texts(heldout))
    right = (given == labels).float()
    share = share_with_interval(right, torch.arange(len(right)))
    return interval_metrics("accuracy/bag_of_words", share)


def _texts(rows: Sequence[LabelledTokens]) -> list[str]:
    return ["\n".join(row.record.texts) for row in rows]


def _logits(score: Score, rows: Sequence[LabelledTokens]) -> tuple[Tensor, Tensor]:
    logits = score([row for item in rows for row in item.rows()])
    return logits, torch.tensor([row.label for row in rows])
