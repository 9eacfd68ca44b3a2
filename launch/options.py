"""The arguments and options that several commands share, as typer reads them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.nodes import PORT, SECONDS, Nodes
from launch.opened import Settings

RECIPE = typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")
RUN = typer.Argument(metavar="RUN", help="A run directory, or the recipe that made it.")
RunName = Annotated[str, RUN]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, as in ppo.lr=1e-5."),
]
Force = Annotated[bool, typer.Option("--force", help="Make stages from nothing, done or not.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be started, and why.")]
Processes = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Processes that train together: distributed.processes."),
]
OnEachNode = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        help="Processes that train together; with --nodes, on each. distributed.processes is the"
        " number of all.",
    ),
]
NodeCount = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Machines that train together.")
]
NodeRank = Annotated[
    int | None,
    typer.Option("--node-rank", min=0, help="Which of them this is, from 0; in Slurm, its own."),
]
Rendezvous = Annotated[
    str | None,
    typer.Option(
        "--rendezvous", metavar="HOST:PORT", help="Where all meet: a free port of node 0."
    ),
]
HostFile = Annotated[
    Path | None,
    typer.Option(
        "--hostfile",
        help="The machines, a line `name slots=N` for each, as DeepSpeed reads them. This one is"
        f" found by its name; they meet on the first, port {PORT}.",
    ),
]
Wait = Annotated[
    float | None,
    typer.Option(
        "--rendezvous-timeout",
        min=1,
        help=f"Seconds that a machine waits for the others to come.  [default: {SECONDS:.0f}]",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")]


def read_settings(
    as_json: bool,
    debug: bool,
    *,
    force: bool = False,
    dry_run: bool = False,
    nodes: Nodes | None = None,
) -> Settings:
    """Return how a command was called; with --json, lines for the user go beside it."""

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    return Settings(force, dry_run, debug, as_json, say, nodes)
