"""What to change in a recipe so that its plan fits: the cheapest changes, one or a few together.

A change is a value of a recipe key, as on the command line. What the recipe itself refuses is never
proposed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pydantic import ValidationError

from align.recipe import Base, Recipe
from align.recipe_distributed import Distributed
from align.recipe_ppo import Ppo

Values = dict[str, Any]  # recipe key -> value
Peaks = Callable[[Recipe], Mapping[str, int]]  # of every stage, in bytes
_TOGETHER = 3  # changes proposed at once, at most, beside smaller micro-batches


@dataclass(frozen=True, slots=True)
class Change:
    """Something to give up. ``cost``: larger the more it takes from speed, then from quality."""

    name: str
    cost: int
    values: Values


@dataclass(frozen=True, slots=True)
class Proposal:
    """Changes that make the recipe fit together, what they cost, and the peak that is left."""

    values: Values
    reasons: tuple[str, ...]
    peak: int


def cheapest(recipe: Recipe, peaks: Peaks, memory: int, count: int = 3) -> list[Proposal]:
    """Return the cheapest proposals with which every stage's peak is at most ``memory`` bytes.

    Never one that holds another: all its changes are needed.
    """
    changes = _changes(recipe)
    sets = [s for n in range(_TOGETHER + 1) for s in combinations(changes, n)]
    found: list[Proposal] = []
    for chosen in sorted(sets, key=lambda s: sum(change.cost for change in s)):
        values = {key: value for change in chosen for key, value in change.values.items()}
        if len(values) < sum(len(change.values) for change in chosen):
            continue  # two values for one key
        proposal = _proposal(recipe, peaks, memory, chosen)
        if proposal is not None and not any(
            one.values.items() <= proposal.values.items() for one in found
        ):
            found.append(proposal)
        if len(found) == count:
            break
    return found


def smallest(recipe: Recipe, peaks: Peaks) -> tuple[Values, Recipe]:
    """Return all changes that help, one after the other, and the recipe with them."""
    steps = [change.values for change in sorted(_changes(recipe), key=lambda c: c.cost)]
    steps += [sizes[-1] for s in peaks(recipe) if (sizes := list(_micro_batches(recipe, s)))]
    values: Values = {}
    best, now = recipe, sorted(peaks(recipe).values(), reverse=True)
    found = True
    while found:
        found = False
        for step in steps:
            changed = with_values(recipe, values | step)
            after = sorted(peaks(changed).values(), reverse=True) if changed is not None else now
            if changed is not None and after < now:
                values, best, now, found = values | step, changed, after, True
    return values, best


def _proposal(
    recipe: Recipe, peaks: Peaks, memory: int, chosen: Sequence[Change]
) -> Proposal | None:
    """Return changes if they suffice, if need be with smaller micro-batches."""
    values = {key: value for change in chosen for key, value in change.values.items()}
    reasons = [change.name for change in chosen]
    changed = with_values(recipe, values)
    if changed is None:
        return None
    found = peaks(changed)
    if max(found.values()) > memory:
        smaller = _smaller_micro_batches(changed, peaks, memory)
        changed = with_values(changed, smaller)
        if not smaller or changed is None:
            return None
        reasons = [*reasons, "smaller micro-batches: a little slower"]
        values |= smaller
        found = peaks(changed)
    return Proposal(values, tuple(reasons), max(found.values()))


def with_values(recipe: Recipe, values: Values) -> Recipe | None:
    """Return the recipe with other values, or None where it refuses them."""
    tree = recipe.model_dump()
    for key, value in values.items():
        *path, last = key.split(".")
        here = tree
        for part in path:
            here = here[part]
        here[last] = value
    try:
        return Recipe.model_validate(tree)
    except ValidationError:
        return None


def _smaller_micro_batches(recipe: Recipe, peaks: Peaks, memory: int) -> Values:
    """Return the largest micro-batches with which the stages fit; none if one never does."""
    values: Values = {}
    for stage, peak in peaks(recipe).items():
        if peak <= memory:
            continue

        def fits(tried: Values, stage: str = stage) -> bool:
            changed = with_values(recipe, tried)
            return changed is not None and peaks(changed)[stage] <= memory

        sizes = list(_micro_batches(recipe, stage))
        if not sizes or not fits(sizes[-1]):
            return {}
        values |= next(tried for tried in sizes if fits(tried))
    return values


def _micro_batches(recipe: Recipe, stage: str) -> Iterator[Values]:
    """Yield a stage's smaller micro-batches, the largest first."""
    section = getattr(recipe, stage)
    if stage == "evaluate":
        yield from ({"evaluate.batch_size": rows} for rows in range(section.batch_size - 1, 0, -1))
        return
    whole = section.minibatch_size if stage == "ppo" else section.batch_size
    now = section.micro_batch_size or whole
    budget = getattr(section, "max_tokens_per_microbatch", None)
    if budget is not None:
        longest = recipe.data.max_prompt_tokens + section.max_new_tokens
        for rows in range(min(budget // longest, whole) - 1, 0, -1):
            yield {f"{stage}.max_tokens_per_microbatch": rows * longest}
        return
    for rows in range(now - 1, 0, -1):
        if whole % rows == 0:
            yield {f"{stage}.micro_batch_size": rows}


def _changes(recipe: Recipe) -> list[Change]:
    """Return what can be given up, beside the size of micro-batches."""
    found = _ppo_changes(recipe.ppo) if recipe.ppo is not None else []
    if recipe.distributed.together:
        found += _group_changes(recipe.distributed)
    if recipe.sft is not None:
        rows = min(recipe.sft.batch_size, recipe.sft.samples)
        if rows > 1:
            name = "fewer answers sampled after SFT, to look at"
            found.append(Change(name, 1, {"sft.samples": max(1, rows // 8)}))
    trained = [s for s in ("sft", "reward", "ppo") if getattr(recipe, s) is not None]
    if all(getattr(recipe, s).optimizer == "adamw" for s in trained):
        values = {f"{stage}.optimizer": "adamw_8bit" for stage in trained}
        found.append(Change("Adam's moments in 8 bits", 4, values))
    if recipe.adapter.method == "full":
        name = "adapters in place of all weights"
        found.append(Change(name, 10, {"adapter.method": "lora"}))
    elif recipe.adapter.layers == "all":
        values = {"adapter.layers": "top-half"}
        found.append(Change("adapters in the upper half only", 12, values))
    if recipe.data.max_prompt_tokens > 1:
        name = "prompts half as long: more of them lose their beginning"
        half = recipe.data.max_prompt_tokens // 2
        found.append(Change(name, 18, {"data.max_prompt_tokens": half}))
    return found + _base_changes(recipe.base)


def _base_changes(base: Base) -> list[Change]:
    found = []
    if not base.gradient_checkpointing:
        key = "base.gradient_checkpointing"
        found.append(Change("gradient checkpointing: a third slower", 3, {key: True}))
    if base.id != "pretrain" and base.dtype == "float32":
        found.append(Change("base in bfloat16: coarser numbers", 5, {"base.dtype": "bfloat16"}))
    if base.id != "pretrain" and base.quantization == "none":
        found.append(Change("base in 4 bits: slower, coarser", 9, {"base.quantization": "nf4"}))
    return found


def _group_changes(chosen: Distributed) -> list[Change]:
    """Return other ways of sharing out, for a recipe that trains in a group already."""
    found = []
    zero, offload = "distributed.zero", "distributed.offload"
    if chosen.zero < 2:
        found.append(Change("ZeRO 2: gradients and states shared out", 1, {zero: 2}))
    if chosen.zero < 3:
        found.append(Change("ZeRO 3: weights shared out, too: slower", 5, {zero: 3}))
    if chosen.zero and chosen.offload == "none":
        name = "the optimiser's states in main memory: slower steps"
        found.append(Change(name, 6, {offload: "optimizer"}))
    if chosen.offload != "all":
        name = "ZeRO 3 with weights in main memory: far slower"
        found.append(Change(name, 8, {zero: 3, offload: "all"}))
    return found


def _ppo_changes(section: Ppo) -> list[Change]:
    rows = section.rollout.batch_size or section.batch_size
    found = [
        Change(
            f"prompts sampled {rows // part} at a time: slower rollouts",
            part // 2,
            {"ppo.rollout.batch_size": rows // part},
        )
        for part in (2, 8)
        if rows // part
    ]
    if section.value.trunk == "own":
        values = {"ppo.value.trunk": "policy"}
        found.append(Change("critic on the policy's states: a weaker critic", 8, values))
    if section.own_models:
        keys = {"policy": "ppo.layout", "value": "ppo.value.layout"}
        values = {keys[role]: "shared" for role in section.own_models}
        found.append(Change("adapters in place of all weights", 10, values))
    shorter = {"ppo.max_new_tokens": max(1, section.max_new_tokens // 2)}
    return [*found, Change("responses half as long", 20, shorter)]
