"""Supervised instruction tuning: an adapter, or the whole model, learns the assistant's turns.

Rows come from ``data.render`` with their labels; TRL's trainer neither renders, tokenises, masks
nor truncates anything here.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from align.adapter_methods import adapter_config, check_trained, say_share, trained_share
from align.adapters import save_trained
from align.attention import Layout, attention_set, packed_attention
from align.errors import InputError, TrainingError
from align.generation import generate
from align.models import (
    base_config,
    base_location,
    check_room,
    first_line,
    load_causal_lm,
    load_trained,
    recipe_base_facts,
    recompute_activations,
)
from align.recipe import Recipe, Sft
from align.seeds import derive_seed
from data.collate import collate_demonstrations
from data.lost import LostRows
from data.records import Demonstration, Labelled, Ranking, Record, Text, as_demonstration, as_prompt
from data.render import IGNORED, Renderer, Tokens, render_all
from data.tokenizer import prepare_tokenizer, stop_ids
from pipelines.best_copy import HeldoutLooks, check_heldout
from pipelines.heldout import heldout_loss, perplexity
from pipelines.memory_check import check_memory
from pipelines.shared_training import alone_again, share_batches
from pipelines.stage import StageJob, StageResult
from pipelines.trainer_checkpoints import train_to_end
from pipelines.trainer_log import num_steps, training_arguments

_SAMPLES_SHOWN = 16  # answers that go to samples.jsonl
_PROBE_ROWS = 4  # rows on which the saved model is compared with the one in memory

Trained = PeftModel | PreTrainedModel


def run(job: StageJob) -> StageResult | None:
    """Tune by ``adapter.method`` on ``data.sft``; write ``model/``, and sampled answers."""
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
    check_heldout("sft", section, heldout)
    check_room(recipe, base_config(recipe, location), tokenizer)
    base_model = load_causal_lm(recipe, location)
    base_parameters = base_model.num_parameters()
    model = add_adapter(base_model, recipe)
    trainer = make_trainer(job, section, model, tokenizer, train)
    looks = _looks(job, section, base_model, model, heldout, tokenizer)
    with separate_rows(trainer, base_model, section):
        if not recipe.distributed.zero:
            try_longest(recipe, section, trainer)
        share = trained_share(model, base_parameters)
        job.log.note(f"sft  {say_share(recipe.adapter.method, share)}")
        logged = train_to_end(trainer, job, looks)
    if recipe.distributed.together:
        whole = alone_again(trainer, model, partial(_new_model, recipe, location))
        if whole is None:
            return None
        model = whole
        del whole
    model.eval()
    # First of all: what follows may run out of memory.
    folder = job.directory / "model"
    save_trained(model, folder, base=location, revision=base.revision)
    tokenizer.save_pretrained(folder)

    metrics = logged | share | looks.kept
    if heldout:
        loss = _heldout_loss(model, section, heldout, tokenizer)
        metrics = metrics | {"loss": loss, "perplexity": perplexity(loss)}
    metrics = metrics | _sample(job, model, renderer, trainer.state.global_step)
    final: dict[str, float] = {
        key: metrics[key] for key in ("perplexity", "eos_rate") if key in metrics
    }
    job.log.log(trainer.state.global_step, final)
    probe = (heldout or train)[:_PROBE_ROWS]
    expected = probe_logits(model, probe)
    # The live model goes first: two of them need not fit into memory.
    del model, base_model, trainer, looks
    gc.collect()
    check_reload(recipe, location, folder, probe, expected)
    return StageResult(metrics, ("model",), tokenizer, base)


def _heldout_loss(
    model: Trained, section: Sft, rows: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase
) -> float:
    batch_size = section.micro_batch_size or section.batch_size
    return heldout_loss(cast(PreTrainedModel, model), rows, pad_id(tokenizer), batch_size)


def _looks(
    job: StageJob,
    section: Sft,
    base: PreTrainedModel,
    model: Trained,
    heldout: Sequence[Tokens],
    tokenizer: PreTrainedTokenizerBase,
) -> HeldoutLooks:
    """Return the looks at the held-out loss, in the attention that ``base`` has now."""
    attention = base.config._attn_implementation

    def measure() -> dict[str, float]:
        with attention_set(base, attention):  # that of packs knows no other batches
            return {"loss": _heldout_loss(model, section, heldout, tokenizer)}

    parameters = [p for p in model.parameters() if p.requires_grad]
    return HeldoutLooks(section, job.log, parameters, "loss", measure)


def _new_model(recipe: Recipe, location: str) -> Trained:
    return add_adapter(load_causal_lm(recipe, location), recipe)


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


def add_adapter(model: PreTrainedModel, recipe: Recipe) -> Trained:
    """Prepare ``model`` for the recipe's adapter method: what it trains is float32.

    Raises:
        InputError: the model has nothing that the method trains.
        TrainingError: something else would be trained, or in another precision.
    """
    config = adapter_config(recipe.adapter, "CAUSAL_LM", model)
    torch.manual_seed(derive_seed(recipe.seed, "sft", "adapter"))
    adapted: Trained = (
        model.requires_grad_(True) if config is None else get_peft_model(model, config)
    )
    check_trained(adapted, recipe.adapter.method)
    if recipe.base.gradient_checkpointing:
        recompute_activations(model)
    return adapted


def make_trainer(
    job: StageJob,
    section: Sft,
    model: Trained,
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
            distributed=job.recipe.distributed,
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
    check_trained(model, job.recipe.adapter.method)
    kept = cast(Dataset, trainer.train_dataset)
    count = sum(len(pack) for pack in kept["seq_lengths"]) if section.packing else len(kept)
    learned = sum(label != IGNORED for labels in kept["labels"] for label in labels)
    wanted = sum(label != IGNORED for row in rows for label in row.labels)
    if (count, learned) != (len(rows), wanted):
        raise TrainingError(
            f"sft: {len(rows)} rows with {wanted} learned tokens went into the trainer, which has"
            f" {count} with {learned}"
        )
    if job.recipe.distributed.together:
        trainer.train_dataset = kept.add_item(_blank(kept))
        share_batches(trainer, section, len(kept), blank=True)
    return trainer


def _blank(rows: Dataset) -> dict[str, Any]:
    """Return a row like the others from which nothing is learned, as short as can be."""
    blank = {"input_ids": rows[0]["input_ids"][:2], "labels": [IGNORED] * 2}
    return blank | ({"seq_lengths": [2]} if "seq_lengths" in rows.column_names else {})


@contextmanager
def separate_rows(trainer: SFTTrainer, base: PreTrainedModel, section: Sft) -> Iterator[None]:
    """Have our attention tell the rows of a pack apart; without packing there is nothing to do.

    The mask that is used otherwise costs as much as one text as long as the pack. It is left to
    bases that cannot have our attention.
    """
    collate = trainer.data_collator
    if not section.packing:
        yield
        return

    def with_lengths(packs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(packs)
        lengths = [length for pack in packs for length in pack["seq_lengths"]]
        names = ("input_ids", "labels", "position_ids")
        return {name: batch[name] for name in names} | {"layout": Layout(lengths)}

    with packed_attention(base) as possible:
        if possible:
            trainer.data_collator = with_lengths
        yield


def try_longest(recipe: Recipe, section: Sft, trainer: SFTTrainer) -> None:
    """Go once through the longest micro-batch there is; see ``pipelines.memory_check``."""
    rows, model = cast(Dataset, trainer.train_dataset), cast(PreTrainedModel, trainer.model)
    lengths = [len(ids) for ids in rows["input_ids"]]
    count = section.micro_batch_size or section.batch_size
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-count:]

    def step() -> Tensor:
        batch = trainer.data_collator([rows[i] for i in longest])
        model.train()
        loss: Tensor = trainer.compute_loss(model, send_to_device(batch, model.device))
        return loss

    what = f"{len(longest)} rows of up to {lengths[longest[-1]]} tokens"
    check_memory(recipe, "sft", list(model.parameters()), step, what)


@torch.no_grad()
def probe_logits(model: Trained, rows: Sequence[Tokens]) -> Tensor:
    """Return the logits of some rows, ``[B, T, V]``, in evaluation mode, which is left on."""
    batch = collate_demonstrations(list(rows), pad_id=0)
    del batch["labels"]
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits: Tensor = model.eval()(**inputs, use_cache=False).logits
    return logits


def check_reload(
    recipe: Recipe, location: str, folder: Path, rows: Sequence[Tokens], here: Tensor
) -> None:
    """Load what was saved, an adapter on a fresh base, and compare logits with the trained model's.

    Args:
        here: ``probe_logits`` of the trained model.

    Raises:
        TrainingError: they differ.
    """
    fresh = load_trained(recipe, location, folder)
    fresh.to(cast(Any, here.device))
    again = probe_logits(fresh, rows)
    if not torch.equal(here, again):
        worst = (here - again).abs().max().item()
        raise TrainingError(
            f"sft: {folder} does not load as what was trained: logits differ by up to {worst:.3g}"
        )


def _rows(job: StageJob, renderer: Renderer) -> tuple[list[Tokens], list[Tokens], LostRows]:
    """Return the tokenised training and held-out rows, and those that were dropped."""

    def tokens(record: Record) -> Tokens:
        assert isinstance(record, Demonstration | Ranking)
        return renderer.demonstration(as_demonstration(record).messages)

    data = job.data["sft"]
    train, dropped = render_all(data.train, tokens)
    heldout, heldout_dropped = render_all(data.heldout, tokens)
    return train, heldout, dropped + heldout_dropped


def _sample(job: StageJob, model: Trained, renderer: Renderer, step: int) -> dict[str, float]:
    """Answer held-out prompts (training prompts if there are none) as a user would see it."""
    section, data = job.recipe.sft, job.data["sft"]
    assert section is not None
    records = (data.heldout or data.train)[: section.samples]
    prompts = [as_prompt(record) for record in records if not isinstance(record, Text | Labelled)]
    rendered, _ = render_all(prompts, lambda row: (row.messages, renderer.prompt(row.messages)))
    if not rendered:
        return {}
    generated = generate(
        cast(PreTrainedModel, model),
        [ids for _, ids in rendered],
        max_new_tokens=job.recipe.data.max_response_tokens,
        temperature=1.0,
        end_ids=stop_ids(renderer.tokenizer, model.config.eos_token_id),
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
