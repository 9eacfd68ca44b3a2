"""Rows from a fuzzer: whatever a field holds, the row is a record, dropped, or refused by name."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from align.errors import DataError
from align.recipe import Source
from data.conversations import Dropped, Fault
from data.records import Demonstration, Labelled, Ranking, Text
from data.shapes import _SHAPES, find_shape, to_record
from data.sources import read_file

EXAMPLES = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
)
LABELS = {"0": "first", "1": "second slightly better", "true": "tie"}

TEXT = st.text(st.characters(), max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "\n\nHuman: a",
        "\n\nHuman: a\n\nAssistant: b",
        "\n\nAssistant:",
        "user",
        "gpt",
        "system",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
KEYS = (
    st.sampled_from(
        ["role", "content", "from", "value", "text", "score", "rank", "votes", "\x1b[2J", "\ud83d"]
    )
    | TEXT
)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | SCALARS, "content": SCALARS}
) | st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "bot"]) | SCALARS, "value": SCALARS}
)
VALUES = st.recursive(
    SCALARS | TURNS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
GOOD: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
        "system": "s",
    },
    "alpaca": {
        "instruction": "a",
        "input": "b",
        "output": "c",
        "system": "s",
        "history": [["a", "b"]],
    },
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "transcript_pairs": {
        "chosen": "\n\nHuman: a\n\nAssistant: b",
        "rejected": "\n\nHuman: a\n\nAssistant: c",
    },
    "pairs": {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "margin": 1.0,
        "strength": "slightly better",
        "agreement": 0.75,
        "subset": "s",
    },
    "labelled_pairs": {"prompt": "a", "input": "", "first": "b", "second": "c", "label": 0},
    "labelled": {"text": "a", "text_pair": "b", "label": 0},
    "ranking": {
        "prompt": "a",
        "responses": ["b", "c"],
        "scores": [1.0, 2.0],
        "ranks": [2, 1],
        "votes": [1, 3],
        "candidates": [{"text": "b", "score": 1.0}, {"text": "c", "score": 2.0}],
    },
    "prompts": {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
    "text": {"text": "a"},
}


def judge(row: object, shape: str) -> None:
    """Read a row as the stages do; anything but a sound record, Dropped or a named Fault fails."""
    source = Source(path="rows.jsonl", shape=shape, labels=LABELS)
    try:
        record = to_record(row, shape, source)
    except Dropped:
        return
    except Fault as fault:
        message = str(fault)
        field, colon, said = message.partition(": got ")
        assert field
        assert colon
        assert ", expected " in said
        assert "; " in said
        assert message.isprintable()  # nothing from the file steers a terminal
        return
    texts = [record.text] if isinstance(record, Text) else []
    if not isinstance(record, Text):
        assert all(message.role in ("system", "user", "assistant") for message in record.messages)
        texts += [message.content for message in record.messages]
    if isinstance(record, Ranking):
        assert len(record.responses) == len(record.scores) >= 2
        assert all(abs(score) < 1e39 for score in record.scores)
        texts += record.responses
    if isinstance(record, Labelled):
        assert record.label
        texts += [record.label, *record.texts]
    for text in texts:
        text.encode()


def test_every_shape_is_tried() -> None:
    assert set(GOOD) == set(_SHAPES)


@pytest.mark.parametrize("shape", GOOD)
def test_any_value_in_any_field(shape: str) -> None:
    good = GOOD[shape]
    judge(good, shape)

    @EXAMPLES
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        field = data.draw(st.sampled_from(sorted(good)))
        row = {
            key: value
            for key, value in good.items()
            if data.draw(st.integers(0, 4)) or key == field
        }
        row[field] = data.draw(VALUES)
        judge(row, shape)

    tried()


@EXAMPLES
@given(VALUES, st.sampled_from(sorted(GOOD)))
def test_any_row(row: object, shape: str) -> None:
    judge(row, shape)


@EXAMPLES
@given(
    st.dictionaries(
        st.sampled_from(sorted({f for row in GOOD.values() for f in row})) | KEYS, VALUES
    )
)
def test_any_first_row(row: dict) -> None:
    source = Source(path="rows.jsonl")
    try:
        shape = find_shape(row, source, "rows.jsonl:1")
    except DataError as error:
        message = str(error)
        assert message.startswith("rows.jsonl:1: ")
        assert message.isprintable()
        return
    judge(row, shape)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt", ".jsonl.gz"])
def test_any_file(suffix: str) -> None:
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in GOOD.values())
    lines = st.lists(st.binary(max_size=30) | st.sampled_from(whole.splitlines()), max_size=5)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"rows{suffix}"

        @settings(EXAMPLES, max_examples=60)
        @given(lines.map(b"\n".join) | st.binary(max_size=60))
        def tried(content: bytes) -> None:
            file.write_bytes(content)
            try:
                rows = list(read_file(file))
            except DataError as error:
                message = str(error)
                assert message.startswith(str(file))
                message.encode()
                return
            assert all(isinstance(number, int) for number, _ in rows)

        tried()


def test_a_line_of_ten_megabytes_is_a_row(tmp_path: Path) -> None:
    text = "x" * 10_000_000
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": text}) + '\n{"prompt": "b"}\n')
    (_, first), (_, second) = read_file(file)
    record = to_record(first, "prompt_completion", Source(path="rows.jsonl"))
    assert isinstance(record, Demonstration)
    assert record.messages[-1].content == text
    with pytest.raises(Fault, match="completion: got nothing"):
        to_record(second, "prompt_completion", Source(path="rows.jsonl"))
