"""Repeat a run from its resolved recipe in a second directory, and say what came out the same.

Every finished stage that the recipe makes is made again, by the same processes as ``align run``
starts. Then its files are compared by the SHA-256 of what lies there now, and what the two
manifests say. Not expected to be equal, and not compared: the run's name, the times, the W&B id,
and metrics of the clock and of memory, also in ``metrics.jsonl``; and where base and parents lie.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import InputError, RecipeError
from align.manifest import METRICS, SAMPLES, Manifest, find_manifest, read_manifest, sha256_file
from align.places import found_members
from align.recipe import Recipe, StageName
from align.recipe_io import dump_recipe, load_recipe
from launch import experiment as experiments
from launch import opened
from launch.opened import Experiment, Settings

_ALTERED = "altered since it was made"
_UNCOMPARED = {"name", "started", "finished", "wandb_id", "outputs"}
_CLOCK = ("time/", "memory/", "tokens_per_second")


@dataclass(frozen=True)
class StageComparison:
    """What is equal of a stage that was made twice.

    Attributes:
        outputs: of each file, relative to the stage's folder: ``equal``, ``differs``, ``is only in
            the first``, ``is only in the second``, or ``altered since it was made``: the first is
            not what its manifest says.
        facts: what the manifests say differently: the first and the second, None where one is
            silent.
    """

    outputs: dict[str, str]
    facts: dict[str, tuple[Any, Any]]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.facts and set(self.outputs.values()) <= {"equal"}


def open_repetition(
    name: str, into: Path | None, settings: Settings
) -> tuple[Path, Experiment, tuple[StageName, ...]]:
    """Prepare the second directory; one that was begun before is gone on with.

    Returns:
        The run, its repetition, and the stages to repeat.

    Raises:
        InputError: there is no such run, none of its stages is finished, or the second directory
            is of something else.
        RecipeError: the run's recipe cannot be read, or the second directory's name cannot be a
            run's.
    """
    run = opened.open_run(name, (), settings).directory
    original = opened.open_run(str(run), (), settings)
    run = original.directory
    stages = tuple(s for s in experiments.planned(original) if find_manifest(run / s) is not None)
    if not stages:
        raise InputError(f"{run}: no stage of it is finished; there is nothing to repeat")
    second = into or run.parent / f"{run.name}-again"
    if run.resolve() in (second.resolve(), *second.resolve().parents):
        raise InputError(f"{second}: is the run itself, or in it; give --into another directory")
    recipe = load_recipe(original.file, opened.settings_of(second))
    if second.exists() and not _can_hold(second, recipe):
        raise InputError(
            f"{second}: exists, and is no repetition of {run} that could be gone on with; give"
            " --into a directory that is new or empty"
        )
    second.mkdir(parents=True, exist_ok=True)
    (second / opened.RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    return run, opened.open_run(str(second), (), settings), stages


def _can_hold(directory: Path, recipe: Recipe) -> bool:
    """Whether a directory is empty, or was begun as a run of this recipe."""
    if not directory.is_dir():
        return False
    if not any(directory.iterdir()):
        return True
    try:
        found = load_recipe(directory / opened.RECIPE, opened.settings_of(directory))
    except RecipeError:
        return False
    return found == recipe


def compare_runs(
    run: Path, again: Path, stages: tuple[StageName, ...]
) -> dict[str, StageComparison]:
    """Compare the stages of two runs, file by file and fact by fact, and those of their members.

    Returns:
        What was found, by the stage's folder in its run.

    Raises:
        ParentError: a stage of either is not finished.
    """
    places: dict[str, StageName] = {stage: stage for stage in stages}
    if "reward" in stages:
        members = [path / "reward" for path in found_members(again) if (path / "reward").is_dir()]
        names = [path.relative_to(again).as_posix() for path in members]
        places |= dict.fromkeys((n for n in names if find_manifest(run / n)), "reward")
    return {place: _compare(run / place, again / place, s) for place, s in places.items()}


def _compare(first: Path, second: Path, stage: StageName) -> StageComparison:
    manifests = read_manifest(first, stage), read_manifest(second, stage)
    made = manifests[0].outputs
    names = dict.fromkeys([*made, *manifests[1].outputs, METRICS, SAMPLES])
    states = {name: _state(first / name, second / name, made.get(name)) for name in names}
    ours, theirs = map(_facts, manifests)
    facts = {key: (ours.get(key), theirs.get(key)) for key in ours | theirs}
    return StageComparison(
        {name: state for name, state in states.items() if state is not None},
        {key: values for key, values in facts.items() if values[0] != values[1]},
    )


def _state(ours: Path, theirs: Path, made: str | None) -> str | None:
    """Return what is to be said of a file; None: neither stage has it.

    Args:
        made: the first one's hash in its manifest, None where that has none.
    """
    if made is not None and not (ours.is_file() and sha256_file(ours) == made):
        return _ALTERED
    if not ours.is_file():
        return "is only in the second" if theirs.is_file() else None
    if not theirs.is_file():
        return "is only in the first"
    return "equal" if _digest(ours) == _digest(theirs) else "differs"


def _digest(path: Path) -> str:
    """Hash a file; of a log, its lines without what the clock decides."""
    if path.name != METRICS:
        return sha256_file(path)
    lines = [_timeless(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.startswith(_CLOCK)}


def _facts(manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest says of how its stage was made and what it reached, flat."""
    facts = manifest.model_dump(mode="json", exclude=_UNCOMPARED)
    del facts["base"]["id"]
    facts["metrics"] = {key: repr(x) for key, x in _timeless(manifest.metrics).items()}  # NaN too
    facts["parents"] = {f"{n} {p.stage}": p.sha256 for n, p in enumerate(manifest.parents)}
    facts["data"] = {f"{n} {d.id}": d.model_dump() for n, d in enumerate(manifest.data)}
    return {
        f"{name} {key}" if isinstance(fact, dict) else name: value
        for name, fact in facts.items()
        for key, value in (fact if isinstance(fact, dict) else {"": fact}).items()
    }


def print_comparison(found: dict[str, StageComparison]) -> None:
    """Print a line per file, and one for every fact that differs."""
    for stage, comparison in found.items():
        for name, state in comparison.outputs.items():
            print(f"{stage}/{name}: {state}")
        for name, (first, second) in comparison.facts.items():
            print(f"{stage}: {name}: {first}, and in the repetition {second}")
    states = [state for comparison in found.values() for state in comparison.outputs.values()]
    facts = sum(len(comparison.facts) for comparison in found.values())
    equal = states.count("equal")
    print(f"{equal} of {len(states)} files are equal, {facts} facts of the manifests differ")
