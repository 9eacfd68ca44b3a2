"""Make an encoder from text: train a tokenizer, then a small BERT by masked language modelling.

The text is cut into blocks as for a decoder, each behind a ``[CLS]``; documents end with ``[SEP]``.
Of every block 15 % of the tokens are to be guessed: 80 % of them are hidden behind ``[MASK]``, 10 %
are other tokens and 10 % stand as they are (Devlin et al. 2019). As in RoBERTa (Liu et al. 2019)
they are drawn anew whenever a block is seen, and there is no next-sentence prediction.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import PreTrainedTokenizerBase, Trainer

from align.errors import InputError
from align.models import base_facts, new_bert
from align.recipe import Recipe
from align.recipe_pretrain import MASKED, Pretrain
from align.seeds import derive_seed
from data.records import Record
from data.tokenizer import prepare_encoder_tokenizer, train_encoder_tokenizer, training_text
from pipelines.blocks import block_arguments, documents, enough_blocks, given_tokenizer, pack
from pipelines.heldout import perplexity
from pipelines.stage import StageJob, StageResult
from pipelines.trainer_checkpoints import train_to_end

HIDDEN, REPLACED = 0.8, 0.1  # of the tokens to guess


def run(job: StageJob) -> StageResult:
    """Train tokenizer and model on ``data.pretrain``; write both to ``model/``."""
    section = job.recipe.pretrain
    assert section is not None
    data = job.data["pretrain"]

    tokenizer = _tokenizer(job.recipe, data.train)
    train, dropped = documents(data.train, tokenizer)
    heldout, heldout_dropped = documents(data.heldout, tokenizer)
    job.check_dropped("pretrain", len(train) + len(heldout), dropped + heldout_dropped)
    blocks = encoder_blocks(train, section.sequence_length, tokenizer)
    enough_blocks(blocks, section)

    job.log.note(
        f"pretrain  {blocks.numel()} tokens in {len(blocks)} blocks, vocabulary {len(tokenizer)}"
    )
    seed = derive_seed(job.recipe.seed, "pretrain")
    model = new_bert(section.model, tokenizer, seed)
    metrics = train_to_end(_trainer(job, section, model, blocks, tokenizer), job)

    model.eval()
    unseen = encoder_blocks(heldout, section.sequence_length, tokenizer)
    if len(unseen):
        loss = heldout_loss(model, unseen, tokenizer, section.batch_size, seed)
        metrics |= {"loss": loss, "perplexity": perplexity(loss)}
        job.log.log(section.steps, {"perplexity": metrics["perplexity"]})
    folder = job.directory / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = base_facts(str(folder), None).model_copy(update={"architecture": "encoder"})
    return StageResult(metrics=metrics, outputs=("model",), tokenizer=tokenizer, base=facts)


def encoder_blocks(
    rows: list[list[int]], length: int, tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """Cut documents into ``[N, length]`` blocks that begin with the token that classifies."""
    first: Any = tokenizer.cls_token_id
    blocks = pack([row[1:] if row[:1] == [first] else row for row in rows], length - 1)
    return F.pad(blocks, (1, 0), value=first)


def mask_tokens(
    ids: Tensor, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Hide some tokens of every block.

    Args:
        ids: ``[B, T]``; special tokens are never chosen.
        generator: on the CPU; None: torch's own.

    Returns:
        What the model is shown, ``[B, T]``, and which tokens it has to guess, ``[B, T]`` bool: as
        many in each block, or all of one that has not so many.
    """
    device, count = ids.device, max(1, round(MASKED * ids.shape[1]))
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=device))
    draw = partial(torch.rand, ids.shape, generator=generator)
    order = draw().to(device).masked_fill(special, 2.0).argsort(dim=1)
    chosen = torch.zeros_like(special).scatter(1, order[:, :count], True) & ~special
    fate = draw().to(device)
    others = torch.randint(len(tokenizer), ids.shape, generator=generator).to(device)
    shown = torch.where(chosen & (fate < HIDDEN), tokenizer.mask_token_id, ids)
    replaced = chosen & (fate >= HIDDEN) & (fate < HIDDEN + REPLACED)
    return torch.where(replaced, others, shown), chosen


def masked_losses(
    model: nn.Module,
    ids: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the negative log-likelihood of each hidden token, in nats, ``[N]``."""
    shown, chosen = mask_tokens(ids, tokenizer, generator)
    bert: Any = model
    states = bert.base_model(input_ids=shown).last_hidden_state
    return F.cross_entropy(bert.cls(states[chosen]).float(), ids[chosen], reduction="none")


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    blocks: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
) -> float:
    """Return the mean loss over the hidden tokens of blocks; which they are, the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    parts = [
        masked_losses(model, part.to(device), tokenizer, generator)
        for part in blocks.split(batch_size)
    ]
    return torch.cat(parts).mean().item()


class MaskedTrainer(Trainer):
    """A trainer that hides tokens as it computes the loss.

    Not as it collects a batch: that is done ahead of time, and a checkpoint's random generators
    would be ahead with it.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, tokenizer: PreTrainedTokenizerBase, rows: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tokenizer, self._rows = tokenizer, rows  # of an optimiser step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this micro batch's share of the optimiser step's loss."""
        ids = inputs["input_ids"]
        loss = masked_losses(model, ids, self._tokenizer).mean() * (len(ids) / self._rows)
        return (loss, {}) if return_outputs else loss


def _tokenizer(recipe: Recipe, records: tuple[Record, ...]) -> PreTrainedTokenizerBase:
    section = recipe.tokenizer
    if section.id is None:
        return train_encoder_tokenizer(map(training_text, records), section)
    tokenizer = given_tokenizer(recipe)
    if tokenizer.mask_token_id is None:
        raise InputError(f"tokenizer.id={section.id}: has no mask token; allowed: encoders'")
    return prepare_encoder_tokenizer(tokenizer)


def _trainer(
    job: StageJob,
    section: Pretrain,
    model: nn.Module,
    blocks: Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> Trainer:
    return MaskedTrainer(
        tokenizer=tokenizer,
        rows=section.batch_size,
        model=model,
        args=block_arguments(job, section),
        train_dataset=TensorDataset(blocks),
        data_collator=lambda rows: {"input_ids": torch.stack([row[0] for row in rows])},
    )
