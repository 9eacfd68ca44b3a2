"""Make an encoder from text: train a tokenizer, then a small BERT by masked language modelling.

The text is cut into blocks as for a decoder, each behind a ``[CLS]``; documents end with ``[SEP]``.
Of every block 15 % of the tokens are to be guessed: 80 % of them are hidden behind ``[MASK]``, 10 %
are other tokens and 10 % stand as they are (Devlin et al. 2019). As in RoBERTa (Liu et al. 2019)
they are drawn anew whenever a block is seen, and there is no next-sentence prediction; with it
(``pretrain.next_sentence``) rows are pairs of texts, see ``pipelines.next_sentence``.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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
from pipelines.next_sentence import PairRows, pair_rows
from pipelines.stage import StageJob, StageResult
from pipelines.trainer_checkpoints import train_to_end

HIDDEN, REPLACED = 0.8, 0.1  # of the tokens to guess


@dataclass(frozen=True)
class Blocks:
    """Blocks ``[N, T]`` as rows that are read as they are."""

    ids: Tensor
    left_out: int = 0  # documents; of a stream none is too short

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """How many the blocks have."""
        return self.ids.numel()

    def collate(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the rows of these numbers as a batch."""
        return {"input_ids": self.ids[rows]}

    def draw(
        self, inputs: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the batch: there is nothing to draw."""
        return inputs


Texts = Blocks | PairRows


class Losses(NamedTuple):
    """Negative log-likelihoods, in nats.

    Attributes:
        hidden: of each hidden token, ``[N]``.
        pairs: of whether B follows A in each row, ``[B]``; None where there are no pairs.
    """

    hidden: Tensor
    pairs: Tensor | None = None


def run(job: StageJob) -> StageResult:
    """Train tokenizer and model on ``data.pretrain``; write both to ``model/``."""
    section = job.recipe.pretrain
    assert section is not None
    data = job.data["pretrain"]

    tokenizer = _tokenizer(job.recipe, data.train)
    train, dropped = documents(data.train, tokenizer)
    heldout, heldout_dropped = documents(data.heldout, tokenizer)
    job.check_dropped("pretrain", len(train) + len(heldout), dropped + heldout_dropped)
    texts = _texts(train, "train", section, tokenizer)
    unseen = _texts(heldout, "heldout", section, tokenizer)
    enough_blocks(texts, section)

    kind = "rows" if section.next_sentence else "blocks"
    job.log.note(
        f"pretrain  {texts.num_tokens} tokens in {len(texts)} {kind}, vocabulary {len(tokenizer)}"
    )
    if left_out := texts.left_out + unseen.left_out:
        job.log.note(f"pretrain  {left_out} documents left out: too short to be split in two")
    seed = derive_seed(job.recipe.seed, "pretrain")
    model = new_bert(section.model, tokenizer, seed, next_sentence=section.next_sentence)
    metrics = train_to_end(_trainer(job, section, model, texts, tokenizer), job)

    model.eval()
    if len(unseen):
        found = heldout_metrics(model, unseen, tokenizer, section.batch_size, seed)
        metrics |= found
        job.log.log(section.steps, {key: found[key] for key in found if key != "loss"})
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


def num_hidden(inputs: dict[str, Tensor]) -> Tensor:
    """Return how many tokens of each row are to be guessed, ``[B]``; padding does not count."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    lengths = mask.sum(1) if mask is not None else torch.full_like(ids[:, 0], ids.shape[1])
    return (MASKED * lengths.double()).round().clamp(min=1).long()


def mask_tokens(
    inputs: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide some tokens of every row.

    Args:
        inputs: with ``input_ids``, ``[B, T]``; special tokens, as padding, are never chosen.
        generator: on the CPU; None: torch's own.

    Returns:
        What the model is shown, ``[B, T]``, and which tokens it has to guess, ``[B, T]`` bool: as
        many as ``num_hidden`` says, or all of a row that has not so many.
    """
    ids = inputs["input_ids"]
    device = ids.device
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=device))
    draw = partial(torch.rand, ids.shape, generator=generator)
    order = draw().to(device).masked_fill(special, 2.0).argsort(dim=1)
    first = torch.arange(ids.shape[1], device=device) < num_hidden(inputs)[:, None]
    chosen = torch.zeros_like(special).scatter(1, order, first) & ~special
    fate = draw().to(device)
    others = torch.randint(len(tokenizer), ids.shape, generator=generator).to(device)
    shown = torch.where(chosen & (fate < HIDDEN), tokenizer.mask_token_id, ids)
    replaced = chosen & (fate >= HIDDEN) & (fate < HIDDEN + REPLACED)
    return torch.where(replaced, others, shown), chosen


def masked_losses(
    model: nn.Module,
    inputs: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator | None = None,
) -> Losses:
    """Hide tokens of rows and return what the model makes of them.

    Args:
        inputs: as ``Texts.draw`` returns them.
    """
    device = next(model.parameters()).device
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    shown, chosen = mask_tokens(given, tokenizer, generator)
    ids, label = given.pop("input_ids"), given.pop("next_sentence_label", None)
    bert: Any = model
    output = bert.base_model(input_ids=shown, **given)
    guesses = bert.cls.predictions(output.last_hidden_state[chosen]).float()
    hidden = F.cross_entropy(guesses, ids[chosen], reduction="none")
    if label is None:
        return Losses(hidden)
    answers = bert.cls.seq_relationship(output.pooler_output).float()
    return Losses(hidden, F.cross_entropy(answers, label, reduction="none"))


@torch.no_grad()
def heldout_metrics(
    model: nn.Module,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Return the mean losses over rows; what is hidden and how rows are split, the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for rows in torch.arange(len(texts)).split(batch_size):
        inputs = texts.draw(texts.collate(rows), generator)
        parts.append(masked_losses(model, inputs, tokenizer, generator))
    loss = torch.cat([part.hidden for part in parts]).mean().item()
    metrics = {"loss": loss, "perplexity": perplexity(loss)}
    pairs = [part.pairs for part in parts if part.pairs is not None]
    if pairs:
        nll = torch.cat(pairs)
        metrics["next_sentence/loss"] = nll.mean().item()
        # Of two answers the right one is the likelier.
        metrics["next_sentence/accuracy"] = (nll < math.log(2)).float().mean().item()
    return metrics


class MaskedTrainer(Trainer):
    """A trainer that hides tokens, and splits rows into pairs, as it computes the loss.

    Not as it collects a batch: that is done ahead of time, and a checkpoint's random generators
    would be ahead with it.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, *, texts: Texts, tokenizer: PreTrainedTokenizerBase, rows: int, **arguments: Any
    ) -> None:
        super().__init__(
            train_dataset=TensorDataset(torch.arange(len(texts))),
            data_collator=lambda items: texts.collate(torch.stack([row for (row,) in items])),
            **arguments,
        )
        self._texts, self._tokenizer, self._rows = texts, tokenizer, rows  # of an optimiser step

    def get_batch_samples(self, *arguments: Any) -> Any:
        """Return a step's micro batches, and how many tokens a step of such rows has to guess.

        Rows differ in that number, and the mean is over all of the step. An epoch's last step may
        have fewer rows; it counts for less.
        """
        batches, _ = super().get_batch_samples(*arguments)
        rows = sum(len(batch["input_ids"]) for batch in batches)
        hidden = sum(int(num_hidden(batch).sum()) for batch in batches)
        return batches, hidden * self._rows / rows

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Any:
        """Return this micro batch's share of the optimiser step's loss."""
        assert num_items_in_batch is not None
        losses = masked_losses(model, self._texts.draw(inputs), self._tokenizer)
        # Rows of special tokens alone have nothing to hide; the mean of nothing would be NaN.
        mean = losses.hidden.sum() / max(1, len(losses.hidden))
        loss = mean * (int(num_hidden(inputs).sum()) / num_items_in_batch)
        if losses.pairs is not None:
            loss = loss + losses.pairs.sum() / self._rows
        return (loss, {}) if return_outputs else loss


def _texts(
    rows: list[list[int]], split: str, section: Pretrain, tokenizer: PreTrainedTokenizerBase
) -> Texts:
    """Return the rows of a split.

    Raises:
        InputError: there are none to make pairs of.
    """
    if section.next_sentence:
        return pair_rows(rows, section.sequence_length, tokenizer, f"data.pretrain.{split}")
    return Blocks(encoder_blocks(rows, section.sequence_length, tokenizer))


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
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
) -> Trainer:
    return MaskedTrainer(
        texts=texts,
        tokenizer=tokenizer,
        rows=section.batch_size,
        model=model,
        args=block_arguments(job, section),
    )
