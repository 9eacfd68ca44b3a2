"""``stage.json``: what a finished stage was made from, with a hash of everything it made.

Written last and atomically, so that its presence means that the stage is complete. Paths in it are
relative to the stage's folder: a run tree can be moved.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from align.errors import InputError, ParentError
from align.recipe import StageName
from align.recipe_reward import Reads

FILE = "stage.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RECIPE = "recipe.yaml"
MARKS = (FILE, METRICS)  # what tells a stage's folder from any other


class _Part(BaseModel):
    # A metric may be NaN; as null it would not read back.
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True
    )


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} points outside the stage's folder")
    return name


class BaseFacts(_Part):
    """The language model under a stage, and how the stage loaded it.

    ``sha256`` covers weights and configuration as they are stored. A base that is quantised while
    it is loaded is another model than the stored one: an adapter or a score head fitted to the one
    does not fit the other (PEFT issues 1043 and 2321). So ``precision`` counts like the hash where
    stages are linked. ``compute_dtype`` does not: it is a matter of the machine.

    An encoder is the base of a reward model alone: no other stage is made on it.
    """

    id: str
    revision: str | None
    sha256: str
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quantization: bool = False
    compute_dtype: str = "float32"
    architecture: Literal["decoder", "encoder"] = "decoder"

    @property
    def precision(self) -> str:
        """The base's weights as the stage saw them: ``none`` for as stored, ``nf4+double``, ..."""
        return self.quantization + ("+double" if self.double_quantization else "")


class ParentFacts(_Part):
    """A stage that this one was made from. ``sha256`` covers all of its outputs.

    ``in_chain`` is False for a reward model that PPO was given besides the recipe's own stages.
    """

    stage: StageName
    path: str
    sha256: str
    in_chain: bool = True


class DataFacts(_Part):
    """One source of records: rows read, kept, and dropped by reason."""

    id: str
    rows: int
    sha256: str
    kept: int
    dropped: dict[str, int]


class ClassifierFacts(_Part):
    """What a classifier tells apart, in the order of its logits, and what it reads."""

    labels: tuple[str, ...]
    reads: Reads


class Manifest(_Part):
    """The content of ``stage.json``.

    ``files`` are hashes of what else was given from outside the run, by the recipe's keys.
    """

    stage: StageName
    status: Literal["finished"] = "finished"
    name: str
    seed: int
    recipe_sha256: str
    inputs_sha256: str
    code_version: str
    versions: dict[str, str]
    base: BaseFacts
    tokenizer_sha256: str
    template_sha256: str
    pad_id: int
    eos_ids: tuple[int, ...]
    parents: tuple[ParentFacts, ...]
    data: tuple[DataFacts, ...]
    files: dict[str, str] = {}
    classifier: ClassifierFacts | None = None  # what the reward stage made, if no reward model
    metrics: dict[str, float]
    outputs: dict[Annotated[str, AfterValidator(_inside)], str]
    wandb_id: str | None
    started: str
    finished: str

    @property
    def origin(self) -> dict[str, str]:
        """What stages that build on each other must have in common: a hash or a word for each.

        The pretrain stage makes the base in full precision, whatever later stages load it in.
        """
        origin = {
            "tokenizer": self.tokenizer_sha256,
            "chat template": self.template_sha256,
            "base": self.base.sha256,
        }
        if self.stage != "pretrain":
            origin["base quantization"] = self.base.precision
        return origin

    def outputs_sha256(self) -> str:
        """Hash the outputs' names and hashes: equal if and only if all output files are."""
        return hashlib.sha256(json.dumps(self.outputs, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_outputs(directory: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Hash the named files and folders of a stage: ``{relative path: sha256}``, sorted."""
    files: list[Path] = []
    for name in names:
        path = directory / name
        files += [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {p.relative_to(directory).as_posix(): sha256_file(p) for p in sorted(files)}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``stage.json`` so that a reader sees all of it or none."""
    temporary = directory / (FILE + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / FILE)


def find_manifest(directory: Path) -> Manifest | None:
    """Return the manifest in a stage's folder, or None if there is none that can be read."""
    try:
        return Manifest.model_validate_json((directory / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def read_manifest(directory: Path, stage: StageName) -> Manifest:
    """Return the manifest of a finished ``stage``.

    Raises:
        ParentError: there is none, it cannot be read, or it is another kind of stage's.
    """
    path = directory / FILE
    if not path.is_file():
        raise ParentError(
            f"{directory}: no finished {stage} stage here ({FILE} is missing); run it first"
        )
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ParentError(f"{path}: not a manifest: {where}{first['msg']}") from None
    if manifest.stage != stage:
        raise ParentError(f"{directory}: holds stage {manifest.stage}; stage {stage} is needed")
    return manifest


def check_replaceable(directory: Path) -> None:
    """Refuse to put a stage in the place of something else: a folder that no stage has made.

    Nor is anything written through a link: what it points to is not the stage's.

    Raises:
        InputError: it holds something, and none of ``MARKS``; or it, something in it, or the
            recipe beside it is a link.
    """
    for link in links_in(directory, directory.parent / RECIPE):
        raise InputError(
            f"{link}: is a link; a stage's folder holds plain files and folders, so remove it, or"
            " change name or run.root"
        )
    if not directory.is_dir() or any((directory / mark).is_file() for mark in MARKS):
        return
    first = min((path.name for path in directory.iterdir()), default=None)
    if first is not None:
        raise InputError(
            f"{directory}: would be replaced, and is no stage's folder: it holds {first}, but"
            f" neither {' nor '.join(MARKS)}; change name or run.root"
        )


def links_in(*paths: Path) -> list[Path]:
    """Return the symbolic links among the paths and in the folders; none is followed."""
    links = [path for path in paths if path.is_symlink()]
    for path in paths:
        if path not in links:
            for folder, folders, files in os.walk(path):
                inside = (Path(folder) / name for name in sorted(folders + files))
                links += [entry for entry in inside if entry.is_symlink()]
    return links


def begin_folder(directory: Path) -> None:
    """Make a stage's folder, empty but for its mark; an earlier result in it is removed.

    Raises:
        InputError: it is the folder of something else; see ``check_replaceable``.
    """
    check_replaceable(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # The manifest goes first: a half-removed result must not look like a finished one. The mark is
    # there before and after, so that a kill in between leaves what may be replaced.
    mark = directory / METRICS
    mark.touch()
    (directory / FILE).unlink(missing_ok=True)
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != mark:
            path.unlink()
    mark.write_bytes(b"")


def check_same_origin(manifests: dict[str, Manifest]) -> None:
    """Refuse parents that were not made on one base with one tokenizer and one template.

    A reward model on an encoder reads text, and need not fit.

    Args:
        manifests: by the name to use in the message.

    Raises:
        ParentError: two of them differ; the message names both and what differs.
    """
    seen: dict[str, tuple[str, str]] = {}  # what -> the first that has it, and its value
    decoders = {n: m for n, m in manifests.items() if m.base.architecture == "decoder"}
    for name, manifest in decoders.items():
        for what, theirs in manifest.origin.items():
            first, ours = seen.setdefault(what, (name, theirs))
            if ours != theirs:
                raise ParentError(
                    f"{first} and {name} do not fit together: their {what} differs"
                    f" ({ours[:12]} and {theirs[:12]}); make both from the same {what}"
                )
