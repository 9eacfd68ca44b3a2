"""Where the results of a recipe lie: its run, its stages, and the members of its ensemble."""

from pathlib import Path

from align.recipe import Recipe, StageName

MEMBERS = "members"  # the folder of a run that holds those of its ensemble


def run_directory(recipe: Recipe) -> Path:
    """Return the folder that holds all stages of this recipe."""
    return Path(recipe.run.root) / recipe.name


def stage_directory(recipe: Recipe, stage: StageName) -> Path:
    """Return the stage's folder: in another run if ``run.parents`` says so."""
    elsewhere = getattr(recipe.run.parents, stage, None)
    return Path(elsewhere) if elsewhere else run_directory(recipe) / stage


def member_runs(recipe: Recipe) -> tuple[Path, ...]:
    """Return the run directories of the members of the recipe's ensemble, but of the first.

    That one is the reward stage itself, so that numbers begin with 2. The others lie beside it,
    under names that stay when the run is renamed.
    """
    members = recipe.reward.members if recipe.reward is not None else 1
    folder = stage_directory(recipe, "reward").parent / MEMBERS
    return tuple(folder / f"member-{number}" for number in range(2, members + 1))
