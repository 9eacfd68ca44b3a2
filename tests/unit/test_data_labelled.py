"""Labelled rows: each form by hand, what a malformed row is told, and where they may stand."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.errors import DataError
from align.recipe import Recipe, Source
from data.conversations import Dropped, Fault
from data.load import load_records, shared_prompts
from data.records import Labelled, Message, Record, Text
from data.shapes import find_shape, to_record

HI = (Message("user", "hi"),)


def read(row: dict[str, Any], **settings: Any) -> Record:
    source = Source(path="x.jsonl", shape="labelled", **settings)
    return to_record(row, find_shape(row, source, "x.jsonl:1"), source)


@pytest.mark.parametrize(
    ("row", "expected", "reads"),
    [
        ({"text": " yes! ", "label": 1}, Labelled(("yes!",), "1"), "text"),
        ({"text": "a", "text_pair": "b", "label": "up"}, Labelled(("a", "b"), "up"), "pair"),
        ({"text": "a", "label": True}, Labelled(("a",), "true"), "text"),
        ({"prompt": "hi", "response": "a", "label": "no"}, Labelled(("a",), "no", HI), "response"),
        (
            {
                "prompt": [{"role": "user", "content": "hi"}],
                "response": {"role": "assistant", "content": "a"},
                "label": 0,
            },
            Labelled(("a",), "0", HI),
            "response",
        ),
    ],
)
def test_every_form_is_read(row: dict[str, Any], expected: Labelled, reads: str) -> None:
    found = read(row)
    assert found == expected
    assert isinstance(found, Labelled)
    assert found.reads == reads


def test_columns_are_mapped() -> None:
    columns = {"text": "sentence", "label": "category"}
    row = {"sentence": "a", "category": "Refund", "text": 3}
    assert read(row, columns=columns) == Labelled(("a",), "Refund")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "label: got nothing, expected a value; the row has text"),
        ({"text": "a", "label": None}, "label: got null, expected text or a whole number"),
        ({"text": "a", "label": 0.5}, "label: got the float 0.5, expected text or a whole number"),
        ({"text": "a", "label": ["x"]}, "label: got a list of 1"),
        ({"text": "a", "label": ""}, "label: got the string ''"),
        ({"label": "x"}, "text: got nothing"),
        ({"text": 3, "label": "x"}, "text: got the int 3"),
        ({"text": "a", "text_pair": None, "label": "x"}, "text_pair: got null"),
        ({"prompt": "hi", "label": "x"}, "response: got nothing"),
    ],
)
def test_malformed_rows_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(Fault) as caught:
        read(row)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": " ", "label": 1}, "empty_text"),
        ({"text": "a", "text_pair": "", "label": 1}, "empty_text"),
        ({"prompt": "", "response": "a", "label": 1}, "empty_prompt"),
        ({"prompt": "hi", "response": "", "label": 1}, "empty_response"),
    ],
)
def test_rows_without_text_are_dropped(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Dropped) as caught:
        read(row)
    assert caught.value.reason == reason


def load(root: Path, rows: list[dict[str, Any]], section: str = "reward", **source: Any) -> Any:
    file = root / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [{"path": "rows.jsonl"} | source]}
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "base": {"id": "b"},
            "data": {"root": str(root), "reward": data, section: data},
            "reward": {"lr": 0.1, "batch_size": 2, "loss": "classes", "center_on": "none"}
            | {"base": {"id": "e"}, "classes": {"labels": ["down", "up"]}},
        }
    )
    stage = {"prompts": "ppo"}.get(section, section)
    return load_records(recipe, stage)[section].train  # type: ignore[arg-type]


def test_a_classifiers_rows_need_no_shape_and_are_text_elsewhere(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "down"}, {"text": "c", "label": "0"}]
    found = load(tmp_path, rows)
    assert found == (Labelled(("a",), "1"), Labelled(("b",), "down"), Labelled(("c",), "0"))
    assert load(tmp_path, rows, "pretrain") == (Text("a"), Text("b"), Text("c"))
    with pytest.raises(DataError, match="holds labelled rows; the pretrain stage needs text"):
        load(tmp_path, rows, "pretrain", shape="labelled")


def test_an_unknown_label_is_named_with_its_row_and_what_is_allowed(tmp_path: Path) -> None:
    rows = [{"text": "a", "mood": "up"}, {"text": "b", "mood": "Up"}, {"text": "c", "mood": 2}]
    with pytest.raises(DataError) as caught:
        load(tmp_path, rows, columns={"label": "mood"})
    message = str(caught.value)
    assert (
        "rows.jsonl:2: mood: got the label 'Up', expected one of reward.classes.labels" in message
    )
    assert "(down, up)" in message
    assert "rows.jsonl:3: mood: got the label '2'" in message


def test_rows_of_several_forms_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "a", "text_pair": "b", "label": 0}]
    with pytest.raises(DataError, match=r"pair \(rows.jsonl:2\), text \(rows.jsonl:1\); allowed"):
        load(tmp_path, rows)


def test_rankings_are_no_labelled_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label: got nothing"):
        load(tmp_path, [{"prompt": "hi", "chosen": "a", "rejected": "b"}])
    pair = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="rankings; the reward stage needs rows with a label each"):
        load(tmp_path, [pair], shape="pairs")


def test_texts_in_train_and_heldout_are_found() -> None:
    train = [Labelled(("a",), "1"), Labelled(("b",), "0", HI)]
    assert shared_prompts(train, [Labelled(("a",), "0"), Labelled(("b",), "0")]) == 1
