"""What a run's numbers say, in words and table cells: the part of the report that one reads first.

Every statement is computed from the metrics of the run; what was not measured is not mentioned.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipelines.charts import MODEL_NAMES, Probe
from pipelines.run_facts import Run, StageFacts

NBSP, ARROW = "\u00a0", "\u2192"


def number(value: float) -> str:
    """Write a number so that two of a kind can be compared: 0.07, 0.81, 12.5, 140."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = 3 if size < 0.01 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:.{digits}f}"


def decimal(value: float) -> str:
    """Write a score: two decimals, so that a column of them lines up."""
    return f"{value:.2f}"


def percent(value: float) -> str:
    """Write a share of 1 as per cent."""
    return f"{value * 100:.1f}{NBSP}%"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that stands out: ``detail`` says how certain it is, or what it is measured on."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Headline:
    """The result of the run in one or two sentences, and its main numbers."""

    sentences: tuple[str, ...]
    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of results: a cell (value, interval) per model."""

    label: str
    note: str
    cells: tuple[tuple[str, str], ...]


_ROWS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("gold/mean", "Gold score", "mean of a judge that training never sees", decimal),
    ("score/mean", "Reward score", "what PPO maximises", decimal),
    ("kl/mean", "KL to SFT", "nats per response, on the model's own answers", number),
    ("perplexity", "Perplexity", "of held-out demonstrations", number),
    ("length/mean", "Answer length", "tokens, stop token included", number),
    ("eos_rate", "Ended by itself", "answers that reached a stop token", percent),
    ("empty_rate", "Empty answers", "no text at all", percent),
    ("repetitive_rate", "Repetitive answers", "over a quarter of their 4-grams repeated", percent),
)


def evaluation(run: Run) -> dict[str, float]:
    """Return the evaluation's metrics, flat; empty before it has finished."""
    return run["evaluate"].final() if "evaluate" in run else {}


def models_in(metrics: dict[str, float]) -> list[str]:
    """Return the evaluated models, from base to PPO."""
    return [m for m in MODEL_NAMES if any(key.startswith(f"{m}/") for key in metrics)]


def results_table(metrics: dict[str, float]) -> list[Row]:
    """Return the lines that at least one model has a number for."""
    models = models_in(metrics)
    rows = []
    for key, label, note, write in _ROWS:
        if any(f"{model}/{key}" in metrics for model in models):
            cells = tuple(_cell(metrics, model, key, write) for model in models)
            rows.append(Row(label, note, cells))
    return rows


def gold_by_category(
    metrics: dict[str, float], categories: Sequence[str]
) -> tuple[list[str], list[int], dict[str, list[float | None]]]:
    """Return category names, prompts in each, and each model's mean gold scores.

    Args:
        categories: one per evaluated prompt.
    """
    counts = Counter(categories)
    names = [name for name in sorted(counts) if f"sft/gold/{name}" in metrics]
    values = {
        model: [metrics.get(f"{model}/gold/{name}") for name in names]
        for model in models_in(metrics)
    }
    return names, [counts[name] for name in names], values


def headline(run: Run, num_prompts: int) -> Headline:
    """Say what came out, from the best evidence that the run holds."""
    metrics = evaluation(run)
    reward = reward_metrics(run)
    figures: list[Figure] = []
    sentences: list[str] = []
    for key, label, judge in (
        ("gold/mean", "Gold score", "the gold judge"),
        ("score/mean", "Reward score", "the reward itself"),
    ):
        if f"ppo/{key}" in metrics:
            sentences = _change(metrics, key, label.lower(), judge, num_prompts)
            figures = _change_figures(metrics, key, label, judge)
            break
    else:
        if "base/perplexity" in metrics and "sft/perplexity" in metrics:
            before, after = metrics["base/perplexity"], metrics["sft/perplexity"]
            sentences.append(
                "Perplexity on held-out demonstrations went from"
                f" {number(before)} (base) to {number(after)} (SFT)."
            )
    if "accuracy" in reward:
        interval = written_interval(reward, "accuracy", percent)
        what = "Classifier" if "accuracy/majority" in reward else "Reward-model"
        figures.append(Figure(f"{what} accuracy", percent(reward["accuracy"]), interval))
    if not sentences:
        done = [stage for stage, facts in run.items() if facts.manifest]
        stages = f"{', '.join(done)} finished" if done else "no stage has finished yet"
        sentences.append(f"Not evaluated yet: {stages}.")
        figures = _stage_figures(run) + figures
    return Headline(tuple(sentences), tuple(figures))


def reward_metrics(run: Run) -> dict[str, float]:
    """Return the reward model's metrics: its stage's, and what only the evaluation knows."""
    trained = run["reward"].final() if "reward" in run else {}
    prefix = "reward/"
    evaluated = {
        key.removeprefix(prefix): value
        for key, value in evaluation(run).items()
        if key.startswith(prefix)
    }
    return evaluated | trained


def probes(run: Run) -> list[Probe]:
    """Return PPO's looks at held-out prompts, by step."""
    rows = run["ppo"].rows if "ppo" in run else []
    return [
        Probe(
            row["step"],
            # A mean of log-ratios estimates the KL, and noise can take it below 0.
            max(row["probe/kl"], 0.0) ** 0.5,
            row["probe/score"],
            row.get("probe/gold"),
        )
        for row in rows
        if "probe/kl" in row and "probe/score" in row
    ]


def overoptimisation_finding(looks: Sequence[Probe]) -> str:
    """Say where the gold score was highest and what came of it."""
    gold = [look for look in looks if look.gold is not None]
    if not gold:
        return "No gold judge was given, so this run cannot show where its reward stops being true."
    values = [look.gold for look in gold if look.gold is not None]
    best, last = max(gold, key=lambda look: (look.gold, look.step)), gold[-1]
    if best.step == last.step:
        return "In this run gold was highest at the last look: no over-optimisation so far."
    return (
        f"In this run gold was highest, {decimal(max(values))}, at step {best.step:g}; at the last"
        f" look, step {last.step:g}, it was {decimal(values[-1])}."
    )


def _cell(
    metrics: dict[str, float], model: str, key: str, write: Callable[[float], str]
) -> tuple[str, str]:
    value = metrics.get(f"{model}/{key}")
    if value is None:
        return "", ""
    group = f"{model}/{key.removesuffix('/mean')}"
    return write(value), written_interval(metrics, group, write, short=True)


def written_interval(
    metrics: Mapping[str, float], group: str, write: Callable[[float], str], short: bool = False
) -> str:
    """Write the 90 % interval of a metric; nothing where it has none. ``short``: only its ends."""
    low, high = metrics.get(f"{group}/low"), metrics.get(f"{group}/high")
    if low is None or high is None:
        return ""
    text = f"{write(low).removesuffix(f'{NBSP}%')} to {write(high)}"
    return text if short else f"90{NBSP}% interval {text}"


def _change(
    metrics: dict[str, float], key: str, label: str, judge: str, num_prompts: int
) -> list[str]:
    before, after = metrics[f"sft/{key}"], metrics[f"ppo/{key}"]
    where = f"On {num_prompts} held-out prompts" if num_prompts else "On held-out prompts"
    sentences = [
        f"{where} the mean {label} went from {decimal(before)} (SFT) to {decimal(after)} (PPO)."
    ]
    if "prompts/selected_on" in metrics:
        sentences.append(
            f"PPO has selected its policy on {metrics['prompts/selected_on']:.0f} of them, so that"
            " its figures are somewhat too good."
        )
    if worse := _worse_categories(metrics):
        sentences.append(f"It fell in {' and '.join(worse)}.")
    if "ppo/win_rate/mean" in metrics:
        low, high = metrics["ppo/win_rate/low"], metrics["ppo/win_rate/high"]
        if low <= 0.5 <= high:
            verdict = "The interval holds 50 %, so the run does not show a difference."
        else:
            verdict = "PPO made the answers better." if low > 0.5 else "PPO made them worse."
        sentences.append(
            f"By {judge}, PPO's answer beats SFT's on {percent(metrics['ppo/win_rate/mean'])} of"
            f" prompts ({written_interval(metrics, 'ppo/win_rate', percent)}; ties count half)."
            f" {verdict}"
        )
    if key != "gold/mean":
        sentences.append(
            "No gold judge was given: the score is what PPO maximised, so its rise shows that"
            " training worked, not that answers are better."
        )
    return sentences


def _worse_categories(metrics: dict[str, float]) -> list[str]:
    """Return the categories that the mean hides: gold fell there by 0.05 or more."""
    worse = []
    for key, before in metrics.items():
        model, _, name = key.partition("/gold/")
        after = metrics.get(f"ppo/gold/{name}", before)
        if model == "sft" and name not in ("mean", "low", "high") and before - after >= 0.05:
            worse.append(f"{name} ({decimal(before)} to {decimal(after)})")
    return worse


def _change_figures(metrics: dict[str, float], key: str, label: str, judge: str) -> list[Figure]:
    value = f"{decimal(metrics[f'sft/{key}'])} {ARROW} {decimal(metrics[f'ppo/{key}'])}"
    group = key.removesuffix("/mean")
    interval = written_interval(metrics, f"ppo/{group}", decimal)
    figures = [Figure(f"{label}, SFT {ARROW} PPO", value, interval and f"PPO: {interval}")]
    if "ppo/win_rate/mean" in metrics:
        interval = written_interval(metrics, "ppo/win_rate", percent)
        rate = percent(metrics["ppo/win_rate/mean"])
        figures.append(Figure("PPO beats SFT", rate, f"by {judge}; {interval}"))
    if "ppo/kl/mean" in metrics:
        nats = f"{number(metrics['ppo/kl/mean'])}{NBSP}nats"
        figures.append(Figure("KL(PPO, SFT)", nats, "per response"))
    return figures


_STAGE_RESULTS = (
    ("perplexity", "perplexity", number),
    ("next_sentence/accuracy", "next-sentence accuracy", percent),
    ("eos_rate", "answers that end", percent),
    ("accuracy", "accuracy", percent),
    ("score/mean", "score", number),
    ("kl/mean", "KL to SFT", number),
)


def stage_result(facts: StageFacts) -> str:
    """Return a finished stage's main numbers; for an evaluation, what it measured on."""
    if facts.stage == "evaluate":
        return f"{len(facts.samples)} held-out prompts"
    final = facts.final()
    return ", ".join(
        f"{label} {write(final[k])}" for k, label, write in _STAGE_RESULTS if k in final
    )


_STAGE_FIGURES = (
    ("pretrain", "perplexity", "Perplexity of the base", number),
    ("sft", "perplexity", "Perplexity after SFT", number),
    ("sft", "eos_rate", "SFT answers that end", percent),
    ("ppo", "score/mean", "Reward score in PPO", number),
    ("ppo", "kl/mean", "KL to SFT in PPO", number),
)


def _stage_figures(run: Run) -> list[Figure]:
    """Return numbers of the stages themselves, for a run without an evaluation."""
    return [
        Figure(label, write(facts.final()[key]))
        for stage, key, label, write in _STAGE_FIGURES
        for name, facts in run.items()
        if name == stage and key in facts.final()
    ]
