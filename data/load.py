"""The records of a stage: every row of every source read and judged before a model is loaded."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from align.errors import DataError, printable_lines
from align.inputs import source_fingerprint, stage_data
from align.manifest import DataFacts
from align.recipe import Recipe, Source, StageData, StageName
from align.recipe_reward import Classes
from data.conversations import Dropped, Fault
from data.lost import LISTED, row_numbers
from data.records import (
    Demonstration,
    Labelled,
    Message,
    Prompt,
    Ranking,
    Record,
    Text,
    as_demonstration,
    as_prompt,
)
from data.shapes import find_shape, to_record
from data.sources import read_source
from data.world import world_records

INVALID = "invalid"  # what malformed rows are counted under where data.bad_rows is drop

# What the stages that read a section need; `classes` is the section of a reward stage that makes a
# classifier.
_NEEDS: dict[str, str] = {
    "pretrain": "text",
    "sft": "answers",
    "reward": "ranked responses",
    "classes": "rows with a label each",
    "prompts": "prompts",
    "benchmark": "ranked responses",
}
_STAGE_OF = {"prompts": "ppo", "benchmark": "evaluate", "classes": "reward"}
_HOLDS: dict[type, str] = {
    Text: "plain text",
    Prompt: "prompts only",
    Demonstration: "demonstrations without a comparison",
    Ranking: "rankings",
    Labelled: "labelled rows",
}


@dataclass(frozen=True, slots=True)
class LoadedData:
    """A data section: its records, and per source what was read, kept and dropped."""

    train: tuple[Record, ...]
    heldout: tuple[Record, ...]
    facts: tuple[DataFacts, ...]


@dataclass(frozen=True, slots=True)
class _SourceRows:
    """What one source gave; ``faults`` are messages that begin with ``file:row``.

    ``dropped``: the numbers of the rows by reason; ``judged_twice``: of rankings with a text twice.
    """

    records: list[Record]
    rows: int
    dropped: dict[str, list[str]]
    judged_twice: list[str]
    faults: list[str]

    @property
    def counts(self) -> dict[str, int]:
        """How many rows were dropped for which reason."""
        counts = {reason: len(rows) for reason, rows in self.dropped.items()}
        return counts | ({INVALID: len(self.faults)} if self.faults else {})


# (file:row, the record or why there is none); a reader is called with a source, its place and id.
_Row = tuple[str, Record | Dropped | Fault]
_Reader = Callable[[Source, str, str], Iterable[_Row]]


def load_records(recipe: Recipe, stage: StageName) -> dict[str, LoadedData]:
    """Read the data of a stage: ``{"pretrain" | "sft" | "reward" | "prompts": LoadedData}``.

    The evaluation also reads ``benchmark.<subset>``, with all of its rows under ``train``.

    pretrain takes any record but labelled rows, sft demonstrations (of a ranking its best
    response), reward rankings, of a classifier labelled rows, all of one form; prompts prompts (of
    a richer record its beginning). Remarks (dropped rows, duplicates, prompts
    both in train and heldout) are printed to stderr.

    Raises:
        DataError: a file cannot be read; rows are malformed and ``data.bad_rows`` is refuse (all of
            them are counted, the first 20 listed); a source drops more rows than
            ``data.max_dropped``; or it cannot give what the stage needs.
    """
    loaded = _load_sections(recipe, stage_data(recipe, stage), partial(_read_rows, recipe), _print)
    for section, records in loaded.items():
        _remark(section, records)
    return loaded


def check_records(recipe: Recipe, stages: Iterable[StageName]) -> None:
    """Judge the rows of several stages as ``load_records`` will, each source read once; silent.

    Raises:
        DataError: as for ``load_records``, with the malformed rows of all the stages.
    """
    sections = {name: data for stage in stages for name, data in stage_data(recipe, stage).items()}
    # The built-in world cannot be malformed: one row of a kind tells whether a section can use it.
    sizes = ("text_rows", "demonstration_rows", "ranked_prompts", "prompt_rows", "heldout_rows")
    world = recipe.data.world.model_copy(update=dict.fromkeys(sizes, 1))
    brief = recipe.model_copy(update={"data": recipe.data.model_copy(update={"world": world})})
    known: dict[str, list[_Row]] = {}

    def read(source: Source, place: str, name: str) -> Iterable[_Row]:
        key = source.model_dump_json()
        if key not in known:
            known[key] = list(_read_rows(brief, source, place, name))
        return known[key]

    _load_sections(recipe, sections, read, lambda text: None)


def duplicates(records: Iterable[Record]) -> int:
    """Count the records that are equal to an earlier one."""
    return sum(count - 1 for count in Counter(records).values())


def shared_prompts(train: Iterable[Record], heldout: Iterable[Record]) -> int:
    """Count the heldout records whose prompt (or text) is also a training record's."""
    known = {_prompt_of(record) for record in train}
    return sum(_prompt_of(record) in known for record in heldout)


def _load_sections(
    recipe: Recipe, sections: Mapping[str, StageData], read: _Reader, say: Callable[[str], None]
) -> dict[str, LoadedData]:
    loaded = {}
    faults: list[str] = []
    for section, data in sections.items():
        parts: dict[str, list[Record]] = {"train": [], "heldout": []}
        facts = []
        for part, sources in (("train", data.train), ("heldout", data.heldout)):
            for i, source in enumerate(sources):
                place = f"data.{section}.{part}[{i}]"
                if section.startswith("benchmark."):
                    place = f"data.{section}"
                fingerprint = source_fingerprint(recipe, source)
                name = fingerprint["id"]
                found = _source_rows(recipe, section, source, place, name, read)
                parts[part] += found.records
                kept = len(found.records)
                facts.append(
                    DataFacts(**fingerprint, rows=found.rows, kept=kept, dropped=found.counts)
                )
                if found.faults and recipe.data.bad_rows == "refuse":
                    faults += found.faults
                    continue
                if found.faults:
                    say(_listed(found.faults))
                if twice := found.judged_twice:
                    say(
                        f"{place} ({name}): {len(twice)} rankings hold a text twice with different"
                        f" scores, whose mean counts ({row_numbers(twice)})"
                    )
                _check_dropped(recipe, place, name, found, say)
        train, heldout = tuple(parts["train"]), tuple(parts["heldout"])
        _check_alike(section, train + heldout)
        loaded[section] = LoadedData(train, heldout, tuple(facts))
    if faults:
        faults = list(dict.fromkeys(faults))  # two sections may hold the same file
        raise DataError(
            f"{_listed(faults)}\ncorrect them, or set data.bad_rows=drop to go on without them"
        )
    return loaded


def _source_rows(
    recipe: Recipe, section: str, source: Source, place: str, name: str, read: _Reader
) -> _SourceRows:
    classes = recipe.reward.classes if recipe.reward and section == "reward" else None
    if classes is None:
        return _convert_rows(read(source, place, name), section.partition(".")[0], place, name)
    if source.shape == "auto" and source.world is None:
        source = source.model_copy(update={"shape": "labelled"})
    rows = _known_labels(read(source, place, name), source, classes)
    return _convert_rows(rows, "classes", place, name)


def _known_labels(rows: Iterable[_Row], source: Source, classes: Classes) -> Iterator[_Row]:
    """Yield the rows, with a Fault in the place of those whose label is not in the recipe."""
    name = source.columns.get("label", "label")
    for origin, row in rows:
        if isinstance(row, Labelled) and row.label not in classes.numbers:
            allowed = f"one of reward.classes.labels ({', '.join(classes.labels)})"
            fix = "correct the row, or add it to the labels"
            yield origin, Fault(name, f"the label {row.label[:40]!r}", allowed, fix)
        else:
            yield origin, row


def _check_alike(section: str, records: Sequence[Record]) -> None:
    """Refuse labelled rows of several forms: a classifier reads one.

    Raises:
        DataError: names a row of each form.
    """
    forms = {row.reads: row.origin for row in records if isinstance(row, Labelled)}
    if len(forms) > 1:
        found = ", ".join(f"{reads} ({origin})" for reads, origin in sorted(forms.items()))
        raise DataError(
            f"data.{section}: holds labelled rows of several forms: {found}; allowed: one of text,"
            " a pair of texts, or a response with its prompt"
        )


def _convert_rows(rows: Iterable[_Row], kind: str, place: str, name: str) -> _SourceRows:
    dropped: dict[str, list[str]] = {}
    judged_twice: list[str] = []
    faults: list[str] = []
    kept: list[Record] = []
    unfit: Counter[type] = Counter()
    total = 0
    for origin, result in rows:
        total += 1
        record = result if isinstance(result, Exception) else _convert(result, kind)
        number = origin.rpartition(":")[2]
        if isinstance(result, Ranking) and result.judged_twice:
            judged_twice.append(number)
        if isinstance(record, Dropped):
            dropped.setdefault(record.reason, []).append(number)
        elif isinstance(record, Fault):
            faults.append(f"{origin}: {record}")
        elif isinstance(record, _Unfit):
            unfit[record.kind] += 1
            fault = Fault("row", _HOLDS[record.kind], _NEEDS[kind], "correct or remove the row")
            faults.append(f"{origin}: {fault}")
        else:
            assert not isinstance(record, Exception)
            kept.append(replace(record, origin=origin))
    if unfit and not kept:
        held = " and ".join(sorted(_HOLDS[kind] for kind in unfit))
        stage = _STAGE_OF.get(kind, kind)
        raise DataError(f"{place} ({name}) holds {held}; the {stage} stage needs {_NEEDS[kind]}")
    return _SourceRows(kept, total, dropped, judged_twice, faults)


class _Unfit(Exception):
    """A record from which the section's kind of record cannot be made."""

    def __init__(self, kind: type) -> None:
        super().__init__(kind.__name__)
        self.kind = kind


def _read_rows(recipe: Recipe, source: Source, place: str, name: str) -> Iterator[_Row]:
    if source.world is not None:
        records = world_records(recipe.data.world, source.world, source.split)
        for number, record in enumerate(records[: source.rows], start=1):
            yield f"{name}:{number}", record
        return
    shape = ""
    for number, row in read_source(recipe, source):
        origin = f"{name}:{number}"
        shape = shape or find_shape(row, source, f"{place} ({origin})")
        try:
            yield origin, to_record(row, shape, source)
        except (Dropped, Fault) as error:
            yield origin, error
    if not shape:
        raise DataError(f"{place} ({name}): holds no rows")


def _convert(record: Record, kind: str) -> Record | _Unfit:
    if isinstance(record, Labelled):
        return record if kind == "classes" else _Unfit(Labelled)
    if kind == "pretrain":
        return record
    if kind == "sft" and isinstance(record, Demonstration | Ranking):
        return as_demonstration(record)
    if kind in ("reward", "benchmark") and isinstance(record, Ranking):
        return record
    if kind == "prompts" and not isinstance(record, Text):
        return as_prompt(record)
    return _Unfit(type(record))


def _check_dropped(
    recipe: Recipe, place: str, name: str, found: _SourceRows, say: Callable[[str], None]
) -> None:
    total = sum(found.counts.values())
    if not total:
        return
    reasons = ", ".join(
        f"{reason} {n}"
        + (f" ({row_numbers(found.dropped[reason])})" if reason in found.dropped else "")
        for reason, n in sorted(found.counts.items())
    )
    counts = f"{place} ({name}): {total} of {found.rows} rows dropped: {reasons}"
    share = total / found.rows
    if not found.records:
        raise DataError(f"{counts}; none is left; correct the file, or leave the source out")
    if share > recipe.data.max_dropped:
        raise DataError(
            f"{counts}; that is {share:.2%}, more than data.max_dropped={recipe.data.max_dropped}"
            " allows; correct the file, or raise data.max_dropped to go on without these rows"
        )
    say(counts)


def _listed(faults: list[str]) -> str:
    lines = [f"{len(faults)} malformed rows:", *(f"  {fault}" for fault in faults[:LISTED])]
    if len(faults) > LISTED:
        lines.append(f"  ... and {len(faults) - LISTED} more")
    return "\n".join(lines)


def _remark(section: str, loaded: LoadedData) -> None:
    repeated = duplicates(loaded.train)
    if repeated:
        _print(f"data.{section}.train: {repeated} of {len(loaded.train)} records are duplicates")
    leaked = shared_prompts(loaded.train, loaded.heldout)
    if leaked:
        _print(
            f"data.{section}.heldout: {leaked} of {len(loaded.heldout)} prompts are also in train;"
            " held-out results are better than they should be"
        )


def _prompt_of(record: Record) -> str | tuple[Message | str, ...]:
    if isinstance(record, Labelled):
        return record.messages + record.texts
    return record.text if isinstance(record, Text) else as_prompt(record).messages


def _print(text: str) -> None:
    print(printable_lines(text), file=sys.stderr)
