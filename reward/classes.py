"""Loss and figures of classifiers: pure functions on logits, one per class."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reward.analysis import interval_metrics
from reward.ranking import share_with_interval
from reward.reliability import expected_calibration_error, reliability_of


def class_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    num_rows: int | Tensor | None = None,
) -> Tensor:
    """Return the mean cross-entropy of labelled rows, in nats, computed in float32.

        loss = 1/N sum_i  -sum_c q_ic log softmax(z_i)_c,    q_ic = (1 - e) [c = y_i] + e / C

    (Szegedy et al. 2016, section 7, for the smoothing e.)

    Args:
        logits: ``[B, C]``, any dtype.
        labels: ``[B]`` long.
        num_rows: N of the whole optimiser step, where these rows are only a part of it; the parts'
            losses then add up to the loss of the whole. None: B.
    """
    total = F.cross_entropy(
        logits.float(), labels, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (len(labels) if num_rows is None else num_rows)


def class_outcomes(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for every row whether its label has the largest logit, ``[B]`` float32: 1 or 0."""
    return (logits.argmax(-1) == labels).float()


def class_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return what held-out rows say about a classifier, under the keys of the metrics log.

    ``accuracy`` with its 90 % interval, ``accuracy/majority`` of always giving the most frequent of
    these labels, and how far the largest probability is off (Guo et al. 2017): ``calibration/ece``
    and the bins of its reliability diagram.

    Args:
        logits: ``[N, C]``, N > 0.
        labels: ``[N]`` long.
    """
    right = class_outcomes(logits, labels)
    said = logits.double().softmax(-1).max(-1).values
    diagram = reliability_of(said, right.double(), lowest=0.0)
    metrics = {
        "loss": class_loss(logits, labels).item(),
        **interval_metrics("accuracy", share_with_interval(right, torch.arange(len(labels)))),
        "accuracy/majority": torch.bincount(labels).max().item() / len(labels),
        "rows": float(len(labels)),
        "calibration/ece": expected_calibration_error(diagram),
    }
    for number, part in enumerate(diagram):
        metrics |= {f"calibration/bin{number}/{k}": float(v) for k, v in part._asdict().items()}
    return metrics


def figures_by_class(given: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return ``class/<label>/precision``, ``/recall``, ``/f1`` and ``/rows``, and ``f1/macro``.

    Of the classes that are among the labels or were given; ``f1/macro`` is their mean. A precision
    or recall of nothing is 0.

    Args:
        given, labels: ``[N]`` long, N > 0: by the classifier, and of the rows.
        names: of all classes.

    Raises:
        ImportError: scikit-learn is missing or broken.
    """
    from sklearn.metrics import precision_recall_fscore_support

    present = torch.unique(torch.cat([labels, given])).tolist()
    found = precision_recall_fscore_support(
        labels.numpy(), given.numpy(), labels=present, zero_division=0.0
    )
    metrics = {"f1/macro": float(found[2].mean())}
    for number, *values in zip(present, *found, strict=True):
        for key, value in zip(("precision", "recall", "f1", "rows"), values, strict=True):
            metrics[f"class/{names[number]}/{key}"] = float(value)
    return metrics
