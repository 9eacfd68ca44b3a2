"""Fields of a row and conversations in them: message lists, ShareGPT turns, HH transcripts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from align.errors import printable
from data.records import ROLES, Message

Messages = tuple[Message, ...]

_MARKER = re.compile(r"(?:\r?\n){2}(Human|Assistant):")
_ASKS_FOR_ANSWER = re.compile(r"(?:\r?\n){2}Assistant:\s*\Z")
_BLANK_LINE = re.compile(r"\s*?\n\r?\n")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# As CSV cells hold them; neither nan nor inf nor Python's 1_000.
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)
_LARGEST = 3.4e38  # what float32 holds, in which the losses are computed


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
    """A row seen through ``columns`` (our field -> their column, dotted paths reach inside).

    ``are_cells``: the values are cells of a CSV file, in which numbers are text and null is empty.
    """

    row: Mapping[str, Any]
    columns: Mapping[str, str]
    prefix: str = ""
    are_cells: bool = False

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
            present = _names(self.row) or "none"
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
        value = self.take(field)
        if self.are_cells and isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        return expect_number(value, self.name(field))

    def optional_number(self, field: str) -> float | None:
        """Return a finite number; None if it is null, missing or an empty cell."""
        value = self.get(field)
        if value in (MISSING, None) or (self.are_cells and value == ""):
            return None
        return self.number(field)

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
        return f"an object with {_names(value) or 'nothing in it'}"
    return f"the {type(value).__name__} {_short(repr(value))}"


def expect_string(value: object, name: str) -> str:
    """Return a string of Unicode characters; anything else is a Fault.

    JSON can spell half a character, ``"\\ud83d"``: no tokenizer takes it, and no file does.
    """
    if not isinstance(value, str):
        raise Fault(name, describe(value), "a string", "correct or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("ascii", "backslashreplace").decode()
        raise Fault(
            name,
            f"{half} at character {error.start + 1}, half of a surrogate pair",
            "whole characters",
            "correct or remove the row",
        ) from None
    return value


def expect_number(value: object, name: str) -> float:
    """Return a finite number; anything else is a Fault."""
    # As a comparison: nan fails it, and so does an integer that is too large for a float.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not -_LARGEST <= value <= _LARGEST
    ):
        raise Fault(name, describe(value), "a finite number", "correct or remove the row")
    return float(value)


def join_input(instruction: str, text: str) -> str:
    """Return an instruction and the text that it is about, if any, as one user turn."""
    return "\n\n".join(part for part in (instruction, text) if part)


def read_messages(value: object, name: str) -> Messages:
    """Read ``[{"role", "content"}]``."""
    return _read_turns(value, name, "role", "content", {role: role for role in ROLES})


def read_sharegpt(value: object, name: str) -> Messages:
    """Read ``[{"from", "value"}]``."""
    return _read_turns(value, name, "from", "value", _SHAREGPT_ROLES)


def read_sharegpt_answer(value: object, name: str) -> str:
    """Read one ``{"from", "value"}`` of the assistant."""
    turn = _read_turn(value, name, "from", "value", _SHAREGPT_ROLES)
    if turn.role != "assistant":
        raise Fault(name, f"a turn of {turn.role}", "an assistant turn", "correct it")
    return turn.content


def read_prompt(value: object, name: str) -> Messages:
    """Read a prompt: messages, a transcript or plain text; it ends on a user turn.

    A text is a transcript if a blank line and a marker begin it. It may end with the Assistant
    marker, and one that does may have lost its first blank line.
    """
    if not isinstance(value, str):
        return end_on_user(_read_conversation(value, name), name)
    text = expect_string(value, name)
    turns = _ASKS_FOR_ANSWER.sub("", text)
    if _is_transcript(turns) or (turns != text and _is_transcript("\n\n" + turns)):
        return end_on_user(read_transcript("\n\n" + turns.lstrip(), name), name)
    return (Message("user", text.strip()),)


def end_on_user(messages: Messages, name: str) -> Messages:
    """Return the messages if they end on a user turn; a Fault if they do not."""
    if messages[-1].role != "user":
        raise Fault(name, f"a last turn of {messages[-1].role}", "a user turn", "cut it off")
    return messages


def read_response(value: object, prompt: Messages, name: str) -> str:
    """Read a response: text, one message, or a conversation that may repeat the prompt.

    The conversation is a list of messages or a transcript.
    """
    if isinstance(value, str):
        text = expect_string(value, name)
        if not _is_transcript(text):
            return text.strip()
        messages = read_transcript(text, name)
    else:
        messages = _read_conversation([value] if isinstance(value, Mapping) else value, name)
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
    marker = [found for found in _MARKER.finditer(text) if found[1] == "Assistant"][-1]
    return text[: marker.start()], text[marker.end() :].strip()


def _read_conversation(value: object, name: str) -> Messages:
    if not isinstance(value, list):
        expected = "text or a list of {role, content}"
        raise Fault(name, describe(value), expected, "correct or remove the row")
    return read_messages(value, name)


def _is_transcript(text: str) -> bool:
    if not _BLANK_LINE.match(text):
        return False
    return _MARKER.match("\n\n" + text.lstrip()) is not None


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
    return tuple(
        _read_turn(turn, f"{name}[{i}]", role_key, text_key, roles, is_first=i == 0)
        for i, turn in enumerate(value)
    )


def _read_turn(
    turn: object,
    name: str,
    role_key: str,
    text_key: str,
    roles: Mapping[str, str],
    *,
    is_first: bool = False,
) -> Message:
    if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
        expected = f"an object with {role_key} and {text_key}"
        raise Fault(name, describe(turn), expected, "correct the row, or set another shape")
    given = turn[role_key]
    role = roles.get(given) if isinstance(given, str) else None
    if role is None or (role == "system" and not is_first):
        raise Fault(
            f"{name}.{role_key}",
            describe(given) + (" after the first turn" if role else ""),
            f"one of {', '.join(roles)}" + (", system only first" if role else ""),
            "rename it or remove the row",
        )
    return Message(role, expect_string(turn[text_key], f"{name}.{text_key}").strip())


def _names(row: Mapping[Any, Any]) -> str:
    return _short(", ".join(printable(str(key)) for key in row), 200)


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
