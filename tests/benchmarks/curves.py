"""Learning curves of finished runs: the gold judge's score over updates and over minutes."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.recipe import Recipe
from tests.benchmarks import common

# The clock counts these alone: neither start-up nor the probes, in which the policy is looked at.
_PHASES = ("time/rollout", "time/score", "time/update")


@dataclass(frozen=True)
class Curve:
    """Gold score on the held-out probe prompts; one entry per look at the policy."""

    updates: list[int]
    minutes: list[float]  # of training, up to that update
    gold: list[float]

    @property
    def final(self) -> float:
        """The gold score at the last look."""
        return self.gold[-1]

    @property
    def average(self) -> float:
        """The mean over all looks after the first, less noisy than the last alone."""
        return statistics.fmean(self.gold[1:])

    def minutes_to(self, gold: float) -> float | None:
        """Return after how many minutes the score was first at least ``gold``; None: never."""
        points = zip(self.minutes, self.gold, strict=True)
        return next((minutes for minutes, score in points if score >= gold), None)


def read_align(stage: Path) -> Curve:
    """Read the curve of a finished PPO stage from its ``metrics.jsonl``."""
    curve, seconds = Curve([], [], []), 0.0
    for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seconds += sum(row.get(key, 0.0) for key in _PHASES)
        if "probe/gold" in row:
            curve.updates.append(row["step"])
            curve.minutes.append(seconds / 60)
            curve.gold.append(row["probe/gold"])
    return curve


def mean(curves: Sequence[Curve]) -> Curve:
    """Return the mean over seeds, at the updates that all of them have (a run may end early)."""
    shared = sorted(set.intersection(*(set(curve.updates) for curve in curves)))
    rows = [[curve.updates.index(update) for update in shared] for curve in curves]
    pairs = list(zip(curves, rows, strict=True))
    return Curve(
        shared,
        [statistics.fmean(c.minutes[r[i]] for c, r in pairs) for i in range(len(shared))],
        [statistics.fmean(c.gold[r[i]] for c, r in pairs) for i in range(len(shared))],
    )


def parent_overrides(recipe: Recipe, run: Path, others: Path | None = None) -> list[str]:
    """Return the overrides that make a recipe build on the stages of a finished run.

    Args:
        others: the run that sft and reward are taken from, if not ``run``.
    """
    folders = {"sft": (others or run) / "sft", "reward": (others or run) / "reward"}
    if recipe.base.id == "pretrain":
        folders["pretrain"] = run / "pretrain"
    return [f"run.parents.{name}={json.dumps(str(path))}" for name, path in folders.items()]


def run_ppo(recipe_file: Path, out: Path, name: str, seed: int, overrides: Sequence[str]) -> Curve:
    """Run ``align ppo`` on one thread, unless it is up to date; return its curve."""
    own = [f"name={name}", f"seed={seed}", f"run.root={json.dumps(str(out))}", *stage_overrides()]
    common.align(["ppo", recipe_file, *own, *overrides], out / f"{name}.log")
    curve = read_align(out / name / "ppo")
    common.say(f"{name}: gold {curve.final:.3f} after {curve.minutes[-1]:.2f} minutes")
    return curve


def stage_overrides() -> list[str]:
    """Return what every stage of a benchmark runs with."""
    return ["run.threads=1", "tracking.mode=disabled"]


def draw(path: Path, groups: dict[str, list[Curve]], axes: Sequence[str]) -> None:
    """Draw every group's curves (thin) and their mean (thick) over ``updates`` or ``minutes``."""
    from matplotlib.figure import Figure  # takes a second, and nothing else here needs it

    figure = Figure(figsize=(6.4 * len(axes), 4.2), layout="constrained")
    for number, quantity in enumerate(axes, start=1):
        plot = figure.add_subplot(1, len(axes), number)
        for color, (label, group) in enumerate(groups.items()):
            for curve in group:
                xs = getattr(curve, quantity)
                plot.plot(xs, curve.gold, color=f"C{color}", linewidth=0.7, alpha=0.5)
            middle, name = mean(group), f"{label} (mean of {len(group)})"
            xs = getattr(middle, quantity)
            plot.plot(xs, middle.gold, color=f"C{color}", linewidth=2.2, label=name)
        plot.set_xlabel("minutes of training" if quantity == "minutes" else quantity)
        plot.set_ylabel("gold score on held-out prompts")
        plot.grid(alpha=0.3)
        plot.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    common.say(f"drawn: {path}")
