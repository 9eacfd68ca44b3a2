"""How much memory every stage of a recipe needs, from the configuration alone, with the arithmetic.

Nothing is loaded and nothing is measured: the sizes come from ``config.json``, the rest from what
the stages do. Every prompt and response is taken to be as long as the recipe allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from align.plan_memory import (
    FLOAT,
    Compute,
    activation_bytes,
    adam_bytes,
    cache_bytes,
    logprob_chunk_bytes,
    sampling_bytes,
    working_per_token,
    zero_per_gpu,
)
from align.plan_model import DTYPE_BYTES, Quantization, Shape, linear_bytes, small_llama
from align.recipe import Recipe, StageData
from align.recipe_ppo import Ppo
from align.recipe_types import Optimisation
from align.stages import planned_stages

# What Python, torch and its allocator take beside the tensors: 0.4 to 0.85 GB in published
# measurements of 7B to 70B models on one GPU, 0.6 GB for a process on a CPU.
OVERHEAD = 600 * 2**20
_TRL_TOKENS, _TRL_VOCAB = 4096, 32768  # TRL takes the logits of SFT in tiles of this size
_PROBE_ROWS = 4  # rows on which the SFT stage compares the saved adapter with the live one

Kind = Literal["weights", "gradients", "states", "rest"]


@dataclass(frozen=True, slots=True)
class Item:
    """Something that takes memory, and the arithmetic behind the number."""

    name: str
    bytes: int
    how: str
    kind: Kind = "rest"


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
        by_phase = []
        for phase in self.phases:
            items = (*self.kept, *phase.items)
            shares = zero_per_gpu(
                _of_kind(items, "weights"),
                _of_kind(items, "gradients"),
                _of_kind(items, "states"),
                gpus,
            )
            by_phase.append([share + _of_kind(items, "rest") for share in shares])
        return tuple(max(values) for values in zip(*by_phase, strict=True))

    def offloaded(self, gpus: int) -> int:
        """Return the peak per GPU at ZeRO 3 with the optimiser's states in main memory."""
        without = tuple(replace(i, bytes=0) if i.kind == "states" else i for i in self.kept)
        return replace(self, kept=without).per_gpu(gpus)[3]


def _of_kind(items: Sequence[Item], kind: Kind) -> int:
    return sum(item.bytes for item in items if item.kind == kind)


def plan_recipe(recipe: Recipe, base: Shape | None) -> tuple[StagePlan, ...]:
    """Return the plan of every stage of a recipe that trains.

    Args:
        base: None: the recipe's pretrain stage makes it.

    Raises:
        InputError: an adapter's target is not a layer of the base.
    """
    if base is None:
        assert recipe.pretrain is not None
        # A tokenizer from elsewhere says its size only once it is loaded.
        base = small_llama(recipe.pretrain.model, recipe.tokenizer.vocab_size or 0)
    setup = _Setup(recipe, base)
    makers = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "ppo": _ppo}
    return tuple(makers[s](setup) for s in planned_stages(recipe) if s in makers)


@dataclass(frozen=True)
class _Setup:
    """A recipe and the base's shape, and what both say together."""

    recipe: Recipe
    shape: Shape

    @property
    def width(self) -> int:
        """Bytes of a number in the base and in its activations."""
        return DTYPE_BYTES[self.recipe.base.dtype]

    @property
    def quantization(self) -> Quantization:
        return self.recipe.base.quantization

    @property
    def checkpointing(self) -> bool:
        return bool(getattr(self.recipe.base, "gradient_checkpointing", False))

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation in the stages before PPO."""
        return self.recipe.data.max_prompt_tokens + self.recipe.data.max_response_tokens

    @property
    def adapted(self) -> int:
        """Blocks that carry adapters: those through which gradients flow."""
        return self.shape.adapted_layers(self.recipe.adapter)

    def compute(self, *, joined: bool = False, expanded: bool = False) -> Compute:
        """Return how adapters on the base are trained."""
        return Compute(self.width, self.recipe.adapter, expanded=expanded, joined=joined)

    def base(self, *, head: bool = True) -> list[Item]:
        """Return the frozen base, with its output embeddings or without."""
        shape, width, kind = self.shape, self.width, self.quantization
        rest = shape.rest + (shape.head if head else 0)
        if kind == "none":
            count = shape.linear + rest
            return [Item("base", count * width, f"{count:,} x {width} B", "weights")]
        double = bool(getattr(self.recipe.base, "double_quantization", False))
        stored, constants = linear_bytes(shape, kind, double)
        bits = "8" if kind == "int8" else "4"
        how = f"scales of {shape.layers * len(shape.matrices):,} matrices"
        return [
            Item(f"base in {kind}", stored, f"{shape.linear:,} x {bits} bits", "weights"),
            Item(
                "quantisation constants",
                constants,
                f"{how}{', doubly quantised' if double else ''}",
                "weights",
            ),
            Item("embeddings and norms", rest * width, f"{rest:,} x {width} B", "weights"),
        ]

    def dequantized(self) -> list[Item]:
        """Return the one matrix that is there as it is computed with, while it is."""
        if self.quantization == "none":
            return []
        largest = max(m.weights for m in self.shape.matrices)
        return [Item("a dequantised matrix", largest * self.width, f"{largest:,} x {self.width} B")]

    def adapter(self, role: str) -> Item:
        """Return a role's adapter."""
        count = sum(self.shape.lora_tensors(self.recipe.adapter))
        how = f"{count:,} x {FLOAT} B (r={self.recipe.adapter.r})"
        return Item(f"adapter: {role}", count * FLOAT, how, "weights")

    def head(self, role: str, copies: int = 1) -> Item:
        """Return a role's score head, whose shift and scale count as two numbers."""
        count = copies * self.shape.hidden + 2
        return Item(f"head: {role}", count * FLOAT, f"{count:,} x {FLOAT} B", "weights")

    def activations(self, compute: Compute, tokens: int, layers: int) -> Item:
        """Return a pass with gradients; both ways of doing it are in its arithmetic."""
        both = [
            activation_bytes(self.shape, compute, tokens, layers, checkpointing=on)
            for on in (False, True)
        ]
        how = f"{tokens:,} tokens, {layers} blocks"
        other = f"{'without' if self.checkpointing else 'with'} checkpointing"
        how = f"{how}; {other} {both[not self.checkpointing] / 2**30:.2f} GiB"
        return Item("activations", both[self.checkpointing], how)

    def forward(self, tokens: int) -> Item:
        """Return a pass without gradients."""
        each = working_per_token(self.shape, self.compute())
        return Item("one block at work", tokens * each, f"{tokens:,} tokens x {each:,} B")

    def generation(self, rows: int, prompt: int, response: int) -> list[Item]:
        """Return what sampling needs: the cache, the prompts' pass, the choice of tokens."""
        shape, width = self.shape, self.width
        cache = cache_bytes(shape, rows, prompt + response, width)
        how = (
            f"2 x {shape.layers} blocks x {rows} rows x {prompt + response} tokens x"
            f" {shape.kv_heads * shape.head_dim} x {width} B"
        )
        choice = sampling_bytes(rows, shape.vocab, width)
        return [
            Item("key-value cache", cache, how),
            self.forward(rows * prompt),
            Item("choice of tokens", choice, f"{rows} rows x {shape.vocab:,} logits"),
            *self.dequantized(),
        ]


def _training(tensors: Sequence[int], section: Optimisation) -> tuple[Item, Item]:
    """Return gradients and optimiser states of trained tensors of so many numbers each."""
    optimizer, count = str(getattr(section, "optimizer", "adamw")), sum(tensors)
    gradients = Item("gradients", FLOAT * count, f"{count:,} x {FLOAT} B", "gradients")
    how = f"two moments of {count:,} numbers"
    states = Item(f"optimiser ({optimizer})", adam_bytes(tensors, optimizer), how, "states")
    return gradients, states


def _overhead() -> Item:
    return Item("libraries, allocator", OVERHEAD, "a flat allowance")


def _mask(rows: int, tokens: int) -> Item:
    return Item("attention mask", rows * tokens**2, f"{rows} rows x {tokens}^2 x 1 B")


def _logits(name: str, tokens: int, vocab: int, width: int) -> Item:
    return Item(name, tokens * vocab * width, f"{tokens:,} tokens x {vocab:,} x {width} B")


def _pretrain(setup: _Setup) -> StagePlan:
    """All weights in float32, on blocks of one length without padding."""
    section, shape = setup.recipe.pretrain, setup.shape
    assert section is not None
    tokens = (section.micro_batch_size or section.batch_size) * section.sequence_length
    full, count = Compute(FLOAT, None), shape.parameters
    gradients, states = _training([count], section)
    kept = (
        _overhead(),
        Item("model", count * FLOAT, f"{count:,} x {FLOAT} B", "weights"),
        states,
    )
    # Checkpointing is a matter of the stages with adapters.
    size = activation_bytes(shape, full, tokens, shape.layers, checkpointing=False)
    training = (
        gradients,
        Item("activations", size, f"{tokens:,} tokens, {shape.layers} blocks"),
        _logits("logits, log-softmax, slope", tokens, shape.vocab, 3 * FLOAT),
    )
    return StagePlan("pretrain", kept, (Phase("training", training),))


def _sft(setup: _Setup) -> StagePlan:
    """One adapter; padded rows, or packs without padding."""
    section, shape, recipe = setup.recipe.sft, setup.shape, setup.recipe
    assert section is not None
    width, longest = setup.width, setup.longest
    rows = section.micro_batch_size or section.batch_size
    tokens = rows * longest
    adapter = setup.adapter("policy")
    gradients, states = _training(shape.lora_tensors(recipe.adapter), section)
    tile = min(tokens, _TRL_TOKENS) * min(shape.vocab, _TRL_VOCAB)
    tile_width = width + 2 * FLOAT
    training = (
        gradients,
        setup.activations(setup.compute(expanded=True), tokens, setup.adapted),
        _mask(*((1, tokens) if section.packing else (rows, longest))),
        Item("logits, a tile", tile * tile_width, f"{tile:,} x {tile_width} B"),
        *setup.dequantized(),
    )
    phases = [Phase("training", training)]
    if recipe.data.sft is not None and recipe.data.sft.heldout:
        copies = 2 * width + (0 if width == FLOAT else FLOAT) + FLOAT
        name = "logits, float32, log-softmax"
        items = (setup.forward(tokens), _logits(name, tokens, shape.vocab, copies))
        phases.append(Phase("held-out loss", items + tuple(setup.dequantized())))
    if section.samples:
        rows = min(section.batch_size, section.samples)
        limits = recipe.data.max_prompt_tokens, recipe.data.max_response_tokens
        phases.append(Phase("sampling", tuple(setup.generation(rows, *limits))))
    again = [replace(i, name=f"{i.name}, once more", kind="rest") for i in (*setup.base(), adapter)]
    check = _logits("logits of both", _PROBE_ROWS * longest, shape.vocab, 2 * width)
    items = (*again, setup.forward(_PROBE_ROWS * longest), check, *setup.dequantized())
    phases.append(Phase("check of what was saved", items))
    return StagePlan("sft", (_overhead(), *setup.base(), adapter, states), tuple(phases))


def _reward(setup: _Setup) -> StagePlan:
    """One adapter and a score head; a padded row per response."""
    section, recipe = setup.recipe.reward, setup.recipe
    assert section is not None
    shape, longest = setup.shape, setup.longest
    responses = _responses_per_ranking(recipe)
    rows = responses * (section.micro_batch_size or section.batch_size)
    trained = [*shape.lora_tensors(recipe.adapter), shape.hidden]
    gradients, states = _training(trained, section)
    # PEFT keeps the head as it was beside the one that is trained.
    kept = (
        _overhead(),
        *setup.base(head=False),
        setup.adapter("reward"),
        setup.head("reward", copies=2),
        states,
    )
    training = (
        gradients,
        setup.activations(setup.compute(expanded=True), rows * longest, setup.adapted),
        _mask(rows, longest),
        *setup.dequantized(),
    )
    scoring_rows = 2 * (section.micro_batch_size or section.batch_size)
    scoring = (setup.forward(scoring_rows * longest), *setup.dequantized())
    return StagePlan("reward", kept, (Phase("training", training), Phase("scoring", scoring)))


def _responses_per_ranking(recipe: Recipe) -> int:
    """Return how many responses a ranking has: two, where only its file could say more."""
    data: StageData | None = recipe.data.reward
    worlds = [s.world for s in data.train] if data is not None else []
    return recipe.data.world.responses_per_ranking if "rankings" in worlds else 2


def _ppo(setup: _Setup) -> StagePlan:
    """Policy, reference, reward models and critic; rollout, scores, update."""
    section, recipe, shape = setup.recipe.ppo, setup.recipe, setup.shape
    assert section is not None
    separate = section.layout == "separate"
    roles, trained, critic = _roles(setup, section)
    gradients, states = _training([*trained, *critic], section)
    kept = [_overhead(), *setup.base(), *roles, states]
    if section.ema is not None:
        policy = sum(trained)
        kept.append(Item("moving average", policy * FLOAT, f"{policy:,} x {FLOAT} B"))

    prompt, response = recipe.data.max_prompt_tokens, section.max_new_tokens
    longest, width = prompt + response, setup.width
    rows = _rows_per_pass(section, longest)
    trunk: list[Item] = []
    native = section.rollout.engine == "native"
    if native and 0 < shape.layers - setup.adapted and not separate:
        count = section.batch_size * longest * shape.hidden
        trunk = [Item("states below the adapters", count * width, f"{count:,} x {width} B")]
    compute = setup.compute(joined=native and rows > 1, expanded=not native)
    layers = setup.adapted
    if separate:
        compute, layers = replace(compute, adapter=None), shape.layers
    update = [
        *trunk,
        gradients,
        setup.activations(compute, rows * longest, layers),
        *_logprobs(setup, section, rows),
        *setup.dequantized(),
    ]
    if separate:
        update += _beside_full_training(setup)
    rollout = setup.generation(section.rollout.batch_size or section.batch_size, prompt, response)
    score = (*trunk, setup.forward(rows * longest), *_logprobs(setup, section, rows))
    phases = [
        Phase("rollout", tuple(rollout)),
        Phase("scores and log-probabilities", score + tuple(setup.dequantized())),
        Phase("update", tuple(update)),
    ]
    if section.ptx is not None:
        tokens = section.ptx.batch_size * setup.longest
        mixed = [gradients, setup.activations(compute, tokens, layers), *setup.dequantized()]
        mixed += _logprobs(setup, section, section.ptx.batch_size)
        phases.append(Phase("language modelling (ptx)", (*trunk, *mixed)))
    return StagePlan("ppo", tuple(kept), tuple(phases))


def _roles(setup: _Setup, section: Ppo) -> tuple[list[Item], list[int], list[int]]:
    """Return the roles' own weights, and the sizes of the policy's and critic's tensors."""
    shape, own_critic = setup.shape, section.value.trunk == "own"
    rewards = [name for source in section.reward_sources for name in source.models]
    items = [setup.adapter("reference")]
    for number in range(len(set(rewards))):
        role = f"reward{number or ''}"
        items += [setup.adapter(role), setup.head(role)]
    items.append(setup.head("value"))
    head = [shape.hidden]
    if section.layout == "shared":
        tensors = shape.lora_tensors(setup.recipe.adapter)
        items.append(setup.adapter("policy"))
        items += [setup.adapter("value")] if own_critic else []
        return items, tensors, [*(tensors if own_critic else []), *head]
    policy, critic = shape.parameters, shape.parameters - shape.head
    items.append(Item("policy", policy * FLOAT, f"{policy:,} x {FLOAT} B", "weights"))
    if own_critic:
        items.append(Item("value", critic * FLOAT, f"{critic:,} x {FLOAT} B", "weights"))
    return items, [policy], [*([critic] if own_critic else []), *head]


def _rows_per_pass(section: Ppo, longest: int) -> int:
    """Return how many of the longest rows go through one pass of the update."""
    if section.max_tokens_per_microbatch is not None:
        return min(max(1, section.max_tokens_per_microbatch // longest), section.minibatch_size)
    return section.micro_batch_size or section.minibatch_size


def _logprobs(setup: _Setup, section: Ppo, rows: int) -> list[Item]:
    """Return the slopes of the log-probabilities, and what computing them needs at a time."""
    vocab, hidden = setup.shape.vocab, setup.shape.hidden
    tokens, width = rows * section.max_new_tokens, setup.width
    if section.rollout.engine == "hf":
        return [_logits("logits, float32, log-softmax", tokens, vocab, width + 2 * FLOAT)]
    chunk = logprob_chunk_bytes(vocab, width)
    slopes = 1 + (section.entropy_coef > 0)
    each = slopes * hidden * width + FLOAT * hidden  # and the critic's input in float32
    return [
        Item("log-probabilities, a chunk", chunk, f"{ceil(2**20 / vocab)} tokens x {vocab:,}"),
        Item("their slopes", tokens * each, f"{tokens:,} tokens x {each:,} B"),
    ]


def _beside_full_training(setup: _Setup) -> list[Item]:
    """Return what only models of their own need during a backward pass."""
    shape, width = setup.shape, setup.width
    head = shape.vocab * shape.hidden
    items = [Item("gradient of the head", head * FLOAT, f"{head:,} x {FLOAT} B")]
    if width != FLOAT:
        linear = shape.linear + head
        how = f"{linear:,} x {width} B (autocast)"
        items.append(Item(f"weights in {setup.recipe.base.dtype}", linear * width, how))
    return items
