"""``--dry-run``: which stages would run, why, and the exact command and environment of each."""

import json
from collections.abc import Collection, Sequence
from typing import Any

from align.recipe import StageName
from align.stages import group_size, parent_stages
from align.zero import WITHOUT_ZERO, deepspeed_settings
from launch.command import Command
from launch.experiment import why_to_run
from launch.opened import Experiment
from launch.tables import print_json


def show(experiment: Experiment, stages: Sequence[StageName]) -> None:
    """Print what ``plan`` returns."""
    found = plan(experiment, stages)
    if experiment.settings.json:
        print_json({"run": str(experiment.directory), "stages": found})
        return
    for stage, facts in found.items():
        _print(stage, facts)
        for name, member in facts.get("members", {}).items():
            _print(f"{name}: {stage}", member)


def _print(stage: str, facts: dict[str, Any]) -> None:
    why = f" ({facts['why']})" if facts["why"] else ""
    print(f"{stage}: {facts['state']}{why}")
    if "nodes" not in facts:
        print(f"  {facts['command']}")
    for rank, node in enumerate(facts.get("nodes", ())):
        print(f"  node {rank}: {node['command']}")
    if "deepspeed" in facts:
        print(f"  DeepSpeed: {json.dumps(facts['deepspeed'])}")


def plan(
    experiment: Experiment, stages: Sequence[StageName], before: Collection[StageName] = ()
) -> dict[StageName, dict[str, Any]]:
    """Say for each stage whether it would run, why, and as which process; nothing is started.

    Args:
        before: stages that would run already.
    """
    result: dict[StageName, dict[str, Any]] = {}
    would_run = set(before)
    nodes = experiment.settings.nodes
    for stage in stages:
        first = [name for name in parent_stages(experiment.recipe, stage) if name in would_run]
        if first:
            parents = "parent {} runs" if len(first) == 1 else "parents {} run"
            why: str | None = f"its {parents.format(' and '.join(first))} before it"
        else:
            why = why_to_run(experiment, stage)
        if why is not None:
            would_run.add(stage)
        result[stage] = {"state": "up to date" if why is None else "would run", "why": why}
        if nodes is not None and group_size(experiment.recipe, stage):
            commands = [experiment.command(stage, nodes.at(rank)) for rank in range(nodes.count)]
            result[stage]["nodes"] = [_facts(command) for command in commands]
        else:
            result[stage] |= _facts(experiment.command(stage))
        if experiment.recipe.distributed.zero and stage not in WITHOUT_ZERO:
            section = getattr(experiment.recipe, stage)
            result[stage]["deepspeed"] = deepspeed_settings(experiment.recipe.distributed, section)
        members = experiment.members if stage == "reward" else ()
        if members:
            found = {m.recipe.name: plan(m, (stage,), would_run - {stage})[stage] for m in members}
            result[stage]["members"] = found
            would_run |= {stage for member in found.values() if member["why"] is not None}
    return result


def _facts(command: Command) -> dict[str, Any]:
    return {
        "env": command.env,
        "argv": list(command.argv),
        "command": command.shell_line(),
    }
