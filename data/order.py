"""In which order rows are drawn: a function of seed and position, so that it can be resumed."""

from functools import lru_cache

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


@lru_cache(maxsize=2)
def _permutation(num_rows: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(num_rows)
