"""In which order rows are drawn: a function of seed and position, so that it can be resumed."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice, repeat
from typing import Protocol

import numpy as np

from align.seeds import derive_seed


def draw(num_rows: int, start: int, count: int, seed: int) -> list[int]:
    """Return row numbers ``start`` to ``start + count`` of an endless shuffled stream.

    The stream is one seeded permutation of all rows after another: every row is seen once before
    any is seen again.
    """
    return [
        int(_permutation(num_rows, position // num_rows, seed)[position % num_rows])
        for position in range(start, start + count)
    ]


class Order(Protocol):
    """An order of rows, epoch by epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn next."""

    def __len__(self) -> int:
        """Return the rows of an epoch."""

    def __iter__(self) -> Iterator[int]:
        """Draw them."""


class WholeBatches:
    """An order in which every epoch consists of whole batches, so that processes can share each.

    Args:
        order: of the rows.
        batch_size: rows of a whole batch.
        blank: the row to fill the last batch of an epoch with; None: a last batch that is not whole
            is left out.
    """

    def __init__(self, order: Order, batch_size: int, blank: int | None) -> None:
        self._order, self._batch_size, self._blank = order, batch_size, blank

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn next; the data loader calls it."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        rest = len(self._order) % self._batch_size
        return (
            len(self._order) - rest + (self._batch_size if rest and self._blank is not None else 0)
        )

    def __iter__(self) -> Iterator[int]:
        fill: Iterable[int] = () if self._blank is None else repeat(self._blank)
        return islice(chain(self._order, fill), len(self))


class SortedBatches:
    """The sampler of a data loader: shuffled rows, those of an optimiser step sorted by length.

    So the micro-batches of a step hold little padding; its gradient is that of any other order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn next; the data loader calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rows = draw(len(self), self._epoch * len(self), len(self), self._seed)
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            yield from sorted(batch, key=self._lengths.__getitem__)


@lru_cache(maxsize=2)
def _permutation(num_rows: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(num_rows)
