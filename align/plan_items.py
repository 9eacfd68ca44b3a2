"""The parts of a memory plan: what takes memory, when it is there, and what ZeRO leaves per GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from align.plan_memory import FLOAT, zero_per_gpu
from align.recipe_distributed import Offload, Zero
from align.zero import BUCKET

# Of the activations' size, on a CPU: 0.8 to 1.0 for sft, reward and ppo on a Llama of 36 million
# parameters with LoRA in float32.
HEAP_HOLES = 0.9

Kind = Literal["weights", "gradients", "states", "rest"]


@dataclass(frozen=True, slots=True)
class Item:
    """Something that takes memory, and the arithmetic behind the number."""

    name: str
    bytes: int
    how: str
    kind: Kind = "rest"
    layers: tuple[int, ...] = ()  # bytes of each layer of a model in PPO, which are part of it
    trained: bool = False  # all of the model's weights


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a stage: what it needs beside what the stage keeps throughout."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What a stage keeps throughout, and its phases."""

    stage: str
    kept: tuple[Item, ...]
    phases: tuple[Phase, ...]

    def total(self, phase: Phase) -> int:
        """Return the bytes of everything that is there in a phase."""
        return sum(item.bytes for item in (*self.kept, *phase.items))

    @property
    def largest(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return self.total(self.largest)

    def sum(self, kind: Kind) -> int:
        """Return the bytes of one kind, over what is kept and the largest of the phases."""
        return _of_kind(self.kept, kind) + max(_of_kind(p.items, kind) for p in self.phases)

    def per_gpu(self, gpus: int) -> tuple[int, ...]:
        """Return the peak per GPU at ZeRO stages 0 to 3, micro-batches as they are."""
        shares = [self._shares(phase, gpus, offloaded=False) for phase in self.phases]
        return tuple(max(values) for values in zip(*shares, strict=True))

    def offloaded(self, gpus: int) -> int:
        """Return the peak per GPU at ZeRO 3 with the optimiser's states in main memory."""
        return max(self._shares(phase, gpus, offloaded=True)[3] for phase in self.phases)

    def trained_together(self, gpus: int, zero: Zero, offload: Offload) -> dict[str, int]:
        """Return what each phase takes per GPU where so many train by this way of ZeRO.

        What comes after training the first process does alone, with whole weights beside the share
        of them that ZeRO 3 has left it.
        """
        offloaded = offload != "none"
        shared = self._without("weights") if offload == "all" else self
        peaks = {p.name: shared._shares(p, gpus, offloaded=offloaded)[zero] for p in self.phases}
        if zero < 3:
            return peaks
        left = _of_kind(shared.kept, "weights")
        if not offloaded:
            left += _of_kind(shared.kept, "states") + self.sum("gradients")
        alone, training = self._without("states"), self.phases[0].name
        after = {p.name: alone.total(p) + ceil(left / gpus) for p in self.phases[1:]}
        return {training: peaks[training]} | after

    def ppo_together(self, gpus: int, zero: Zero, offload: Offload) -> dict[str, int]:
        """Return what each phase of PPO takes per GPU where so many train by this way of ZeRO.

        Up to ZeRO 2 each holds the weights and the gradients of what it trains whole. ZeRO 3 shares
        all layers out: there is a part of them throughout, and beside it they are whole, but where
        there are gradients only one at a time. So are their gradients, of which one layer's are on
        their way as well; those of the rest that is trained are whole, beside a part.
        """
        offloaded = offload != "none"
        if zero < 3:
            states: Zero = 1 if zero else 0
            bucket = FLOAT * BUCKET if zero == 2 else 0
            return {
                phase.name: self._shares(phase, gpus, offloaded=offloaded)[states] + bucket
                for phase in self.phases
            }
        layers = [layer for item in self.kept for layer in item.layers]
        trained = [layer for item in self.kept if item.trained for layer in item.layers]
        gradients, kept = self.sum("gradients"), self._without("states")
        outside = gradients - sum(trained)
        parts = 0 if offload == "all" else ceil((sum(layers) + outside) / gpus)
        parts += 0 if offloaded else ceil(_of_kind(self.kept, "states") / gpus)
        found = {}
        for phase in self.phases:
            found[phase.name] = kept.total(phase) + parts
            if _of_kind(phase.items, "gradients"):
                found[phase.name] += max(layers) - sum(layers)
                found[phase.name] += 2 * max(trained, default=0) - sum(trained)
                found[phase.name] += 0 if offloaded else ceil(gradients / gpus)
        return found

    def _shares(self, phase: Phase, gpus: int, *, offloaded: bool) -> tuple[int, ...]:
        """Return what a phase takes per GPU at ZeRO stages 0 to 3.

        ZeRO has a copy of the trained weights, as large as their gradients, which goes where the
        optimiser's states go; and from stage 2 on a bucket for gradients. Stage 2 has its part of
        the gradients twice: that of the passes before, and that of this one, or the flat copy that
        the optimiser gets; not so where the states, and with them what has added up, are offloaded.

        Args:
            offloaded: the optimiser's states are in main memory.
        """
        items = (*self.kept, *phase.items)
        weights, gradients = _of_kind(items, "weights"), _of_kind(items, "gradients")
        states, copies = _of_kind(items, "states"), self.sum("gradients")
        twice = 0 if offloaded else ceil(gradients / gpus)
        if offloaded:
            states = copies = 0
        bucket = FLOAT * BUCKET if gradients else 0
        copied = ceil(copies / gpus)
        more = (0, copied, copied + bucket + twice, copied + bucket)
        rest, shares = _of_kind(items, "rest"), zero_per_gpu(weights, gradients, states, gpus)
        return tuple(rest + sum(parts) for parts in zip(shares, more, strict=True))

    def _without(self, *kinds: Kind) -> "StagePlan":
        kept = tuple(replace(i, bytes=0) if i.kind in kinds else i for i in self.kept)
        return replace(self, kept=kept)


def with_heap_holes(plan: StagePlan) -> StagePlan:
    """Return the plan with what glibc's heap loses beside activations on a CPU.

    Large tensors that are kept lie between freed ones, whose places small kept ones break up. (The
    memory allocator of a GPU has a pool of its own for small ones.)
    """
    phases = []
    for phase in plan.phases:
        kept = sum(item.bytes for item in phase.items if item.name == "activations")
        how = f"{kept:,} x {HEAP_HOLES} B; measured"
        holes = Item("holes in the heap", round(kept * HEAP_HOLES), how)
        phases.append(replace(phase, items=(*phase.items, holes)) if kept else phase)
    return replace(plan, phases=tuple(phases))


def _of_kind(items: Sequence[Item], kind: Kind) -> int:
    return sum(item.bytes for item in items if item.kind == kind)
