"""``align plan``: what a recipe needs before anything of it is downloaded: memory, GPUs, time."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from align.errors import AlignError, InputError
from align.places import stage_directory
from align.plan import plan_recipe, pretrained_shape
from align.plan_changes import Proposal, Values, cheapest, smallest
from align.plan_items import Item, StagePlan
from align.plan_memory import deepspeed_bytes, deepspeed_host_bytes
from align.plan_model import Shape, read_shape
from align.plan_scale import scaling
from align.plan_time import Speed, StageWork, calibrated_speed, card_speed, plan_work
from align.published import CARDS, CONFIGS
from align.recipe import Recipe
from align.recipe_distributed import Distributed, Zero
from align.zero import WITHOUT_ZERO, deepspeed_settings
from launch.command import Python
from launch.opened import Experiment
from launch.packages import ROOT

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}": size**power
    for power, letter in enumerate("KMGT", start=1)
    for kind, size in (("iB", 1024), ("B", 1000))
}


def read_memory(text: str) -> int:
    """Return the bytes that ``24GiB``, ``80 GB`` or ``1500000000`` mean.

    Raises:
        InputError: it means nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[2].lower() not in units or not float(match[1]):
        raise InputError(f"--memory={text}: not a size; allowed: a number and a unit, as 24GiB")
    return int(float(match[1]) * units[match[2].lower()])


def plan_experiment(
    experiment: Experiment,
    memory: str | None = None,
    gpus: int | None = None,
    card: str | None = None,
    *,
    calibrate: bool = False,
    on_cpu: bool = False,
) -> dict[str, Any]:
    """Return what ``make_plan`` does, for the options of the command.

    Raises:
        InputError: an option means nothing; or see ``base_shape`` and ``make_plan``.
    """
    if card is not None and calibrate:
        raise InputError("--card and --calibrate: the time is that of one device; give one of them")
    if card is not None and card not in CARDS:
        raise InputError(f"--card={card}: not one that plan knows; allowed: {', '.join(CARDS)}")
    gpus = gpus or experiment.recipe.distributed.processes
    if on_cpu and (card is not None or gpus > 1):
        raise InputError("--cpu: has no GPUs; allowed without: --card, --gpus")
    limit = read_memory(memory) if memory is not None else None
    recipe, speed = experiment.recipe, None
    shape = base_shape(recipe)
    if card is not None:
        limit = limit or CARDS[card].memory
        base, dtype = recipe.base, recipe.base.dtype
        quantized = base.quantization != "none"
        if quantized:  # what its layers compute in; the cards have bfloat16
            dtype = base.compute_dtype if base.compute_dtype != "auto" else "bfloat16"
        speed = card_speed(card, CARDS[card], quantized, dtype)
    elif calibrate:
        speed = _measure(experiment, shape)
    plan = make_plan(recipe, shape, limit, gpus, speed, on_cpu=on_cpu)
    if card is not None and gpus > 1 and speed is not None and limit is not None:
        plan["scaling"] = {
            "card": asdict(CARDS[card]),
            "zero": f"ZeRO {recipe.distributed.zero}, offload {recipe.distributed.offload}",
            "stages": scaling(recipe, shape, gpus, CARDS[card], speed, limit, _phases),
        }
    return plan


def base_shape(recipe: Recipe) -> Shape:
    """Return the shape of the recipe's base: of the one it makes, or read off ``config.json``.

    A hub id is looked up in the hub's cache, in ``align.published``, and only then on the hub.

    Raises:
        InputError: there is no ``config.json``, here or on the hub, or its model is not known.
    """
    makes_base = recipe.pretrain is not None and recipe.base.id == "pretrain"
    if makes_base and not recipe.run.parents.pretrain:
        return pretrained_shape(recipe)
    if recipe.base.id == "pretrain":
        file = stage_directory(recipe, "pretrain") / "model" / "config.json"
    elif Path(recipe.base.id).is_dir():
        file = Path(recipe.base.id) / "config.json"
    else:
        cached = _cached(recipe.base.id, recipe.base.revision)
        if cached is None and recipe.base.id in CONFIGS:
            return read_shape(CONFIGS[recipe.base.id])
        file = cached or _from_hub(recipe.base.id, recipe.base.revision)
    try:
        return read_shape(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{file.parent}/{error}") from None
        raise InputError(f"{file}: cannot be read as a model's configuration: {error}") from None


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # not the form of a hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:  # what the hub's client raises are these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"base.id={name}: no such folder here, and the Hugging Face hub does not give its"
            f" config.json: {reason}; a folder with that one file is enough for a plan:"
            " base.id=FOLDER"
        ) from None


def _measure(experiment: Experiment, shape: Shape) -> Speed:
    """Measure this machine, in a process of its own and with all its libraries.

    Raises:
        AlignError: the process has failed.
    """
    matrix = max(shape.matrices, key=lambda matrix: matrix.weights)
    limits = experiment.recipe.data
    tokens = min(1024, limits.max_prompt_tokens + limits.max_response_tokens)
    sizes = ["--matrix", f"{matrix.inputs}x{matrix.outputs}", "--tokens", str(tokens)]
    arguments = [str(experiment.file), *experiment.overrides, *sizes]
    command = Python(sys.executable, ROOT, os.environ).module("pipelines.calibrate", arguments)
    done = subprocess.run(
        command.argv, env=os.environ | command.env, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise AlignError(f"--calibrate: the process ended with exit code {done.returncode}")
    measured = json.loads(done.stdout.splitlines()[-1])
    return calibrated_speed(**measured, quantized=experiment.recipe.base.quantization != "none")


def make_plan(
    recipe: Recipe,
    shape: Shape,
    memory: int | None,
    gpus: int,
    speed: Speed | None = None,
    *,
    on_cpu: bool = False,
) -> dict[str, Any]:
    """Return the plan as JSON: stages, ZeRO tables, time, whether it fits, and what makes it fit.

    Args:
        shape: of the recipe's base; see ``base_shape``.
        memory: bytes on each GPU; None: not asked whether it fits.
        speed: None: tokens and operations only.

    Raises:
        InputError: the recipe has no stage.
    """
    stages = plan_recipe(recipe, shape, on_cpu=on_cpu)
    if not stages:
        raise InputError(f"{recipe.name}: has no section of a stage; nothing to plan")

    def peaks(changed: Recipe) -> dict[str, int]:
        plans = plan_recipe(changed, shape, on_cpu=on_cpu)
        return {plan.stage: _peak(plan, gpus, changed.distributed) for plan in plans}

    largest = max(stages, key=lambda stage: _peak(stage, gpus, recipe.distributed))
    result: dict[str, Any] = {
        "name": recipe.name,
        "base": {"id": recipe.base.id, "parameters": shape.parameters, "blocks": shape.layers},
        "peak_bytes": _peak(largest, gpus, recipe.distributed),
        "largest_stage": largest.stage,
        "stages": {stage.stage: _stage(stage) for stage in stages},
        "time": _time(plan_work(recipe, shape), shape, speed),
    }
    if recipe.distributed.zero:
        result["deepspeed"] = {
            stage.stage: deepspeed_settings(recipe.distributed, getattr(recipe, stage.stage))
            for stage in stages
            if stage.stage not in WITHOUT_ZERO
        }
    if gpus > 1:
        shares = {s.stage: _shares(s, gpus, recipe.distributed) for s in stages}
        result |= {"gpus": gpus, "way": _way(recipe.distributed), "per_gpu": shares}
        result["by_gpus"] = {
            n: _by_gpus(stages, n, memory, recipe.distributed) for n in _counts(gpus)
        }
        result["full_training"] = {n: _full_training(shape, n) for n in _counts(gpus)}
    if memory is not None:
        result |= {"memory_bytes": memory, "fits": result["peak_bytes"] <= memory}
        if not result["fits"]:
            found = cheapest(recipe, peaks, memory)
            result["changes"] = [_change(proposal) for proposal in found]
            if not found:
                values, least = smallest(recipe, peaks)
                plans = plan_recipe(least, shape, on_cpu=on_cpu)
                result["least"] = _least(values, plans, peaks(least), gpus, least.distributed)
    return result


def _least(
    values: Values,
    stages: Sequence[StagePlan],
    peaks: Mapping[str, int],
    gpus: int,
    chosen: Distributed,
) -> dict[str, Any]:
    """Return what is left when everything that helps has been given up: its largest parts."""
    stage = max(stages, key=lambda stage: peaks[stage.stage])
    totals = _phases(stage, gpus, chosen)
    name = max(totals, key=totals.__getitem__)
    (phase,) = (phase for phase in stage.phases if phase.name == name)
    items = sorted((*stage.kept, *phase.items), key=lambda item: -item.bytes)
    return {
        "overrides": _overrides(values),
        "peak_bytes": peaks[stage.stage],
        "stage": stage.stage,
        "phase": name,
        "items": _items(items[:3]),
    }


def _peak(stage: StagePlan, gpus: int, chosen: Distributed) -> int:
    """Return a stage's peak on each of so many GPUs: as the recipe partitions, else at the best."""
    if chosen.together or gpus == 1:
        return max(_phases(stage, gpus, chosen).values())
    return min(_shares(stage, gpus, chosen).values())


def _phases(stage: StagePlan, gpus: int, chosen: Distributed) -> dict[str, int]:
    """Return what each phase takes on a GPU as the recipe runs it."""
    if not chosen.together or stage.stage in WITHOUT_ZERO:
        return {phase.name: stage.total(phase) for phase in stage.phases}
    if stage.stage == "ppo":
        return stage.ppo_together(gpus, chosen.zero, chosen.offload)
    return stage.trained_together(gpus, chosen.zero, chosen.offload)


def _way(chosen: Distributed) -> str | None:
    """Return how a recipe partitions its training, in the words of the table."""
    words = {"none": "", "optimizer": ", offload", "all": ", offload all"}[chosen.offload]
    return f"ZeRO {chosen.zero}{words}" if chosen.together else None


def _shares(stage: StagePlan, gpus: int, chosen: Distributed) -> dict[str, int]:
    """Return the peak per GPU for each way of partitioning, the simplest first.

    For a recipe that trains in a group: as that would run, with what one process does alone.
    """
    way = _way(chosen)
    if way is None:
        shares = {f"ZeRO {number}": share for number, share in enumerate(stage.per_gpu(gpus))}
        return shares | {"ZeRO 3, offload": stage.offloaded(gpus)}
    zeros: tuple[Zero, ...] = (0, 1, 2, 3)
    ways = [chosen.model_copy(update={"zero": zero, "offload": "none"}) for zero in zeros]
    ways += [chosen.model_copy(update={"zero": 3, "offload": "optimizer"}), chosen]
    return {_way(one) or "": max(_phases(stage, gpus, one).values()) for one in ways}


def _counts(gpus: int) -> list[int]:
    """Return the powers of two below a number of GPUs, and that number."""
    return [*(2**n for n in range(gpus.bit_length()) if 2**n < gpus), gpus]


def _by_gpus(
    stages: Sequence[StagePlan], gpus: int, memory: int | None, chosen: Distributed
) -> dict[str, Any]:
    """Return the largest stage's peak for each way of partitioning, and the simplest that fits."""
    by_stage = [_shares(stage, gpus, chosen) for stage in stages]
    largest = {way: max(shares[way] for shares in by_stage) for way in by_stage[0]}
    if memory is None:
        return {"bytes": largest}
    fitting = [way for way, share in largest.items() if share <= memory]
    return {"bytes": largest, "needs": fitting[0] if fitting else None}


def _full_training(shape: Shape, gpus: int) -> dict[str, int]:
    """Return DeepSpeed's own estimates of training all weights of the base in 16 bits."""
    largest = max(shape.vocab * shape.hidden, *(m.weights for m in shape.matrices))
    estimate = partial(deepspeed_bytes, shape.parameters, largest, gpus)
    return {
        "ZeRO 2": estimate(stage=2, offload="none"),
        "ZeRO 2, offload": estimate(stage=2, offload="optimizer"),
        "ZeRO 3": estimate(stage=3, offload="none"),
        "ZeRO 3, offload": estimate(stage=3, offload="optimizer"),
        "ZeRO 3, offload all": estimate(stage=3, offload="all"),
        "main memory": deepspeed_host_bytes(shape.parameters, gpus),
    }


def _stage(stage: StagePlan) -> dict[str, Any]:
    return {
        "peak_bytes": stage.peak,
        "largest_phase": stage.largest.name,
        "kept": _items(stage.kept),
        "phases": {
            phase.name: {"bytes": stage.total(phase), "items": _items(phase.items)}
            for phase in stage.phases
        },
    }


def _items(items: Sequence[Item]) -> list[dict[str, Any]]:
    return [{"name": i.name, "bytes": i.bytes, "arithmetic": i.how} for i in items]


def _time(works: Sequence[StageWork], shape: Shape, speed: Speed | None) -> dict[str, Any]:
    """Return tokens and operations of every stage, and with a device its time."""
    stages: dict[str, dict[str, Any]] = {}
    for work in works:
        parts = []
        for part in work.parts:
            facts: dict[str, Any] = {
                "name": part.name,
                "tokens": part.tokens,
                "flops": part.flops,
                "arithmetic": part.how,
            }
            if speed is not None:
                facts["seconds"] = part.seconds(speed, shape.layers)
            parts.append(facts)
        keys = ("tokens", "flops") + (("seconds",) if speed is not None else ())
        sums = {key: sum(part[key] for part in parts) for key in keys}
        stages[work.stage] = sums | {"per_rows": work.per_rows, "parts": parts}
    result: dict[str, Any] = {"device": speed.how if speed is not None else None, "stages": stages}
    if speed is not None:
        known = [stage for stage in stages.values() if stage["per_rows"] is None]
        result["seconds"] = sum(stage["seconds"] for stage in known)
    return result


def _change(proposal: Proposal) -> dict[str, Any]:
    return {
        "overrides": _overrides(proposal.values),
        "reasons": list(proposal.reasons),
        "peak_bytes": proposal.peak,
    }


def _overrides(values: Values) -> list[str]:
    """Return changes as they are written on the command line."""
    return [f"{key}={json.dumps(value)}".replace('"', "") for key, value in values.items()]
