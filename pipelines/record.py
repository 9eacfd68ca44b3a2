"""The record of a stage that has ended: its manifest, with hashes of inputs and outputs."""

import os
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import align
from align import manifest as manifests
from align import stages
from align.manifest import DataFacts, Manifest, ParentFacts
from align.recipe import Recipe

if TYPE_CHECKING:
    from pipelines.stage import StageJob, StageResult

_LIBRARIES: tuple[str, ...] = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
)


def now() -> str:
    """Return the time as manifests have it: in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_record(job: "StageJob", result: "StageResult", started: str) -> None:
    """Write the manifest of a stage that has ended, and hash what it has made.

    Args:
        started: when, as ``now`` gives it.
    """
    from data.tokenizer import end_ids, template_sha256, tokenizer_sha256

    pad_id = result.tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    manifest = Manifest(
        stage=job.stage,
        name=job.recipe.name,
        seed=job.recipe.seed,
        recipe_sha256=stages.recipe_sha256(job.recipe, job.stage),
        inputs_sha256=job.inputs_sha256,
        code_version=align.__version__,
        versions=library_versions(job.recipe),
        base=result.base,
        tokenizer_sha256=tokenizer_sha256(result.tokenizer),
        template_sha256=template_sha256(result.tokenizer),
        pad_id=pad_id,
        eos_ids=tuple(end_ids(result.tokenizer)),
        parents=_parent_facts(job),
        data=_data_facts(job),
        files=job.files,
        classifier=result.classifier,
        metrics=result.metrics,
        outputs=manifests.sha256_outputs(job.directory, result.outputs),
        wandb_id=job.tracker.id if job.tracker is not None else None,
        started=started,
        finished=max(started, now()),  # the clock may have gone back
    )
    manifests.write_manifest(job.directory, manifest)
    if job.tracker is not None:
        job.tracker.record(manifest.model_dump(mode="json"), job.directory)


def library_versions(recipe: Recipe) -> dict[str, str]:
    """Return the versions of Python and of the libraries that the recipe's stages run on."""
    names = _LIBRARIES
    if recipe.base.quantization != "none":
        names += ("bitsandbytes",)
    return {"python": sys.version.split()[0]} | {name: version(name) for name in names}


def _parent_facts(job: "StageJob") -> tuple[ParentFacts, ...]:
    """Return the recipe's own stages that this one was made from, and the other reward models."""
    made_from = [(name, job.parent_folder(name), made, True) for name, made in job.parents.items()]
    for folder, made in job.reward_models.items():
        made_from.append(("reward", Path(folder), made, False))
    return tuple(
        ParentFacts(
            stage=name,
            path=os.path.relpath(folder, job.directory),
            sha256=made.outputs_sha256(),
            in_chain=in_chain,
        )
        for name, folder, made, in_chain in made_from
    )


def _data_facts(job: "StageJob") -> tuple[DataFacts, ...]:
    """Return the facts of all sources, and of each section whose rows tokenising has reduced."""
    facts = [fact for loaded in job.data.values() for fact in loaded.facts]
    for name, (kept, dropped) in job.tokenised.items():
        if dropped:
            facts.append(
                DataFacts(
                    id=f"{name} as tokens",
                    rows=kept + dropped.total(),
                    sha256="",
                    kept=kept,
                    dropped=dropped.counts(),
                )
            )
    return tuple(facts)
