"""Reward models that do not share the policy's base, tokenizer or template: they read its text.

The response is decoded, rendered with the prompt by the reward model's own tokenizer and template,
and scored as the model was trained to: a decoder at the last token of that rendering. The policy
still learns from the tokens it sampled. They may be more tokens there than the model can read.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.adapters import CONFIG, is_adapter, trained_method
from align.attention import can_be_packed
from align.base_check import check_base, own_logprobs, probe_texts
from align.errors import InputError, ParentError, TrainingError
from align.functions import Chat
from align.manifest import BaseFacts, Manifest
from align.models import base_config, base_facts, check_lengths, compute_device, load_causal_lm
from align.recipe import Base, Recipe
from align.roles import Roles
from align.sequences import join, micro_batches
from data.records import Labelled, Message, Prompt
from data.render import Renderer, Unusable, render_all
from data.tokenizer import template_sha256, tokenizer_sha256
from pipelines.encoder_base import SHORTEST_PROMPT, load_finished
from reward.head import load_score_head
from reward.scorer import Row, score_rows


@dataclass
class ForeignRewards:
    """Reward models on one base of their own, or classifiers, whose scores are logits."""

    folders: tuple[Path, ...]  # of their stages
    renderer: Renderer
    positions: int  # tokens that the base can read
    score: Callable[[int, Sequence[Row]], Tensor]  # of one of the models: rows to scores
    reads_text: bool  # they are classifiers of texts, and given the response alone
    note: Callable[[str], None]  # is told of the first response that had to be cut
    _told: bool = False

    @torch.no_grad()
    def scores(self, number: int, prompts: Sequence[Chat], responses: Sequence[str]) -> Tensor:
        """Return the scores that one of the models gives to responses, ``[B]`` float32, or its
        logits ``[B, C]``.

        A response that ran into its length limit is rendered as if it had ended there; what that
        costs is for ``ppo.missing_eos`` to say. So is one that the model has no room for.

        Raises:
            TrainingError: the template or the tokenizer cannot write a response.
        """
        return self.score(number, [self._render(*r) for r in zip(prompts, responses, strict=True)])

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that the reward models cannot be shown, before training meets one.

        Raises:
            InputError: names them by reason.
        """
        if self.reads_text:
            return
        _, lost = render_all(prompts, lambda prompt: self.renderer.prompt(prompt.messages))
        if lost:
            raise InputError(
                f"{self.folders[0]}: {lost.total()} of {len(prompts)} prompts cannot be written by"
                f" its template and tokenizer: {lost.named()}; remove them from data.prompts"
            )

    def _render(self, prompt: Chat, response: str) -> tuple[list[int], list[int]]:
        """Return the ids of prompt and response; what does not fit is the prompt's beginning, and
        of a response that leaves no room for a prompt its end, but for the token that ends it.
        """
        if self.reads_text:
            with self._refusing(response):
                return self.renderer.labelled(Labelled((response,), ""))
        messages = [Message(turn["role"], turn["content"]) for turn in prompt]
        with self._refusing(response):
            prompt_ids = self.renderer.prompt(messages)
            response_ids = self.renderer.response(messages, response)
        longest = self.positions - SHORTEST_PROMPT
        if len(response_ids) > longest:
            self._tell(len(response_ids), longest)
            response_ids = response_ids[: longest - 1] + response_ids[-1:]
        room = self.positions - len(response_ids)
        if len(prompt_ids) > room:
            narrower = Renderer(self.renderer.tokenizer, room, self.positions)
            prompt_ids = narrower.prompt(messages)
        return prompt_ids, response_ids

    def _tell(self, length: int, longest: int) -> None:
        if not self._told:
            self._told = True
            self.note(
                f"{self.folders[0]}: a response has {length} tokens of this model, which can read"
                f" {longest}: it is judged by its beginning, like any other that is as long"
            )

    @contextmanager
    def _refusing(self, response: str) -> Iterator[None]:
        try:
            yield
        except Unusable as error:
            raise TrainingError(
                f"{self.folders[0]}: its template and tokenizer cannot write the response"
                f" {response[:80]!r} ({error.reason})"
            ) from None


def _reads_text(manifest: Manifest) -> bool:
    return manifest.classifier is not None and manifest.classifier.reads == "text"


def load_foreign_rewards(
    recipe: Recipe,
    folders: Sequence[Path],
    manifest: Manifest,
    *,
    batch_size: int,
    note: Callable[[str], None],
) -> ForeignRewards:
    """Load finished reward models that were made on one base with one tokenizer and template.

    Encoders come one by one. The base of decoders is loaded once, quantised as the models were
    trained on it, and otherwise in the dtype that the recipe gives to its own.

    Args:
        recipe: of the run that scores, not of the one that made the models.
        folders: of their reward stages.
        manifest: of the first one; base, tokenizer and template of all are those in it.
        batch_size: rows per forward pass; only speed and memory depend on it.
        note: is told of the first response that is too long for the models.

    Raises:
        ParentError: the base cannot be found or has no room for the recipe's conversations; base,
            tokenizer or template are not those that the stage was finished with; an adapter does
            not fit the base.
        RewardModelError: a score head is missing or malformed.
    """
    if manifest.base.architecture == "encoder":
        (folder,) = folders
        return _load_encoder(recipe, folder, manifest, batch_size, note)
    assert recipe.ppo is not None
    models = [folder / "model" for folder in folders]
    for folder, model in zip(folders, models, strict=True):
        method = trained_method(model)
        if method != "lora":
            raise ParentError(
                f"{folder}: was trained with adapter.method={method}; allowed for a reward model"
                " with a base of its own: lora"
            )
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    with _named(folders[0]):
        causal_lm = _load_base(recipe, models[0], tokenizer, manifest)
    texts = probe_texts(causal_lm.config.vocab_size)
    expected = own_logprobs(causal_lm, texts)
    roles = Roles(
        causal_lm,
        {f"reward{i}": model for i, model in enumerate(models)},
        heads={f"reward{i}": load_score_head(model) for i, model in enumerate(models)},
        engine=recipe.ppo.rollout.engine if can_be_packed(causal_lm) else "hf",
    ).to(compute_device())
    check_base(roles, texts, expected)
    positions = getattr(causal_lm.config, "max_position_embeddings", None) or sys.maxsize

    def score(number: int, rows: Sequence[Row]) -> Tensor:
        sequences = join(*zip(*rows, strict=True)).to(roles.device)
        parts = micro_batches(sequences.lengths, rows=batch_size)
        return torch.cat([roles.scores(sequences.rows(part), f"reward{number}") for part in parts])

    renderer = Renderer(tokenizer, recipe.data.max_prompt_tokens, sys.maxsize)
    return ForeignRewards(tuple(folders), renderer, positions, score, _reads_text(manifest), note)


def _load_encoder(
    recipe: Recipe,
    folder: Path,
    manifest: Manifest,
    batch_size: int,
    note: Callable[[str], None],
) -> ForeignRewards:
    path, revision, device = folder / "model", manifest.base.revision, compute_device()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with _named(folder):
        location = _base_location(path) if is_adapter(path) else str(path)
        facts = base_facts(location, revision) if is_adapter(path) else manifest.base
        _check_origin(tokenizer, facts, manifest)
        model, positions = load_finished(recipe, path, location, revision)
    model.to(device)

    def score(_: int, rows: Sequence[Row]) -> Tensor:
        pad = tokenizer.pad_token_id
        return score_rows(model, rows, batch_size=batch_size, pad_id=pad, device=device).to(device)

    renderer = Renderer(tokenizer, model.form.max_prompt_tokens, sys.maxsize)
    return ForeignRewards((folder,), renderer, positions, score, _reads_text(manifest), note)


def _load_base(
    recipe: Recipe, model: Path, tokenizer: PreTrainedTokenizerBase, manifest: Manifest
) -> PreTrainedModel:
    """Load the base of a reward model, if it is still what the model was made on."""
    assert recipe.ppo is not None
    location, revision = _base_location(model), manifest.base.revision
    _check_origin(tokenizer, base_facts(location, revision), manifest)
    base = Base(
        id=location,
        revision=revision,
        dtype=recipe.base.dtype,
        quantization=manifest.base.quantization,
        double_quantization=manifest.base.double_quantization,
    )
    foreign = recipe.model_copy(update={"base": base})
    check_lengths(
        base_config(foreign, location),
        tokenizer,
        recipe.data.max_prompt_tokens + recipe.ppo.max_new_tokens,
        "data.max_prompt_tokens + ppo.max_new_tokens",
    )
    return load_causal_lm(foreign, location)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Begin messages about a model with the folder that the recipe names it by."""
    try:
        yield
    except InputError as error:
        raise ParentError(f"{folder}: {error}") from error


def _check_origin(tokenizer: PreTrainedTokenizerBase, base: BaseFacts, manifest: Manifest) -> None:
    """Refuse a model whose base, tokenizer or template have changed since it was made."""
    for what, found, expected in (
        ("base", base.sha256, manifest.base.sha256),
        ("tokenizer", tokenizer_sha256(tokenizer), manifest.tokenizer_sha256),
        ("chat template", template_sha256(tokenizer), manifest.template_sha256),
    ):
        if found != expected:
            raise ParentError(
                f"its {what} ({found[:12]}) is not the one that it was made with"
                f" ({expected[:12]}); run its reward stage again"
            )


def _base_location(model: Path) -> str:
    """Return where the base of a saved adapter lies: a folder, also where a tree was moved, or a
    hub id.
    """
    path = model / CONFIG
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise ParentError(f"{path}: names no base: {error!r}") from None
    folder = model / stored  # an absolute path stays itself
    if folder.is_dir():
        return str(folder.resolve())
    if stored.startswith((".", "/")):
        raise ParentError(
            f"{path}: its base {stored} is not there; move the whole run tree, with its base"
        )
    return str(stored)
