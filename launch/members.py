"""The members of an ensemble of reward models: the reward stage alone, with other seeds.

The first member is the run's own reward stage. Every other has a run directory of its own below it,
so that it is found up to date, goes on after an interruption and is verified as any run is.
"""

import json

from align.places import member_runs, stage_directory
from align.recipe import Recipe
from align.seeds import derive_seed


def member_settings(recipe: Recipe) -> list[dict[str, str]]:
    """Return what the recipe of each member but the first says otherwise: YAML by key."""
    shared: dict[str, object] = {"reward.members": 1, "ppo": None, "evaluate": None}
    shared["data.benchmark"] = {}  # which is refused without an evaluation
    for stage in ("pretrain", "sft"):
        if getattr(recipe, stage) is not None:
            shared[f"run.parents.{stage}"] = str(stage_directory(recipe, stage))
    if recipe.tracking.backend == "wandb":
        shared["tracking.group"] = recipe.tracking.group or recipe.name
    own = [
        {"name": run.name, "run.root": str(run.parent), "seed": derive_seed(recipe.seed, run.name)}
        for run in member_runs(recipe)
    ]
    # json.dumps: a YAML scalar that is text whatever it looks like.
    return [{key: json.dumps(value) for key, value in (shared | its).items()} for its in own]
