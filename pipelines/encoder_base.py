"""An encoder as the base of reward models: found, checked, and loaded again for scoring."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.adapters import is_adapter
from align.errors import InputError
from align.manifest import BaseFacts
from align.models import base_facts, check_lengths, load_settings
from align.places import stage_directory
from align.recipe import Base, Recipe
from align.recipe_reward import RewardBase
from data.tokenizer import prepare_encoder_tokenizer
from reward.encoder import (
    EncoderReward,
    Form,
    encoder_body,
    load_encoder_reward,
    num_positions,
)

# Of a prompt there has to be more than its special tokens.
SHORTEST_PROMPT = 8


@dataclass(frozen=True)
class EncoderBase:
    """An encoder that reward models are made on. ``settings`` are those of ``from_pretrained``."""

    location: str
    facts: BaseFacts
    tokenizer: PreTrainedTokenizerBase
    settings: dict[str, Any]
    form: Form


def read_encoder(recipe: Recipe, section: RewardBase) -> EncoderBase:
    """Find the encoder of a recipe's reward model and see how it has to be read; no weights yet.

    Prompts lose their beginning where they and a response as long as the recipe allows would not
    fit into the encoder.

    Raises:
        InputError: it cannot be found, is no encoder, or has no room for prompt and response.
    """
    location = section.id
    if location == "pretrain":
        location = str(stage_directory(recipe, "pretrain") / "model")
    with _named(f"reward.base.id={section.id}"):
        facts = base_facts(location, section.revision)
        settings = encoder_settings(recipe, location, section.revision)
        try:
            revision = section.revision or "main"
            tokenizer = AutoTokenizer.from_pretrained(location, revision=revision)
        except (OSError, ValueError) as error:
            raise InputError(f"its tokenizer cannot be loaded: {error}") from error
        prepare_encoder_tokenizer(tokenizer)
        positions, limits = num_positions(encoder_body(settings["config"])), recipe.data
        room = positions - limits.max_response_tokens
        if room < SHORTEST_PROMPT:
            raise InputError(
                f"reads {positions} tokens at a time, and data.max_response_tokens="
                f"{limits.max_response_tokens} leaves too little room for a prompt; allowed: at"
                f" most {positions - SHORTEST_PROMPT}"
            )
        prompt = min(limits.max_prompt_tokens, room)
        longest = prompt + limits.max_response_tokens
        check_lengths(settings["config"], tokenizer, longest, "prompt and response")
    return EncoderBase(
        location=location,
        facts=facts.model_copy(update={"architecture": "encoder"}),
        tokenizer=tokenizer,
        settings=settings,
        form=Form(section.pooling, tokenizer.sep_token_id, prompt),
    )


def encoder_settings(recipe: Recipe, location: str, revision: str | None) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for an encoder, with all dropout at 0."""
    base = Base(id=location, revision=revision)
    return load_settings(recipe.model_copy(update={"base": base}), location)


def load_finished(
    recipe: Recipe, model: Path, location: str, revision: str | None
) -> tuple[EncoderReward, int]:
    """Load a finished reward model on an encoder; also return how many tokens it can read.

    Args:
        location: of the base of an adapter, or the model's own folder.

    Raises:
        InputError: the base cannot be found.
        RewardModelError: the folder is incomplete or does not fit the base.
    """
    revision = revision if is_adapter(model) else None
    settings = encoder_settings(recipe, location, revision)
    found = load_encoder_reward(model, location, settings)
    return found, num_positions(found.backbone)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Begin messages about an encoder with the key that names it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
