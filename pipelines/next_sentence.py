"""Pairs of texts for next-sentence prediction: rows of documents, split anew when they are seen.

A row is read as ``[CLS] A [SEP] B [SEP]``. A and B are neighbours in a document, or B is another
document's, which the model has to tell (Devlin et al. 2019, section 3.1, task 2); a "sentence" is
any stretch of text. Whichever B it is, it has as many tokens and ends where a row ends: else the
lengths alone would tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.errors import InputError
from data.collate import pad_right, right_padded_mask

_SPECIAL = 3  # [CLS], and [SEP] twice
_SHORTEST = 2  # tokens of a document, that A and B have one each
_OTHERS = 0.5  # of the rows have another document's B


@dataclass(frozen=True)
class PairRows:
    """Documents in rows that can be split in two.

    Attributes:
        texts: the ids of each row, without what is put around and between A and B. Those of a
            document follow one another.
        first: ``[N]``, the number of the first row of each row's document.
        siblings: ``[N]``, how many rows that document has.
        left_out: how many documents are too short to be split.
    """

    texts: list[list[int]]
    first: Tensor
    siblings: Tensor
    left_out: int
    tokenizer: PreTrainedTokenizerBase

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def num_tokens(self) -> int:
        """How many the rows have as they are read."""
        return sum(len(text) + _SPECIAL for text in self.texts)

    def collate(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the numbers ``[B]`` of a batch's rows, and the rows themselves, not split yet.

        They are as long as they will be: a trainer counts tokens by them.
        """
        begin, separator = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        whole = [[begin, *self.texts[row], separator, separator] for row in rows.tolist()]
        return {"rows": rows, **self._padded(whole)}

    def draw(
        self, inputs: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Split rows, and give half of them the B of another document.

        Args:
            inputs: from ``collate``.
            generator: on the CPU; None: torch's own.

        Returns:
            What ``BertForPreTraining`` takes: ``input_ids``, ``attention_mask``, ``token_type_ids``
            (1 for B and what ends it, else 0), ``[B, T]``; and ``next_sentence_label``, ``[B]``: 1
            where B is another document's.
        """
        rows = inputs["rows"].cpu()
        draw = partial(torch.rand, len(rows), dtype=torch.float64, generator=generator)
        texts = [self.texts[row] for row in rows.tolist()]
        others = [self.texts[row] for row in self._elsewhere(rows, draw()).tolist()]
        shorter = torch.tensor([min(map(len, both)) for both in zip(texts, others, strict=True)])
        ends = 1 + (draw() * (shorter - 1)).long()  # tokens of B, which is all of neither
        replaced = draw() < _OTHERS
        begin, separator = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        pairs, segments = [], []
        choices = zip(texts, others, ends.tolist(), replaced.tolist(), strict=True)
        for text, other, end, is_replaced in choices:
            a = [begin, *text[:-end], separator]
            b = [*(other if is_replaced else text)[-end:], separator]
            pairs.append(a + b)
            segments.append([0] * len(a) + [1] * len(b))
        return {
            **self._padded(pairs),
            "token_type_ids": pad_right(segments, 0),
            "next_sentence_label": replaced.long(),
        }

    def _elsewhere(self, rows: Tensor, draws: Tensor) -> Tensor:
        """Return a row of another document for each row; ``draws`` in [0, 1) choose among all."""
        first, siblings = self.first[rows], self.siblings[rows]
        others = (draws * (len(self) - siblings)).long()
        return others + siblings * (others >= first)

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        ids = pad_right(rows, self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": right_padded_mask(rows).long()}


def pair_rows(
    documents: Sequence[list[int]], length: int, tokenizer: PreTrainedTokenizerBase, source: str
) -> PairRows:
    """Divide documents into as few rows of at most ``length`` tokens as they fill, equally long.

    Args:
        documents: see ``pipelines.blocks.documents``.
        source: the recipe key that they come from, for the message.

    Raises:
        InputError: there are documents, but not two that can be split.
    """
    texts: list[list[int]] = []
    sizes: list[int] = []  # of documents, in rows
    for document in documents:
        text = document[int(document[:1] == [tokenizer.cls_token_id]) : -1]
        if len(text) < _SHORTEST:
            continue
        size = -(-len(text) // (length - _SPECIAL))
        bounds = [len(text) * part // size for part in range(size + 1)]
        texts += [text[start:stop] for start, stop in pairwise(bounds)]
        sizes.append(size)
    if documents and len(sizes) < 2:
        raise InputError(
            f"{source}: {len(sizes)} of {len(documents)} documents can be split in two, and"
            " pretrain.next_sentence=true gives half of the rows the end of another document's;"
            " allowed: at least 2 (a .txt file is one)"
        )
    siblings = torch.tensor(sizes, dtype=torch.long)
    first = siblings.cumsum(0) - siblings
    return PairRows(
        texts=texts,
        first=first.repeat_interleave(siblings),
        siblings=siblings.repeat_interleave(siblings),
        left_out=len(documents) - len(sizes),
        tokenizer=tokenizer,
    )
