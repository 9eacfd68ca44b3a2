"""The records of a stage: every row of every source read and judged before a model is loaded."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from align.errors import DataError
from align.manifest import DataFacts
from align.recipe import Recipe, Source, StageName
from align.stages import source_fingerprint, stage_data
from data.conversations import Dropped, Fault
from data.records import (
    Demonstration,
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
_LISTED = 20

# What the stages that read a section need.
_NEEDS: dict[str, str] = {
    "sft": "answers",
    "reward": "ranked responses",
    "prompts": "prompts",
}
_STAGE_OF = {"prompts": "ppo"}
_HOLDS: dict[type, str] = {
    Text: "plain text",
    Prompt: "prompts only",
    Demonstration: "demonstrations without a comparison",
    Ranking: "rankings",
}


@dataclass(frozen=True, slots=True)
class LoadedData:
    """A data section: its records, and per source what was read, kept and dropped."""

    train: tuple[Record, ...]
    heldout: tuple[Record, ...]
    facts: tuple[DataFacts, ...]


@dataclass(frozen=True, slots=True)
class _SourceRows:
    """What one source gave; ``faults`` are messages that begin with ``file:row``."""

    records: list[Record]
    rows: int
    dropped: Counter[str]
    faults: list[str]


def load_records(recipe: Recipe, stage: StageName) -> dict[str, LoadedData]:
    """Read the data of a stage: ``{"pretrain" | "sft" | "reward" | "prompts": LoadedData}``.

    pretrain takes any record, sft demonstrations (of a ranking its best response), reward rankings,
    prompts prompts (of a richer record its beginning). Remarks (dropped rows, duplicates, prompts
    both in train and heldout) are printed to stderr.

    Raises:
        DataError: a file cannot be read; rows are malformed and ``data.bad_rows`` is refuse (all of
            them are counted, the first 20 listed); a source drops more rows than
            ``data.max_dropped``; or it cannot give what the stage needs.
    """
    loaded = {}
    faults: list[str] = []
    for section, data in stage_data(recipe, stage).items():
        parts: dict[str, list[Record]] = {"train": [], "heldout": []}
        facts = []
        for part, sources in (("train", data.train), ("heldout", data.heldout)):
            for i, source in enumerate(sources):
                place = f"data.{section}.{part}[{i}]"
                fingerprint = source_fingerprint(recipe, source)
                found = _load_source(recipe, source, section, place, fingerprint["id"])
                faults += _report_faults(recipe, found.faults)
                parts[part] += found.records
                kept = len(found.records)
                facts.append(
                    DataFacts(
                        **fingerprint, rows=found.rows, kept=kept, dropped=dict(found.dropped)
                    )
                )
                if recipe.data.bad_rows == "drop" or not found.faults:
                    _check_dropped(recipe, place, fingerprint["id"], found)
        train, heldout = tuple(parts["train"]), tuple(parts["heldout"])
        loaded[section] = LoadedData(train, heldout, tuple(facts))
    if faults:
        raise DataError(
            f"{_listed(faults)}\ncorrect them, or set data.bad_rows=drop to go on without them"
        )
    for section, records in loaded.items():
        _remark(section, records)
    return loaded


def duplicates(records: Iterable[Record]) -> int:
    """Count the records that are equal to an earlier one."""
    return sum(count - 1 for count in Counter(records).values())


def shared_prompts(train: Iterable[Record], heldout: Iterable[Record]) -> int:
    """Count the heldout records whose prompt (or text) is also a training record's."""
    known = {_prompt_of(record) for record in train}
    return sum(_prompt_of(record) in known for record in heldout)


def _load_source(
    recipe: Recipe, source: Source, section: str, place: str, name: str
) -> _SourceRows:
    dropped: Counter[str] = Counter()
    faults: list[str] = []
    kept: list[Record] = []
    unfit: Counter[type] = Counter()
    rows = 0
    for origin, result in _results(recipe, source, place, name):
        rows += 1
        record = result if isinstance(result, Exception) else _convert(result, section)
        if isinstance(record, Dropped):
            dropped[record.reason] += 1
        elif isinstance(record, Fault):
            faults.append(f"{origin}: {record}")
        elif isinstance(record, _Unfit):
            unfit[record.kind] += 1
            fault = Fault("row", _HOLDS[record.kind], _NEEDS[section], "correct or remove the row")
            faults.append(f"{origin}: {fault}")
        else:
            assert not isinstance(record, Exception)
            kept.append(replace(record, origin=origin))
    if unfit and not kept:
        held = " and ".join(sorted(_HOLDS[kind] for kind in unfit))
        stage = _STAGE_OF.get(section, section)
        raise DataError(f"{place} ({name}) holds {held}; the {stage} stage needs {_NEEDS[section]}")
    if faults:
        dropped[INVALID] += len(faults)
    return _SourceRows(kept, rows, dropped, faults)


class _Unfit(Exception):
    """A record from which the section's kind of record cannot be made."""

    def __init__(self, kind: type) -> None:
        super().__init__(kind.__name__)
        self.kind = kind


def _results(
    recipe: Recipe, source: Source, place: str, name: str
) -> Iterator[tuple[str, Record | Dropped | Fault]]:
    """Yield ``(file:row, record or why there is none)`` for every row of the source."""
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


def _convert(record: Record, section: str) -> Record | _Unfit:
    if section == "pretrain":
        return record
    if section == "sft" and isinstance(record, Demonstration | Ranking):
        return as_demonstration(record)
    if section == "reward" and isinstance(record, Ranking):
        return record
    if section == "prompts" and not isinstance(record, Text):
        return as_prompt(record)
    return _Unfit(type(record))


def _check_dropped(recipe: Recipe, place: str, name: str, found: _SourceRows) -> None:
    total = found.dropped.total()
    if not total:
        return
    reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(found.dropped.items()))
    counts = f"{place} ({name}): {total} of {found.rows} rows dropped: {reasons}"
    share = total / found.rows
    if not found.records:
        raise DataError(f"{counts}; none is left; correct the file, or leave the source out")
    if share > recipe.data.max_dropped:
        raise DataError(
            f"{counts}; that is {share:.2%}, more than data.max_dropped={recipe.data.max_dropped}"
            " allows; correct the file, or raise data.max_dropped to go on without these rows"
        )
    _print(counts)


def _report_faults(recipe: Recipe, faults: list[str]) -> list[str]:
    """Return the faults to refuse the stage for; print those of rows that may be dropped."""
    if recipe.data.bad_rows == "refuse":
        return faults
    if faults:
        _print(_listed(faults))
    return []


def _listed(faults: list[str]) -> str:
    lines = [f"{len(faults)} malformed rows:", *(f"  {fault}" for fault in faults[:_LISTED])]
    if len(faults) > _LISTED:
        lines.append(f"  ... and {len(faults) - _LISTED} more")
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


def _prompt_of(record: Record) -> str | tuple[Message, ...]:
    return record.text if isinstance(record, Text) else as_prompt(record).messages


def _print(text: str) -> None:
    print(text, file=sys.stderr)
