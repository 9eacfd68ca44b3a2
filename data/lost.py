"""Rows that are dropped: how many for which reason, and which they are, in words for messages."""

from collections.abc import Sequence
from dataclasses import dataclass, field

LISTED = 20  # rows that a message names for one reason; the rest is counted


@dataclass(frozen=True, slots=True)
class LostRows:
    """The rows that were dropped: by reason, the origin (``file:row``) of each."""

    origins: dict[str, list[str]] = field(default_factory=dict)

    def __add__(self, other: "LostRows") -> "LostRows":
        both = LostRows()
        for origins in (self.origins, other.origins):
            for reason, rows in origins.items():
                both.origins.setdefault(reason, []).extend(rows)
        return both

    def __bool__(self) -> bool:
        return bool(self.origins)

    def add(self, reason: str, origin: str) -> None:
        """Note a row."""
        self.origins.setdefault(reason, []).append(origin)

    def total(self) -> int:
        """Return how many rows there are."""
        return sum(map(len, self.origins.values()))

    def counts(self) -> dict[str, int]:
        """Return how many rows were dropped for which reason."""
        return {reason: len(rows) for reason, rows in self.origins.items()}

    def named(self) -> str:
        """Return all reasons with their counts and rows: ``too_long 2 (a.jsonl rows 3, 9)``."""
        return ", ".join(
            f"{reason} {len(rows)} ({_by_file(rows)})"
            for reason, rows in sorted(self.origins.items())
        )


def row_numbers(numbers: Sequence[str]) -> str:
    """Name rows of one file: ``rows 3, 9``, and of more than are listed how many."""
    return _rows(numbers[:LISTED]) + _more(numbers)


def _by_file(origins: Sequence[str]) -> str:
    """Name rows by their files: ``a.jsonl rows 3, 9; b.jsonl row 1``."""
    numbers: dict[str, list[str]] = {}
    for origin in origins[:LISTED]:
        file, _, number = origin.rpartition(":")
        numbers.setdefault(file, []).append(number)
    return "; ".join(f"{file} {_rows(its)}" for file, its in numbers.items()) + _more(origins)


def _rows(numbers: Sequence[str]) -> str:
    return f"row{'s'[: len(numbers) > 1]} {', '.join(numbers)}"


def _more(rows: Sequence[str]) -> str:
    return f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
