"""Whether a run tree still is what its hashes say, and was made from what its inputs are today.

Every file of a finished stage is named by its manifest or by the run's ``SHA256SUMS``, which has a
line for the manifest, too. Data and models outside the run are compared where they still lie where
they lay: a tree that was moved or copied stays valid.
"""

from dataclasses import dataclass, field
from pathlib import Path

from align.errors import AlignError, DataError, InputError, ParentError, printable
from align.inputs import named_sha256, source_fingerprint, stage_data
from align.manifest import FILE, Manifest, read_manifest, sha256_file
from align.places import MEMBERS
from align.recipe import StageName
from align.recipe_io import load_recipe
from align.stages import STAGES
from launch.sums import FILE as SUMS
from launch.sums import plain_files, read_sums

_LINK = "is a link; a run tree holds plain files"


@dataclass
class StageCheck:
    """What was found in one stage's folder. ``state`` is ok, differs, unfinished or not made.

    ``notes`` say what could not be compared.
    """

    state: str
    files: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_run(run: Path) -> tuple[dict[StageName, StageCheck], StageCheck]:
    """Check every stage of a run, and the files beside the stages.

    The members of its ensemble are runs of their own, those that were left by an earlier recipe
    too: their files are covered by no other hash. See ``align.places.found_members``.

    Raises:
        InputError: this is no run directory.
    """
    if not any((run / stage).is_dir() for stage in STAGES):
        raise InputError(f"{run}: not a run directory: it holds none of {', '.join(STAGES)}")
    try:
        sums = read_sums(run)
        problems = [] if sums else [f"{SUMS}: is missing; `align run` writes what is there now"]
    except InputError as error:
        sums, problems = {}, [str(error).removeprefix(f"{run}/")]
    stages = {}
    for stage in STAGES:
        its = {name: sha256 for name, sha256 in sums.items() if name.startswith(f"{stage}/")}
        stages[stage] = _verify_stage(run, stage, its, complete=bool(sums))
    beside = {name: sums[name] for name in sums if name.partition("/")[0] not in STAGES}
    problems += _differing(run, beside, SUMS)
    unnamed = [
        f"{path.relative_to(run)}: no hash covers it"
        for top in sorted(run.iterdir())
        if top.name not in (*STAGES, MEMBERS, SUMS)
        for path in plain_files(top)
        if path.relative_to(run).as_posix() not in beside
    ]
    return stages, _check(len(beside), problems, unnamed)


def _check(files: int, problems: list[str], notes: list[str]) -> StageCheck:
    return StageCheck("differs" if problems else "ok", files, problems, notes)


def _verify_stage(
    run: Path, stage: StageName, sums: dict[str, str], *, complete: bool
) -> StageCheck:
    """Check a stage.

    Args:
        sums: the lines of its files, by their path in the run.
        complete: whether there are such lines at all.
    """
    directory = run / stage
    if directory.is_symlink():
        return StageCheck("differs", 0, [_LINK])
    if not directory.is_dir():
        return StageCheck("not made")
    if not (directory / FILE).exists():
        return StageCheck("unfinished")
    sums = {name.removeprefix(f"{stage}/"): sha256 for name, sha256 in sums.items()}
    problems = _differing(directory, sums, SUMS)
    try:
        manifest = read_manifest(directory, stage)
    except ParentError as error:
        return StageCheck("differs", 0, [str(error).removeprefix(f"{directory}/"), *problems])
    problems += _differing(directory, manifest.outputs, "its manifest")
    folders = {name.partition("/")[0] for name in manifest.outputs if "/" in name}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name in manifest.outputs or name in sums:
            continue
        if path.is_symlink():
            problems.append(f"{name}: {_LINK}")
        elif not path.is_dir() and (complete or name.partition("/")[0] in folders):
            problems.append(f"{name}: is unexpected; neither its manifest nor {SUMS} names it")
    problems += _parents(directory, manifest)
    changed, notes = _inputs(directory, manifest)
    return _check(len(manifest.outputs) + len(sums), problems + changed, notes)


def _differing(directory: Path, expected: dict[str, str], where: str) -> list[str]:
    """Say which files are not those that ``expected`` names by path and hash."""
    problems = []
    for name, sha256 in expected.items():
        path = directory / name
        if path.is_symlink():
            problems.append(f"{name}: {_LINK}")
        elif not path.is_file():
            problems.append(f"{name}: is missing")
        elif sha256_file(path) != sha256:
            problems.append(f"{name}: differs from {where}")
    return problems


def _parents(directory: Path, manifest: Manifest) -> list[str]:
    problems = []
    for parent in manifest.parents:
        try:
            found = read_manifest(directory / parent.path, parent.stage)
        except ParentError as error:
            problems.append(f"parent {parent.stage}: {error}")
            continue
        if found.outputs_sha256() != parent.sha256:
            problems.append(
                f"parent {parent.stage}: {parent.path} is not what this stage was made from;"
                " it was redone since"
            )
        # A reward model on an encoder reads text, and need not fit.
        alike = parent.in_chain and found.base.architecture == manifest.base.architecture
        for what, theirs in found.origin.items() if alike else ():
            ours = manifest.origin.get(what, theirs)
            if ours != theirs:
                problems.append(
                    f"parent {parent.stage}: its {what} ({theirs[:12]}) is not this stage's"
                    f" ({ours[:12]})"
                )
    return problems


def _inputs(directory: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """Return which inputs from outside the run have changed since, and what cannot be compared."""
    problems, notes = [], []
    try:
        recipe = load_recipe(directory / "recipe.yaml")
    except AlignError:
        return [], ["its recipe cannot be read: data and other inputs are not compared"]
    for data in stage_data(recipe, manifest.stage).values():
        for source in (*data.train, *data.heldout):
            if source.path is None:
                continue
            try:
                now = source_fingerprint(recipe, source)
            except DataError as error:
                notes.append(f"data is not compared: {error}")
                continue
            made_from = {fact.sha256 for fact in manifest.data if fact.id == now["id"]}
            if now["sha256"] not in made_from:
                problems.append(f"data {source.path}: was changed since this stage was made")
    try:
        named = named_sha256(recipe, manifest.stage)
    except DataError as error:
        return problems, [*notes, f"other inputs are not compared: {error}"]
    for key, sha256 in manifest.files.items():
        if key in named and named[key] != sha256:
            problems.append(f"{key}: was changed since this stage was made")
    return problems, notes


def print_check(name: str, check: StageCheck, prefix: str) -> None:
    """Print what was found, a line for each problem and note."""
    print(f"{name}: {check.state}" + (f" ({check.files} files)" if check.files else ""))
    for problem in check.problems:
        print(f"  {printable(prefix + problem)}")
    for note in check.notes:
        print(f"  note: {printable(prefix + note)}")
