"""Where the results of a recipe lie: its run, and the folder of each of its stages."""

from pathlib import Path

from align.recipe import Recipe, StageName


def run_directory(recipe: Recipe) -> Path:
    """Return the folder that holds all stages of this recipe."""
    return Path(recipe.run.root) / recipe.name


def stage_directory(recipe: Recipe, stage: StageName) -> Path:
    """Return the stage's folder: in another run if ``run.parents`` says so."""
    elsewhere = getattr(recipe.run.parents, stage, None)
    return Path(elsewhere) if elsewhere else run_directory(recipe) / stage
