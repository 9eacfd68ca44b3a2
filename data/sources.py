"""Files and hub data sets to rows, each with the number by which a person finds it.

A row is whatever the file holds there, an object as a rule; ``data.shapes`` judges it. Everything
that is wrong with a file as a whole is one ``DataError`` that says where.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from align.errors import DataError, printable
from align.inputs import source_path
from align.recipe import Recipe, Source

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".txt")

Row = tuple[int, Any]


def read_source(recipe: Recipe, source: Source) -> Iterator[Row]:
    """Yield ``(number, row)`` of a ``path`` or ``hub`` source, at most ``source.rows`` of them.

    Numbers start at 1. In .jsonl they are line numbers; in .csv the header is not counted.

    Raises:
        DataError: the file or data set cannot be read; the message says what is wrong and where.
    """
    rows = read_hub(source) if source.hub is not None else read_file(source_path(recipe, source))
    return islice(rows, source.rows)


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .json, .csv, .parquet or .txt file, each also as .gz.

    A .json file holds a list of objects, or an object with one list in it. A .txt file is one row
    ``{"text": ...}``: pretraining joins all texts to one stream of tokens anyway.

    Raises:
        DataError: see ``read_source``.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name the files in it, one source each")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix not in FORMATS:
        raise DataError(
            f"{path}: unknown file type {suffix or 'without ending'!r}; allowed are"
            f" {', '.join(FORMATS)}, each also with .gz"
        )
    content = _read_bytes(path)
    if not content.strip():
        raise DataError(f"{path}: the file is empty")
    if suffix == ".parquet":
        return _parquet(path, content)
    text = _decode(path, content)
    if suffix == ".txt":
        return iter([(1, {"text": text})])
    return {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[suffix](path, text)


def is_csv(path: str) -> bool:
    """Say whether a file is read as CSV, in which every value is text."""
    return path.removesuffix(".gz").endswith(".csv")


def read_hub(source: Source) -> Iterator[Row]:
    """Yield the rows of a hub data set, ``org/name`` or ``org/name@revision``.

    Raises:
        DataError: it, its revision or its split does not exist, or the hub is out of reach.
    """
    # Slow to import, and of no use to recipes whose data are files.
    import datasets

    assert source.hub is not None
    name, _, revision = source.hub.partition("@")
    try:
        rows = datasets.load_dataset(name, split=source.split, revision=revision or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"hub:{source.hub}: split {source.split} cannot be loaded: {reason};"
            " check name, revision, split and network, or download it and use path"
        ) from None
    return enumerate(rows, start=1)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip file is truncated or damaged ({error}); copy or download it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(path: Path, content: bytes) -> str:
    if content.startswith(b"\xef\xbb\xbf"):
        raise DataError(f"{path}:1: begins with a byte order mark; save it as UTF-8 without one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: not UTF-8: byte 0x{content[error.start]:02x} at column {column};"
            " save the file as UTF-8"
        ) from None


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): it also splits at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, _loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: broken JSON: {error.msg} at column {error.colno};"
                    " each line has to be one object"
                ) from None
            except _UNREADABLE as error:
                raise DataError(f"{path}:{number}: broken JSON: {_reason(error)}") from None


def _json(path: Path, text: str) -> Iterator[Row]:
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        hint = "; for one object per line name the file .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}{hint}"
        ) from None
    except _UNREADABLE as error:
        raise DataError(f"{path}: broken JSON: {_reason(error)}") from None
    if isinstance(value, dict):
        lists = [key for key, entry in value.items() if isinstance(entry, list)]
        if len(lists) != 1:
            named = ", ".join(map(printable, lists)) or "none"
            raise DataError(
                f"{path}: an object with {len(lists)} lists in it ({named});"
                " expected a list of objects, or an object with one list"
            )
        value = value[lists[0]]
    if not isinstance(value, list) or not value:
        raise DataError(f"{path}: holds no rows; expected a list of objects")
    return enumerate(value, start=1)


# What Python's parser raises besides JSONDecodeError: nesting and digits without end; ours too.
_UNREADABLE = (ValueError, RecursionError)


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"one object holds the key {repeated!r} twice; keep one of them")
    return made


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _csv(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = (cells for cells in reader if cells)  # without blank ones, as in .jsonl
    try:
        header = next(lines)
        repeated = [name for name in header if header.count(name) > 1]
        if repeated:
            raise DataError(f"{path}:1: the header names column {repeated[0]!r} twice")
        for number, cells in enumerate(lines, start=1):
            if len(cells) != len(header):
                raise DataError(
                    f"{path}: row {number} (it ends on line {reader.line_num}):"
                    f" got {len(cells)} cells, the header names {len(header)}"
                )
            yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}") from None


def _parquet(path: Path, content: bytes) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(content))
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].rpartition("'<Buffer>': ")[2]
        raise DataError(
            f"{path}: the parquet file is truncated or damaged ({reason}); copy or download it"
            " again"
        ) from None
    rows = (row for batch in table.to_batches(1000) for row in batch.to_pylist())
    return enumerate(rows, start=1)
