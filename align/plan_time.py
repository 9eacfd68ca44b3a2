"""Tokens, operations and time of every stage, at most: all texts as long as the recipe allows.

A pass over a text of ``s`` tokens takes, for each of them (Chowdhery et al. 2022, appendix B),

    forward(s) = 2 N + 4 L d s    operations

with ``N`` weights in matrices, ``L`` blocks, and heads that are ``d`` wide together. Going backward
takes as much again for the slopes of the states, once more where weights are trained, and once
more where checkpointing repeats the pass: with adapters 2 or 3 passes, with all weights 3 or 4. The
adapters' own matrices, a few hundredths of the base's, and all that is no matrix product are left
out.

Weights are also read once in every pass, and 4-bit ones written and read again as they are computed
with. That decides while responses are sampled, one token of each row at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from align.inputs import reward_sources, world_rows
from align.plan import pretrain_setup, reward_setup
from align.plan_memory import cache_bytes
from align.plan_model import Shape, linear_bytes
from align.plan_setup import Setup, ranking_tokens, responses_per_ranking, rows_per_pass
from align.published import Card
from align.recipe import Recipe, Source, StageName
from align.recipe_types import Dtype
from align.stages import planned_stages

# Shares of a card's published figures that passes are assumed to reach. Full training reaches 0.4
# to 0.64 of the operations on A100 and H100 (MosaicML's llm-foundry); QLoRA of 7B on an A100 at
# 1024 tokens 2,295 tokens per second (LLaMA-Factory), which is 0.4 with these formulas.
FLOPS_SHARE, BANDWIDTH_SHARE = 0.4, 0.7
MEASURED_SHARE = 0.7  # the same of measured matrix products, which are a part of a pass
# Seconds that a GPU takes at least for a block of one step of sampling, whatever its size: it waits
# for the program. By LitGPT's table for 7B and 13B on an A100; quantised blocks launch more.
BLOCK_SECONDS, QUANTIZED_BLOCK_SECONDS = 1.0e-3, 1.7e-3

_PROBES, _PROBED_ROWS = 4, 200  # of the reward stage's report; tests compare them with its own
_PER_ROWS = 1000  # rows that a stage's work is given for where their number is not known


@dataclass(frozen=True, slots=True)
class Speed:
    """What a device does: operations and bytes per second, and its least time for a block."""

    flops: float
    bandwidth: float
    block_seconds: float
    how: str


@dataclass(frozen=True, slots=True)
class Work:
    """A part of a stage.

    Attributes:
        tokens: that go through the model, each as often as it does.
        flops: operations.
        bytes: of weights and caches that are read and written.
        steps: of sampling, one after the other.
        how: the arithmetic.
    """

    name: str
    tokens: int
    flops: float
    bytes: float
    how: str
    steps: int = 0

    def seconds(self, speed: Speed, layers: int) -> float:
        """Return the time that it takes."""
        computing = self.flops / speed.flops + self.bytes / speed.bandwidth
        return max(computing, self.steps * layers * speed.block_seconds)


@dataclass(frozen=True, slots=True)
class StageWork:
    """A stage's parts; ``per_rows``: of so many rows of data, whose number is not known yet."""

    stage: StageName
    parts: tuple[Work, ...]
    per_rows: int | None = None


def card_speed(name: str, card: Card, quantized: bool, dtype: Dtype = "bfloat16") -> Speed:
    """Return what a card is assumed to do, computing in numbers of a kind."""
    flops = card.float32 if dtype == "float32" else card.flops
    return Speed(
        FLOPS_SHARE * flops,
        BANDWIDTH_SHARE * card.bandwidth,
        QUANTIZED_BLOCK_SECONDS if quantized else BLOCK_SECONDS,
        f"{name}: {FLOPS_SHARE:.0%} of {flops / 1e12:g} TFLOP/s and {BANDWIDTH_SHARE:.0%} of"
        f" {card.bandwidth / 1e9:g} GB/s, as published for {dtype}; the shares are assumed",
    )


def calibrated_speed(device: str, flops: float, bandwidth: float, quantized: bool) -> Speed:
    """Return what a machine does whose matrix products have been measured."""
    least = 0.0
    if not device.startswith("CPU"):
        least = QUANTIZED_BLOCK_SECONDS if quantized else BLOCK_SECONDS
    how = (
        f"{device}: matrix products reach {flops / 1e12:.4g} TFLOP/s, and read weights at"
        f" {bandwidth / 1e9:.4g} GB/s; passes are assumed to reach {MEASURED_SHARE:.0%} of both"
    )
    return Speed(MEASURED_SHARE * flops, MEASURED_SHARE * bandwidth, least, how)


def forward_flops(weights: int, layers: int, width: int, length: int) -> int:
    """Return the operations of a pass for each token of a text of ``length`` tokens."""
    return 2 * weights + 4 * layers * width * length


def plan_work(recipe: Recipe, shape: Shape) -> tuple[StageWork, ...]:
    """Return the work of every stage of a recipe on its base."""
    setup = Setup(recipe, shape)
    makers: dict[StageName, Callable[[Setup], StageWork]] = {
        "pretrain": _pretrain,
        "sft": _sft,
        "reward": _reward,
        "ppo": _ppo,
        "evaluate": _evaluate,
    }
    return tuple(makers[stage](setup) for stage in planned_stages(recipe))


def step_work(recipe: Recipe, shape: Shape, stage: StageName, processes: int) -> tuple[Work, ...]:
    """Return what each of so many processes does in a step; in ppo: a rollout and its updates."""
    setup = Setup(recipe, shape)
    texts = getattr(recipe, stage).batch_size // processes
    if stage == "ppo":
        return tuple(_ppo_parts(setup, texts, texts))
    makers = {"pretrain": _pretraining, "sft": _sft_training, "reward": _reward_training}
    return (makers[stage](setup, texts),)


def _pretrain(setup: Setup) -> StageWork:
    section = setup.recipe.pretrain
    assert section is not None
    return StageWork("pretrain", (_pretraining(setup, section.steps * section.batch_size),))


def _pretraining(setup: Setup, texts: int) -> Work:
    setup = pretrain_setup(setup)
    section = setup.recipe.pretrain
    assert section is not None
    rows = section.micro_batch_size or section.batch_size
    return _passes("training", setup, texts, section.sequence_length, rows, times=3)


def _sft(setup: Setup) -> StageWork:
    recipe, section = setup.recipe, setup.recipe.sft
    assert section is not None
    assert recipe.data.sft is not None
    texts, per_rows = _texts(recipe, recipe.data.sft.train)
    rows = section.micro_batch_size or section.batch_size
    parts = [_sft_training(setup, ceil(texts * section.epochs))]
    heldout = _known(recipe, recipe.data.sft.heldout)
    if heldout:
        parts.append(_passes("held-out loss", setup, heldout, setup.longest, rows))
    if section.samples:
        limits = recipe.data.max_prompt_tokens, recipe.data.max_response_tokens
        parts.append(_sampling(setup, section.samples, *limits, rows=section.batch_size))
    return StageWork("sft", tuple(parts), per_rows)


def _sft_training(setup: Setup, texts: int) -> Work:
    section = setup.recipe.sft
    assert section is not None
    rows = section.micro_batch_size or section.batch_size
    return _passes("training", setup, texts, setup.longest, rows, times=_adapting(setup))


def _reward(setup: Setup) -> StageWork:
    setup = reward_setup(setup)
    recipe, section = setup.recipe, setup.recipe.reward
    assert section is not None
    assert recipe.data.reward is not None
    rankings, per_rows = _texts(recipe, recipe.data.reward.train)
    each = responses_per_ranking(recipe)
    rows = each * (section.micro_batch_size or section.batch_size)
    trained = section.members * ceil(rankings * section.epochs)
    parts = [_reward_training(setup, trained)]
    if section.aux_lm_coef:
        tokens = trained * recipe.data.max_response_tokens
        flops = 2 * 2 * setup.shape.vocab * setup.shape.hidden  # the logits, and back
        how = f"{tokens:,} tokens of best responses x {flops / 1e9:.4g} GFLOP"
        parts.append(Work("auxiliary language modelling", tokens, tokens * flops, 0, how))
    heldout = _known(recipe, recipe.data.reward.heldout)
    if heldout:
        scored = section.members * heldout * each
        probed = section.members * _PROBES * min(heldout, _PROBED_ROWS)
        parts.append(_passes("held-out scores", setup, scored, setup.longest, rows, head=False))
        if section.classes is None:
            parts.append(_passes("probes", setup, probed, setup.longest, rows, head=False))
    return StageWork("reward", tuple(parts), per_rows)


def _reward_training(setup: Setup, rankings: int) -> Work:
    setup = reward_setup(setup)
    recipe, section, times = setup.recipe, setup.recipe.reward, _adapting(setup)
    assert section is not None
    rows = section.micro_batch_size or section.batch_size
    if section.base is None:  # the responses of a prompt share it
        texts, seen = (rankings, ranking_tokens(recipe), rows), setup.longest
        return _passes("training", setup, *texts, times, head=False, seen=seen)
    each = responses_per_ranking(recipe)
    texts = (rankings * each, setup.longest, rows * each)
    return _passes("training", setup, *texts, times, head=False)


def _ppo(setup: Setup) -> StageWork:
    recipe, section = setup.recipe, setup.recipe.ppo
    assert section is not None
    responses = texts = section.steps * section.batch_size
    if recipe.data.prompts is not None and recipe.data.prompts.heldout:
        texts += (1 + ceil(section.steps / section.probe_every)) * section.probe_prompts
    return StageWork("ppo", tuple(_ppo_parts(setup, texts, responses)))


def _ppo_parts(setup: Setup, texts: int, responses: int) -> list[Work]:
    """Return the work of sampling and scoring texts, and of updates on so many of them."""
    recipe, section = setup.recipe, setup.recipe.ppo
    assert section is not None
    prompt, response = recipe.data.max_prompt_tokens, section.max_new_tokens
    longest, own_critic = prompt + response, section.value.trunk == "own"
    models = sum(len(source.models) for source in reward_sources(recipe, "ppo").values())
    rows = rows_per_pass(section, longest)

    # Layers below all adapters run once for all roles, and for all epochs.
    separate = section.layout == "separate"
    share = 1.0 if separate else setup.adapted / setup.shape.layers
    looks = (1 - share) + share * (2 + own_critic + models)
    trained = 3 + setup.checkpointing if separate else share * (2 + setup.checkpointing)
    updates = section.epochs * (1 + own_critic) * trained
    parts = [
        _sampling(setup, texts, prompt, response, section.rollout.batch_size or section.batch_size),
        _passes("scores, log-probabilities", setup, texts, longest, rows, looks),
        _passes("updates", setup, responses, longest, rows, updates),
    ]
    if section.ptx is not None:
        batches = section.epochs * (responses // section.minibatch_size)
        mixed = section.ptx.batch_size
        parts.append(_passes("ptx", setup, batches * mixed, setup.longest, mixed, trained))
    return parts


def _evaluate(setup: Setup) -> StageWork:
    recipe, section = setup.recipe, setup.recipe.evaluate
    assert section is not None
    models = 2 + (recipe.ppo is not None)
    limits = recipe.data.max_prompt_tokens, section.max_new_tokens
    answers, rows = models * section.prompts, section.batch_size
    parts = [
        _sampling(setup, answers, *limits, rows=rows),
        _passes("scores, log-probabilities", setup, answers, sum(limits), rows, times=3),
    ]
    if recipe.reward is not None and recipe.data.reward is not None:
        parts.append(_passes("rankings", setup, 2 * section.pairs, setup.longest, rows, head=False))
    benchmark = _known(recipe, tuple(recipe.data.benchmark.values()))
    if benchmark:  # of two responses, where only its files could say more
        texts = 2 * benchmark
        parts.append(_passes("benchmark", setup, texts, setup.longest, rows, head=False))
    if recipe.data.sft is not None and recipe.data.sft.heldout:
        known = _known(recipe, recipe.data.sft.heldout) or section.pairs
        texts = models * min(known, section.pairs)
        parts.append(_passes("held-out loss", setup, texts, setup.longest, rows))
    return StageWork("evaluate", tuple(parts))


def _adapting(setup: Setup) -> float:
    """Return how many passes forward a training pass of sft and reward is worth."""
    if setup.full:
        return 3 + setup.checkpointing
    share = setup.adapted / setup.shape.layers
    return 1 + share * (1 + setup.checkpointing)


def _passes(
    name: str,
    setup: Setup,
    texts: int,
    length: int,
    rows: int,
    times: float = 1.0,
    *,
    head: bool = True,
    seen: int | None = None,
) -> Work:
    """Return whole passes over texts: ``times`` over each, ``rows`` of them together.

    Args:
        seen: the tokens that attention sees from the last one of a text; None: all.
    """
    each, tokens = _forward(setup.shape, seen or length, head=head), texts * length
    how = (
        f"{texts:,} texts x {length:,} tokens x {times:g} passes x {each / 1e9:.4g} GFLOP"
        f" in batches of {rows}"
    )
    traffic = ceil(texts / rows) * times * _read_bytes(setup)
    return Work(name, ceil(tokens * times), tokens * times * each, traffic, how)


def _sampling(setup: Setup, texts: int, prompt: int, response: int, rows: int) -> Work:
    """Return the sampling of responses, ``rows`` of them at a time."""
    shape, rows = setup.shape, min(rows, texts)
    before, after = _forward(shape, prompt, head=False), _forward(shape, prompt + response // 2)
    flops = texts * (prompt * before + response * after)
    batches = ceil(texts / rows)
    cache = cache_bytes(shape, rows, prompt + response // 2, setup.width)
    traffic = batches * (_read_bytes(setup) * (1 + response) + response * cache)
    how = (
        f"{texts:,} texts x ({prompt:,} tokens x {before / 1e9:.4g} GFLOP + {response:,} x"
        f" {after / 1e9:.4g}), {rows} at a time: {batches:,} x {response:,} steps"
    )
    return Work("sampling", texts * (prompt + response), flops, traffic, how, batches * response)


def _forward(shape: Shape, length: int, *, head: bool = True) -> int:
    weights = shape.linear + (shape.vocab * shape.hidden if head else 0)
    return forward_flops(weights, shape.layers, shape.heads * shape.head_dim, length)


def _read_bytes(setup: Setup) -> int:
    """Return the bytes of weights that a pass moves."""
    shape, width, kind = setup.shape, setup.width, setup.quantization
    head = shape.vocab * shape.hidden * width
    if kind == "none":
        return shape.linear * width + head
    stored = sum(linear_bytes(shape, kind, setup.recipe.base.double_quantization))
    whole = 0 if kind == "int8" else 2 * shape.linear * width  # written, then read
    return stored + whole + head


def _texts(recipe: Recipe, sources: Sequence[Source]) -> tuple[int, int | None]:
    """Return how many rows the sources have; else a round number of them, and that number."""
    counts = [_rows(recipe, source) for source in sources]
    known = [count for count in counts if count is not None]
    return (sum(known), None) if len(known) == len(counts) else (_PER_ROWS, _PER_ROWS)


def _known(recipe: Recipe, sources: Sequence[Source]) -> int:
    return sum(_rows(recipe, source) or 0 for source in sources)


def _rows(recipe: Recipe, source: Source) -> int | None:
    """Return how many rows a source has, None where only its file could say."""
    if source.world is None:
        return source.rows
    rows = world_rows(recipe.data.world, source.world, source.split)
    return min(rows, source.rows or rows)
