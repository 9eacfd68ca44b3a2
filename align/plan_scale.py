"""Scaling on paper: what each GPU sends, moves and computes in a step, and what limits it.

With G bytes of gradients (float32, of what is trained), W bytes of weights as stored, N GPUs and p
passes of each per optimiser step, each GPU sends, and receives as much,

    ZeRO 0, 1    (N - 1) / N x 2 G            gradients reduced and scattered, results gathered
    ZeRO 2       (N - 1) / N x (p + 1) G      gradients are scattered after every pass
    ZeRO 3       (N - 1) / N x p (2 W + G)    weights are gathered forward and backward

where all weights are trained in one pass 2, 2 and 3 times their size (Rajbhandari et al. 2020,
section 7; a ring's factor (N - 1) / N is 1 there). PPO sends its gradients once per update, in
which each has added up those of its passes. With ZeRO 3 those of T trained bytes in layers leave
with every pass, and layers are gathered as ``gathered_bytes`` counts:

    ZeRO 3, PPO  (N - 1) / N x (p T + 2 (G - T))    and the layers

To and from main memory each moves

    optimiser    1 / N x 2 p G                gradients out, added up there, results back
    all          1 / N x ((2 p - 1) G + 2 p W)    the weights in for each gathering, none back

for one pass and the optimiser twice the gradients (Ren et al. 2021, ZeRO-Offload, section 4). What
libraries send beyond that, latency, and the CPU's arithmetic are left out; so is that the three
times overlap: the longest is what limits a step, and it takes no less.
"""

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

from align.plan import plan_recipe
from align.plan_items import StagePlan
from align.plan_model import Shape
from align.plan_setup import rows_per_pass
from align.plan_time import Speed, step_work
from align.published import GPUS_PER_MACHINE, Card
from align.recipe import Recipe
from align.recipe_distributed import Distributed, Offload, Zero, rows_and_passes
from align.recipe_ppo import Ppo
from align.stages import STAGES, planned_stages
from align.zero import WITHOUT_ZERO

_COUNTS = (1, 8, 64, 512)

Phases = Callable[[StagePlan, int, Distributed], Mapping[str, int]]


def sent_bytes(zero: Zero, weights: int, gradients: int, passes: int, gpus: int) -> int:
    """Return the bytes that each GPU sends to others per optimiser step.

    Args:
        weights: bytes of all, trained or not, as stored; with the scales of quantised ones, which
            stay whole, a little too much.
        gradients: bytes of those of what is trained.
        passes: of each GPU, forward and backward, per step.
    """
    if zero == 3:
        volume = passes * (2 * weights + gradients)
    else:
        volume = ((passes if zero == 2 else 1) + 1) * gradients
    return ceil(volume * (gpus - 1) / gpus)


def moved_bytes(offload: Offload, weights: int, gradients: int, passes: int, gpus: int) -> int:
    """Return the bytes that each GPU moves out to main memory and in from it per optimiser step."""
    volume = {
        "none": 0,
        "optimizer": 2 * passes * gradients,
        "all": (2 * passes - 1) * gradients + 2 * passes * weights,
    }[offload]
    return ceil(volume / gpus)


def sending_seconds(sent: int, card: Card, gpus: int) -> float:
    """Return how long sending takes at the published rates.

    A ring leaves a machine once for each of its GPUs, whose network adapters share the load.
    """
    inside = sent / card.link
    if gpus <= GPUS_PER_MACHINE:
        return inside
    return max(inside, sent / (GPUS_PER_MACHINE * card.network))


def scaling(
    recipe: Recipe,
    shape: Shape,
    gpus: int,
    card: Card,
    speed: Speed,
    memory: int,
    phases: Phases,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Return for every stage that trains, and 1, 8, 64, 512 and ``gpus`` GPUs, a step's figures.

    Args:
        memory: bytes on each GPU.
        phases: what each phase of a stage takes on each of so many GPUs, in bytes.
    """
    result: dict[str, dict[int, dict[str, Any]]] = {}
    stages = [stage for stage in planned_stages(recipe) if stage not in WITHOUT_ZERO]
    for count in sorted({n for n in _COUNTS if n < gpus} | {gpus}):
        chosen = recipe.distributed.model_copy(update={"processes": count})
        changed = recipe.model_copy(update={"distributed": chosen})
        refused = {stage: _refused(changed, stage) for stage in stages}
        possible = not all(refused.values())
        plans = {plan.stage: plan for plan in plan_recipe(changed, shape)} if possible else {}
        for stage, reason in refused.items():
            facts: dict[str, Any] = {"refused": reason}
            if reason is None:
                took = phases(plans[stage], count, chosen)
                works = step_work(changed, shape, stage, count)
                facts = _step(changed, plans[stage], shape, card) | {
                    "step_bytes": took.get("training", max(took.values())),
                    "later_bytes": max(took.values()),
                    "computing": sum(work.seconds(speed, shape.layers) for work in works),
                }
                facts["limit"] = limit(facts, memory)
            result.setdefault(stage, {})[count] = facts
    return result


def limit(facts: Mapping[str, Any], memory: int) -> str:
    """Return what limits a step: memory if it does not fit, else what takes the longest."""
    if facts["step_bytes"] > memory:
        return "memory"
    times = ("computing", "sending", "moving")
    return max(times, key=lambda name: float(facts[name]))


def _refused(recipe: Recipe, stage: str) -> str | None:
    """Return why so many processes would not train a stage, in the words of the recipe's check."""
    for key, reason in recipe.distributed.problems(recipe):
        if key.partition(".")[0] not in STAGES or key.startswith(f"{stage}."):
            return f"{key}: {reason}"
    return None


def _step(recipe: Recipe, plan: StagePlan, shape: Shape, card: Card) -> dict[str, Any]:
    """Return what each GPU sends and moves in a step, in bytes and seconds."""
    section, chosen = getattr(recipe, plan.stage), recipe.distributed
    zero, gpus = chosen.zero, chosen.processes
    sizes = plan.sum("weights"), plan.sum("gradients")
    if isinstance(section, Ppo):
        updates, passes = _passes(recipe, section)
        # It adds the gradients of its passes up by itself.
        sent = updates * sent_bytes(min(zero, 2), *sizes, 1, gpus)
        inside: Offload = "none" if chosen.offload == "none" else "optimizer"
        moved = updates * moved_bytes(inside, *sizes, 1, gpus)
        if zero == 3:
            layers = gathered_bytes(recipe, section, plan, shape)
            trained = sum(sum(item.layers) for item in plan.kept if item.trained)
            sent += ceil((layers + updates * (passes - 2) * trained) * (gpus - 1) / gpus)
            # Without a place on the GPU parts need not come back: they are gathered from there.
            moved += {
                "none": 0,
                "optimizer": ceil(updates * (passes - 1) * trained / gpus),
                "all": ceil((layers + updates * (passes - 2) * trained) / gpus),
            }[chosen.offload]
        passes *= updates
    else:
        _, passes = rows_and_passes(section, chosen)
        sent = sent_bytes(zero, *sizes, passes, gpus)
        moved = moved_bytes(chosen.offload, *sizes, passes, gpus)
    return {
        "passes": passes,
        "sent_bytes": sent,
        "moved_bytes": moved,
        "sending": sending_seconds(sent, card, gpus),
        "moving": moved / card.host,
    }


def gathered_bytes(recipe: Recipe, section: Ppo, plan: StagePlan, shape: Shape) -> int:
    """Return the bytes of layers that a step of PPO makes whole where ZeRO 3 shares them out.

    All of them once for the rollout; those with adapters and those between, or all of a model of
    its own, forward and backward in every pass of policy and critic. The layers below the lowest
    adapter are computed once.
    """
    updates, passes = _passes(recipe, section)
    own = {item.name: sum(item.layers) for item in plan.kept if item.trained}
    base = sum(sum(item.layers) for item in plan.kept if not item.trained)
    adapted = ceil(base * shape.adapted_layers(recipe.adapter) / shape.layers)
    roles = ("policy", "value") if section.value.trunk == "own" else ("policy",)
    each = sum(own.get(role, adapted) for role in roles)
    return base + sum(own.values()) + updates * passes * 2 * each


def _passes(recipe: Recipe, section: Ppo) -> tuple[int, int]:
    """Return the updates of a step of PPO, and how often each process goes through a model in one.

    By the longest texts that there can be.
    """
    longest = recipe.data.max_prompt_tokens + section.max_new_tokens
    rows = section.minibatch_size // recipe.distributed.processes
    passes = ceil(rows / min(rows_per_pass(section, longest), rows))
    return section.epochs * section.batch_size // section.minibatch_size, passes
