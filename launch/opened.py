"""A recipe or a run as a command was given it, and the process that makes each of its stages."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.places import run_directory
from align.recipe import Recipe, StageName
from align.recipe_io import find_recipe, load_recipe, shipped_recipes
from align.stages import group_size
from launch.command import Command, Python, stage_command
from launch.members import member_settings
from launch.nodes import Nodes, processes_on_each
from launch.packages import ROOT

RECIPE = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class Settings:
    """How the command was called. ``say`` prints a line for the user."""

    force: bool = False
    dry_run: bool = False
    debug: bool = False
    json: bool = False
    say: Callable[[str], None] = print
    nodes: Nodes | None = None  # machines that make a stage together; None: this one alone


@dataclass
class Experiment:
    """A recipe, as the user gave it and as it was read."""

    file: Path
    overrides: list[str]
    recipe: Recipe
    settings: Settings
    results: dict[StageName, dict[str, Any]] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """The run directory."""
        return run_directory(self.recipe)

    @property
    def ran(self) -> bool:
        """Whether a stage has run; False while all were up to date."""
        results = [*self.results.values(), *self.results.get("reward", {}).get("members", ())]
        return any(result["status"] == "done" for result in results)

    @property
    def members(self) -> tuple["Experiment", ...]:
        """What makes the members of the ensemble of reward models, but the first."""
        return tuple(self._member(settings) for settings in member_settings(self.recipe))

    def _member(self, settings: dict[str, str]) -> "Experiment":
        others = [word for word in self.overrides if word.partition("=")[0] not in settings]
        overrides = [*others, *(f"{key}={value}" for key, value in settings.items())]
        recipe = load_recipe(self.file, overrides)
        say = partial(_say_of, recipe.name, self.settings.say)
        return Experiment(self.file, overrides, recipe, replace(self.settings, say=say))

    def command(self, stage: StageName, nodes: Nodes | None = None) -> Command:
        """Return the process that makes the stage, or its part of it on one of several nodes.

        Raises:
            InputError: the nodes cannot share the processes equally.
        """
        processes = group_size(self.recipe, stage)
        if processes is not None and nodes is not None:
            processes = processes_on_each(processes, nodes.count)
        return stage_command(
            python(),
            stage,
            self.file,
            self.overrides,
            force=self.settings.force,
            processes=processes,
            nodes=nodes,
            debug=self.settings.debug,
            spare_memory=self.recipe.base.gradient_checkpointing,
        )


def _say_of(name: str, say: Callable[[str], None], text: str) -> None:
    say(f"{name}: {text}")


def open_recipe(name: str, overrides: Sequence[str], settings: Settings) -> Experiment:
    """Read a recipe file or shipped recipe.

    Raises:
        RecipeError: lists everything that is wrong with it.
    """
    file = find_recipe(name)
    return Experiment(file, list(overrides), load_recipe(file, overrides), settings)


def open_run(name: str, overrides: Sequence[str], settings: Settings) -> Experiment:
    """Read the recipe of a run directory, wherever it lies today; else a recipe as above.

    Raises:
        InputError: there is no such run, or the directory is none.
        RecipeError: lists everything that is wrong with the recipe.
    """
    folder = Path(name)
    if not folder.exists() and name not in shipped_recipes():
        raise InputError(
            f"{name}: no such run; allowed: a run directory, as runs/NAME, or a recipe"
        )
    if not folder.is_dir():
        return open_recipe(name, overrides, settings)
    file = folder / RECIPE
    if not file.is_file():
        raise InputError(f"{folder}: not a run directory: {RECIPE} is missing")
    return open_recipe(str(file), [*settings_of(folder), *overrides], settings)


def settings_of(folder: Path) -> list[str]:
    """Return the settings of a recipe whose run directory is ``folder``."""
    if folder.name in ("", ".."):
        folder = folder.resolve()
    # json.dumps: a YAML scalar that is text whatever it looks like.
    return [f"run.root={json.dumps(str(folder.parent))}", f"name={json.dumps(folder.name)}"]


def python() -> Python:
    """Return how modules of ours are started."""
    return Python(sys.executable, ROOT, os.environ)
