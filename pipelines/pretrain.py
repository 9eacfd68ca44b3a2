"""Make a base from text: train a tokenizer, then a small Llama by causal language modelling.

The text becomes one stream of tokens, documents separated by the end token, cut into blocks of
equal length: no padding, and every token but a block's first is predicted. (By the other objective
an encoder is made, in ``pipelines.pretrain_masked``.)
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from align.models import base_facts, new_llama
from align.recipe import Recipe
from align.recipe_pretrain import Pretrain
from align.seeds import derive_seed
from data.records import Record
from data.render import Tokens
from data.tokenizer import prepare_tokenizer, train_tokenizer, training_text
from pipelines import pretrain_masked
from pipelines.blocks import block_arguments, documents, enough_blocks, given_tokenizer, pack
from pipelines.heldout import heldout_loss, perplexity
from pipelines.shared_training import alone_again, share_batches
from pipelines.stage import StageJob, StageResult
from pipelines.trainer_checkpoints import train_to_end


def run(job: StageJob) -> StageResult | None:
    """Train tokenizer and model on ``data.pretrain``; write both to ``model/``."""
    section = job.recipe.pretrain
    assert section is not None
    if section.objective == "masked":
        return pretrain_masked.run(job)
    data = job.data["pretrain"]

    tokenizer = _tokenizer(job.recipe, data.train)
    train, dropped = documents(data.train, tokenizer)
    heldout, heldout_dropped = documents(data.heldout, tokenizer)
    job.check_dropped("pretrain", len(train) + len(heldout), dropped + heldout_dropped)
    blocks = pack(train, section.sequence_length)
    enough_blocks(blocks, section)

    job.log.note(
        f"pretrain  {blocks.numel()} tokens in {len(blocks)} blocks, vocabulary {len(tokenizer)}"
    )
    new = partial(new_llama, section.model, tokenizer, derive_seed(job.recipe.seed, "pretrain"))
    model = new()
    trainer = _trainer(job, section, model, blocks)
    metrics = train_to_end(trainer, job)
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


def _tokenizer(recipe: Recipe, records: Sequence[Record]) -> PreTrainedTokenizerBase:
    section = recipe.tokenizer
    if section.id is None:
        return train_tokenizer(map(training_text, records), section)
    return prepare_tokenizer(given_tokenizer(recipe), section)


def _trainer(job: StageJob, section: Pretrain, model: PreTrainedModel, blocks: Tensor) -> Trainer:
    trainer = Trainer(
        model=model,
        args=block_arguments(job, section),
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
