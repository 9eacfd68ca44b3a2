"""How much memory every stage of a recipe needs, from the configuration alone, with the arithmetic.

Nothing is loaded and nothing is measured: the sizes come from ``config.json``, the rest from what
the stages do. Every prompt and response is taken to be as long as the recipe allows.
"""

from collections.abc import Callable
from dataclasses import replace

from align.errors import InputError
from align.inputs import reward_sources
from align.plan_items import Item, Phase, StagePlan, with_heap_holes
from align.plan_memory import FLOAT, Compute, chunk_tokens, chunk_width, logprob_chunk_bytes
from align.plan_model import Shape, small_bert, small_llama
from align.plan_setup import (
    Setup,
    logits_item,
    overhead,
    ranking_tokens,
    responses_per_ranking,
    rows_per_pass,
    training_items,
)
from align.recipe import Recipe, StageName
from align.recipe_distributed import rows_and_passes
from align.recipe_ppo import Ppo
from align.recipe_pretrain import MASKED
from align.stages import planned_stages

_TRL_TOKENS, _TRL_VOCAB = 4096, 32768  # TRL takes the logits of SFT in tiles of this size
_PROBE_ROWS = 4  # rows on which the SFT stage compares the saved adapter with the live one


def plan_recipe(
    recipe: Recipe, base: Shape | None, *, on_cpu: bool = False
) -> tuple[StagePlan, ...]:
    """Return the plan of every stage of a recipe.

    Args:
        base: None: the recipe's pretrain stage makes it.
        on_cpu: with what a CPU's memory needs more than a GPU's.

    Raises:
        InputError: an adapter's target is not a layer of the base; it is not known what the
            adapter's method takes; see ``pretrained_shape``.
    """
    method, later = recipe.adapter.method, {"ppo", "evaluate"} & set(planned_stages(recipe))
    if method not in ("lora", "full") or (method == "lora" and recipe.adapter.dora):
        used = "dora=true" if recipe.adapter.dora else f"method={method}"
        raise InputError(f"adapter.{used}: align plan only knows lora without dora, and full")
    if method == "full" and later:
        raise InputError(
            f"adapter.method=full: align plan knows it in sft and reward only; plan without"
            f" {' and '.join(sorted(later))}"
        )
    setup = Setup(recipe, base or pretrained_shape(recipe), on_cpu)
    makers: dict[StageName, Callable[[Setup], StagePlan]] = {
        "pretrain": _pretrain,
        "sft": _sft,
        "reward": _reward,
        "ppo": _ppo,
        "evaluate": _evaluate,
    }
    plans = tuple(makers[stage](setup) for stage in planned_stages(recipe))
    # With gradient checkpointing the launcher has large tensors given back at once.
    holes = on_cpu and not recipe.base.gradient_checkpointing
    return tuple(with_heap_holes(plan) for plan in plans) if holes else plans


def pretrained_shape(recipe: Recipe, *, pooler: bool = True) -> Shape:
    """Return the shape of the base that a recipe's pretrain stage makes.

    Args:
        pooler: with that of an encoder which has learned to tell next sentences.

    Raises:
        InputError: the size of its vocabulary is not known.
    """
    section = recipe.pretrain
    assert section is not None
    vocab, model, pairs = recipe.tokenizer.vocab_size, section.model, section.next_sentence
    if vocab is None:
        raise InputError(
            f"tokenizer.id={recipe.tokenizer.id}: its size is not known before it is loaded;"
            " for the plan, give tokenizer.vocab_size as well"
        )
    if section.objective == "masked":
        return small_bert(model, vocab, segments=1 + pairs, pooler=pairs and pooler)
    return small_llama(model, vocab)


def pretrain_setup(setup: Setup) -> Setup:
    """Return the setup of the pretrain stage: on the shape of what it makes."""
    return replace(setup, shape=pretrained_shape(setup.recipe))


def reward_setup(setup: Setup) -> Setup:
    """Return the setup of the reward stage: with ``reward.base``, on that encoder.

    Raises:
        InputError: its shape or what its adapter takes is not known here.
    """
    recipe = setup.recipe
    assert recipe.reward is not None
    base = recipe.reward.base
    if base is None:
        return setup
    if base.id != "pretrain" or recipe.pretrain is None:
        raise InputError(
            f"reward.base={base.id}: align plan only knows encoders that the recipe's pretrain"
            " stage makes; plan the other stages with reward.base=null, which counts an adapter"
        )
    adapter = base.adapter or recipe.adapter
    if adapter.method not in ("lora", "full") or adapter.dora:
        raise InputError("reward.base.adapter: align plan only knows lora without dora, and full")
    plain = recipe.base.model_copy(update={"dtype": "float32", "quantization": "none"})
    alone = recipe.model_copy(update={"base": plain, "adapter": adapter})
    # The mean of the states passes the pooler by.
    shape = pretrained_shape(setup.recipe, pooler=base.pooling == "cls")
    return replace(setup, shape=shape, recipe=alone)


def _pretrain(setup: Setup) -> StagePlan:
    """All weights in float32, on blocks of one length without padding, or on padded pairs."""
    setup = pretrain_setup(setup)
    section, shape = setup.recipe.pretrain, setup.shape
    assert section is not None
    rows, _ = rows_and_passes(section, setup.recipe.distributed)
    tokens = rows * section.sequence_length
    guessed = round(MASKED * tokens) if section.objective == "masked" else tokens
    full, count = Compute(FLOAT, None), shape.parameters
    gradients, states = training_items([count], section)
    kept = (
        overhead("pretrain"),
        Item("model", count * FLOAT, f"{count:,} x {FLOAT} B", "weights"),
        states,
    )
    training = [
        gradients,
        setup.activations(full, tokens, shape.layers, whole=True),
        logits_item("logits, log-softmax, slope", guessed, shape.vocab, 3 * FLOAT),
    ]
    if section.next_sentence:
        training.append(setup.masks(rows, section.sequence_length, whole=True))
    return StagePlan("pretrain", kept, (Phase("training", tuple(training)),))


def _sft(setup: Setup) -> StagePlan:
    """One adapter; padded rows, or packs without padding."""
    section, shape, recipe = setup.recipe.sft, setup.shape, setup.recipe
    assert section is not None
    width, longest = setup.width, setup.longest
    rows, _ = rows_and_passes(section, recipe.distributed)
    tokens = rows * longest
    weights, trained = setup.model("policy")
    gradients, states = training_items(trained, section)
    # A tile of them in place on a GPU; on a CPU torch makes eight of its size and a mask.
    part = min(shape.vocab, _TRL_VOCAB) if setup.on_cpu else _TRL_VOCAB
    tile = min(tokens, _TRL_TOKENS) * part
    tile_width = width + (8 * FLOAT + 1 if setup.on_cpu else 0)
    training = (
        gradients,
        setup.activations(setup.padded(), tokens, setup.adapted),
        setup.masks(*((1, tokens) if section.packing else (rows, longest))),
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
    # The trained model is gone by then, and another one loaded.
    check = logits_item("logits of both", _PROBE_ROWS * longest, shape.vocab, 2 * width)
    items = (setup.forward(_PROBE_ROWS * longest), check, *setup.dequantized())
    phases.append(Phase("check of what was saved", items))
    return StagePlan("sft", (overhead("sft"), *weights, states), tuple(phases))


def _reward(setup: Setup) -> StagePlan:
    """One adapter and a score head. Responses share their prompt; an encoder reads padded rows."""
    setup = reward_setup(setup)
    section, recipe = setup.recipe.reward, setup.recipe
    assert section is not None
    shape, longest = setup.shape, setup.longest
    rankings, _ = rows_and_passes(section, recipe.distributed)
    rows = rankings * responses_per_ranking(recipe)
    weights, trained = setup.model("reward", head=False)
    maps = setup.maps()
    gradients, states = training_items([*trained, *maps], section)
    # PEFT keeps the head as it was beside the one that is trained.
    head = setup.head("reward", weights=sum(maps) * (1 if setup.full else 2))
    kept = [overhead("reward"), *weights, head, states]
    if section.base is None:
        tokens = rankings * ranking_tokens(recipe)
        training = [
            setup.activations(setup.packed(), tokens, setup.adapted),
            setup.repeated_keys(rows - rankings),
        ]
    else:
        training = [
            setup.activations(setup.padded(), rows * longest, setup.adapted),
            setup.masks(rows, longest),
        ]
    training += [gradients, *setup.dequantized()]
    if section.aux_lm_coef:  # of each ranking's best response, through the frozen embeddings
        width, count = setup.width, shape.head
        if count:  # of their own, and not the input's
            how = f"{count:,} x {width} B"
            kept.append(Item("output embeddings", count * width, how, "weights"))
        tokens = rankings * recipe.data.max_response_tokens
        each = 2 * shape.hidden * width
        how = f"{tokens:,} tokens x {each:,} B"
        training += [_chunk(setup), Item("best responses' states, slopes", tokens * each, how)]
    scoring_rows = 2 * (section.micro_batch_size or section.batch_size)
    scoring = (setup.forward(scoring_rows * longest), *setup.dequantized())
    phases = (Phase("training", tuple(training)), Phase("scoring", scoring))
    return StagePlan("reward", tuple(kept), phases)


def _ppo(setup: Setup) -> StagePlan:
    """Policy, reference, reward models and critic; rollout, scores, update."""
    section, recipe, shape = setup.recipe.ppo, setup.recipe, setup.shape
    assert section is not None
    roles, trained, critic = _roles(setup, section)
    gradients, states = training_items([*trained, *critic], section)
    kept = [overhead("ppo"), *setup.base(), *roles, states]
    if section.ema is not None:
        policy = sum(trained)
        kept.append(Item("moving average", policy * FLOAT, f"{policy:,} x {FLOAT} B"))

    prompt, response = recipe.data.max_prompt_tokens, section.max_new_tokens
    longest, width = prompt + response, setup.width
    rows = rows_per_pass(section, longest)
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
    if native and "policy" not in section.own_models:
        rollout += setup.summed()
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
    critic = _critic_maps(setup, section)
    head = setup.head("value", sum(critic))
    items = [setup.adapter("reference"), *_reward_roles(setup, "ppo"), head]
    sizes: dict[str, list[int]] = {"policy": [], "value": []}
    whole = {"policy": shape.parameters, "value": shape.parameters - shape.head}
    for role in sizes if section.value.trunk == "own" else ("policy",):
        if role in section.own_models:
            size, how = whole[role] * FLOAT, f"{whole[role]:,} x {FLOAT} B"
            layers = (shape.linear // shape.layers * FLOAT,) * shape.layers
            items.append(Item(role, size, how, "weights", layers, trained=True))
            sizes[role] = [whole[role]]
        else:
            items.append(setup.adapter(role))
            sizes[role] = shape.lora_tensors(setup.recipe.adapter)
    return items, sizes["policy"], [*sizes["value"], *critic]


def _critic_maps(setup: Setup, section: Ppo) -> list[int]:
    """Return the sizes of the maps in the critic's head, which may start as the reward model's."""
    reward = setup.recipe.reward
    on_reward = section.value.trunk == "own" and section.needs_reward_stage
    if reward is None or reward.base is not None or reward.labels or not on_reward:
        return [setup.shape.hidden]
    return setup.maps()


def _reward_roles(setup: Setup, stage: StageName) -> list[Item]:
    """Return the reward models that a stage scores with; without PPO, the reward stage's."""
    recipe, names = setup.recipe, {"reward"}
    if recipe.ppo is not None:
        sources = reward_sources(recipe, stage).values()
        names = {name for source in sources for name in source.models}
    elif recipe.reward is None and not recipe.run.parents.reward:
        names = set()
    if recipe.reward is not None and recipe.reward.base is not None:
        names -= {"reward"}  # it reads the text, on a base of its own
    roles = {f"reward{number or ''}": setup.shape.hidden for number in range(len(names))}
    if "reward" in names:  # its own comes first
        roles["reward"] = sum(setup.maps())
    items = ((setup.adapter(role), setup.head(role, maps)) for role, maps in roles.items())
    return [item for pair in items for item in pair]


def _logprobs(setup: Setup, section: Ppo, rows: int) -> list[Item]:
    """Return the slopes of the log-probabilities, and what computing them needs at a time."""
    vocab, hidden = setup.shape.vocab, setup.shape.hidden
    tokens, width = rows * section.max_new_tokens, setup.width
    if section.rollout.engine == "hf":
        return [logits_item("logits, float32, log-softmax", tokens, vocab, width + 2 * FLOAT)]
    slopes = 1 + (section.entropy_coef > 0)
    each = slopes * hidden * width + FLOAT * hidden  # and the critic's input in float32
    return [
        _chunk(setup),
        Item("their slopes", tokens * each, f"{tokens:,} tokens x {each:,} B"),
    ]


def _chunk(setup: Setup) -> Item:
    """Return what log-probabilities need at a time."""
    vocab, width = setup.shape.vocab, setup.width
    how = f"{chunk_tokens(vocab)} tokens x {vocab:,} x {chunk_width(width)} B"
    return Item("log-probabilities, a chunk", logprob_chunk_bytes(vocab, width), how)


def _beside_full_training(setup: Setup, *, head: bool) -> list[Item]:
    """Return what only a model of its own needs during a backward pass."""
    shape, width = setup.shape, setup.width
    outputs = shape.vocab * shape.hidden if head else 0
    how = f"{outputs:,} x {FLOAT} B"
    items = [Item("gradient of the head", outputs * FLOAT, how)] if head else []
    if width != FLOAT:
        linear = shape.linear + outputs
        how = f"{linear:,} x {width} B; autocast"
        items.append(Item(f"weights in {setup.recipe.base.dtype}", linear * width, how))
    return items


def _evaluate(setup: Setup) -> StagePlan:
    """Every model of the run as an adapter on the base; answers, log-probabilities, scores."""
    section, recipe, shape = setup.recipe.evaluate, setup.recipe, setup.shape
    assert section is not None
    ppo = recipe.ppo
    kept = [overhead("evaluate"), *setup.base(), setup.adapter("reference")]
    if ppo is not None and ppo.layout == "separate":
        count = shape.parameters
        kept.append(Item("policy", count * FLOAT, f"{count:,} x {FLOAT} B", "weights"))
    elif ppo is not None:
        kept.append(setup.adapter("policy"))
    kept += _reward_roles(setup, "evaluate")

    rows = min(section.batch_size, section.prompts)
    prompt, response = recipe.data.max_prompt_tokens, section.max_new_tokens
    answered, longest = rows * (prompt + response), section.batch_size * setup.longest
    phases = [
        Phase("answers", (*setup.generation(rows, prompt, response), *setup.summed())),
        Phase("their log-probabilities and scores", tuple(_looks(setup, answered))),
        Phase("held-out loss and rankings", tuple(_looks(setup, longest))),
    ]
    return StagePlan("evaluate", tuple(kept), tuple(phases))


def _looks(setup: Setup, tokens: int) -> list[Item]:
    """Return a pass without gradients up to log-probabilities."""
    return [setup.forward(tokens), _chunk(setup), *setup.dequantized()]
