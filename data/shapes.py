"""Rows of the published formats to records: one function per shape, told apart by their columns.

A row that breaks its shape's rules is a ``Fault`` and refused; a row that is well formed but
teaches nothing (two equal responses, an empty answer) is ``Dropped`` and counted.
"""

from collections.abc import Callable

from align.errors import DataError, printable
from align.recipe import Source
from align.recipe_reward import STRENGTHS, Strength
from data.conversations import (
    MISSING,
    Dropped,
    Fault,
    Fields,
    describe,
    end_on_user,
    expect_number,
    expect_string,
    join_input,
    read_messages,
    read_prompt,
    read_response,
    read_sharegpt,
    read_sharegpt_answer,
    split_pair,
)
from data.labelled import FIELDS, label_text, read_labelled
from data.records import Demonstration, Message, Prompt, Ranking, Record, Text
from data.sources import is_csv


def _messages(row: Fields, source: Source) -> Record:
    return _conversation(
        read_messages(row.take("messages"), row.name("messages")), row.name("messages")
    )


def _sharegpt(row: Fields, source: Source) -> Record:
    name = row.name("conversations")
    messages = _after_system(row, read_sharegpt(row.take("conversations"), name))
    if row.get("chosen") is MISSING:
        return _conversation(messages, name)
    chosen, rejected = (
        read_sharegpt_answer(row.take(key), row.name(key)) for key in ("chosen", "rejected")
    )
    return _ranking(end_on_user(messages, name), (chosen, rejected), (1.0, 0.0))


def _alpaca(row: Fields, source: Source) -> Record:
    prompt = join_input(row.text("instruction"), row.optional_text("input"))
    turns = (
        *_history(row),
        Message("user", prompt),
        Message("assistant", row.text("output")),
    )
    return _conversation(_after_system(row, turns), row.name("output"))


def _history(row: Fields) -> tuple[Message, ...]:
    """Return the earlier turns of an Alpaca row: a list of an instruction and its output each."""
    name = row.name("history")
    earlier = [] if row.get("history") in (MISSING, None, "") else row.take("history")
    if not isinstance(earlier, list):
        raise Fault(name, describe(earlier), "a list of [instruction, output]", "correct it")
    turns = []
    for i, pair in enumerate(earlier):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Fault(f"{name}[{i}]", describe(pair), "[instruction, output]", "correct it")
        for j, role in enumerate(("user", "assistant")):
            turns.append(Message(role, expect_string(pair[j], f"{name}[{i}][{j}]").strip()))
    return tuple(turns)


def _after_system(row: Fields, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages after the text of the row's system column, if it has one."""
    system = row.optional_text("system")
    if not system:
        return messages
    if messages[0].role == "system":
        raise Fault(row.name("system"), "text beside a system turn", "one of them", "remove one")
    return (Message("system", system), *messages)


def _prompt_completion(row: Fields, source: Source) -> Record:
    prompt = read_prompt(row.take("prompt"), row.name("prompt"))
    answer = read_response(row.take("completion"), prompt, row.name("completion"))
    return _conversation((*prompt, Message("assistant", answer)), row.name("completion"))


def _transcript_pairs(row: Fields, source: Source) -> Record:
    prompt, chosen, rejected = split_pair(row.string("chosen"), row.string("rejected"), row)
    return _ranking(prompt, (chosen, rejected), (1.0, 0.0))


def _pairs(row: Fields, source: Source) -> Record:
    if row.get("prompt") is MISSING:
        sides = [read_messages(row.take(key), row.name(key)) for key in ("chosen", "rejected")]
        prompt = sides[0][:-1]
        if prompt != sides[1][:-1]:
            raise Dropped("different_prompts")
        if not prompt:
            raise Fault(
                row.name("chosen"),
                f"a lone {sides[0][-1].role} turn and no prompt",
                "the conversation up to the answer, or a prompt beside it",
                "map prompt in columns",
            )
        end_on_user(prompt, row.name("chosen"))
    else:
        prompt = read_prompt(row.take("prompt"), row.name("prompt"))
    chosen, rejected = (
        read_response(row.take(key), prompt, row.name(key)) for key in ("chosen", "rejected")
    )
    margin = row.optional_number("margin")
    if margin is not None and margin < 0:
        raise Fault(
            row.name("margin"),
            describe(margin),
            "0 or more: how much better chosen is",
            "correct or remove the row",
        )
    agreement = _agreement(row)
    scores = (1.0, 0.0) if agreement is None else (agreement, 1 - agreement)
    return _ranking(
        prompt,
        (chosen, rejected),
        scores,
        margin=margin,
        strength=_strength(row),
        votes=agreement is not None,
        subset=row.optional_text("subset") or None,
    )


def _agreement(row: Fields) -> float | None:
    """Return the share of a pair's annotators who preferred chosen, if the row has it."""
    share = row.optional_number("agreement")
    if share is not None and not 0.5 <= share <= 1:
        raise Fault(
            row.name("agreement"),
            describe(share),
            "0.5 to 1: the share of annotators who preferred chosen",
            "correct the row, or swap its responses",
        )
    return share


def _strength(row: Fields) -> Strength | None:
    """Return how much better a pair's chosen response is, if the row has it in words."""
    text = row.optional_text("strength")
    if not text:
        return None
    for strength in STRENGTHS:
        if text == strength:
            return strength
    allowed = f"one of {', '.join(STRENGTHS)}"
    raise Fault(row.name("strength"), describe(text), allowed, "correct or remove the row")


def _labelled_pairs(row: Fields, source: Source) -> Record:
    label = row.take("label")
    if label == []:
        raise Fault(row.name("label"), "an empty list", "a label or several", "remove the row")
    several = label if isinstance(label, list) else [label]
    judged = [_judgement(row, source, one) for one in several]
    text = row.optional_text("input") if "input" in row.columns else ""
    given = join_input(row.text("prompt"), text) if text else row.take("prompt")
    prompt = read_prompt(given, row.name("prompt"))
    first, second = (
        read_response(row.take(key), prompt, row.name(key)) for key in ("first", "second")
    )
    return _ranking(
        prompt,
        (first, second),
        (sum(votes[0] for votes, _ in judged), sum(votes[1] for votes, _ in judged)),
        strength=judged[0][1] if len(judged) == 1 else None,
        votes=isinstance(label, list),
    )


def _judgement(
    row: Fields, source: Source, label: object
) -> tuple[tuple[float, float], Strength | None]:
    """Return the votes for first and second that a label stands for, and how strong it is."""
    meaning = source.labels.get(label_text(label))
    if meaning is None:
        allowed = ", ".join(source.labels) or "none"
        raise Fault(
            row.name("label"), describe(label), f"one of labels ({allowed})", "add it to labels"
        )
    better, _, words = meaning.partition(" ")
    votes = {"first": (1.0, 0.0), "second": (0.0, 1.0), "tie": (0.5, 0.5)}[better]
    return votes, next((strength for strength in STRENGTHS if strength == words), None)


def _rankings(row: Fields, source: Source) -> Record:
    prompt = read_prompt(row.take("prompt"), row.name("prompt"))
    if row.get("candidates") is MISSING:
        kind = _kind_of_numbers(row, "scores", "ranks", "votes")
        texts, numbers = _parallel_lists(row, kind)
    else:
        places = enumerate(row.several("candidates"))
        items = [row.inside(item, f"candidates[{i}]") for i, item in places]
        kind = _kind_of_numbers(items[0], "score", "rank", "votes")
        texts = [item.text("text") for item in items]
        numbers = [item.number(kind) for item in items]
    if kind == "votes" and min(numbers) < 0:
        raise Fault(row.name(kind), describe(min(numbers)), "0 or more votes", "correct the row")
    scores = tuple(-value if kind.startswith("rank") else value for value in numbers)
    return _ranking(prompt, tuple(texts), scores, votes=kind == "votes")


def _kind_of_numbers(row: Fields, score: str, rank: str, votes: str) -> str:
    """Return which field says how good a response is: one that columns maps, else one there is."""
    for kind in (score, rank, votes):
        if kind in row.columns:
            return kind
    return next((kind for kind in (votes, rank) if row.get(kind) is not MISSING), score)


def _parallel_lists(row: Fields, kind: str) -> tuple[list[str], list[float]]:
    texts, numbers = row.several("responses"), row.several(kind)
    name = row.name(kind)
    if len(numbers) != len(texts):
        raise Fault(name, describe(numbers), f"{len(texts)} numbers, as responses", "complete it")
    values = [expect_number(value, f"{name}[{i}]") for i, value in enumerate(numbers)]
    responses = row.name("responses")
    return (
        [expect_string(text, f"{responses}[{i}]").strip() for i, text in enumerate(texts)],
        values,
    )


def _prompts(row: Fields, source: Source) -> Record:
    if row.get("prompt") is MISSING and row.get("messages") is not MISSING:
        return _conversation(
            read_messages(row.take("messages"), row.name("messages")), row.name("messages")
        )
    return _conversation(read_prompt(row.take("prompt"), row.name("prompt")), row.name("prompt"))


def _text(row: Fields, source: Source) -> Record:
    text = row.string("text")
    if not text.strip():
        raise Dropped("empty_text")
    return Text(text)


_Reader = Callable[[Fields, Source], Record]
# Per shape: its reader and our names of its fields, which `columns` may map.
_SHAPES: dict[str, tuple[_Reader, tuple[str, ...]]] = {
    "messages": (_messages, ("messages",)),
    "sharegpt": (_sharegpt, ("conversations", "chosen", "rejected", "system")),
    "alpaca": (_alpaca, ("instruction", "input", "output", "system", "history")),
    "prompt_completion": (_prompt_completion, ("prompt", "completion")),
    "transcript_pairs": (_transcript_pairs, ("chosen", "rejected")),
    "pairs": (
        _pairs,
        ("prompt", "chosen", "rejected", "margin", "strength", "agreement", "subset"),
    ),
    "labelled_pairs": (_labelled_pairs, ("prompt", "input", "first", "second", "label")),
    "labelled": (read_labelled, FIELDS),
    "ranking": (
        _rankings,
        ("prompt", "responses", "scores", "ranks", "votes", "candidates", "text", "rank", "score"),
    ),
    "prompts": (_prompts, ("prompt", "messages")),
    "text": (_text, ("text",)),
}


def find_shape(row: object, source: Source, where: str) -> str:
    """Return the source's shape: as told, else recognised by the columns of its first row.

    Raises:
        DataError: no shape fits, or ``columns`` maps fields that the shape does not have.
    """
    shape = source.shape if source.shape != "auto" else _recognise(row, source, where)
    _, fields = _SHAPES[shape]
    unknown = [field for field in source.columns if field not in fields]
    if unknown:
        raise DataError(
            f"{where}: columns names {', '.join(unknown)}, which shape {shape} does not have;"
            f" allowed are {', '.join(fields)}"
        )
    if shape == "labelled_pairs" and not source.labels:
        raise DataError(
            f"{where}: shape labelled_pairs needs labels: for every label in the file, whether"
            " first or second is better, or tie; the same number means different things elsewhere"
        )
    return shape


def to_record(row: object, shape: str, source: Source) -> Record:
    """Return the row as a record; ``origin`` is left empty.

    Raises:
        Fault: the row is malformed.
        Dropped: the row is well formed but nothing can be learned from it.
    """
    if not isinstance(row, dict):
        raise Fault("row", type(row).__name__, "an object", "give every row named fields")
    are_cells = source.path is not None and is_csv(source.path)
    return _SHAPES[shape][0](Fields(row, source.columns, are_cells=are_cells), source)


def _recognise(row: object, source: Source, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: got {type(row).__name__}, expected an object with named fields")
    fields = Fields(row, source.columns)

    def has(*names: str) -> bool:
        return all(fields.get(name) is not MISSING for name in names)

    if has("messages", "label"):
        raise DataError(
            f"{where}: messages with one label each (good or bad, without a pair) cannot be ranked;"
            " shape: messages reads the conversations and ignores the label"
        )
    if has("chosen", "rejected") and not has("prompt") and isinstance(fields.get("chosen"), str):
        return "transcript_pairs"
    for shape, needed in (
        ("sharegpt", ("conversations",)),
        ("pairs", ("chosen", "rejected")),
        ("labelled_pairs", ("prompt", "first", "second", "label")),
        ("ranking", ("prompt", "candidates")),
        ("ranking", ("prompt", "responses")),
        ("alpaca", ("instruction", "output")),
        ("prompt_completion", ("prompt", "completion")),
        ("messages", ("messages",)),
        ("prompts", ("prompt",)),
        ("text", ("text",)),
    ):
        if has(*needed):
            return shape
    raise DataError(
        f"{where}: no known shape has the columns {', '.join(map(printable, row))};"
        f" set shape (one of {', '.join(_SHAPES)}) and map its fields in columns"
    )


def _conversation(messages: tuple[Message, ...], field: str) -> Record:
    roles = [message.role for message in messages]
    if "user" not in roles or roles[-1] == "system":
        found = ", ".join(roles)
        raise Fault(field, f"turns of {found}", "a user turn and its answer", "correct the row")
    if roles[-2:] == ["assistant", "assistant"]:
        raise Fault(field, "two last turns of assistant", "one answer", "join them")
    if not next(m.content for m in reversed(messages) if m.role == "user"):
        raise Dropped("empty_prompt")
    if roles[-1] == "user":
        return Prompt(messages)
    if not messages[-1].content:
        raise Dropped("empty_response")
    return Demonstration(messages)


def _ranking(
    prompt: tuple[Message, ...],
    responses: tuple[str, ...],
    scores: tuple[float, ...],
    *,
    margin: float | None = None,
    strength: Strength | None = None,
    votes: bool = False,
    subset: str | None = None,
) -> Record:
    if not prompt[-1].content:
        raise Dropped("empty_prompt")
    if not all(responses):
        raise Dropped("empty_response")
    # A text that is given twice has two judgements of one response: their mean, of votes all.
    judged: dict[str, list[float]] = {}
    for response, score in zip(responses, scores, strict=True):
        judged.setdefault(response, []).append(score)
    if len(judged) < 2:
        raise Dropped("identical_responses")
    joined = tuple(sum(v) / (1 if votes else len(v)) for v in judged.values())
    if len(set(joined)) == 1:
        raise Dropped("all_tied")
    differs = any(len(set(values)) > 1 for values in judged.values())
    return Ranking(
        prompt,
        tuple(judged),
        joined,
        margin,
        strength,
        votes=votes,
        subset=subset,
        judged_twice=differs,
    )
