"""The report's charts, as SVG text that stands inside the page; matplotlib is imported here only.

Lengths are CSS pixels. Text stays text, so it can be read out, searched, and takes the page's font.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from align.errors import AlignError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE, SFT, PPO = "#8b8f98", "#2f6fb3", "#c8552b"
COLORS = {"base": BASE, "sft": SFT, "ppo": PPO}
INK, MUTED, GRID = "#33373d", "#686d76", "#e4e6ea"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "align",  # the same numbers give the same file
    "text.parse_math": False,  # a "$" in somebody's category name is a dollar
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "lines.linewidth": 1.6,
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": "#b9bdc4",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 1.2,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; where the chart has several, ``label`` names it."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: str = SFT


@dataclass(frozen=True, slots=True)
class Bar:
    """One value with its interval, if it has one."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    color: str = SFT


@dataclass(frozen=True, slots=True)
class Reliability:
    """Pairs that a model is about equally sure of: mean probability, share right, how many."""

    said: float
    right: float
    pairs: float


@dataclass(frozen=True, slots=True)
class Probe:
    """One look at the policy during PPO. ``distance`` is the root of its KL to the SFT model."""

    step: float
    distance: float
    proxy: float
    gold: float | None


def line_chart(lines: Sequence[Line], *, name: str, x: str = "step", share: bool = False) -> str:
    """Draw curves over steps.

    Where a curve has many points, they are pale and their running mean is strong.

    Args:
        lines: at least one, each with at least one point.
        name: what the chart shows, for people who do not see it.
        share: the values are shares of 1 and drawn as per cent.
    """
    with _chart(360, 210) as (figure, (axes,)):
        for line in lines:
            smooth = running_mean(line.ys, window=len(line.ys) // 20)
            many = smooth != list(line.ys)
            if many:
                axes.plot(line.xs, line.ys, color=line.color, alpha=0.25, linewidth=0.8)
            marker = "o" if len(line.ys) == 1 else None
            axes.plot(line.xs, smooth, color=line.color, label=line.label, marker=marker)
        axes.set_xlabel(x)
        axes.margins(x=0.02)
        axes.locator_params(axis="x", integer=True)
        if share:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value * 100:.4g} %")
        if len(lines) > 1:
            _legend_above(axes, len(lines))
        return _svg(figure, name)


def category_chart(
    categories: Sequence[str], values: Mapping[str, Sequence[float | None]], *, name: str
) -> str:
    """Draw one row per category with a dot per model, from base over SFT to PPO.

    Args:
        categories: row labels, from the top.
        values: model -> one value per category, or None where it has none.
        name: what the chart shows, for people who do not see it.
    """
    with _chart(420, 62 + 32 * len(categories)) as (figure, (axes,)):
        rows = range(len(categories))
        for row in rows:
            present = [n for n in (v[row] for v in values.values()) if n is not None]
            if present:
                axes.plot([min(present), max(present)], [row, row], color="#cdd1d7", linewidth=2)
        for model, numbers in values.items():
            points = [(v, row) for row, v in enumerate(numbers) if v is not None]
            axes.plot(
                [v for v, _ in points],
                [row for _, row in points],
                "o",
                markersize=8,
                color=COLORS[model],
                label=MODEL_NAMES[model],
            )
        axes.set_yticks(list(rows), list(categories))
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(categories) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("mean gold score")
        _legend_above(axes, len(values))
        return _svg(figure, name)


def interval_chart(bars: Sequence[Bar], *, chance: float, name: str) -> str:
    """Draw shares as dots with their intervals, and a line where guessing would stand."""
    with _chart(420, 52 + 34 * len(bars)) as (figure, (axes,)):
        axes.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for row, bar in enumerate(bars):
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [row, row], color=bar.color, linewidth=2.4)
            axes.plot([bar.value], [row], "o", markersize=8, color=bar.color)
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        ends = [v for b in bars for v in (b.value, b.low, b.high) if v is not None]
        axes.set_xlim(min(0.4, min(ends) - 0.05), max(0.9, min(1.0, max(ends) + 0.05)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:.0f} %")
        axes.set_xlabel("share of pairs ordered alike; dashed: guessing")
        return _svg(figure, name)


def reliability_chart(bins: Sequence[Reliability], *, name: str) -> str:
    """Draw how often a model is right over how sure it says it is; larger dots hold more pairs."""
    with _chart(420, 250) as (figure, (axes,)):
        # Of several classes the likeliest may have less than half.
        lowest = min(0.5, *(part.said for part in bins))
        axes.plot([lowest, 1], [lowest, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        most = max(part.pairs for part in bins)
        axes.plot([b.said for b in bins], [b.right for b in bins], color=SFT, alpha=0.35)
        axes.scatter(
            [part.said for part in bins],
            [part.right for part in bins],
            s=[10 + 90 * part.pairs / most for part in bins],
            color=SFT,
        )
        axes.set_ylim(min(0.4, *(part.right for part in bins)) - 0.03, 1.03)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value * 100:.0f} %")
        axes.set_xlabel("probability that the model gives its choice; dashed: right as often")
        axes.set_ylabel("right")
        return _svg(figure, name)


def overoptimisation_chart(probes: Sequence[Probe], *, name: str) -> str:
    """Draw proxy and gold score over the square root of the KL (Gao et al. 2022, figure 1).

    Two panels under each other on one horizontal axis, because the scores have different units;
    the lower one is left out where there is no gold score.
    """
    gold = [p for p in probes if p.gold is not None]
    with _chart(420, 360 if gold else 210, rows=2 if gold else 1) as (figure, panels):
        _path(panels[0], probes, [p.proxy for p in probes], SFT)
        panels[0].set_ylabel("proxy: what PPO sees")
        if gold:
            values = [p.gold for p in gold if p.gold is not None]
            _path(panels[1], gold, values, PPO)
            panels[1].set_ylabel("gold: never seen")
            best = max(gold, key=lambda p: (p.gold, p.step))
            left = best.distance > (probes[0].distance + probes[-1].distance) / 2
            for panel in panels:
                panel.axvline(best.distance, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            panels[1].annotate(
                f"best gold, step {best.step:g}",
                (best.distance, min(values)),
                xytext=(-5 if left else 5, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                color=MUTED,
                fontsize=10,
            )
        panels[-1].set_xlabel("square root of KL(policy, SFT), KL in nats per response")
        return _svg(figure, name)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return for each value the mean of those at most ``window // 2`` places away."""
    half = window // 2
    if half < 1:
        return list(values)
    result = []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        result.append(sum(near) / len(near))
    return result


MODEL_NAMES = {"base": "Base", "sft": "SFT", "ppo": "PPO"}


def _path(axes: "Axes", probes: Sequence[Probe], values: Sequence[float], color: str) -> None:
    xs = [p.distance for p in probes]
    axes.plot(xs, values, "-", color=color, alpha=0.35)
    axes.plot(xs, values, "o", color=color, markersize=4)
    for i, where in ((0, "start"), (-1, f"step {probes[-1].step:g}")):
        axes.annotate(
            where,
            (xs[i], values[i]),
            xytext=(6, -12) if i == 0 else (6, -4),
            textcoords="offset points",
            color=color,
            fontsize=10,
        )
    axes.margins(x=0.09, y=0.12)


def _legend_above(axes: "Axes", columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.2,
        columnspacing=1.2,
        handletextpad=0.5,
    )


@contextmanager
def _chart(width: int, height: int, rows: int = 1) -> "Iterator[tuple[Figure, list[Axes]]]":
    """Make a figure with axes under each other that share x, in the report's style."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AlignError(
            f"the report's charts need matplotlib, which does not import here ({error});"
            " install it: pip install 'matplotlib>=3.11'"
        ) from error
    with matplotlib.rc_context(_STYLE):
        # matplotlib's unit is the point, 1/72 inch; the page shows one as one pixel.
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
        yield figure, list(axes[:, 0])


def _svg(figure: "Figure", name: str) -> str:
    """Return the figure as an ``<svg>`` element that fits its column and says what it shows."""
    text = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    width, height = (round(inches * 72) for inches in figure.get_size_inches())
    drawing = text.getvalue().partition("<svg")[2].partition(">")[2]
    # One drawing's style sheet and group names would leak into a page that holds many.
    drawing = re.sub(r"<style.*?</style>", "", drawing, count=1, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    return (
        f'<svg role="img" aria-label={quoteattr(name)} viewBox="0 0 {width} {height}"'
        f' style="max-width:{width * 5 // 4}px">{drawing}'
    )
