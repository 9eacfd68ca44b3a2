"""The roles of PPO, loaded from the stages that made them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.models import base_location, load_causal_lm
from align.roles import Role, Roles
from data.render import Renderer
from data.tokenizer import end_ids
from pipelines.stage import StageJob
from reward.model import ScoreHead, load_score_head


@dataclass(frozen=True)
class LoadedRoles:
    """The roles and what their inputs are made with."""

    roles: Roles
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    end_ids: tuple[int, ...]
    pad_id: int


def load_roles(
    job: StageJob, adapters: dict[Role, Path], *, trainable: Sequence[Role] = ()
) -> LoadedRoles:
    """Load the base once and put the roles' adapters and heads on it.

    Args:
        adapters: the adapter folder each role starts from. If ``reward`` is among them, ``value``
            gets a copy of its score head; without a reward model the critic starts at 0.
        trainable: the roles that will be trained.
    """
    limits = job.recipe.data
    tokenizer = AutoTokenizer.from_pretrained(job.parent_folder("sft") / "model")
    base = load_causal_lm(job.recipe, base_location(job.recipe))
    reward_head = load_score_head(adapters["reward"]) if "reward" in adapters else None
    value_head = None
    if "value" in adapters:
        value_head = ScoreHead(base.config.hidden_size)  # its weight is 0
        if reward_head is not None:
            value_head.load_state_dict(reward_head.state_dict())
    roles = Roles(
        base, adapters, reward_head=reward_head, value_head=value_head, trainable=trainable
    )
    renderer = Renderer(tokenizer, limits.max_prompt_tokens, limits.max_response_tokens)
    return LoadedRoles(roles, tokenizer, renderer, end_ids(tokenizer), tokenizer.pad_token_id)
