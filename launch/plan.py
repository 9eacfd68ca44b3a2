"""``align plan``: how much memory a recipe needs, printed with its arithmetic."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.plan import plan_recipe
from align.plan_changes import Proposal, cheapest
from align.plan_items import Item, StagePlan
from align.plan_model import Shape, read_shape
from align.recipe import Recipe
from align.stages import stage_directory

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


def base_shape(recipe: Recipe) -> Shape | None:
    """Read the shape of the recipe's base; None where its pretrain stage makes it.

    Raises:
        InputError: there is no ``config.json``, here or on the hub, or its model is not known.
    """
    if recipe.pretrain is not None and not recipe.run.parents.pretrain:
        return None
    if recipe.base.id == "pretrain":
        file = stage_directory(recipe, "pretrain") / "model" / "config.json"
    elif Path(recipe.base.id).is_dir():
        file = Path(recipe.base.id) / "config.json"
    else:
        file = _from_hub(recipe.base.id, recipe.base.revision)
    try:
        return read_shape(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{file.parent}/{error}") from None
        raise InputError(f"{file}: cannot be read as a model's configuration: {error}") from None


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:  # what the hub's client raises are these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"base.id={name}: no such folder here, and the Hugging Face hub does not give its"
            f" config.json: {reason}; a folder with that one file is enough for a plan:"
            " base.id=FOLDER"
        ) from None


def make_plan(recipe: Recipe, memory: int | None, gpus: int) -> dict[str, Any]:
    """Return the plan as JSON: stages, ZeRO table, whether it fits, and what would make it fit.

    Raises:
        InputError: the recipe trains nothing, or its base is not known.
    """
    planner, peak = partial(plan_recipe, base=base_shape(recipe)), partial(_peak, gpus=gpus)
    stages = planner(recipe)
    if not stages:
        raise InputError(f"{recipe.name}: has no stage that trains; nothing to plan")
    result: dict[str, Any] = {
        "name": recipe.name,
        "peak_bytes": max(map(peak, stages)),
        "largest_stage": max(stages, key=peak).stage,
        "stages": {stage.stage: _stage(stage) for stage in stages},
    }
    if gpus > 1:
        result |= {"gpus": gpus, "per_gpu": {s.stage: _shares(s, gpus) for s in stages}}
    if memory is not None:
        result |= {"memory_bytes": memory, "fits": result["peak_bytes"] <= memory}
        if not result["fits"]:
            found = cheapest(recipe, planner, memory, peak)
            result["changes"] = [_change(proposal) for proposal in found]
    return result


def _peak(stage: StagePlan, gpus: int) -> int:
    """Return a stage's peak on each of so many GPUs, partitioned as far as it goes."""
    return stage.peak if gpus == 1 else min(_shares(stage, gpus).values())


def _shares(stage: StagePlan, gpus: int) -> dict[str, int]:
    """Return the peak per GPU for each way of partitioning."""
    shares = {f"ZeRO {number}": share for number, share in enumerate(stage.per_gpu(gpus))}
    return shares | {"ZeRO 3, offload": stage.offloaded(gpus)}


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


def _change(proposal: Proposal) -> dict[str, Any]:
    overrides = [f"{key}={json.dumps(value)}" for key, value in proposal.values.items()]
    return {
        "overrides": [text.replace('"', "") for text in overrides],
        "reasons": list(proposal.reasons),
        "peak_bytes": proposal.peak,
    }


def print_plan(plan: dict[str, Any]) -> None:
    """Print a plan for a person."""
    for name, stage in plan["stages"].items():
        print(f"{name}: {_size(stage['peak_bytes'])} in {stage['largest_phase']}")
        print("  throughout")
        _print_items(stage["kept"])
        for title, phase in stage["phases"].items():
            print(f"  {title}: {_size(phase['bytes'])} with all of the above")
            _print_items(phase["items"])
        print()
    if "per_gpu" in plan:
        _print_shares(plan)
    where = f"on each of {plan['gpus']} GPUs" if "gpus" in plan else "on one device"
    print(f"largest: {plan['largest_stage']}, {_size(plan['peak_bytes'])} {where}")
    if "fits" in plan:
        _print_verdict(plan)


def _print_items(items: list[dict[str, Any]]) -> None:
    for item in items:
        print(f"    {item['name']:32} {_size(item['bytes']):>12}   {item['arithmetic']}")


def _print_shares(plan: dict[str, Any]) -> None:
    memory = plan.get("memory_bytes")
    columns = list(next(iter(plan["per_gpu"].values())))
    print(f"per GPU, of {plan['gpus']}, micro-batches as they are" + (" (* fits)" * bool(memory)))
    print(" " * 10 + "".join(f"{column:>17}" for column in columns))
    for stage, shares in plan["per_gpu"].items():
        cells = [
            _size(share) + (" *" if memory is not None and share <= memory else "  ")
            for share in shares.values()
        ]
        print(f"  {stage:8}" + "".join(f"{cell:>17}" for cell in cells).rstrip())
    print("  offload: the optimiser's states in main memory\n")


def _print_verdict(plan: dict[str, Any]) -> None:
    verdict = "fits into" if plan["fits"] else "does not fit into"
    print(f"{verdict} {_size(plan['memory_bytes'])}")
    if plan["fits"]:
        return
    none = "none of the changes that plan knows makes it fit: take a smaller base"
    print("the cheapest changes that make it fit:" if plan["changes"] else none)
    for change in plan["changes"]:
        print(f"  {' '.join(change['overrides'])}   ({_size(change['peak_bytes'])})")
        for reason in change["reasons"]:
            print(f"    {reason}")


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size / 10:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
