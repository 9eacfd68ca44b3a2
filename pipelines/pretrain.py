"""Make a base from text: train a tokenizer, then a small Llama by causal language modelling.

The text becomes one stream of tokens, documents separated by the end token, cut into blocks of
equal length: no padding, and every token but a block's first is predicted.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from align.errors import InputError
from align.models import base_facts, new_llama
from align.recipe import Pretrain, Recipe
from align.seeds import derive_seed
from data.records import Record
from data.render import Renderer, Tokens, render_all
from data.tokenizer import prepare_tokenizer, train_tokenizer, training_text
from pipelines.heldout import heldout_loss, perplexity
from pipelines.shared_training import alone_again, share_batches
from pipelines.stage import StageJob, StageResult
from pipelines.trainer_checkpoints import train_to_end
from pipelines.trainer_log import training_arguments

_NO_LIMIT = 2**31


def run(job: StageJob) -> StageResult | None:
    """Train tokenizer and model on ``data.pretrain``; write both to ``model/``."""
    section = job.recipe.pretrain
    assert section is not None
    data = job.data["pretrain"]

    tokenizer = _tokenizer(job.recipe, data.train)
    train, dropped = documents(data.train, tokenizer)
    heldout, heldout_dropped = documents(data.heldout, tokenizer)
    job.check_dropped("pretrain", len(train) + len(heldout), dropped + heldout_dropped)
    blocks = pack(train, section.sequence_length)
    if len(blocks) < section.batch_size:
        raise InputError(
            f"data.pretrain: gives {len(blocks)} blocks of sequence_length="
            f"{section.sequence_length} tokens, fewer than batch_size={section.batch_size};"
            " give more text, or make one of the two smaller"
        )

    job.log.note(
        f"pretrain  {blocks.numel()} tokens in {len(blocks)} blocks, vocabulary {len(tokenizer)}"
    )
    new = partial(new_llama, section.model, tokenizer, derive_seed(job.recipe.seed, "pretrain"))
    model = new()
    trainer = _trainer(job, section, model, blocks)
    metrics = train_to_end(trainer, job).last
    if job.recipe.distributed.together:
        whole = alone_again(trainer, model, new)
        if whole is None:
            return None
        model = whole
        del whole

    model.eval()
    if heldout:
        rows = [Tokens(ids, ids) for ids in _cut(heldout, section.sequence_length)]
        loss = heldout_loss(model, rows, tokenizer.pad_token_id, section.batch_size)
        metrics |= {"loss": loss, "perplexity": perplexity(loss)}
        job.log.log(section.steps, {"perplexity": metrics["perplexity"]})
    folder = job.directory / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return StageResult(
        metrics=metrics,
        outputs=("model",),
        tokenizer=tokenizer,
        base=base_facts(str(folder), None),
    )


def documents(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], Counter[str]]:
    """Return each record's ids, the end token last, and why records were dropped.

    Text never becomes a special token, whatever it holds.
    """
    renderer = Renderer(tokenizer, _NO_LIMIT, _NO_LIMIT)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else renderer.end_ids[0]
    kept, dropped = render_all(records, renderer.document)
    return [row if row[-1:] == [end] else [*row, end] for row in kept], dropped


def pack(rows: Sequence[list[int]], length: int) -> Tensor:
    """Join rows to one stream and cut it into ``[N, length]`` blocks; the rest is left out."""
    stream = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long)
    whole = len(stream) // length
    return stream[: whole * length].view(whole, length)


def _tokenizer(recipe: Recipe, records: Sequence[Record]) -> PreTrainedTokenizerBase:
    section = recipe.tokenizer
    if section.id is None:
        return train_tokenizer(map(training_text, records), section)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.id, trust_remote_code=recipe.base.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer.id={section.id}: cannot be loaded: {error}") from error
    return prepare_tokenizer(tokenizer, section)


def _trainer(job: StageJob, section: Pretrain, model: PreTrainedModel, blocks: Tensor) -> Trainer:
    trainer = Trainer(
        model=model,
        args=training_arguments(
            TrainingArguments,
            section,
            job.directory,
            steps=section.steps,
            seed=job.recipe.seed,
            distributed=job.recipe.distributed,
            dataloader_drop_last=True,  # every step has full batches
            remove_unused_columns=False,
            include_num_input_tokens_seen="all",
        ),
        train_dataset=TensorDataset(blocks),
        data_collator=_collate,
    )
    if job.recipe.distributed.together:
        share_batches(trainer, section, len(blocks), blank=False)
    return trainer


def _collate(rows: list[tuple[Tensor]]) -> dict[str, Tensor]:
    """Return a batch without an attention mask: there is no padding."""
    block = torch.stack([row[0] for row in rows])
    return {"input_ids": block, "labels": block}


def _cut(rows: Sequence[list[int]], length: int) -> list[list[int]]:
    """Cut the joined rows into pieces of ``length``; the last may be shorter, but predicts."""
    stream = list(chain.from_iterable(rows))
    pieces = [stream[i * length : (i + 1) * length] for i in range(math.ceil(len(stream) / length))]
    return [piece for piece in pieces if len(piece) > 1]
