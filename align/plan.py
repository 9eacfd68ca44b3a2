"""How much memory every stage of a recipe needs, from the configuration alone, with the arithmetic.

Nothing is loaded and nothing is measured: the sizes come from ``config.json``, the rest from what
the stages do. Every prompt and response is taken to be as long as the recipe allows.
"""

from dataclasses import replace

from align.errors import InputError
from align.plan_items import Item, Phase, StagePlan
from align.plan_memory import CHUNK_ELEMENTS, FLOAT, Compute, activation_bytes, logprob_chunk_bytes
from align.plan_model import Shape, small_llama
from align.plan_setup import Setup, logits_item, mask_item, overhead, training_items
from align.recipe import Recipe, StageData
from align.recipe_ppo import Ppo
from align.stages import planned_stages

_TRL_TOKENS, _TRL_VOCAB = 4096, 32768  # TRL takes the logits of SFT in tiles of this size
_PROBE_ROWS = 4  # rows on which the SFT stage compares the saved adapter with the live one


def plan_recipe(recipe: Recipe, base: Shape | None) -> tuple[StagePlan, ...]:
    """Return the plan of every stage of a recipe that trains.

    Args:
        base: None: the recipe's pretrain stage makes it.

    Raises:
        InputError: an adapter's target is not a layer of the base; the size of the vocabulary of
            a base to be made is not known.
    """
    if base is None:
        assert recipe.pretrain is not None
        vocab = recipe.tokenizer.vocab_size
        if vocab is None:
            raise InputError(
                f"tokenizer.id={recipe.tokenizer.id}: its size is not known before it is loaded;"
                " for the plan, give tokenizer.vocab_size as well"
            )
        base = small_llama(recipe.pretrain.model, vocab)
    setup = Setup(recipe, base)
    makers = {"pretrain": _pretrain, "sft": _sft, "reward": _reward, "ppo": _ppo}
    return tuple(makers[s](setup) for s in planned_stages(recipe) if s in makers)


def _pretrain(setup: Setup) -> StagePlan:
    """All weights in float32, on blocks of one length without padding."""
    section, shape = setup.recipe.pretrain, setup.shape
    assert section is not None
    tokens = (section.micro_batch_size or section.batch_size) * section.sequence_length
    full, count = Compute(FLOAT, None), shape.parameters
    gradients, states = training_items([count], section)
    kept = (
        overhead(),
        Item("model", count * FLOAT, f"{count:,} x {FLOAT} B", "weights"),
        states,
    )
    # Checkpointing is a matter of the stages with adapters.
    size = activation_bytes(shape, full, tokens, shape.layers, checkpointing=False)
    training = (
        gradients,
        Item("activations", size, f"{tokens:,} tokens, {shape.layers} blocks"),
        logits_item("logits, log-softmax, slope", tokens, shape.vocab, 3 * FLOAT),
    )
    return StagePlan("pretrain", kept, (Phase("training", training),))


def _sft(setup: Setup) -> StagePlan:
    """One adapter; padded rows, or packs without padding."""
    section, shape, recipe = setup.recipe.sft, setup.shape, setup.recipe
    assert section is not None
    width, longest = setup.width, setup.longest
    rows = section.micro_batch_size or section.batch_size
    tokens = rows * longest
    adapter = setup.adapter("policy")
    gradients, states = training_items(shape.lora_tensors(recipe.adapter), section)
    tile = min(tokens, _TRL_TOKENS) * min(shape.vocab, _TRL_VOCAB)
    tile_width = width + 2 * FLOAT
    training = (
        gradients,
        setup.activations(setup.compute(expanded=True), tokens, setup.adapted),
        mask_item(*((1, tokens) if section.packing else (rows, longest))),
        Item("logits, a tile", tile * tile_width, f"{tile:,} x {tile_width} B"),
        *setup.dequantized(),
    )
    phases = [Phase("training", training)]
    if recipe.data.sft is not None and recipe.data.sft.heldout:
        copies = 2 * width + (0 if width == FLOAT else FLOAT) + FLOAT
        name = "logits, float32, log-softmax"
        logits = logits_item(name, tokens, shape.vocab, copies)
        measuring = (setup.forward(tokens), logits, *setup.dequantized())
        phases.append(Phase("held-out loss", measuring))
    if section.samples:
        rows = min(section.batch_size, section.samples)
        limits = recipe.data.max_prompt_tokens, recipe.data.max_response_tokens
        phases.append(Phase("sampling", tuple(setup.generation(rows, *limits))))
    again = [replace(i, name=f"{i.name}, once more", kind="rest") for i in (*setup.base(), adapter)]
    check = logits_item("logits of both", _PROBE_ROWS * longest, shape.vocab, 2 * width)
    items = (*again, setup.forward(_PROBE_ROWS * longest), check, *setup.dequantized())
    phases.append(Phase("check of what was saved", items))
    return StagePlan("sft", (overhead(), *setup.base(), adapter, states), tuple(phases))


def _reward(setup: Setup) -> StagePlan:
    """One adapter and a score head; a padded row per response."""
    section, recipe = setup.recipe.reward, setup.recipe
    assert section is not None
    shape, longest = setup.shape, setup.longest
    responses = _responses_per_ranking(recipe)
    rows = responses * (section.micro_batch_size or section.batch_size)
    trained = [*shape.lora_tensors(recipe.adapter), shape.hidden]
    gradients, states = training_items(trained, section)
    # PEFT keeps the head as it was beside the one that is trained.
    kept = (
        overhead(),
        *setup.base(head=False),
        setup.adapter("reward"),
        setup.head("reward", copies=2),
        states,
    )
    training = (
        gradients,
        setup.activations(setup.compute(expanded=True), rows * longest, setup.adapted),
        mask_item(rows, longest),
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


def _ppo(setup: Setup) -> StagePlan:
    """Policy, reference, reward models and critic; rollout, scores, update."""
    section, recipe, shape = setup.recipe.ppo, setup.recipe, setup.shape
    assert section is not None
    roles, trained, critic = _roles(setup, section)
    gradients, states = training_items([*trained, *critic], section)
    kept = [overhead(), *setup.base(), *roles, states]
    if section.ema is not None:
        policy = sum(trained)
        kept.append(Item("moving average", policy * FLOAT, f"{policy:,} x {FLOAT} B"))

    prompt, response = recipe.data.max_prompt_tokens, section.max_new_tokens
    longest, width = prompt + response, setup.width
    rows = _rows_per_pass(section, longest)
    trunk: list[Item] = []
    native = section.rollout.engine == "native"
    if native and setup.adapted < shape.layers:
        count = section.batch_size * longest * shape.hidden
        trunk = [Item("states below the adapters", count * width, f"{count:,} x {width} B")]
    compute = setup.compute(joined=native and rows > 1, expanded=not native)
    layers = setup.adapted
    if section.own_models:  # the larger of the two passes
        compute, layers = replace(compute, adapter=None), shape.layers
    update = [
        *trunk,
        gradients,
        setup.activations(compute, rows * longest, layers),
        *_logprobs(setup, section, rows),
        *setup.dequantized(),
    ]
    if section.own_models:
        update += _beside_full_training(setup, head="policy" in section.own_models)
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


def _roles(setup: Setup, section: Ppo) -> tuple[list[Item], list[int], list[int]]:
    """Return the roles' own weights, and the sizes of the policy's and critic's tensors."""
    shape = setup.shape
    rewards = [name for source in section.reward_sources for name in source.models]
    items = [setup.adapter("reference")]
    for number in range(len(set(rewards))):
        role = f"reward{number or ''}"
        items += [setup.adapter(role), setup.head(role)]
    items.append(setup.head("value"))
    sizes: dict[str, list[int]] = {"policy": [], "value": []}
    whole = {"policy": shape.parameters, "value": shape.parameters - shape.head}
    for role in sizes if section.value.trunk == "own" else ("policy",):
        if role in section.own_models:
            how = f"{whole[role]:,} x {FLOAT} B"
            items.append(Item(role, whole[role] * FLOAT, how, "weights"))
            sizes[role] = [whole[role]]
        else:
            items.append(setup.adapter(role))
            sizes[role] = shape.lora_tensors(setup.recipe.adapter)
    return items, sizes["policy"], [*sizes["value"], shape.hidden]


def _rows_per_pass(section: Ppo, longest: int) -> int:
    """Return how many of the longest rows go through one pass of the update."""
    if section.max_tokens_per_microbatch is not None:
        return min(max(1, section.max_tokens_per_microbatch // longest), section.minibatch_size)
    return section.micro_batch_size or section.minibatch_size


def _logprobs(setup: Setup, section: Ppo, rows: int) -> list[Item]:
    """Return the slopes of the log-probabilities, and what computing them needs at a time."""
    vocab, hidden = setup.shape.vocab, setup.shape.hidden
    tokens, width = rows * section.max_new_tokens, setup.width
    if section.rollout.engine == "hf":
        return [logits_item("logits, float32, log-softmax", tokens, vocab, width + 2 * FLOAT)]
    chunk = logprob_chunk_bytes(vocab, width)
    slopes = 1 + (section.entropy_coef > 0)
    each = slopes * hidden * width + FLOAT * hidden  # and the critic's input in float32
    return [
        Item(
            "log-probabilities, a chunk",
            chunk,
            f"{max(1, CHUNK_ELEMENTS // vocab)} tokens x {vocab:,}",
        ),
        Item("their slopes", tokens * each, f"{tokens:,} tokens x {each:,} B"),
    ]


def _beside_full_training(setup: Setup, *, head: bool) -> list[Item]:
    """Return what only a model of its own needs during a backward pass."""
    shape, width = setup.shape, setup.width
    outputs = shape.vocab * shape.hidden if head else 0
    how = f"{outputs:,} x {FLOAT} B"
    items = [Item("gradient of the head", outputs * FLOAT, how)] if head else []
    if width != FLOAT:
        linear = shape.linear + outputs
        how = f"{linear:,} x {width} B (autocast)"
        items.append(Item(f"weights in {setup.recipe.base.dtype}", linear * width, how))
    return items
