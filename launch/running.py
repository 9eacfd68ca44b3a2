"""The commands that make stages: ``run``, one for each training stage, and ``eval``."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.models import ArgumentInfo

from align.recipe import StageName
from launch import experiment as experiments
from launch import opened
from launch.dry_run import show as show_plan
from launch.nodes import find_nodes, processes_on_each
from launch.opened import Experiment, Settings
from launch.options import (
    RECIPE,
    RUN,
    Debug,
    DryRun,
    Force,
    HostFile,
    NodeCount,
    NodeRank,
    OnEachNode,
    Overrides,
    Processes,
    Rendezvous,
    Wait,
    read_settings,
)
from launch.recipes import Json
from launch.tables import by_model, print_json, print_table

_STAGES: dict[StageName, str] = {
    "pretrain": "Make a small base model from plain text.",
    "sft": "Tune the base on demonstrations.",
    "reward": "Train the reward model on ranked responses.",
    "ppo": "Optimise the policy against the reward with PPO.",
}


def _run(experiment: Experiment) -> None:
    settings = experiment.settings
    stages = experiments.planned(experiment)
    if settings.dry_run:
        show_plan(experiment, stages)
        return
    experiments.run_stages(experiment, stages)
    report = experiment.directory / experiments.REPORT
    if experiment.ran or not experiments.report_is_current(experiment):
        experiments.write_report(experiment)
    if settings.json:
        print_json(_summary(experiment) | {"report": str(report)})
    if not experiment.ran:
        settings.say("everything is up to date; --force redoes it")
    settings.say(f"report: {report}")


def _run_stage(stage: StageName, experiment: Experiment) -> None:
    if experiment.settings.dry_run:
        show_plan(experiment, experiments.one(experiment, stage))
        return
    nodes, stages = experiment.settings.nodes, experiments.single(experiment, stage)
    if nodes is None or nodes.is_first:
        experiments.run_stages(experiment, stages)
    else:
        experiments.help_with(experiment, stage)
    if experiment.settings.json:
        print_json(_summary(experiment))


def _evaluate(experiment: Experiment) -> None:
    settings = experiment.settings
    if experiment.recipe.evaluate is None:
        again = [*experiment.overrides, "evaluate={}"]
        experiment = opened.open_recipe(str(experiment.file), again, settings)
    if settings.dry_run:
        show_plan(experiment, experiments.one(experiment, "evaluate"))
        return
    experiments.run_stages(experiment, experiments.single(experiment, "evaluate"))
    metrics = by_model(experiment.results["evaluate"]["metrics"])
    if settings.json:
        print_json(metrics)
    else:
        print_table(metrics)


def add_commands(app: typer.Typer) -> None:
    """Give ``app`` the commands."""
    text = "Run every stage that is not up to date; then the report."
    _add_command(app, "run", text, _run)
    for stage, text in _STAGES.items():
        _add_stage(app, stage, text)
    text = "Measure every finished model of a run on held-out data."
    _add_command(app, "eval", text, _evaluate, RUN, opened.open_run)


def _add_command(
    app: typer.Typer,
    name: str,
    text: str,
    work: Callable[[Experiment], None],
    subject: ArgumentInfo = RECIPE,
    open_subject: Callable[[str, Sequence[str], Settings], Experiment] = opened.open_recipe,
) -> None:
    """Make a command of a function."""

    @app.command(name=name, help=text)
    def command(
        given: Annotated[str, subject],
        overrides: Overrides = None,
        nproc: Processes = None,
        force: Force = False,
        dry_run: DryRun = False,
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        settings = read_settings(as_json, debug, force=force, dry_run=dry_run)
        work(open_subject(given, [*(overrides or ()), *_group(nproc)], settings))


def _add_stage(app: typer.Typer, stage: StageName, text: str) -> None:
    """Make the command of a training stage, which several machines can make together."""

    @app.command(name=stage, help=text)
    def command(
        recipe: Annotated[str, RECIPE],
        overrides: Overrides = None,
        nproc: OnEachNode = None,
        nodes: NodeCount = None,
        node_rank: NodeRank = None,
        rendezvous: Rendezvous = None,
        hostfile: HostFile = None,
        rendezvous_timeout: Wait = None,
        force: Force = False,
        dry_run: DryRun = False,
        as_json: Json = False,
        debug: Debug = False,
    ) -> None:
        wanted = (nodes, node_rank, rendezvous, hostfile, rendezvous_timeout)
        found, slots = find_nodes(*wanted, all_of_them=dry_run)
        group = _group(nproc or slots, found.count if found is not None else 1)
        settings = read_settings(as_json, debug, force=force, dry_run=dry_run, nodes=found)
        experiment = opened.open_recipe(recipe, [*(overrides or ()), *group], settings)
        if found is not None:
            processes_on_each(experiment.recipe.distributed.processes, found.count)
        _run_stage(stage, experiment)


def _group(nproc: int | None, nodes: int = 1) -> list[str]:
    return [f"distributed.processes={nodes * nproc}"] if nproc is not None else []


def _summary(experiment: Experiment) -> dict[str, Any]:
    return {"run": str(experiment.directory), "stages": experiment.results}
