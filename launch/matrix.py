"""The support matrix: what of method, quantisation, ZeRO and offload goes together in each stage.

Nothing is written down here of what goes: for every cell the smallest recipe is made and judged by
the checks that refuse at launch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, get_args

from pydantic import ValidationError

from align.recipe import Base, Recipe
from align.recipe_adapter import Adapter
from align.recipe_distributed import Distributed

STAGES = ("pretrain", "sft", "reward", "ppo")
NOTES = """\
Columns: one process; else several, with this distributed.zero; o, a: distributed.offload=optimizer,
all. pretrain trains all weights of a base of its own; one process makes evaluate.
DeepSpeed's hybrid engine is not used, and no key turns it on: with it Llama 2 repeats tokens or
generates nothing (microsoft/DeepSpeedExamples issues 503, 821 and 864, DeepSpeed issue 4301)."""

_METHODS = get_args(Adapter.model_fields["method"].annotation)
_QUANTIZATIONS = get_args(Base.model_fields["quantization"].annotation)
_ZEROS = get_args(Distributed.model_fields["zero"].annotation)
_OFFLOADS = get_args(Distributed.model_fields["offload"].annotation)
_RATES = {"lr": 1e-3, "batch_size": 2}
_SECTIONS: dict[str, dict[str, Any]] = {
    "pretrain": {
        "model": {
            "hidden_size": 8,
            "num_layers": 1,
            "num_heads": 1,
            "intermediate_size": 8,
            "max_positions": 8,
        },
        "steps": 1,
        "sequence_length": 8,
    },
    "sft": {},
    "reward": {"center_on": "none"},
    "ppo": {"minibatch_size": 2, "steps": 1, "max_new_tokens": 8},
}
_DATA = {
    "pretrain": {"pretrain": {"train": [{"world": "text"}]}},
    "sft": {"sft": {"train": [{"world": "demonstrations"}]}},
    "reward": {"reward": {"train": [{"world": "rankings"}]}},
    "ppo": {"prompts": {"train": [{"world": "prompts"}]}},
}
_PARENTS = {"pretrain": (), "sft": (), "reward": ("sft",), "ppo": ("sft", "reward")}
_MARKS = {"none": "", "optimizer": "o", "all": "a"}
_VALUE = re.compile(r"(?<=\w)=(\w+)")  # that a key has, in a message
Way = tuple[int, int, str]  # processes, zero, offload


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination; method and quantisation are None in ``pretrain``, which reads neither."""

    stage: str
    method: str | None
    quantization: str | None
    processes: int
    zero: int
    offload: str

    @property
    def values(self) -> dict[str, Any]:
        """The smallest recipe that asks for it, as a file would."""
        keys = ("processes", "zero", "offload")
        recipe: dict[str, Any] = {
            "name": "cell",
            "base": {"id": "a/model"},
            "data": _DATA[self.stage],
            self.stage: _RATES | _SECTIONS[self.stage],
            "distributed": {key: getattr(self, key) for key in keys},
            "run": {"parents": dict.fromkeys(_PARENTS[self.stage], "runs/other")},
        }
        if self.method is None:
            return recipe | {"base": {"id": "pretrain"}, "tokenizer": {"vocab_size": 384}}
        recipe["adapter"] = {"method": self.method}
        if self.method == "top_layers":
            recipe["adapter"]["top_layers"] = 1
        recipe["base"]["quantization"] = self.quantization
        if self.stage == "ppo" and self.method == "full":
            recipe["ppo"] |= {"layout": "separate", "value": {"layout": "separate"}}
        return recipe

    @property
    def refused(self) -> tuple[str, ...]:
        """What the recipe's checks say against it, each as ``key=value: reason``; nothing: runs."""
        values = self.values
        try:
            Recipe.model_validate(values)
        except ValidationError as error:
            return tuple(
                f"{key}={_value(values, key)}: {reason}"
                for details in error.errors(include_url=False)
                for key, reason in _problems(details["loc"], details["ctx"]["problems"])
            )
        return ()


def cells() -> list[Cell]:
    """Return every cell of the matrix."""
    ways = _ways()
    pretrain = [Cell("pretrain", None, None, *way) for way in ways]
    return pretrain + [
        Cell(*what, *way) for *what, way in product(STAGES[1:], _METHODS, _QUANTIZATIONS, ways)
    ]


def matrix() -> list[dict[str, Any]]:
    """Return the cells as JSON, each with the refusals in ``refused``."""
    return [asdict(cell) | {"refused": list(cell.refused)} for cell in cells()]


def print_matrix(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what ``matrix`` has returned: a table a stage, and every reason once."""
    reasons = _reasons(rows)
    letters = {pattern: chr(ord("a") + number) for number, pattern in enumerate(reasons)}
    tables = _tables(rows, letters)
    width = max(len(mark) for lines in tables.values() for _, marks in lines for mark in marks)
    _print_line("", [_head(way) for way in _ways()], width)
    for title, lines in tables.items():
        print(title)
        for name, marks in lines:
            _print_line(f"  {name}", marks, width)
    print("\nyes: runs. A letter: refused before anything is loaded, because")
    for pattern, slots in reasons.items():
        values = ("|".join(dict.fromkeys(slot)) for slot in zip(*slots, strict=True))
        print(f"  {letters[pattern]}  {pattern.format(*values)}")
    print(f"\n{NOTES}")


def _print_line(name: str, marks: Sequence[str], width: int) -> None:
    print(f"{name:28}{' '.join(mark.ljust(width) for mark in marks)}".rstrip())


def _reasons(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """Return the reasons without the values in them; for each, the values that it was given for."""
    found: dict[str, list[list[str]]] = {}
    for row in rows:
        for text in row["refused"]:
            found.setdefault(_pattern(text), []).append(_VALUE.findall(text))
    return found


def _pattern(text: str) -> str:
    return _VALUE.sub("={}", text)


def _tables(
    rows: Sequence[Mapping[str, Any]], letters: Mapping[str, str]
) -> dict[str, list[tuple[str, list[str]]]]:
    """Return a table for each stage: the lines' names and marks; what is alike is put together."""
    marks: dict[str, dict[tuple[str, str], list[str]]] = {}
    for row in rows:
        found = "".join(sorted({letters[_pattern(text)] for text in row["refused"]}))
        of_stage = marks.setdefault(row["stage"], {})
        line = of_stage.setdefault((row["method"] or "", row["quantization"] or ""), [])
        line.append(found or "yes")
    tables: dict[str, list[tuple[str, list[str]]]] = {}
    for stage, lines in marks.items():
        table: list[tuple[str, list[str]]] = []
        for method in dict.fromkeys(method for method, _ in lines):
            alike: dict[tuple[str, ...], list[str]] = {}
            for (of, quantization), line in lines.items():
                if of == method:
                    alike.setdefault(tuple(line), []).append(quantization)
            table += [(f"{method:12}{' '.join(q)}", list(line)) for line, q in alike.items()]
        same = next((title for title, other in tables.items() if other == table), None)
        if same is not None:
            tables = {f"{t}, {stage}" if t == same else t: v for t, v in tables.items()}
        else:
            tables[stage] = table
    return tables


def _ways() -> list[Way]:
    return [(1, 0, "none"), *((2, zero, offload) for zero, offload in product(_ZEROS, _OFFLOADS))]


def _head(way: Way) -> str:
    processes, zero, offload = way
    return "one" if processes == 1 else f"{zero}{_MARKS[offload]}"


def _problems(
    where: tuple[int | str, ...], problems: list[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    for key, reason in problems:
        yield ".".join(map(str, (*where, key))), reason


def _value(values: Mapping[str, Any], key: str) -> Any:
    here: Any = values
    for part in key.split("."):
        here = here[part]
    return here
