"""The ``align`` command.

Torch is never imported here: help, mistakes in a recipe and the look at what is already done
answer at once. The work happens in processes of its own, started by ``launch.experiment``.
"""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from align import __version__
from align.errors import AlignError, InputError, printable, stopped_by
from align.places import found_members
from launch import experiment as experiments
from launch import opened
from launch.experiment import ChildError
from launch.options import RECIPE, Debug, Overrides, RunName, read_settings
from launch.packages import check_packages
from launch.processes import Stopped, catch_signals
from launch.recipes import Json, recipes
from launch.running import add_commands
from launch.slurm import app as launch
from launch.tables import print_json, readable
from launch.verify import print_check, verify_run

app = typer.Typer(
    name="align",
    help="Turn a base language model into an aligned one: SFT, a reward model, PPO.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(recipes, name="recipes", invoke_without_command=True)
app.add_typer(launch, name="launch", no_args_is_help=True)

Exported = Literal["sft", "reward", "ppo"]
Dtype = Literal["float32", "bfloat16", "float16"]

_PLANNED = ("data", "compare", "label", "chat")


def main() -> None:
    """Run the command line and end the process with 0, 1 (failed) or 2 (bad input or usage)."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    catch_signals()
    try:
        check_packages()
        app()
    except ChildError as error:
        sys.exit(error.exit_code)
    except Stopped as stopped:
        if not stopped.announced:
            print(f"error: {stopped_by(stopped.signum)}", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except BrokenPipeError:
        # The reader of our output has gone; what Python flushes at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (AlignError, OSError) as error:
        _fail(error)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"align {__version__}")
        raise typer.Exit


add_commands(app)


@app.command()
def plan(
    recipe: Annotated[str, RECIPE],
    overrides: Overrides = None,
    memory: Annotated[str | None, typer.Option(help="What there is, as 24GiB.")] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="GPUs that share the work; default: distributed.processes."),
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="A GPU, as a100-80g: its memory, and the time on it.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine, for the time on it.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for main memory, not a GPU's.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what memory and time each stage needs, and what makes it fit; exit 1 if it does not."""
    from launch.plan import plan_experiment  # nothing else needs it
    from launch.plan_print import print_plan

    experiment = opened.open_recipe(recipe, overrides or (), read_settings(as_json, debug))
    result = plan_experiment(experiment, memory, gpus, card, calibrate=calibrate, on_cpu=cpu)
    if as_json:
        print_json(result)
    else:
        print_plan(result)
    raise typer.Exit(0 if result.get("fits", True) else 1)


@app.command()
def report(run: RunName, as_json: Json = False, debug: Debug = False) -> None:
    """Write a run's report: one self-contained HTML page."""
    settings = read_settings(as_json, debug)
    path = experiments.write_report(opened.open_run(run, (), settings))
    if as_json:
        print_json({"report": str(path)})
    else:
        print(path)


@app.command()
def export(
    run: RunName,
    stage: Annotated[Exported, typer.Option(help="Whose model.")] = "ppo",
    out: Annotated[Path | None, typer.Option(help="Where to.  [default: RUN/export/STAGE]")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights.")] = None,
    max_drift: Annotated[float | None, typer.Option(min=0, help="Refuse above it.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a stage's model, adapter merged, as a plain checkpoint that transformers loads alone.

    The written model is compared with the adapter on its base and refused beyond --max-drift: the
    mean KL in nats per token (default 0.01), or of a reward model the mean difference of scores
    (0.1). Weights are bfloat16, a reward model's float32, unless --dtype says otherwise.
    """
    experiment = opened.open_run(run, (), read_settings(as_json, debug))
    folder, facts = experiments.export(experiment, stage, out, dtype, max_drift)
    if as_json:
        print_json({"export": str(folder)} | facts)


@app.command()
def verify(run: RunName, as_json: Json = False, debug: Debug = False) -> None:
    """Check a run against its hashes; exit 1 if one differs."""
    folder = Path(run)
    if not folder.is_dir():
        folder = opened.open_run(run, (), read_settings(as_json, debug)).directory
    members = found_members(folder)
    found = {path: verify_run(path) for path in (folder, *members)}
    wrong = any(c.problems for checks, beside in found.values() for c in (*checks.values(), beside))
    if as_json:
        whole, *others = (
            {"stages": {stage: vars(check) for stage, check in checks.items()}}
            | {"beside": vars(beside)}
            for checks, beside in found.values()
        )
        facts = {"run": str(folder), "ok": not wrong} | whole
        if members:
            facts["members"] = dict(zip([path.name for path in members], others, strict=True))
        print_json(facts)
    else:
        for path, (checks, beside) in found.items():
            place = "" if path == folder else f"{path.relative_to(folder)}/"
            for stage, check in checks.items():
                if not place or check.state != "not made":
                    print_check(f"{place}{stage}", check, f"{place}{stage}/")
            print_check(f"{place}beside the stages", beside, place)
    raise typer.Exit(1 if wrong else 0)


@app.command()
def reproduce(
    run: RunName,
    into: Annotated[
        Path | None, typer.Option(help="The second directory.  [default: RUN-again]")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Repeat a run from its recipe in a second directory, and compare; exit 1 if something differs.

    Compared are the SHA-256 of every output, and what the manifests say of recipe, versions, data,
    parents and metrics. Names, times, W&B ids and metrics of the clock and of memory are not.
    """
    from launch.reproduce import compare_runs, open_repetition, print_comparison

    folder, again, stages = open_repetition(run, into, read_settings(as_json, debug))
    experiments.run_stages(again, stages)
    found = compare_runs(folder, again.directory, stages)
    equal = all(stage.equal for stage in found.values())
    if as_json:
        stages_found = {stage: vars(comparison) for stage, comparison in found.items()}
        runs = {"run": str(folder), "again": str(again.directory)}
        print_json(runs | {"equal": equal, "stages": stages_found})
    else:
        print_comparison(found)
    raise typer.Exit(0 if equal else 1)


@app.command()
def doctor(
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Print what goes together in a recipe, and what not.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show this machine, its libraries and GPUs; or what recipes may combine."""
    if matrix:
        _show_matrix(as_json)
        return
    from launch.doctor import examine  # nothing else needs what it imports

    facts = examine()
    if as_json:
        print_json(facts)
    else:
        problems = facts.pop("problems")
        for name, value in facts.items():
            inner = value.items() if isinstance(value, dict) else ()
            print(f"{name}" if inner else f"{name:14} {readable(value)}")
            for key, part in inner:
                print(f"  {key:16} {readable(part)}")
        for problem in problems:
            print(f"problem: {problem}")
        facts["problems"] = problems
        print("no problems found" if not problems else f"problems: {len(problems)}")
    raise typer.Exit(1 if facts["problems"] else 0)


def _show_matrix(as_json: bool) -> None:
    from launch.matrix import matrix, print_matrix

    rows = matrix()
    if as_json:
        print_json({"cells": rows})
    else:
        print_matrix(rows)


def _refuse_planned(name: str) -> None:
    @app.command(name=name, hidden=True, context_settings={"ignore_unknown_options": True})
    def command(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> NoReturn:
        raise InputError(f"align {name} is planned but not built yet; `align --help` lists what is")


for _name in _PLANNED:
    _refuse_planned(_name)


def _fail(error: AlignError | OSError) -> NoReturn:
    """Print the error for a user, or for a developer with --debug, and end the process."""
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    for line in text.splitlines():
        print(f"error: {printable(line)}", file=sys.stderr)
    sys.exit(error.exit_code if isinstance(error, AlignError) else 1)
