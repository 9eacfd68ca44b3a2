"""Where the results of a recipe lie: its run, its stages, and the members of its ensemble."""

from pathlib import Path

from align.recipe import Recipe, StageName

MEMBERS = "members"  # the folder of a run that holds those of its ensemble
_MEMBER = "member-"  # and its number


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
    return members_of(stage_directory(recipe, "reward").parent, members)


def members_of(run: Path, members: int) -> tuple[Path, ...]:
    """Return where the members of a run's ensemble lie, but the first, in their order."""
    return tuple(run / MEMBERS / f"{_MEMBER}{number}" for number in range(2, members + 1))


def found_members(run: Path) -> list[Path]:
    """Return all folders among a run's members, by number.

    With those that were left by a recipe that had more members.
    """
    folders = [path for path in (run / MEMBERS).glob("*") if path.is_dir()]
    return sorted(folders, key=_by_number)


def _by_number(member: Path) -> tuple[bool, int, str]:
    """Sort by it; what is not named like a member comes last."""
    number = member.name.removeprefix(_MEMBER)
    is_number = number.isascii() and number.isdigit()
    return not is_number, int(number) if is_number else 0, member.name
