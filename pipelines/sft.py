"""Supervised instruction tuning: a LoRA adapter that learns the assistant's turns.

Rows come from ``data.render`` with their labels; TRL's trainer neither renders, tokenises, masks
nor truncates anything here.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from align.adapters import check_trained, lora_config, save_adapter
from align.errors import InputError, TrainingError
from align.generation import generate
from align.models import (
    base_config,
    base_location,
    check_lengths,
    first_line,
    load_causal_lm,
    recipe_base_facts,
    recompute_activations,
)
from align.recipe import Recipe, Sft
from align.seeds import derive_seed
from data.collate import collate_demonstrations
from data.records import Demonstration, Ranking, Record, Text, as_demonstration, as_prompt
from data.render import IGNORED, Renderer, Tokens, render_all
from data.tokenizer import prepare_tokenizer
from pipelines.heldout import heldout_loss, perplexity
from pipelines.stage import StageJob, StageResult
from pipelines.trainer_log import connect, num_steps, training_arguments

_SAMPLES_SHOWN = 16  # answers that go to samples.jsonl
_PROBE_ROWS = 4  # rows on which the saved adapter is compared with the one in memory


def run(job: StageJob) -> StageResult:
    """Tune an adapter on ``data.sft``; write it to ``model/``, and sampled answers."""
    recipe, section = job.recipe, job.recipe.sft
    assert section is not None
    location = base_location(recipe)
    tokenizer = load_tokenizer(recipe)
    base = recipe_base_facts(recipe)
    job.check_origin(tokenizer, base)

    limits = (recipe.data.max_prompt_tokens, recipe.data.max_response_tokens)
    renderer = Renderer(tokenizer, *limits)
    train, heldout, dropped = _rows(job, renderer)
    job.check_dropped("sft", len(train) + len(heldout), dropped)

    keys = "data.max_prompt_tokens + data.max_response_tokens"
    check_lengths(base_config(recipe, location), tokenizer, sum(limits), keys)
    model = add_adapter(load_causal_lm(recipe, location), recipe)
    trainer = make_trainer(job, section, model, tokenizer, train)
    callback = connect(trainer, job.log)
    trainer.train()
    model.eval()
    # First of all: what follows may run out of memory.
    folder = job.directory / "model"
    save_adapter(model, folder, base=location, revision=base.revision)
    tokenizer.save_pretrained(folder)

    metrics = callback.last
    if heldout:
        batch_size = section.micro_batch_size or section.batch_size
        loss = heldout_loss(cast(PreTrainedModel, model), heldout, pad_id(tokenizer), batch_size)
        metrics = metrics | {"loss": loss, "perplexity": perplexity(loss)}
    metrics = metrics | _sample(job, model, renderer, trainer.state.global_step)
    final: dict[str, float] = {
        key: metrics[key] for key in ("perplexity", "eos_rate") if key in metrics
    }
    job.log.log(trainer.state.global_step, final)
    check_reload(recipe, location, folder, model, (heldout or train)[:_PROBE_ROWS])
    return StageResult(metrics, ("model",), tokenizer, base)


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, the base's own by default, with template and pad token.

    Raises:
        InputError: it cannot be loaded, or cannot be used (``data.tokenizer``).
    """
    base = recipe.base
    own = recipe.tokenizer.id is None or base.id == "pretrain"  # pretrain saved the one it used
    location = base_location(recipe) if own else str(recipe.tokenizer.id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location,
            revision=base.revision if own else None,
            trust_remote_code=base.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {location}: {first_line(error)}") from error
    return prepare_tokenizer(tokenizer, recipe.tokenizer)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the pad token's id; ``prepare_tokenizer`` has given it one."""
    assert isinstance(tokenizer.pad_token_id, int)
    return tokenizer.pad_token_id


def add_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Put the recipe's LoRA adapter on ``model``: float32, and all that is trained.

    Raises:
        TrainingError: something else would be trained, or in another precision.
    """
    config = lora_config(recipe.adapter, "CAUSAL_LM", model)
    torch.manual_seed(derive_seed(recipe.seed, "sft", "adapter"))
    adapted = cast(PeftModel, get_peft_model(model, config))
    check_trained(adapted)
    if recipe.base.gradient_checkpointing:
        recompute_activations(cast(PreTrainedModel, adapted.get_base_model()))
    return adapted


def make_trainer(
    job: StageJob,
    section: Sft,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Tokens],
) -> SFTTrainer:
    """Return a trainer of ``model`` on ``rows``.

    Loss and gradient of an optimiser step are means over its learned tokens, whatever the micro
    batches. With packing a batch counts packs of rows instead of rows; a row in a pack sees itself
    only.

    Raises:
        TrainingError: the trainer has lost rows.
    """
    seed = job.recipe.seed
    data = Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    )
    if section.packing:
        limits = job.recipe.data
        longest = limits.max_prompt_tokens + limits.max_response_tokens  # so that no row is cut
        data = pack_dataset(data.shuffle(seed=seed), longest, "bfd")
    steps = num_steps(len(data), section, section.epochs)
    trainer = SFTTrainer(
        model=cast(PreTrainedModel, model),
        args=training_arguments(
            SFTConfig,
            section,
            job.directory,
            steps=steps,
            seed=seed,
            max_length=None,  # rows come within their limits; TRL would cut and drop
            packing=False,  # done above, where the rows can be counted
            padding_free=section.packing,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    # On a quantised base TRL rounds the adapter to bfloat16, in which small updates vanish.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    check_trained(model)
    kept = cast(Dataset, trainer.train_dataset)
    count = sum(len(pack) for pack in kept["seq_lengths"]) if section.packing else len(kept)
    learned = sum(label != IGNORED for labels in kept["labels"] for label in labels)
    wanted = sum(label != IGNORED for row in rows for label in row.labels)
    if (count, learned) != (len(rows), wanted):
        raise TrainingError(
            f"sft: {len(rows)} rows with {wanted} learned tokens went into the trainer, which has"
            f" {count} with {learned}"
        )
    return trainer


def check_reload(
    recipe: Recipe, location: str, folder: Path, model: PeftModel, rows: Sequence[Tokens]
) -> None:
    """Load the saved adapter on a fresh base and compare its logits with the trained model's.

    Raises:
        TrainingError: they differ.
    """
    fresh = PeftModel.from_pretrained(load_causal_lm(recipe, location), folder)
    batch = collate_demonstrations(list(rows), pad_id=0)
    del batch["labels"]
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.no_grad():
        here = model.eval()(**inputs, use_cache=False).logits
        again = fresh.eval().to(model.device)(**inputs, use_cache=False).logits
    if not torch.equal(here, again):
        worst = (here - again).abs().max().item()
        raise TrainingError(
            f"sft: {folder} does not load as what was trained: logits differ by up to {worst:.3g}"
        )


def _rows(job: StageJob, renderer: Renderer) -> tuple[list[Tokens], list[Tokens], Counter[str]]:
    """Return the tokenised training and held-out rows, and why others were dropped."""

    def tokens(record: Record) -> Tokens:
        assert isinstance(record, Demonstration | Ranking)
        return renderer.demonstration(as_demonstration(record).messages)

    data = job.data["sft"]
    train, dropped = render_all(data.train, tokens)
    heldout, heldout_dropped = render_all(data.heldout, tokens)
    return train, heldout, dropped + heldout_dropped


def _sample(job: StageJob, model: PeftModel, renderer: Renderer, step: int) -> dict[str, float]:
    """Answer held-out prompts (training prompts if there are none) as a user would see it."""
    section, data = job.recipe.sft, job.data["sft"]
    assert section is not None
    records = (data.heldout or data.train)[: section.samples]
    prompts = [as_prompt(record).messages for record in records if not isinstance(record, Text)]
    rendered, _ = render_all(prompts, lambda messages: (messages, renderer.prompt(messages)))
    if not rendered:
        return {}
    generated = generate(
        cast(PreTrainedModel, model),
        [ids for _, ids in rendered],
        max_new_tokens=job.recipe.data.max_response_tokens,
        temperature=1.0,
        end_ids=renderer.end_ids,
        pad_id=pad_id(renderer.tokenizer),
        seed=derive_seed(job.recipe.seed, "sft", "samples"),
        batch_size=section.micro_batch_size or section.batch_size,
        engine="hf",  # the trainer's model keeps the attention that the trainer gave it
    )
    job.sample(
        [
            {
                "step": step,
                "prompt": [{"role": m.role, "content": m.content} for m in messages],
                "response": renderer.decode(response),
                "ended": ended,
            }
            for (messages, _), response, ended in list(
                zip(rendered, generated.responses, generated.ended, strict=True)
            )[:_SAMPLES_SHOWN]
        ]
    )
    return {"eos_rate": sum(generated.ended) / len(generated.ended)}
