"""What a run directory says about itself: manifests, metrics and samples of every stage in it.

Nothing here loads a model, and the recipe says only how many members an ensemble has: a tree copied
from elsewhere reads the same.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from align.errors import InputError, RecipeError
from align.manifest import FILE, MARKS, RECIPE, Manifest, read_manifest
from align.places import members_of
from align.recipe import StageName
from align.recipe_io import load_recipe
from align.stages import STAGES


@dataclass(frozen=True, slots=True)
class StageFacts:
    """One stage of a run, finished or begun."""

    stage: StageName
    directory: Path
    manifest: Manifest | None  # None: begun, not finished
    rows: list[dict[str, float]]  # metrics.jsonl: one row per logged step, steps rising
    samples: list[dict[str, Any]]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps and the values of one metric, where it was logged."""
        points = [(row["step"], row[key]) for row in self.rows if key in row]
        return [step for step, _ in points], [value for _, value in points]

    def final(self) -> dict[str, float]:
        """Return the final metrics; of an unfinished stage, nothing."""
        return self.manifest.metrics if self.manifest else {}

    def seconds(self) -> float | None:
        """Return how long the stage took from start to finish."""
        if self.manifest is None:
            return None
        started, finished = self.manifest.started, self.manifest.finished
        return (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds()


Run = dict[StageName, StageFacts]


def read_run(directory: Path) -> Run:
    """Read all stages of a run, in their order, parents in other runs included.

    A reward model of another run that PPO was given beside its parents is none of the run's.

    Raises:
        InputError: there is no such directory, or no stage in it.
        ParentError: a manifest cannot be read.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run directory")
    folders = {stage: directory / stage for stage in STAGES if _begun(directory / stage)}
    if not folders:
        raise InputError(
            f"{directory}: no stage in it has begun; a run directory holds folders named"
            f" {', '.join(STAGES)} with a {FILE} in each"
        )
    run: Run = {}
    waiting = list(folders)
    while waiting:
        stage = waiting.pop()
        run[stage] = _read_stage(stage, folders[stage])
        manifest = run[stage].manifest
        for parent in manifest.parents if manifest else ():
            folder = folders[stage] / parent.path
            wanted = parent.in_chain and parent.stage not in folders
            if wanted and (folder / FILE).is_file():
                folders[parent.stage] = folder
                waiting.append(parent.stage)
    return {stage: run[stage] for stage in STAGES if stage in run}


def member_metrics(run: Run) -> list[dict[str, float]]:
    """Return the final metrics of the other members of the reward model's ensemble, by number.

    How many there are the recipe says that lies beside the reward stage: a recipe before it may
    have left members of its own. None where that recipe cannot be read.

    Raises:
        ParentError: a manifest cannot be read.
    """
    if "reward" not in run:
        return []
    place = run["reward"].directory.parent
    try:
        section = load_recipe(place / RECIPE).reward
    except RecipeError:
        return []
    folders = [m / "reward" for m in members_of(place, section.members if section else 1)]
    return [read_manifest(f, "reward").metrics for f in folders if (f / FILE).is_file()]


def _begun(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS)


def _read_stage(stage: StageName, folder: Path) -> StageFacts:
    manifest = read_manifest(folder, stage) if (folder / FILE).is_file() else None
    by_step: dict[float, dict[str, float]] = {}
    for row in _read_rows(folder / "metrics.jsonl"):
        if isinstance(row.get("step"), int | float):
            # A stage's last row holds held-out numbers of the step that it logged before.
            logged = by_step.get(row["step"], {})
            by_step[row["step"]] = _numbers(row) | logged
    rows = [by_step[step] for step in sorted(by_step)]
    return StageFacts(stage, folder, manifest, rows, _read_rows(folder / "samples.jsonl"))


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file; absent: no rows. A last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    # A kill may cut a character in two, too.
    text = path.read_text(encoding="utf-8", errors="replace")
    # Not splitlines(): it also splits at separators that a response may hold.
    lines = text.rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a JSON object is needed, found {line[:40]}")
        rows.append(row)
    return rows
