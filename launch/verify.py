"""Whether a run tree still is what its manifests say, file by file and stage by stage."""

from dataclasses import dataclass, field
from pathlib import Path

from align.errors import InputError, ParentError
from align.manifest import FILE, Manifest, read_manifest, sha256_file
from align.recipe import StageName
from align.stages import STAGES


@dataclass
class StageCheck:
    """What was found in one stage's folder. ``state`` is ok, differs, unfinished or not made."""

    state: str
    files: int = 0
    problems: list[str] = field(default_factory=list)


def verify_run(run: Path) -> dict[StageName, StageCheck]:
    """Check every stage of a run.

    Raises:
        InputError: this is no run directory.
    """
    if not any((run / stage).is_dir() for stage in STAGES):
        raise InputError(f"{run}: not a run directory: it holds none of {', '.join(STAGES)}")
    return {stage: _verify_stage(run / stage, stage) for stage in STAGES}


def _verify_stage(directory: Path, stage: StageName) -> StageCheck:
    if not directory.is_dir():
        return StageCheck("not made")
    if not (directory / FILE).exists():
        return StageCheck("unfinished")
    try:
        manifest = read_manifest(directory, stage)
    except ParentError as error:
        return StageCheck("differs", problems=[str(error).removeprefix(f"{directory}/")])
    problems = _files(directory, manifest) + _parents(directory, manifest)
    return StageCheck("differs" if problems else "ok", len(manifest.outputs), problems)


def _files(directory: Path, manifest: Manifest) -> list[str]:
    problems = []
    for name, expected in manifest.outputs.items():
        path = directory / name
        if path.is_symlink():
            problems.append(f"{name}: is a link; a run tree holds plain files")
        elif not path.is_file():
            problems.append(f"{name}: is missing")
        elif sha256_file(path) != expected:
            problems.append(f"{name}: differs from its manifest")
    folders = {Path(name).parts[0] for name in manifest.outputs if len(Path(name).parts) > 1}
    for folder in sorted(folders):
        for path in sorted((directory / folder).rglob("*")):
            name = path.relative_to(directory).as_posix()
            if not path.is_dir() and name not in manifest.outputs:
                problems.append(f"{name}: is unexpected; its manifest does not name it")
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
    return problems
