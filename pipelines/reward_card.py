"""How far a run's reward model can be trusted, in words, bars and tables for the report."""

from collections.abc import Mapping
from dataclasses import dataclass

from align.recipe_reward import STRENGTHS
from pipelines.charts import BASE, PPO, SFT, Bar, Reliability
from pipelines.results import number, percent, reward_metrics, written_interval
from pipelines.run_facts import Run, member_metrics
from reward.analysis import PROBES, warnings

# Metric group, its title, and its parts in their order, where they have one.
_PARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "length",
        "Length of the better answer",
        {
            "shorter": "shorter than the other",
            "matched": "about equal (to 10 %)",
            "longer": "longer than the other",
        },
    ),
    (
        "margin",
        "Margin by the labels",
        {"low": "lowest third", "middle": "middle third", "high": "highest third"},
    ),
    (
        "strength",
        "Strength of the label",
        {name: name for name in STRENGTHS},
    ),
    ("source", "Source", {}),
)


MAJORITY = "accuracy/majority"  # which only classifiers have


@dataclass(frozen=True, slots=True)
class Part:
    """Accuracy on a part of the pairs: label, share, interval, number of pairs."""

    label: str
    share: str
    interval: str
    pairs: str


@dataclass(frozen=True, slots=True)
class RewardCard:
    """How far the reward model can be trusted."""

    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    bars: tuple[Bar, ...]
    parts: tuple[tuple[str, tuple[Part, ...]], ...]
    probes: tuple[Part, ...]
    reliability: tuple[Reliability, ...]


def reward_card(run: Run) -> RewardCard | None:
    """Describe the reward model's accuracy beside what needs no model; None without one."""
    metrics = reward_metrics(run)
    if "accuracy" not in metrics:
        return None
    sentences = (
        *_accuracy_sentences(metrics),
        *_member_sentence(run),
        *_calibration_sentences(metrics),
        *_length_sentences(metrics),
    )
    if MAJORITY in metrics:
        sentences = (*_class_sentences(metrics), *_words_sentence(metrics))
    return RewardCard(
        sentences,
        tuple(f"PPO could exploit this: {text}." for text in warnings(metrics)),
        _bars(metrics),
        _parts(metrics),
        tuple(
            _part(metrics, f"probe_wins/{name}", label)
            for name, label in PROBES.items()
            if f"probe_wins/{name}" in metrics
        ),
        tuple(
            Reliability(
                metrics[f"calibration/bin{i}/said"],
                metrics[f"calibration/bin{i}/right"],
                metrics[f"calibration/bin{i}/pairs"],
            )
            for i in range(_num_bins(metrics))
        ),
    )


def _accuracy_sentences(metrics: Mapping[str, float]) -> list[str]:
    accuracy, low = metrics["accuracy"], metrics.get("accuracy/low")
    pairs = f" {metrics['pairs']:.0f}" if "pairs" in metrics else ""
    bounds = f" ({written_interval(metrics, 'accuracy', percent)})" if low is not None else ""
    sentences = [
        f"On{pairs} held-out pairs it orders {percent(accuracy)} as their labels do{bounds}."
    ]
    longer = metrics.get("accuracy/longer_wins")
    if longer is not None:
        rule = max(longer, 1 - longer)
        beyond = low is not None and low > rule
        verdict = "so it knows more than length" if beyond else "which this does not clearly beat"
        shorter = "longer" if longer >= 0.5 else "shorter"
        sentences.append(f"Choosing the {shorter} answer gets {percent(rule)}, {verdict}.")
    sentences += _words_sentence(metrics)
    if "labels/gold" in metrics:
        sentences.append(
            f"The labels themselves agree with gold on {percent(metrics['labels/gold'])} of pairs:"
            " a model that followed gold perfectly would agree with the labels that often."
        )
    return sentences


def _member_sentence(run: Run) -> list[str]:
    found = [percent(metrics["accuracy"]) for metrics in member_metrics(run)]
    if not found:
        return []
    others = ", ".join(found)
    return [f"It is one of {len(found) + 1} that differ by their seed; the others: {others}."]


def _words_sentence(metrics: Mapping[str, float]) -> list[str]:
    words = metrics.get("accuracy/bag_of_words")
    if words is None:
        return []
    low = metrics.get("accuracy/low")
    beyond = low is not None and low > words
    verdict = "which it beats" if beyond else "which it does not clearly beat"
    what = "words alone" if MAJORITY in metrics else "answers' words"
    return [f"A linear model on the {what} (TF-IDF) gets {percent(words)}, {verdict}."]


def _class_sentences(metrics: Mapping[str, float]) -> list[str]:
    """Say how well a classifier does."""
    bounds, f1 = written_interval(metrics, "accuracy", percent), metrics.get("f1/macro")
    mean = f"; the mean F1 of its classes is {number(f1)}" if f1 is not None else ""
    return [
        f"Of {metrics['rows']:.0f} held-out rows it names the class of"
        f" {percent(metrics['accuracy'])} as their labels do ({bounds}){mean}.",
        f"Always naming the most frequent class gets {percent(metrics[MAJORITY])}.",
        "The probability of what it names is off by"
        f" {percent(metrics['calibration/ece'])} on average (expected calibration error).",
    ]


def _calibration_sentences(metrics: Mapping[str, float]) -> list[str]:
    if "calibration/ece" not in metrics:
        return []
    sentences = [
        "Where it gives a pair a probability, it is off by"
        f" {percent(metrics['calibration/ece'])} on average (expected calibration error)."
    ]
    if "calibration/ece_scaled" in metrics:
        temperature, scaled = metrics["calibration/temperature"], metrics["calibration/ece_scaled"]
        how = "(temperatures fitted on one half of the prompts, measured on the other)"
        if scaled < metrics["calibration/ece"]:
            sure = "too sure" if temperature > 1 else "not sure enough"
            better = f"with its scores over {number(temperature)} it would be off by"
            sentences.append(f"It is {sure}: {better} {percent(scaled)} {how}.")
        else:
            sentences.append(
                f"Dividing its scores by a temperature does not help: {percent(scaled)} {how}."
            )
    if "calibration/brier" in metrics:
        brier, so_scaled = metrics["calibration/brier"], metrics.get("calibration/brier_scaled")
        also = f", so scaled {so_scaled:.3f}" if so_scaled is not None else ""
        sentences.append(f"Its Brier score is {brier:.3f}{also} (always saying one half: 0.250).")
    return sentences


def _length_sentences(metrics: Mapping[str, float]) -> list[str]:
    """Say how much the scores follow length, beside how much the labels do."""
    sentences = []
    if "length/bias" in metrics:
        bounds = written_interval(metrics, "length/prefers_longer", percent)
        sentences.append(
            "The longer answer scores higher in"
            f" {percent(metrics['length/prefers_longer'])} of pairs ({bounds}); the labels prefer"
            f" it in {percent(metrics['length/labels_prefer_longer'])}: a length bias of"
            f" {_points(metrics['length/bias'])} points"
            f" ({written_interval(metrics, 'length/bias', _points)})."
        )
    if "length/correlation" in metrics:
        found = number(metrics["length/correlation"])
        sentences.append(
            f"Within prompts, differences of score and of length correlate with {found}."
        )
    return sentences


def _points(value: float) -> str:
    """Write a difference of two shares in percentage points."""
    return f"{value * 100:+.1f}"


def _bars(metrics: Mapping[str, float]) -> tuple[Bar, ...]:
    bars = []
    own = "model names the class" if MAJORITY in metrics else "model orders as labels do"
    for key, label, color in (
        ("accuracy", own, SFT),
        (MAJORITY, "most frequent class", BASE),
        ("accuracy/longer_wins", "longer answer wins", BASE),
        ("accuracy/bag_of_words", "words alone", BASE),
        ("accuracy/gold", "model orders as gold does", PPO),
        ("labels/gold", "labels order as gold does", BASE),
    ):
        if key in metrics:
            bounds = metrics.get(f"{key}/low"), metrics.get(f"{key}/high")
            bars.append(Bar(label, metrics[key], *bounds, color=color))
    return tuple(bars)


def _parts(metrics: Mapping[str, float]) -> tuple[tuple[str, tuple[Part, ...]], ...]:
    tables = []
    for group, title, labels in _PARTS:
        prefix, suffix = f"accuracy/{group}/", "/pairs"
        found = [
            key.removeprefix(prefix).removesuffix(suffix)
            for key in metrics
            if key.startswith(prefix) and key.endswith(suffix)
        ]
        names = [name for name in labels if name in found] if labels else sorted(found)
        if names:
            parts = (_part(metrics, prefix + name, labels.get(name, name)) for name in names)
            tables.append((title, tuple(parts)))
    return tuple(tables)


def _part(metrics: Mapping[str, float], key: str, label: str) -> Part:
    pairs = f"{metrics[f'{key}/pairs']:.0f}" if f"{key}/pairs" in metrics else ""
    bounds = written_interval(metrics, key, percent, short=True)
    return Part(label, percent(metrics[key]), bounds, pairs)


def _num_bins(metrics: Mapping[str, float]) -> int:
    return sum(key.startswith("calibration/bin") and key.endswith("/said") for key in metrics)
