"""Text as blocks of equal length, and training on them: no padding, nothing but a rest is left out.

Both objectives of pretraining share this.
"""

from collections.abc import Callable, Sequence, Sized
from itertools import chain

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from align.errors import InputError
from align.recipe import Recipe
from align.recipe_pretrain import Pretrain
from data.lost import LostRows
from data.records import Record
from data.render import Renderer, render_all
from pipelines.stage import StageJob
from pipelines.trainer_log import training_arguments

_NO_LIMIT = 2**31


def documents(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], LostRows]:
    """Return each record's ids, see ``document_writer``, and the records that were dropped."""
    return render_all(records, document_writer(tokenizer))


def document_writer(tokenizer: PreTrainedTokenizerBase) -> Callable[[Record], list[int]]:
    """Return what gives a record's ids, the end token last, or raises Unusable.

    Text never becomes a special token, whatever it holds.
    """
    renderer = Renderer(tokenizer, _NO_LIMIT, _NO_LIMIT)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else renderer.end_ids[0]

    def write(record: Record) -> list[int]:
        row = renderer.document(record)
        return row if row[-1:] == [end] else [*row, end]

    return write


def pack(rows: Sequence[list[int]], length: int) -> Tensor:
    """Join rows to one stream and cut it into ``[N, length]`` blocks; the rest is left out."""
    stream = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.long)
    whole = len(stream) // length
    return stream[: whole * length].view(whole, length)


def enough_blocks(blocks: Sized, section: Pretrain) -> None:
    """Refuse a text of which there is not even one batch of blocks, or of rows for pairs.

    Raises:
        InputError: says how much there is, and what can be made smaller.
    """
    if len(blocks) < section.batch_size:
        kind = "rows of at most" if section.next_sentence else "blocks of"
        raise InputError(
            f"data.pretrain: gives {len(blocks)} {kind} sequence_length="
            f"{section.sequence_length} tokens, fewer than batch_size={section.batch_size};"
            " give more text, or make one of the two smaller"
        )


def given_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer that ``tokenizer.id`` names.

    Raises:
        InputError: it cannot be loaded.
    """
    name = recipe.tokenizer.id
    trusted = recipe.base.trust_remote_code
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trusted
        )
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer.id={name}: cannot be loaded: {error}") from error
    return tokenizer


def block_arguments(job: StageJob, section: Pretrain) -> TrainingArguments:
    """Return a trainer's settings for training on blocks, or on pairs, which are padded."""
    arguments: TrainingArguments = training_arguments(
        TrainingArguments,
        section,
        job.directory,
        steps=section.steps,
        seed=job.recipe.seed,
        distributed=job.recipe.distributed,
        dataloader_drop_last=True,  # every step has full batches
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding" if section.next_sentence else "all",
    )
    return arguments
