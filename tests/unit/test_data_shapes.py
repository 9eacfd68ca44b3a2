"""Rows of every shape to records by hand, and what each malformed row is told."""

import json

import pytest

from align.errors import DataError
from align.recipe import Source
from data.conversations import Dropped, Fault
from data.records import Demonstration, Message, Prompt, Ranking, Text
from data.shapes import find_shape, to_record


def read(row, **settings):
    source = Source(path="x.jsonl", **settings)
    return to_record(row, find_shape(row, source, "x.jsonl:1"), source)


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


HI = (user("hi"),)
TALK = (Message("system", "be kind"), user("hi"), assistant("yo"))
ROLE_TALK = [{"role": m.role, "content": f" {m.content}\n"} for m in TALK]
FROM_TALK = [
    {"from": "system", "value": "be kind"},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "yo"},
]
HH = "\n\nHuman: hi\n\nAssistant: a\n\nHuman: and?\n\nAssistant:"
HH_PROMPT = (user("hi"), assistant("a"), user("and?"))

GOOD = [
    ({"messages": ROLE_TALK}, {}, Demonstration(TALK)),
    ({"messages": ROLE_TALK[:2]}, {}, Prompt(TALK[:2])),
    ({"chat": {"turns": ROLE_TALK}}, {"columns": {"messages": "chat.turns"}}, Demonstration(TALK)),
    ({"conversations": FROM_TALK}, {}, Demonstration(TALK)),
    ({"conversations": FROM_TALK[1:], "system": "be kind"}, {}, Demonstration(TALK)),
    (
        {
            "conversations": FROM_TALK[:2],
            "chosen": {"from": "gpt", "value": "yo"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {},
        Ranking(TALK[:2], ("yo", "no"), (1.0, 0.0)),
    ),
    (
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {},
        Demonstration((user("Add.\n\n1 1"), assistant("2"))),
    ),
    ({"instruction": "hi", "input": "", "output": "yo"}, {}, Demonstration((*HI, assistant("yo")))),
    (
        {"instruction": "hi", "input": None, "output": "yo"},
        {},
        Demonstration((*HI, assistant("yo"))),
    ),
    (
        {"instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}]},
        {"columns": {"input": "instances.0.input", "output": "instances.0.output"}},
        Demonstration((user("Add.\n\n1 1"), assistant("2"))),
    ),
    ({"prompt": "hi", "completion": " yo"}, {}, Demonstration((*HI, assistant("yo")))),
    (
        {"q": "hi", "a": "yo"},
        {"columns": {"prompt": "q", "completion": "a"}},
        Demonstration((*HI, assistant("yo"))),
    ),
    (
        {"prompt": ROLE_TALK[:2], "completion": ROLE_TALK[2:]},
        {},
        Demonstration(TALK),
    ),
    ({"chosen": HH + " b", "rejected": HH + " c"}, {}, Ranking(HH_PROMPT, ("b", "c"), (1.0, 0.0))),
    (
        # A reply in two parts, of which the first is shared, is one reply.
        {"chosen": HH + " b\n\nAssistant: x", "rejected": HH + " b\n\nAssistant: y"},
        {},
        Ranking(HH_PROMPT, ("b\n\nx", "b\n\ny"), (1.0, 0.0)),
    ),
    (
        # A marker without the two line feeds is text.
        {
            "chosen": "\n\nHuman: who is Human: ?\n\nAssistant: b",
            "rejected": "\n\nHuman: who is Human: ?\n\nAssistant: c",
        },
        {},
        Ranking((user("who is Human: ?"),), ("b", "c"), (1.0, 0.0)),
    ),
    ({"prompt": "hi", "chosen": "a", "rejected": "b"}, {}, Ranking(HI, ("a", "b"), (1.0, 0.0))),
    (
        {"prompt": "hi", "chosen": "a", "rejected": "b", "gap": 0.5},
        {"columns": {"margin": "gap"}},
        Ranking(HI, ("a", "b"), (1.0, 0.0), 0.5),
    ),
    (
        {"prompt": HH, "chosen": "b", "rejected": "c"},
        {},
        Ranking(HH_PROMPT, ("b", "c"), (1.0, 0.0)),
    ),
    (
        {"chosen": ROLE_TALK, "rejected": [*ROLE_TALK[:2], {"role": "assistant", "content": "no"}]},
        {},
        Ranking(TALK[:2], ("yo", "no"), (1.0, 0.0)),
    ),
    (
        {
            "prompt": "hi",
            "chosen": ROLE_TALK[1:],
            "rejected": [{"role": "assistant", "content": "n"}],
        },
        {},
        Ranking(HI, ("yo", "n"), (1.0, 0.0)),
    ),
    (
        {"prompt": "hi", "response 1": "a", "b": "b", "label": 1},
        {
            "columns": {"first": "response 1", "second": "b"},
            "labels": {"0": "first", "1": "second", "2": "tie"},
        },
        Ranking(HI, ("a", "b"), (0.0, 1.0)),
    ),
    (
        {"prompt": "Add.", "first": "2", "second": "3", "label": True, "input": "1 1"},
        {"columns": {"input": "input"}, "labels": {"true": "first"}},
        Ranking((user("Add.\n\n1 1"),), ("2", "3"), (1.0, 0.0)),
    ),
    (
        # A transcript, and messages, are prompts of labelled pairs as of others.
        {"prompt": HH, "first": "b", "second": "c", "label": 1},
        {"labels": {"1": "first"}},
        Ranking(HH_PROMPT, ("b", "c"), (1.0, 0.0)),
    ),
    (
        {"prompt": ROLE_TALK[:2], "first": "b", "second": "c", "label": 1},
        {"labels": {"1": "first"}},
        Ranking(TALK[:2], ("b", "c"), (1.0, 0.0)),
    ),
    (
        {"prompt": HH, "first": "b", "second": "c", "label": 1, "input": ""},
        {"columns": {"input": "input"}, "labels": {"1": "first"}},
        Ranking(HH_PROMPT, ("b", "c"), (1.0, 0.0)),
    ),
    (
        {"prompt": "hi", "responses": ["a", "b", "c"], "scores": [1, 3.5, 1]},
        {},
        Ranking(HI, ("a", "b", "c"), (1.0, 3.5, 1.0)),
    ),
    (
        {"prompt": "hi", "responses": ["a", "b"], "ranks": [2, 1]},
        {},
        Ranking(HI, ("a", "b"), (-2.0, -1.0)),
    ),
    (
        {"prompt": "hi", "candidates": [{"text": "a", "rank": 1}, {"text": "b", "rank": 2}]},
        {},
        Ranking(HI, ("a", "b"), (-1.0, -2.0)),
    ),
    (
        {
            "prompt": "hi",
            "candidates": [
                {"text": "a", "rank": 1, "scores": {"overall": 2}},
                {"text": "b", "rank": 2, "scores": {"overall": 5}},
            ],
        },
        {"columns": {"score": "scores.overall"}},
        Ranking(HI, ("a", "b"), (2.0, 5.0)),
    ),
    (
        # One text judged twice has the mean of its scores.
        {"prompt": "hi", "responses": ["a", "b", "a"], "scores": [1, 3, 4]},
        {},
        Ranking(HI, ("a", "b"), (2.5, 3.0)),
    ),
    ({"prompt": "hi"}, {}, Prompt(HI)),
    ({"prompt": HH}, {}, Prompt(HH_PROMPT)),
    # A transcript without the marker that asks for an answer, without the first blank line, with
    # Windows line ends; a marker that is the user's own.
    ({"prompt": HH[: -len("\n\nAssistant:")]}, {}, Prompt(HH_PROMPT)),
    ({"prompt": HH.strip()}, {}, Prompt(HH_PROMPT)),
    ({"prompt": HH.replace("\n", "\r\n")}, {}, Prompt(HH_PROMPT)),
    ({"prompt": "\n\nHuman: say Assistant:"}, {}, Prompt((user("say Assistant:"),))),
    (
        {"prompt": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: say Assistant:"},
        {},
        Prompt((user("hi"), assistant("a"), user("say Assistant:"))),
    ),
    ({"prompt": "Human: hi"}, {}, Prompt((user("Human: hi"),))),
    # Responses that repeat the prompt, as transcripts.
    (
        {"prompt": HH, "chosen": HH + " b", "rejected": "\n\nAssistant: c"},
        {},
        Ranking(HH_PROMPT, ("b", "c"), (1.0, 0.0)),
    ),
    (
        {
            "chosen": (HH + " b").replace("\n", "\r\n"),
            "rejected": (HH + " c").replace("\n", "\r\n"),
        },
        {},
        Ranking(HH_PROMPT, ("b", "c"), (1.0, 0.0)),
    ),
    (
        {"instruction": "", "input": "1 1", "output": "2"},
        {},
        Demonstration((user("1 1"), assistant("2"))),
    ),
    (
        {"instruction": "c", "output": "d", "system": "be kind", "history": [["a", " b"]]},
        {},
        Demonstration(
            (Message("system", "be kind"), user("a"), assistant("b"), user("c"), assistant("d"))
        ),
    ),
    ({"text": " as it is\n"}, {}, Text(" as it is\n")),
]


@pytest.mark.parametrize(("row", "settings", "record"), GOOD)
def test_records(row, settings, record):
    assert read(row, **settings) == record


DROPPED = [
    ({"chosen": HH + " b", "rejected": HH + " b "}, "identical_responses"),
    ({"chosen": HH + " b", "rejected": HH + ""}, "empty_response"),
    ({"chosen": HH + " b", "rejected": HH + " b\n\nHuman: c"}, "ends_on_user"),
    ({"chosen": HH + " b", "rejected": HH + " b\n\nAssistant: c"}, "different_prompts"),
    ({"prompt": "hi", "chosen": "a", "rejected": ROLE_TALK}, "different_prompts"),
    (
        {"prompt": HH, "chosen": "b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
        "different_prompts",
    ),
    ({"prompt": "\n\nHuman:\n\nAssistant:"}, "empty_prompt"),
    ({"prompt": "hi", "responses": ["a", "b"], "scores": [1, 1]}, "all_tied"),
    ({"prompt": "hi", "completion": "  "}, "empty_response"),
    ({"prompt": " ", "completion": "a"}, "empty_prompt"),
    ({"prompt": ""}, "empty_prompt"),
    ({"text": " \n"}, "empty_text"),
]


@pytest.mark.parametrize(("row", "reason"), DROPPED)
def test_rows_that_teach_nothing(row, reason):
    with pytest.raises(Dropped, match=f"^{reason}$"):
        read(row)


MALFORMED = [
    (
        "messages",
        {"text": "a"},
        "messages: got nothing, expected a value;"
        " the row has text; add it, or map messages in columns",
    ),
    (
        "messages",
        {"messages": []},
        "messages: got an empty conversation, expected a list of {role, content};"
        " correct or remove the row",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
        "messages[1].role: got the string 'tool', expected one of system, user, assistant;"
        " rename it or remove the row",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        "messages[1].content: got null, expected a string; correct or remove the row",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        "messages[1].role: got the string 'system' after the first turn, expected one of system,"
        " user, assistant, system only first; rename it or remove the row",
    ),
    (
        "messages",
        {"messages": [*ROLE_TALK, ROLE_TALK[2]]},
        "messages: got two last turns of assistant, expected one answer; join them",
    ),
    (
        "messages",
        {"messages": [{"role": "assistant", "content": "a"}]},
        "messages: got turns of assistant, expected a user turn and its answer; correct the row",
    ),
    (
        "messages",
        {"messages": ["a"]},
        "messages[0]: got the string 'a', expected an object with role and content;"
        " correct the row, or set another shape",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "observation", "value": "x"}]},
        "conversations[0].from: got the string 'observation', expected one of human, user, gpt,"
        " assistant, system; rename it or remove the row",
    ),
    (
        "sharegpt",
        {"conversations": ROLE_TALK},
        "conversations[0]: got an object with role, content, expected an object with from and"
        " value; correct the row, or set another shape",
    ),
    (
        "sharegpt",
        {"conversations": FROM_TALK[:2], "chosen": FROM_TALK[1], "rejected": FROM_TALK[2]},
        "chosen: got a turn of user, expected an assistant turn; correct it",
    ),
    (
        "sharegpt",
        {"conversations": FROM_TALK, "chosen": FROM_TALK[2], "rejected": FROM_TALK[2]},
        "conversations: got a last turn of assistant, expected a user turn; cut it off",
    ),
    (
        "sharegpt",
        {"conversations": FROM_TALK, "system": "be brief"},
        "system: got text beside a system turn, expected one of them; remove one",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history[0]: got a list of 1, expected [instruction, output]; correct it",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["c", 1]]},
        "history[0][1]: got the int 1, expected a string; correct or remove the row",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": "c"},
        "history: got the string 'c', expected a list of [instruction, output]; correct it",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": ["b"]},
        "output: got a list of 1, expected a string; correct or remove the row",
    ),
    (
        "pairs",
        {"prompt": "a", "chosen": True, "rejected": "b"},
        "chosen: got the boolean true, expected text or a list of {role, content};"
        " correct or remove the row",
    ),
    (
        "pairs",
        {"chosen": ROLE_TALK[2:], "rejected": ROLE_TALK[2:]},
        "chosen: got a lone assistant turn and no prompt, expected the conversation up to the"
        " answer, or a prompt beside it; map prompt in columns",
    ),
    (
        "pairs",
        {"chosen": [*ROLE_TALK, ROLE_TALK[2]], "rejected": [*ROLE_TALK, ROLE_TALK[2]]},
        "chosen: got a last turn of assistant, expected a user turn; cut it off",
    ),
    (
        "pairs",
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": -0.5},
        "margin: got the float -0.5, expected 0 or more: how much better chosen is;"
        " correct or remove the row",
    ),
    (
        "pairs",
        {"prompt": "\n\nHuman: a\n\nAssistant: b", "chosen": "b", "rejected": "c"},
        "prompt: got a last turn of assistant, expected a user turn; cut it off",
    ),
    # JSON spells half a surrogate pair, which no tokenizer takes.
    (
        "text",
        {"text": json.loads('"ab\\ud83d"')},
        "text: got \\ud83d at character 3, half of a surrogate pair, expected whole characters;"
        " correct or remove the row",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": json.loads('"\\ude00"')}]},
        "messages[0].content: got \\ude00 at character 1, half of a surrogate pair, expected whole"
        " characters; correct or remove the row",
    ),
    (
        "pairs",
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")},
        "margin: got the float nan, expected a finite number; correct or remove the row",
    ),
    (
        "transcript_pairs",
        {"chosen": "no markers", "rejected": HH + " a"},
        "chosen: got the string 'no markers', expected a transcript that begins with"
        ' "\\n\\nHuman:"; correct the row, or set another shape',
    ),
    (
        "ranking",
        {"prompt": "a", "responses": ["b", "c"], "scores": [1]},
        "scores: got a list of 1, expected a list of 2 or more; correct it",
    ),
    (
        "ranking",
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, "2"]},
        "scores[1]: got the string '2', expected a finite number; correct or remove the row",
    ),
    (
        "ranking",
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, float("inf")]},
        "ranks[1]: got the float inf, expected a finite number; correct or remove the row",
    ),
    (
        "ranking",
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, 10**400]},
        f"scores[1]: got the int 1{'0' * 39}..., expected a finite number;"
        " correct or remove the row",
    ),
    (
        # More than float32 holds, in which the losses are computed.
        "ranking",
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, 1e39]},
        "scores[1]: got the float 1e+39, expected a finite number; correct or remove the row",
    ),
    (
        "ranking",
        {"prompt": "a", "candidates": [{"text": "b", "rank": 1}, {"text": "c"}]},
        "candidates[1].rank: got nothing, expected a value;"
        " the row has text; add it, or map rank in columns",
    ),
    (
        "prompts",
        {"messages": [{"role": "system", "content": "a"}]},
        "messages: got turns of system, expected a user turn and its answer; correct the row",
    ),
    ("text", [1], "row: got list, expected an object; give every row named fields"),
]


@pytest.mark.parametrize(("shape", "row", "message"), MALFORMED)
def test_malformed_rows(shape, row, message):
    with pytest.raises(Fault) as error:
        to_record(row, shape, Source(path="x", shape=shape))
    assert str(error.value) == message


def test_an_unknown_label_is_named():
    row = {"prompt": "a", "first": "b", "second": "c", "label": 3}
    with pytest.raises(Fault) as error:
        read(row, labels={"1": "first", "2": "second"})
    assert str(error.value) == (
        "label: got the int 3, expected one of labels (1, 2); add it to labels"
    )


@pytest.mark.parametrize("file", ["x.csv", "x.csv.gz"])
def test_numbers_in_csv_cells_are_text(file):
    def margin(cell, path=file):
        row = {"prompt": "5", "chosen": "a", "rejected": "b", "margin": cell}
        return to_record(row, "pairs", Source(path=path, shape="pairs")).margin

    assert [margin(cell) for cell in ("0.5", " 2 ", "1e-2", ".5", "")] == [0.5, 2, 0.01, 0.5, None]
    for cell in ("nan", "inf", "1_0", "0,5", "a", " "):
        with pytest.raises(Fault, match=r"^margin: got the string .*, expected a finite number"):
            margin(cell)
    for cell in ("0.5", ""):
        with pytest.raises(Fault, match="expected a finite number"):
            margin(cell, "x.jsonl")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"a": 1, "b": 2},
            {},
            "x.jsonl:1: no known shape has the columns a, b; set shape (one of messages, sharegpt,"
            " alpaca, prompt_completion, transcript_pairs, pairs, labelled_pairs, labelled,"
            " ranking, prompts, text) and map its fields in columns",
        ),
        (
            {"text": "a"},
            {"columns": {"txt": "text"}},
            "x.jsonl:1: columns names txt, which shape text does not have; allowed are text",
        ),
        (
            {"messages": ROLE_TALK, "label": True},
            {},
            "x.jsonl:1: messages with one label each (good or bad, without a pair) cannot be"
            " ranked; shape: messages reads the conversations and ignores the label",
        ),
        (
            {"prompt": "a", "first": "b", "second": "c", "label": 1},
            {},
            "x.jsonl:1: shape labelled_pairs needs labels: for every label in the file, whether"
            " first or second is better, or tie; the same number means different things elsewhere",
        ),
        ("a", {}, "x.jsonl:1: got str, expected an object with named fields"),
    ],
)
def test_shapes_that_cannot_be_settled(row, settings, message):
    with pytest.raises(DataError) as error:
        read(row, **settings)
    assert str(error.value) == message
