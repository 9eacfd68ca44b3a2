"""A stage's model written as transformers alone loads it, and how far it is from what was trained.

The weights are those of the base as the stage saw it, quantised or not, plus the adapter. What is
compared with the adapter on its base is the written checkpoint, as transformers loads it.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.adapters import load_adapter, trained_method
from align.drift import logit_drift, score_drift
from align.errors import InputError
from align.manifest import BaseFacts
from align.merging import in_dtype, merged
from align.models import (
    base_config,
    base_location,
    compute_device,
    load_backbone,
    load_causal_lm,
)
from align.quantization import dequantize
from align.recipe import Recipe
from align.roles import Role, Roles
from align.sequences import Sequences, join, micro_batches
from data.records import Labelled, Message
from data.render import Renderer, render_all
from pipelines.load_roles import LoadedRoles, load_roles
from pipelines.stage import StageJob
from reward.calibrate import read_labels, read_widths
from reward.head import load_score_head
from reward.model import load_reward_model, plain_classifier

SCORE_OFFSET = "score_offset"  # in a reward model's config.json
_TOKENS_AT_ONCE = 4096  # per forward pass; only memory depends on it
_POSITIONS_AT_ONCE = 256  # whose logits exist at a time

# A prompt's turns, {"role", "content"} each, and a response to it.
Conversation = tuple[Sequence[dict[str, str]], str]


@dataclass(frozen=True, slots=True)
class Written:
    """What a checkpoint was made from, and what was measured on it.

    Attributes:
        drift: see ``align.drift``; with ``texts`` and ``tokens``, how many were compared.
        score_offset: what the logits of a reward model are above its scores.
    """

    base: BaseFacts
    drift: dict[str, float]
    score_offset: float | None = None


def write_policy(
    job: StageJob, folder: Path, target: Path, texts: Sequence[Conversation], dtype: torch.dtype
) -> Written:
    """Write a language model with its tokenizer, and compare the logits before response tokens.

    Args:
        job: the stage, with itself and the SFT stage as parents.
        folder: what the stage made: an adapter, or a whole model.
        target: a fresh folder.
        dtype: of all weights.

    Raises:
        InputError: none of the texts can be rendered.
        ParentError: base, tokenizer or template are not those that the stage was made with.
    """
    loaded = load_roles(job, {"policy": folder}, max_new_tokens=0, engine="hf")
    sequences = _sequences(job.recipe, loaded, texts)
    trained = _states(loaded.roles, "policy", sequences)
    tokenizer, facts, stops = loaded.tokenizer, loaded.facts, loaded.end_ids
    del loaded
    plain = _whole(job.recipe, folder, dtype)
    plain.config.pad_token_id = tokenizer.pad_token_id
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    _save(plain, tokenizer, target, padding_side="left")  # where generation needs it
    del plain
    gc.collect()
    written = Roles(AutoModelForCausalLM.from_pretrained(target), {}, engine="hf")
    again = _states(written.to(compute_device()), "base", sequences)
    return Written(facts, logit_drift(_logits(trained, again)) | _counts(sequences))


def write_reward_model(
    job: StageJob, folder: Path, target: Path, texts: Sequence[Conversation], dtype: torch.dtype
) -> Written:
    """Write a reward model with its head and tokenizer, and compare the scores of the responses.

    Args and errors: as above; the model in ``folder`` has its head with it.
    """
    if read_widths(folder):
        raise InputError(
            f"{folder}: its head has several maps, and transformers' classifiers of decoders have"
            " one; exported are models of reward.head.depth=1"
        )
    loaded = load_roles(job, {"reward": folder}, max_new_tokens=0, engine="hf")
    sequences = _sequences(job.recipe, loaded, texts)
    trained = _scores(loaded.roles, sequences)
    tokenizer, facts, pad_id = loaded.tokenizer, loaded.facts, loaded.pad_id
    del loaded
    head, labels = load_score_head(folder), read_labels(folder)
    whole = _whole(job.recipe, folder, dtype, scored=True)
    plain, offset = plain_classifier(whole, head, labels, pad_id)
    del whole
    setattr(plain.config, SCORE_OFFSET, offset)
    # Models with learned positions count them from the left, whatever the mask says.
    _save(in_dtype(plain, dtype), tokenizer, target, padding_side="right")
    del plain
    gc.collect()
    scores = _plain_logits(target, sequences, pad_id) - offset
    return Written(facts, score_drift(trained, scores) | _counts(sequences), offset)


def _sequences(recipe: Recipe, loaded: LoadedRoles, texts: Sequence[Conversation]) -> Sequences:
    """Render the texts; responses may be as long as the base has positions."""
    limit = recipe.data.max_prompt_tokens
    config = base_config(recipe, base_location(recipe))
    positions = getattr(config, "max_position_embeddings", None) or 2 * limit
    renderer = Renderer(loaded.tokenizer, limit, positions - limit)

    def labelled(text: Conversation) -> Labelled:
        turns = tuple(Message(turn["role"], turn["content"]) for turn in text[0])
        return Labelled((text[1],), "", turns)

    rows, lost = render_all(map(labelled, texts), renderer.labelled)
    if not rows:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(lost.counts().items()))
        raise InputError(f"none of {len(texts)} sampled texts can be rendered ({reasons})")
    return join(*zip(*rows, strict=True)).to(loaded.roles.device)


def _whole(
    recipe: Recipe, folder: Path, dtype: torch.dtype, *, scored: bool = False
) -> PreTrainedModel:
    """Return the model in a folder with all its weights, on the CPU.

    Args:
        scored: it is a reward model; what is returned has its body, but not its head.
    """
    method = trained_method(folder)
    if method == "full":
        in_float32 = recipe.base.model_copy(update={"dtype": "float32"})  # as it was saved
        recipe = recipe.model_copy(update={"base": in_float32})
        model = load_backbone(recipe, folder) if scored else load_causal_lm(recipe, str(folder))
        return in_dtype(model, dtype)
    base = dequantize(load_causal_lm(recipe, base_location(recipe)))
    if method == "lora":
        return merged(base, folder, dtype)
    # The other methods have trained copies of what the base has.
    adapted: Any = (
        load_reward_model(base, folder).classifier if scored else load_adapter(base, folder)
    )
    plain = cast(PreTrainedModel, adapted.unload())
    if not scored:  # output embeddings that were trained are no longer those of the input
        tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
        plain.config.tie_word_embeddings = tied
    return in_dtype(plain, dtype)


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path, *, padding_side: str
) -> None:
    model.save_pretrained(target)
    tokenizer.padding_side = padding_side
    tokenizer.init_kwargs["padding_side"] = padding_side  # else it is not written
    tokenizer.save_pretrained(target)


@torch.no_grad()
def _states(roles: Roles, role: Role, sequences: Sequences) -> tuple[Tensor, Any]:
    """Return the states before the response tokens, ``[N, H]``, and what makes logits of them."""
    states = [roles.hidden(role, part, part.response_spans) for part in _parts(sequences)]
    head: Any = roles.model(role).get_output_embeddings()
    return torch.cat(states), head


@torch.no_grad()
def _logits(
    ours: tuple[Tensor, Any], theirs: tuple[Tensor, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of both, ``[n, V]``, some positions at a time: all would not fit."""
    for start in range(0, len(ours[0]), _POSITIONS_AT_ONCE):
        rows = slice(start, start + _POSITIONS_AT_ONCE)
        first, second = (
            head(states[rows].to(head.weight.dtype)) for states, head in (ours, theirs)
        )
        yield first, second


@torch.no_grad()
def _scores(roles: Roles, sequences: Sequences) -> Tensor:
    return torch.cat([roles.scores(part) for part in _parts(sequences)]).cpu()


@torch.no_grad()
def _plain_logits(folder: Path, sequences: Sequences, pad_id: int) -> Tensor:
    """Return the logits of the classifier in a folder, as anyone would compute them: ``[N]``, or of
    several labels ``[N, C]``.
    """
    model = AutoModelForSequenceClassification.from_pretrained(folder).to(compute_device())
    logits = []
    for part in _parts(sequences):
        input_ids, mask = part.padded(pad_id)
        logits.append(model(input_ids=input_ids, attention_mask=mask.long()).logits.squeeze(1))
    return torch.cat(logits).float().cpu()


def _parts(sequences: Sequences) -> list[Sequences]:
    groups = micro_batches(sequences.lengths, tokens=_TOKENS_AT_ONCE)
    return [sequences.rows(rows) for rows in groups]


def _counts(sequences: Sequences) -> dict[str, float]:
    return {"texts": len(sequences), "tokens": int(sequences.response_mask.sum())}
