"""Files that cannot be read: one exact message each, with the place of the mistake."""

import gzip
import io
import json
import struct
import sys

import pyarrow
import pytest
from pyarrow import parquet

from align.errors import DataError
from align.recipe import Data, Source
from data.sources import read_file, read_hub, read_source


def _parquet_of(names, *columns) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(list(columns), names=names), file)
    return file.getvalue()


def _parquet_bytes() -> bytes:
    return _parquet_of(["text", "n"], pyarrow.array(["a", "b"]), pyarrow.array([1, 2]))


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_file(path))


BROKEN = [
    (
        "a.jsonl",
        '{"text": "a"}\n\n{"text": "b"\n',
        "{path}:3: broken JSON: Expecting ',' delimiter at column 13;"
        " each line has to be one object",
    ),
    (
        "a.json",
        '[{"text": "a"},\n {"text" "b"}]',
        "{path}:2: broken JSON: Expecting ':' delimiter at column 10",
    ),
    (
        "a.json",
        '{"text": "a"}\n{"text": "b"}\n',
        "{path}:2: broken JSON: Extra data at column 1;"
        " for one object per line name the file .jsonl",
    ),
    (
        "a.json",
        '{"train": [1], "test": [2]}',
        "{path}: an object with 2 lists in it (train, test);"
        " expected a list of objects, or an object with one list",
    ),
    ("a.json", "[]", "{path}: holds no rows; expected a list of objects"),
    ("a.jsonl", "", "{path}: the file is empty"),
    ("a.txt", " \n\n", "{path}: the file is empty"),
    (
        "a.xlsx",
        "x",
        "{path}: unknown file type '.xlsx'; allowed are .jsonl, .json, .csv, .parquet, .txt,"
        " each also with .gz",
    ),
    (
        "a.jsonl",
        '{"text": "a"}\n{"text": "caf\u00e9"}\n'.encode("latin-1"),
        "{path}:2: not UTF-8: byte 0xe9 at column 14; save the file as UTF-8",
    ),
    (
        "a.csv",
        b"\xef\xbb\xbftext\na\n",
        "{path}:1: begins with a byte order mark; save it as UTF-8 without one",
    ),
    (
        "a.jsonl.gz",
        # The bytes name the test: with the time in them, two workers would collect different tests.
        gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-12],
        "{path}: the gzip file is truncated or damaged (Compressed file ended before the"
        " end-of-stream marker was reached); copy or download it again",
    ),
    (
        "a.jsonl.gz",
        b'{"text": "a"}\n',
        "{path}: the gzip file is truncated or damaged (Not a gzipped file (b'{{\"'));"
        " copy or download it again",
    ),
    (
        "a.parquet",
        _parquet_bytes()[:-7],
        "{path}: the parquet file is truncated or damaged (Parquet magic bytes not found in footer."
        " Either the file is corrupted or this is not a parquet file.);"
        " copy or download it again",
    ),
    (
        "a.csv",
        "text,label\na,1\nb\n",
        "{path}: row 2 (it ends on line 3): got 1 cells, the header names 2",
    ),
    ("a.csv", "text,text\na,1\n", "{path}:1: the header names column 'text' twice"),
    (
        "a.jsonl",
        '{"text": "a"}\n{"text": "b", "text": "c"}\n',
        "{path}:2: broken JSON: one object holds the key 'text' twice; keep one of them",
    ),
    (
        "a.json",
        '[{"messages": [{"role": "user", "role": "user"}]}]',
        "{path}: broken JSON: one object holds the key 'role' twice; keep one of them",
    ),
    ("a.jsonl", '\n{"text": ' + "[" * 100_000, "{path}:2: broken JSON: nested too deeply"),
    ("a.json", "[" * 100_000, "{path}: broken JSON: nested too deeply"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files(tmp_path, name, content, message):
    with pytest.raises(DataError) as error:
        read(tmp_path, name, content)
    assert str(error.value) == message.format(path=tmp_path / name)


def test_numbers_without_end_are_broken_json(tmp_path):
    for name, place in (("a.jsonl", "a.jsonl:1"), ("a.json", "a.json")):
        with pytest.raises(DataError, match=rf"{place}: broken JSON: Exceeds the limit \(4300"):
            read(tmp_path, name, '[{"n": ' + "9" * 5000 + "}]")


def test_parquet_text_that_is_no_utf_8_is_refused(tmp_path):
    offsets = struct.pack("<2i", 0, 2)
    text = pyarrow.StringArray.from_buffers(1, *map(pyarrow.py_buffer, (offsets, b"\xff\xfe")))
    with pytest.raises(DataError, match=r"a\.parquet: .* damaged \(.*Invalid UTF8"):
        read(tmp_path, "a.parquet", _parquet_of(["text"], text))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_file(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a directory; name the files in it"):
        read_file(tmp_path)


ROWS = [{"text": "a\u2028b", "n": 1}, {"text": "c", "n": 2}]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        # The second row is on line 3: that is its number.
        (
            "a.jsonl",
            "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
            [(1, ROWS[0]), (3, ROWS[1])],
        ),
        ("a.json", json.dumps(ROWS), [(1, ROWS[0]), (2, ROWS[1])]),
        ("a.json", json.dumps({"version": 1, "rows": ROWS}), [(1, ROWS[0]), (2, ROWS[1])]),
        (
            "a.csv",
            'text,n\r\n"two\nlines",1\r\nc,2\r\n',
            [(1, {"text": "two\nlines", "n": "1"}), (2, {"text": "c", "n": "2"})],
        ),
        # Blank lines are no rows.
        ("a.csv", "\ntext\n\na\r\n\r\nb\n\n", [(1, {"text": "a"}), (2, {"text": "b"})]),
        ("a.parquet", _parquet_bytes(), [(1, {"text": "a", "n": 1}), (2, {"text": "b", "n": 2})]),
        ("a.txt", "one\n\ntwo\n", [(1, {"text": "one\n\ntwo\n"})]),
    ],
)
def test_formats(tmp_path, name, content, rows, packed):
    content = content if isinstance(content, bytes) else content.encode()
    if packed:
        name, content = name + ".gz", gzip.compress(content)
    assert read(tmp_path, name, content) == rows


def test_rows_limits(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')

    class Recipe:
        data = Data(root=str(tmp_path))

    found = list(read_source(Recipe, Source(path="a.jsonl", rows=2)))
    assert found == [(1, {"a": 1}), (2, {"a": 2})]


def test_hub_data_sets(monkeypatch):
    calls = []

    class Datasets:
        class exceptions:
            class DatasetsError(Exception):
                pass

        @staticmethod
        def load_dataset(name, *, split, revision):
            calls.append((name, split, revision))
            if name == "gone/away":
                raise ConnectionError("Couldn't reach 'gone/away' on the Hub\nmore")
            return [{"a": 1}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert list(read_hub(Source(hub="org/name@abc", split="test"))) == [(1, {"a": 1})]
    assert calls == [("org/name", "test", "abc")]
    with pytest.raises(DataError) as error:
        read_hub(Source(hub="gone/away"))
    assert str(error.value) == (
        "hub:gone/away: split train cannot be loaded: Couldn't reach 'gone/away' on the Hub;"
        " check name, revision, split and network, or download it and use path"
    )
