"""The roles of PPO, loaded from the stages that made them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.manifest import BaseFacts
from align.models import (
    base_facts,
    base_location,
    check_lengths,
    compute_device,
    load_causal_lm,
)
from align.roles import Role, Roles
from data.render import Renderer
from data.tokenizer import end_ids
from pipelines.stage import StageJob
from reward.model import ScoreHead, load_score_head


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
    adapters: dict[Role, Path],
    *,
    max_new_tokens: int,
    trainable: Sequence[Role] = (),
) -> LoadedRoles:
    """Load the base once and put the roles' adapters and heads on it.

    Args:
        adapters: the adapter folder each role starts from. If ``reward`` is among them, ``value``
            gets a copy of its score head; without a reward model the critic starts at 0.
        max_new_tokens: how long responses will be; the base needs positions for them.
        trainable: the roles that will be trained.

    Raises:
        InputError: prompts and responses are longer than the base allows.
        ParentError: a parent was made on another base, or with another tokenizer or template.
    """
    limits, location = job.recipe.data, base_location(job.recipe)
    tokenizer = AutoTokenizer.from_pretrained(job.parent_folder("sft") / "model")
    facts = base_facts(location, job.recipe.base.revision)
    job.check_origin(tokenizer, facts)
    base = load_causal_lm(job.recipe, location)
    check_lengths(
        base,
        tokenizer,
        limits.max_prompt_tokens + max_new_tokens,
        f"data.max_prompt_tokens + {job.stage}.max_new_tokens",
    )
    reward_head = load_score_head(adapters["reward"]) if "reward" in adapters else None
    value_head = None
    if "value" in adapters:
        value_head = ScoreHead(base.config.hidden_size)  # its weight is 0
        if reward_head is not None:
            value_head.load_state_dict(reward_head.state_dict())
    roles = Roles(
        base, adapters, reward_head=reward_head, value_head=value_head, trainable=trainable
    ).to(compute_device())
    renderer = Renderer(tokenizer, limits.max_prompt_tokens, limits.max_response_tokens)
    return LoadedRoles(
        roles, facts, tokenizer, renderer, end_ids(tokenizer), tokenizer.pad_token_id
    )
