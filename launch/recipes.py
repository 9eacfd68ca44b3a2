"""``align recipes``: list, show and copy the recipes that come with Align."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from align.errors import InputError
from align.recipe_io import find_recipe, shipped_recipes
from launch.tables import print_json

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

recipes = typer.Typer(help="List, show and copy the recipes that come with Align.")


@recipes.callback()
def _recipes(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        list_recipes(context, as_json)
    elif as_json and context.invoked_subcommand != "list":
        context.fail(f"--json goes with list; {context.invoked_subcommand} has none")


@recipes.command(name="list")
def list_recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the shipped recipes."""
    as_json = as_json or bool(context.parent and context.parent.params.get("as_json"))
    found = {name: _first_comment(path) for name, path in shipped_recipes().items()}
    if as_json:
        print_json(found)
        return
    width = max(map(len, found), default=0)
    for name, text in found.items():
        print(f"{name:{width}}  {text}".rstrip())


@recipes.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a recipe as it was written, comments included."""
    print(find_recipe(name).read_text(encoding="utf-8"), end="")


@recipes.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    to: Annotated[str | None, typer.Argument(metavar="FILE")] = None,
) -> None:
    """Copy a shipped recipe here, to change it."""
    source = find_recipe(name)
    target = Path(to or f"{name.replace('/', '-').removesuffix('.yaml')}.yaml")
    if target.is_dir():
        target /= f"{Path(name).name}.yaml"
    if target.exists():
        raise InputError(f"{target}: exists already; name another file")
    if not target.parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.parent}; make it, or name another")
    shutil.copyfile(source, target)
    print(target)


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return line.removeprefix("#").strip() if line.startswith("#") else ""
