"""Fields of a row and conversations in them: message lists, ShareGPT turns, HH transcripts."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from data.records import ROLES, Message

Messages = tuple[Message, ...]

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_ASSISTANT = "\n\nAssistant:"


class _Missing:
    """The value of a field that a row does not have; null is another thing."""


MISSING: Final = _Missing()


class Fault(Exception):
    """A malformed row: which field, what it holds, what it should hold, what to do."""

    def __init__(self, field: str, got: str, expected: str, fix: str) -> None:
        super().__init__(f"{field}: got {got}, expected {expected}; {fix}")


class Dropped(Exception):
    """A well-formed row that nothing can be learned from, and the reason to count it under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Fields:
    """A row seen through ``columns`` (our field -> their column, dotted paths reach inside)."""

    row: Mapping[str, Any]
    columns: Mapping[str, str]
    prefix: str = ""

    def name(self, field: str) -> str:
        """Return the field's place in the file, for messages."""
        return self.prefix + self.columns.get(field, field)

    def get(self, field: str) -> Any:
        """Return the field's value, or ``MISSING``."""
        path = self.columns.get(field, field)
        if path in self.row:
            return self.row[path]
        value: Any = self.row
        for part in path.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                return MISSING
        return value

    def take(self, field: str) -> Any:
        """Return the field's value; a Fault if the row lacks it."""
        value = self.get(field)
        if value is MISSING:
            present = ", ".join(map(str, self.row)) or "none"
            raise Fault(
                self.name(field),
                "nothing",
                "a value",
                f"the row has {present}; add it, or map {field} in columns",
            )
        return value

    def string(self, field: str) -> str:
        """Return a string as it is."""
        return expect_string(self.take(field), self.name(field))

    def text(self, field: str) -> str:
        """Return a string without white space at its ends."""
        return self.string(field).strip()

    def optional_text(self, field: str) -> str:
        """Return a string without white space at its ends; "" if it is null or missing."""
        return "" if self.get(field) in (MISSING, None) else self.text(field)

    def several(self, field: str) -> list[Any]:
        """Return a list of at least two entries."""
        value = self.take(field)
        if not isinstance(value, list) or len(value) < 2:
            raise Fault(self.name(field), describe(value), "a list of 2 or more", "correct it")
        return value

    def number(self, field: str) -> float:
        """Return a finite number."""
        return expect_number(self.take(field), self.name(field))

    def inside(self, value: object, place: str) -> "Fields":
        """Return an object inside the row, seen through the same columns."""
        if not isinstance(value, Mapping):
            raise Fault(self.name(place), describe(value), "an object", "correct it")
        return Fields(value, self.columns, f"{self.prefix}{place}.")


def describe(value: object) -> str:
    """Say in a few words what a value is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, str):
        return f"the string {value[:40]!r}" + ("..." if len(value) > 40 else "")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
    return f"the {type(value).__name__} {value!r}"


def expect_string(value: object, name: str) -> str:
    """Return a string; anything else is a Fault."""
    if not isinstance(value, str):
        raise Fault(name, describe(value), "a string", "correct or remove the row")
    return value


def expect_number(value: object, name: str) -> float:
    """Return a finite number; anything else is a Fault."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Fault(name, describe(value), "a finite number", "correct or remove the row")
    return float(value)


def join_input(instruction: str, text: str) -> str:
    """Return an instruction and the text that it is about, if any, as one user turn."""
    return f"{instruction}\n\n{text}" if text else instruction


def read_messages(value: object, name: str) -> Messages:
    """Read ``[{"role", "content"}]``."""
    return _read_turns(value, name, "role", "content", {role: role for role in ROLES})


def read_sharegpt(value: object, name: str) -> Messages:
    """Read ``[{"from", "value"}]``."""
    return _read_turns(value, name, "from", "value", _SHAREGPT_ROLES)


def read_prompt(value: object, name: str) -> Messages:
    """Read a prompt: messages, a transcript that ends with the Assistant marker, or plain text."""
    if not isinstance(value, str):
        messages = read_messages(value, name)
    elif value.startswith("\n\nHuman:") and value.rstrip().endswith(_ASSISTANT.strip()):
        messages = read_transcript(value[: value.rindex(_ASSISTANT)], name)
    else:
        messages = (Message("user", value.strip()),)
    if messages[-1].role != "user":
        raise Fault(name, f"a last turn of {messages[-1].role}", "a user turn", "cut it off")
    return messages


def read_response(value: object, prompt: Messages, name: str) -> str:
    """Read a response: text, one message, or a conversation that may repeat the prompt."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        value = [value]
    messages = read_messages(value, name)
    if messages[-1].role != "assistant":
        raise Fault(name, f"a last turn of {messages[-1].role}", "an assistant turn", "correct it")
    if len(messages) > 1 and messages[:-1] != prompt:
        raise Dropped("different_prompts")
    return messages[-1].content


def read_transcript(text: str, name: str) -> Messages:
    """Read turns that begin with "\\n\\nHuman:" or "\\n\\nAssistant:".

    Turns of one role in a row become one: they are a turn whose text held the marker, or a reply in
    two parts, and many templates refuse them.
    """
    pieces = _MARKER.split(text)
    if pieces[0].strip() or len(pieces) < 3:
        raise Fault(
            name,
            describe(text),
            'a transcript that begins with "\\n\\nHuman:"',
            "correct the row, or set another shape",
        )
    messages: list[Message] = []
    for marker, content in zip(pieces[1::2], pieces[2::2], strict=True):
        role = _TRANSCRIPT_ROLES[marker]
        if messages and messages[-1].role == role:
            content = f"{messages.pop().content}\n\n{content.strip()}"
        messages.append(Message(role, content.strip()))
    return tuple(messages)


def split_pair(chosen: str, rejected: str, row: Fields) -> tuple[Messages, str, str]:
    """Split two transcripts into their common prompt and the two last Assistant turns.

    Raises:
        Fault: a text is no transcript.
        Dropped: ``ends_on_user``, or ``different_prompts``: what precedes the last Assistant marker
            is not the same in both.
    """
    for key, text in (("chosen", chosen), ("rejected", rejected)):
        turns = read_transcript(text, row.name(key))
        if turns[-1].role != "assistant":
            raise Dropped("ends_on_user")
    prefix, answer = _at_last_answer(chosen)
    other_prefix, other_answer = _at_last_answer(rejected)
    if prefix != other_prefix:
        raise Dropped("different_prompts")
    prompt = read_transcript(prefix, row.name("chosen"))
    if prompt[-1].role == "assistant":  # a shared first part of both answers
        if answer and other_answer:
            shared = prompt[-1].content
            answer, other_answer = f"{shared}\n\n{answer}", f"{shared}\n\n{other_answer}"
        prompt = prompt[:-1]
    if not prompt:
        raise Fault(row.name("chosen"), "no Human turn", "one before the answer", "remove the row")
    return prompt, answer, other_answer


def _at_last_answer(text: str) -> tuple[str, str]:
    start = text.rindex(_ASSISTANT)
    return text[:start], text[start + len(_ASSISTANT) :].strip()


def _read_turns(
    value: object, name: str, role_key: str, text_key: str, roles: Mapping[str, str]
) -> Messages:
    if not isinstance(value, list) or not value:
        raise Fault(
            name,
            "an empty conversation" if value == [] else describe(value),
            f"a list of {{{role_key}, {text_key}}}",
            "correct or remove the row",
        )
    messages = []
    for i, turn in enumerate(value):
        fields = Fields(turn, {}, f"{name}[{i}].") if isinstance(turn, Mapping) else None
        if fields is None:
            raise Fault(f"{name}[{i}]", describe(turn), "an object", "correct or remove the row")
        role = roles.get(str(fields.take(role_key)))
        if role is None or (role == "system" and i):
            raise Fault(
                fields.name(role_key),
                f"{fields.get(role_key)!r}" + (" after the first turn" if role else ""),
                f"one of {', '.join(roles)}" + (", system only first" if role else ""),
                "rename it or remove the row",
            )
        messages.append(Message(role, fields.text(text_key)))
    return tuple(messages)
