"""The roles of PPO, loaded from the stages that made them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.adapters import load_adapter, trained_method
from align.attention import can_be_packed
from align.base_check import check_base, own_logprobs, probe_texts
from align.errors import ParentError
from align.generation import Engine
from align.manifest import BaseFacts
from align.merging import merged
from align.models import (
    base_config,
    base_location,
    check_lengths,
    compute_device,
    load_backbone,
    load_causal_lm,
    recipe_base_facts,
)
from align.recipe import Recipe
from align.recipe_adapter import Method
from align.roles import Role, Roles
from data.records import Prompt, Record
from data.render import Renderer, render_all
from data.tokenizer import stop_ids
from pipelines.stage import StageJob
from reward.calibrate import SCORE_FILE
from reward.head import ScoreHead, load_score_head
from reward.model import load_reward_model


@dataclass(frozen=True)
class LoadedRoles:
    """The roles and what their inputs are made with."""

    roles: Roles
    facts: BaseFacts
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    end_ids: tuple[int, ...]
    pad_id: int


def load_roles(
    job: StageJob,
    folders: Mapping[Role, Path],
    *,
    max_new_tokens: int,
    own_models: Sequence[Role] = (),
    value_on_policy: bool = False,
    trainable: Sequence[Role] = (),
    engine: Engine | None = None,
) -> LoadedRoles:
    """Load the base once and put the roles' LoRA adapters and heads on it.

    A role that was trained by another method gets a model of its own.

    Args:
        folders: what each role starts from: an adapter of the base, or a whole model. Reward roles
            bring their score head; so does ``value`` if it starts from a reward model.
        max_new_tokens: how long responses will be; the base needs positions for them.
        own_models: roles whose adapter is merged into a copy of the base, to train all weights.
        value_on_policy: the critic is a head on the policy's hidden states, which starts at 0.
        trainable: the roles that will be trained.
        engine: see ``align.roles.Roles``; None takes the native one where the base allows it.

    Raises:
        InputError: prompts and responses are longer than the base allows, or the base is of a kind
            whose log-probabilities come out wrong here.
        ParentError: a parent was made on another base, or with another tokenizer or template, or
            by an adapter method that has no place here.
    """
    methods = {role: trained_method(folder) for role, folder in folders.items()}
    _check_methods(job, folders, methods, bool(trainable))
    location = base_location(job.recipe)
    tokenizer, facts = _load_tokenizer(job, location, max_new_tokens)
    # Where all weights are trained, nothing is computed with the base as it was; an adapter that
    # comes from elsewhere was trained on that.
    whole = bool(trainable) and set(methods.values()) == {"full"}
    base = load_causal_lm(job.recipe, str(folders["reference"]) if whole else location)
    texts = probe_texts(base.config.vocab_size)
    expected = own_logprobs(base, texts)
    own = [r for r in folders if r in own_models or methods[r] != "lora"]
    models = {
        role: base
        if whole and role == "reference"
        else _own_model(job, location, role, folders[role], trained=role in own_models)
        for role in own
    }
    roles = Roles(
        base,
        {role: folder for role, folder in folders.items() if role not in own},
        models=models,
        heads=_heads(folders, base.config.hidden_size, value_on_policy=value_on_policy),
        trainable=trainable,
        engine=engine or ("native" if can_be_packed(base) else "hf"),
        recompute=job.recipe.base.gradient_checkpointing,
    ).to(compute_device())
    check_base(roles, texts, expected)
    limits = job.recipe.data
    renderer = Renderer(tokenizer, limits.max_prompt_tokens, limits.max_response_tokens)
    stops = stop_ids(tokenizer, base.config.eos_token_id)
    return LoadedRoles(roles, facts, tokenizer, renderer, stops, tokenizer.pad_token_id)


def _load_tokenizer(
    job: StageJob, location: str, max_new_tokens: int
) -> tuple[PreTrainedTokenizerBase, BaseFacts]:
    """Load the SFT stage's tokenizer, once it, the base and the lengths are found to fit."""
    recipe = job.recipe
    tokenizer = AutoTokenizer.from_pretrained(
        job.parent_folder("sft") / "model", trust_remote_code=recipe.base.trust_remote_code
    )
    facts = recipe_base_facts(recipe)
    job.check_origin(tokenizer, facts)
    keys = f"data.max_prompt_tokens + {job.stage}.max_new_tokens"
    longest = recipe.data.max_prompt_tokens + max_new_tokens
    check_lengths(base_config(recipe, location), tokenizer, longest, keys)
    return tokenizer, facts


def usable_prompts(job: StageJob, loaded: LoadedRoles, records: Sequence[Record]) -> list[Prompt]:
    """Return the prompts of ``data.prompts`` among the records that can be tokenised.

    Raises:
        DataError: too many of them cannot be; see ``StageJob.check_dropped``.
    """
    prompts = [record for record in records if isinstance(record, Prompt)]
    kept, dropped = render_all(prompts, lambda p: (p, loaded.renderer.prompt(p.messages)))
    job.check_dropped("prompts", len(kept), dropped)
    return [prompt for prompt, _ in kept]


def _heads(
    folders: Mapping[Role, Path], hidden_size: int, *, value_on_policy: bool
) -> dict[Role, ScoreHead]:
    """Return the rewards' heads, and the critic's: its reward model's if it has one, else zeros."""
    heads = {
        role: load_score_head(folder)
        for role, folder in folders.items()
        if role.startswith("reward")
    }
    critic = folders.get("value")
    if critic is not None and (critic / SCORE_FILE).is_file():
        heads["value"] = load_score_head(critic)
    elif critic is not None or value_on_policy:
        heads["value"] = ScoreHead(hidden_size)
    return heads


def _own_model(
    job: StageJob, location: str, role: Role, folder: Path, *, trained: bool
) -> PreTrainedModel:
    """Return a model of its own: a checkpoint, or a copy of the base with what was trained on it.

    Args:
        trained: whether all its weights will be.
    """
    recipe, method = job.recipe, trained_method(folder)
    model: Any
    if method == "full":
        is_reward = (folder / SCORE_FILE).is_file()
        model = (load_backbone if is_reward else _load_whole)(recipe, folder)
    elif method == "lora":
        # In float32: what an adapter adds to a weight is less than bfloat16 can tell.
        base: Any = load_causal_lm(recipe, location)
        model = merged(base.float(), folder)
    elif role.startswith("reward"):
        model = load_reward_model(load_causal_lm(recipe, location), folder).backbone
    else:
        model = load_adapter(load_causal_lm(recipe, location), folder).get_base_model()
    # A critic does not use the output embeddings.
    own: Any = model.base_model if role == "value" else model
    return cast(PreTrainedModel, own.float() if trained or method == "full" else own)


def _load_whole(recipe: Recipe, folder: Path) -> PreTrainedModel:
    return load_causal_lm(recipe, str(folder))


def _check_methods(
    job: StageJob, folders: Mapping[Role, Path], methods: Mapping[Role, Method], is_ppo: bool
) -> None:
    """Refuse what was trained by a method that this stage cannot work with."""
    ours = job.recipe.adapter.method
    for role, method in methods.items():
        if is_ppo and method not in ("lora", "full"):
            allowed = "lora or full"
        elif is_ppo and role in ("policy", "reference", "value") and method != ours:
            allowed = f"{ours}, as in the recipe"
        elif method == "prefix":
            allowed = "any other"
        else:
            continue
        raise ParentError(
            f"{folders[role]}: was trained with adapter.method={method}; allowed for the stage"
            f" {job.stage}: {allowed}"
        )
