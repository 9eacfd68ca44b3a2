"""Rows with one label each, for classifiers: a text, two texts, or a response to a prompt."""

from align.recipe import Source
from data.conversations import (
    MISSING,
    Dropped,
    Fault,
    Fields,
    describe,
    expect_string,
    read_prompt,
    read_response,
)
from data.records import Labelled, Record

FIELDS = ("text", "text_pair", "prompt", "response", "label")


def read_labelled(row: Fields, source: Source) -> Record:
    """Read ``{text, label}``, ``{text, text_pair, label}`` or ``{prompt, response, label}``.

    Raises:
        Fault: a field is missing, or not what it should be.
        Dropped: a text is empty.
    """
    label = row.take("label")
    if not isinstance(label, str | int) or label == "":
        expected = "text or a whole number"
        raise Fault(row.name("label"), describe(label), expected, "correct or remove the row")
    if isinstance(label, str):
        expect_string(label, row.name("label"))
    if row.get("text") is MISSING and row.get("prompt") is not MISSING:
        prompt = read_prompt(row.take("prompt"), row.name("prompt"))
        response = read_response(row.take("response"), prompt, row.name("response"))
        if not prompt[-1].content:
            raise Dropped("empty_prompt")
        if not response:
            raise Dropped("empty_response")
        return Labelled((response,), label_text(label), prompt)
    texts = [row.text("text")]
    if row.get("text_pair") is not MISSING:
        texts.append(row.text("text_pair"))
    if not all(texts):
        raise Dropped("empty_text")
    return Labelled(tuple(texts), label_text(label))


def label_text(label: object) -> str:
    """Return a label as it stands in a YAML or JSON file: ``true``, not Python's ``True``."""
    return str(label).lower() if isinstance(label, bool) else str(label)
