"""Bring an experiment up to date: start the stages that are not done, in order, then the report."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from align.checkpoints import remove_checkpoints
from align.errors import AlignError, InputError
from align.inputs import named_files, source_fingerprint, stage_data
from align.lock import locked
from align.manifest import FILE as MANIFEST
from align.manifest import check_replaceable, read_manifest
from align.places import member_runs, stage_directory
from align.recipe import Recipe, StageName
from align.stages import (
    STAGES,
    parent_stages,
    planned_stages,
    read_parents,
    read_reward_models,
    why_not_done,
)
from launch import processes
from launch.command import (
    Command,
    check_data_command,
    export_command,
    report_command,
)
from launch.opened import RECIPE, Experiment, python
from launch.sums import add_sums, drop_sums, put_back_sums, read_sums

REPORT = "report.html"
EXPORT = "export.json"
_TRACKING = ("wandb", "tensorboard")


class ChildError(AlignError):
    """A process that we started has failed; it has told the user why itself."""

    def __init__(self, exit_code: int) -> None:
        """Keep the code, to end with it ourselves."""
        super().__init__()
        self.exit_code = exit_code


def planned(experiment: Experiment) -> tuple[StageName, ...]:
    """Return the stages that the recipe makes.

    Raises:
        InputError: it makes none.
    """
    stages = planned_stages(experiment.recipe)
    if not stages:
        raise InputError(f"{experiment.file}: has no section of a stage; nothing to do")
    return stages


def one(experiment: Experiment, stage: StageName) -> tuple[StageName, ...]:
    """Return the one stage.

    Raises:
        InputError: the recipe does not make it.
    """
    stages = planned(experiment)
    if stage not in stages:
        found = ", ".join(stages)
        raise InputError(f"{experiment.file}: makes no {stage} stage; its stages: {found}")
    return (stage,)


def single(experiment: Experiment, stage: StageName) -> tuple[StageName, ...]:
    """Return the one stage, after a look at what it builds on; a stale parent is told, and used.

    Raises:
        InputError: the recipe does not make it.
        ParentError: a parent is not finished or does not fit.
    """
    stages = one(experiment, stage)
    read_parents(experiment.recipe, stage)
    for parent in parent_stages(experiment.recipe, stage):
        why = _why_stale(experiment.recipe, parent)
        if why is not None:
            experiment.settings.say(
                f"warning: {stage} builds on {parent} as it was made, which is not up to date:"
                f" {why}; `align run` makes it again"
            )
    return stages


def _why_stale(recipe: Recipe, parent: StageName) -> str | None:
    """Return why a finished stage is not what the recipe says; of another run's, None."""
    if parent not in planned_stages(recipe):
        return None
    try:
        return why_not_done(recipe, parent)
    except InputError as error:  # its data, perhaps, are no longer here
        return str(error)


def run_stages(experiment: Experiment, stages: Sequence[StageName]) -> None:
    """Run those of the stages that are not up to date; ``experiment.results`` says what happened.

    Raises:
        ChildError: a stage has failed; the later ones were not started.
        InputError: a file or another run's stage that any of the stages needs is missing, or the
            run directory cannot be written.
    """
    settings = experiment.settings
    held: dict[str, str] = {}
    with contextlib.ExitStack() as until_the_end:
        for number, stage in enumerate(stages):
            # Asked only now: a stage is stale as soon as the one before it was redone.
            why = why_to_run(experiment, stage)
            seconds = 0.0
            if why is None:
                # Of a process that was killed at its very end.
                remove_checkpoints(stage_directory(experiment.recipe, stage))
                if f"{stage}/{MANIFEST}" not in read_sums(experiment.directory):
                    _add_sums(experiment.directory, stage)
                settings.say(f"{stage}: up to date")
            else:
                if not held:
                    _check_inputs(experiment, stages[number:])
                    held = until_the_end.enter_context(locked(experiment.directory))
                dropped = drop_sums(experiment.directory, [stage, RECIPE])
                settings.say(f"{stage}: running ({why})")
                started = time.monotonic()
                command = experiment.command(stage, settings.nodes)
                command = replace(command, env=command.env | held)
                try:
                    _start(command, sys.stderr if settings.json else None)
                except ChildError:
                    # A stage that begins removes its earlier manifest first of all.
                    if (stage_directory(experiment.recipe, stage) / MANIFEST).is_file():
                        put_back_sums(experiment.directory, dropped)
                    raise
                _add_sums(experiment.directory, stage)
                seconds = time.monotonic() - started
                settings.say(f"{stage}: done in {seconds:.1f} s")
            manifest = read_manifest(stage_directory(experiment.recipe, stage), stage)
            experiment.results[stage] = {
                "status": "skipped" if why is None else "done",
                "why": why,
                "seconds": round(seconds, 3),
                "metrics": manifest.metrics,
            }
            if stage == "reward":
                _run_members(experiment)


def _run_members(experiment: Experiment) -> None:
    """Make the other members of an ensemble, which hold their own run directories."""
    found = []
    for member in experiment.members:
        run_stages(member, ("reward",))
        found.append(member.results["reward"])
    if found:
        experiment.results["reward"]["members"] = found


def help_with(experiment: Experiment, stage: StageName) -> None:
    """Run this machine's processes of a stage that node 0 makes: what is written, is by node 0.

    Raises:
        ChildError: it has failed, here or elsewhere.
    """
    settings = experiment.settings
    why = why_to_run(experiment, stage)
    if why is None:
        settings.say(f"{stage}: up to date")
    else:
        assert settings.nodes is not None
        settings.say(f"{stage}: running as node {settings.nodes.rank} ({why})")
        _start(experiment.command(stage, settings.nodes), sys.stderr if settings.json else None)
        settings.say(f"{stage}: this node's part is done; node 0 writes the result")
    for member in experiment.members if stage == "reward" else ():
        help_with(member, stage)


def _add_sums(run: Path, stage: StageName) -> None:
    """Write down the hashes of what a stage has left besides its outputs."""
    add_sums(run, [stage, RECIPE])
    add_sums(run, _TRACKING, only_new=True)


def write_report(experiment: Experiment) -> Path:
    """Write the run's report and return where it lies.

    Raises:
        ChildError: it could not be written.
    """
    # It prints the path, which is for the caller to say.
    command = report_command(python(), experiment.directory, debug=experiment.settings.debug)
    _start(command, subprocess.DEVNULL)
    add_sums(experiment.directory, [REPORT])
    return experiment.directory / REPORT


def report_is_current(experiment: Experiment) -> bool:
    """Whether there is a report, and no stage in it has finished since."""
    report = experiment.directory / REPORT
    if not report.is_file():
        return False
    manifests = (stage_directory(experiment.recipe, stage) / MANIFEST for stage in STAGES)
    finished = [path.stat().st_mtime_ns for path in manifests if path.is_file()]
    return max(finished, default=0) <= report.stat().st_mtime_ns


def export(
    experiment: Experiment,
    stage: StageName,
    out: Path | None,
    dtype: str | None,
    max_drift: float | None,
) -> tuple[Path, dict[str, Any]]:
    """Export a finished stage's model; return its folder and what ``export.json`` there says.

    Raises:
        ChildError: it was refused or failed; nothing was written.
    """
    settings = experiment.settings
    folder = out or experiment.directory / "export" / stage
    command = export_command(
        python(),
        stage,
        experiment.file,
        experiment.overrides,
        folder,
        dtype=dtype,
        max_drift=max_drift,
        debug=settings.debug,
    )
    _start(command, sys.stderr if settings.json else None)
    if folder.resolve().is_relative_to(experiment.directory.resolve()):
        name = folder.resolve().relative_to(experiment.directory.resolve()).as_posix()
        add_sums(experiment.directory, [name])
    facts: dict[str, Any] = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
    return folder, facts


def why_to_run(experiment: Experiment, stage: StageName) -> str | None:
    """Return why a stage has to run, or None if it is up to date.

    Raises:
        InputError: what it makes could not be written.
    """
    why = "--force" if experiment.settings.force else why_not_done(experiment.recipe, stage)
    if why is not None:
        _check_place(stage_directory(experiment.recipe, stage))
    return why


def _check_place(directory: Path) -> None:
    """Refuse what could not or should not be replaced, before hours of work go into it."""
    nearest = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    if not nearest.is_dir():
        problem = f"{nearest} is a file"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        problem = f"no permission to write in {nearest}"
    else:
        check_replaceable(directory)
        return
    raise InputError(f"{directory}: cannot be made: {problem}; change name or run.root")


def _check_inputs(experiment: Experiment, stages: Sequence[StageName]) -> None:
    """Judge what every stage is given from outside before the first of them starts."""
    recipe, settings = experiment.recipe, experiment.settings
    for stage in stages:
        named_files(recipe, stage)
        for data in stage_data(recipe, stage).values():
            for source in (*data.train, *data.heldout):
                source_fingerprint(recipe, source)
        for parent in parent_stages(recipe, stage):
            if getattr(recipe.run.parents, parent, None):
                read_manifest(stage_directory(recipe, parent), parent)
        # The members of an ensemble that is about to be made are not there yet.
        made = member_runs(recipe) if "reward" in stages else ()
        read_reward_models(recipe, stage, but=[str(run / "reward") for run in made])
    if len(stages) > 1:  # a single one judges its own rows
        command = check_data_command(
            python(), stages, experiment.file, experiment.overrides, debug=settings.debug
        )
        _start(command, sys.stderr if settings.json else None)


def _start(command: Command, stdout: int | TextIO | None) -> None:
    sys.stdout.flush()
    code = processes.run(command, stdout)
    if code:
        raise ChildError(code)
