"""Export of a finished stage: one plain checkpoint without adapters, refused if it has drifted.

    python -m pipelines.export STAGE RECIPE [key=value ...] --out FOLDER

The checkpoint is written beside ``FOLDER``, compared with what was trained, and only then moved
there: an export that is refused, or stopped, leaves nothing. ``export.json`` beside the weights
says what they were made from and what was measured.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich.console import Console

import align
from align.errors import AlignError, InputError, ParentError
from align.manifest import Manifest, read_manifest, sha256_file, sha256_outputs
from align.places import run_directory, stage_directory
from align.recipe import StageName
from align.recipe_io import load_recipe
from pipelines.process import (
    exit_code,
    quiet_libraries,
    seed_generators,
    share_processors,
)
from pipelines.record import library_versions
from pipelines.run_facts import Run, read_run
from pipelines.stage import StageJob

if TYPE_CHECKING:
    from pipelines.plain_checkpoint import Conversation, Written

FILE = "export.json"
ADAPTER = "adapter_config.json"  # where it lies, the model is an adapter

# What a stage's model is called in its folder.
_MODELS: dict[StageName, str] = {"sft": "model", "reward": "model", "ppo": "policy"}

TEXTS = 16  # on which the drift is measured

# What is limited, and how far. Rounding to bfloat16 costs about 0.0001 nats per token; merging onto
# another base than the adapter was trained on, far more. A score difference of 0.1 moves a
# preference of even odds by 0.025.
LIMITS = {"kl/mean": 0.01, "score/mean": 0.1}

# What PEFT calls the adapters that cannot be merged; what we call them, and why.
_NO_WEIGHTS = {
    "BOTTLENECK": (
        "bottleneck",
        "puts layers with a nonlinearity between those of the base: no weights of the base do that",
    ),
    "PREFIX_TUNING": (
        "prefix",
        "puts keys and values before every text: a plain checkpoint has no place for them",
    ),
}

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Export:
    """What is exported, and where to. ``texts`` are from ``source``."""

    job: StageJob
    manifest: Manifest
    model: Path
    out: Path
    dtype: Dtype
    limit: tuple[str, float]  # a key of the drift, and how large its value may be
    source: Path
    texts: "list[Conversation]"


def prepare(options: argparse.Namespace) -> Export:
    """Check everything that can be checked without torch.

    Raises:
        InputError: there is no such stage, it is not finished or not what its manifest says; the
            folder to write is taken; the run holds no text to measure the drift on.
    """
    recipe, stage = load_recipe(options.recipe, options.overrides), options.stage
    _check_place(options.out)
    made = [s for s in _MODELS if getattr(recipe, s) or getattr(recipe.run.parents, s, None)]
    if stage not in made:
        raise InputError(
            f"{run_directory(recipe)}: its recipe makes no {stage} stage; allowed with --stage:"
            f" {', '.join(made) or 'nothing, the recipe makes none'}"
        )
    directory = stage_directory(recipe, stage)
    manifest = read_manifest(directory, stage)
    if manifest.base.architecture == "encoder":
        raise InputError(
            f"{directory}: a reward model on an encoder is not exported: its folder model/ holds it"
            " as transformers or PEFT load it, and score.json says how to read its scores"
        )
    _check_files(directory, manifest, _MODELS[stage])
    _check_method(directory / _MODELS[stage])
    # The SFT stage has the tokenizer of all.
    parents = {"sft": read_manifest(stage_directory(recipe, "sft"), "sft"), stage: manifest}
    job = StageJob(recipe, stage, directory, parents, {}, Console(stderr=True))
    source, texts = sampled_texts(read_run(run_directory(recipe)), stage)
    key = "score/mean" if stage == "reward" else "kl/mean"
    limit = LIMITS[key] if options.max_drift is None else options.max_drift
    # A score in bfloat16 moves in steps of 1/128 near 1.
    dtype: Dtype = options.dtype or ("float32" if stage == "reward" else "bfloat16")
    model = directory / _MODELS[stage]
    return Export(job, manifest, model, options.out, dtype, (key, limit), source, texts)


def sampled_texts(run: Run, stage: StageName) -> "tuple[Path, list[Conversation]]":
    """Choose what to measure on: prompts that the run has sampled responses to, with those.

    Held-out ones, where the recipe gives any: of the stage's last look at them, else of PPO, SFT or
    the evaluation.

    Raises:
        InputError: the run holds none.
    """
    for name in (stage, "ppo", "sft", "evaluate"):
        rows = run[name].samples if name in run else []
        last = [row for row in rows if row.get("step") == rows[-1].get("step")][:TEXTS]
        if last:
            return run[name].directory / "samples.jsonl", [
                _conversation(row, stage) for row in last
            ]
    raise InputError(
        "the run holds no sampled responses to measure the drift on: run `align eval`, or the sft"
        " stage with sft.samples above 0"
    )


def _conversation(row: dict[str, Any], stage: StageName) -> "Conversation":
    if "responses" in row:  # of the evaluation: a response of each model
        return row["prompt"], row["responses"].get(stage, row["responses"]["sft"])["text"]
    return row["prompt"], row["response"]


def export(request: Export) -> None:
    """Write, measure, and move the checkpoint to its place.

    Raises:
        AlignError: it has drifted too far.
    """
    import torch

    from pipelines.plain_checkpoint import write_policy, write_reward_model

    stage, out = request.job.stage, request.out
    print(f"{stage}  {_description(request)}, in {request.dtype}", flush=True)
    with tempfile.TemporaryDirectory(dir=_nearest_folder(out), prefix=".export-") as temporary:
        target = Path(temporary) / "model"
        write = write_reward_model if stage == "reward" else write_policy
        dtype = getattr(torch, request.dtype)
        written = write(request.job, request.model, target, request.texts, dtype)
        print(f"{stage}  drift  {_drift(written.drift)}", flush=True)
        _check_drift(request, written.drift)
        facts = json.dumps(_facts(request, written, target), indent=2, ensure_ascii=False)
        (target / FILE).write_text(facts + "\n", encoding="utf-8")
        out.parent.mkdir(parents=True, exist_ok=True)
        target.replace(out)
    if written.score_offset:
        print(
            f"{stage}  score = logit - {written.score_offset:.6g}: transformers' classifier has no"
            " bias for the zero of the scores; config.json says it as score_offset"
        )
    print(f"{stage}  exported to {out}", flush=True)


def _description(request: Export) -> str:
    if not (request.model / ADAPTER).is_file():
        return "writing all weights"
    kind = request.manifest.base.quantization
    return f"merging the adapter onto the {'' if kind == 'none' else f'dequantised {kind} '}base"


def _drift(drift: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.3g}" for key, value in drift.items())


def _check_drift(request: Export, drift: dict[str, float]) -> None:
    key, limit = request.limit
    if not drift[key] <= limit:  # also if it is not a number
        hint = "" if request.dtype == "float32" else " export it with --dtype float32, or"
        raise AlignError(
            f"{request.job.stage}: the exported model is not the trained one: {key}"
            f" {drift[key]:.3g}, but --max-drift={limit:g};{hint} allow more with --max-drift"
        )


def _facts(request: Export, written: "Written", folder: Path) -> dict[str, Any]:
    """Return what ``export.json`` says."""
    manifest, (key, limit) = request.manifest, request.limit
    facts: dict[str, Any] = {
        "stage": request.job.stage,
        "name": manifest.name,
        "dtype": request.dtype,
        "base": written.base.model_dump(),
        "parents": [
            {"stage": request.job.stage, "sha256": manifest.outputs_sha256()},
            *({"stage": p.stage, "sha256": p.sha256} for p in manifest.parents),
        ],
        "drift": written.drift,
        "max_drift": {key: limit},
        "texts": [{"prompt": prompt, "response": text} for prompt, text in request.texts],
        "code_version": align.__version__,
        "versions": library_versions(request.job.recipe),
        "outputs": sha256_outputs(folder, tuple(path.name for path in folder.iterdir())),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if written.score_offset is not None:
        facts["score_offset"] = written.score_offset
    return facts


def _check_files(directory: Path, manifest: Manifest, model: str) -> None:
    """Refuse a model that is not the one that the stage was finished with."""
    for name, expected in manifest.outputs.items():
        path = directory / name
        if name.startswith(f"{model}/") and not (path.is_file() and sha256_file(path) == expected):
            raise ParentError(
                f"{path}: is not what the {manifest.stage} stage was finished with; `align verify`"
                " lists what differs; redo the stage"
            )


def _check_method(model: Path) -> None:
    """Refuse an adapter that no weights of the base can stand for."""
    if not (model / ADAPTER).is_file():
        return
    kind = json.loads((model / ADAPTER).read_text(encoding="utf-8"))["peft_type"]
    if kind in _NO_WEIGHTS:
        method, reason = _NO_WEIGHTS[kind]
        raise InputError(
            f"{model}: was trained with adapter.method={method}, which {reason}; allowed for"
            " export: any other method. PEFT loads the folder as it is"
        )


def _check_place(out: Path) -> None:
    """Refuse a folder that is taken or cannot be written, before any work."""
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; remove it, or name another folder with --out")
    nearest = _nearest_folder(out)
    if (out.exists() and not out.is_dir()) or not nearest.is_dir():
        raise InputError(f"{out}: cannot be made: a file is in its place; name another with --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{out}: cannot be made: no permission to write in {nearest}")


def _nearest_folder(out: Path) -> Path:
    """Return the lowest folder above ``out`` that exists."""
    return next(path for path in out.absolute().parents if path.exists())


def main(arguments: Sequence[str] | None = None) -> int:
    """Export one stage; return the exit code: 0 done, 1 failed, 2 bad input, 128 + n signal n."""
    options = _parser().parse_intermixed_args(arguments)
    return exit_code("export", lambda: _export(options), debug=options.debug)


def _export(options: argparse.Namespace) -> None:
    request = prepare(options)
    share_processors()
    quiet_libraries()
    seed_generators(request.job.recipe)
    export(request)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.export", description="Write a finished stage as a plain model."
    )
    parser.add_argument("stage", choices=list(_MODELS))
    parser.add_argument("recipe", help="the recipe in the run directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--dtype", choices=get_args(Dtype))
    parser.add_argument("--max-drift", type=float)
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    return parser


if __name__ == "__main__":
    sys.exit(main())
