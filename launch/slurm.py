"""``align launch slurm``: an sbatch script that makes a recipe's stages on several nodes."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from align.errors import InputError
from align.recipe import Recipe
from align.stages import group_size, planned_stages
from launch import experiment as experiments
from launch import opened
from launch.command import Python
from launch.nodes import processes_on_each
from launch.options import RECIPE, Debug, Overrides, read_settings

app = typer.Typer(help="Write what a cluster starts; nothing is started here.")

# No pipes: with pipefail, `head` would end them in failure where the list is long.
_SCRIPT = """\
#!/bin/bash
# Options that are given to sbatch itself, as --time and --partition, win over those here.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={nproc}
# Five minutes before the time is up a stage ends after its step, with a checkpoint; the same script
# goes on from there.
#SBATCH --signal=TERM@300
set -euo pipefail
export {environment}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Not the same port for two jobs that share a node.
rendezvous="${{hosts[0]}}:$((10000 + SLURM_JOB_ID % 20000))"
{stages}
# What one machine makes, and the report.
{rest}
"""


@app.callback()
def _launch() -> None:
    """Keep ``slurm`` a command of its own, alone as it is."""


@app.command()
def slurm(
    recipe: Annotated[str, RECIPE],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            min=1,
            help="GPUs of each, and processes.  [default: the recipe's share]",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to.  [default: standard output]")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write an sbatch script: every stage on all nodes, then evaluation and report on the first."""
    given = list(overrides or ())
    if nproc is not None:
        given.append(f"distributed.processes={nodes * nproc}")
    experiment = opened.open_recipe(recipe, given, read_settings(False, debug))
    experiments.planned(experiment)
    text = script(experiment.recipe, experiment.file, overrides or (), nodes, opened.python())
    if output is None:
        print(text, end="")
        return
    if output.exists():
        raise InputError(f"{output}: exists already; name another file")
    output.write_text(text, encoding="utf-8")
    print(output)


def script(recipe: Recipe, file: Path, overrides: Sequence[str], nodes: int, python: Python) -> str:
    """Return the script.

    Args:
        file: the recipe; its path has to mean the same on every node.
        overrides: of the recipe, without the number of processes.

    Raises:
        InputError: the nodes cannot share the recipe's processes equally.
    """
    processes = recipe.distributed.processes
    nproc = processes_on_each(processes, nodes)
    given = [str(file), *overrides]
    together = [stage for stage in planned_stages(recipe) if group_size(recipe, stage)]
    places = ["--nodes", str(nodes), "--nproc", str(nproc), "--rendezvous"]
    # Without the last, a task would be held to one core of its node.
    srun = "srun --kill-on-bad-exit=1 --cpu-bind=none"
    commands = [
        shlex.join(python.module("launch", [stage, *given, *places]).argv) for stage in together
    ]
    rest = python.module("launch", ["run", *given, f"distributed.processes={processes}"])
    settings = python.environment.items()
    return _SCRIPT.format(
        name=recipe.name,
        nodes=nodes,
        nproc=nproc,
        environment=" ".join(f"{name}={shlex.quote(value)}" for name, value in settings),
        stages="\n".join(f'{srun} {command} "$rendezvous"' for command in commands),
        rest=shlex.join(rest.argv),
    )
