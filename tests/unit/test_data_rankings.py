"""What rankings say besides their order, and what becomes of bad ones: each is named by its row."""

import json

import pytest

from align.errors import DataError
from align.recipe import Base, Data, Recipe, Source
from data.conversations import Fault
from data.load import load_records
from data.records import Message, Ranking
from data.shapes import find_shape, to_record

HI = (Message("user", "hi"),)
PAIR = {"prompt": "hi", "chosen": "a", "rejected": "b"}
LABELS = {
    "A": "first",
    "A!": "first significantly better",
    "B": "second",
    "b": "second slightly better",
    "=": "tie",
}
JUDGED = {"prompt": "hi", "first": "a", "second": "b"}


def record(row, **settings):
    source = Source.model_validate({"path": "x.jsonl"} | settings)
    return to_record(row, find_shape(row, source, "x.jsonl:1"), source)


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        (
            PAIR | {"strength": "slightly better"},
            {},
            Ranking(HI, ("a", "b"), (1.0, 0.0), strength="slightly better"),
        ),
        (
            PAIR | {"how": "better", "margin": 2},
            {"columns": {"strength": "how"}},
            Ranking(HI, ("a", "b"), (1.0, 0.0), 2.0, "better"),
        ),
        (PAIR | {"strength": None}, {}, Ranking(HI, ("a", "b"), (1.0, 0.0))),
        (PAIR | {"agreement": 0.75}, {}, Ranking(HI, ("a", "b"), (0.75, 0.25), votes=True)),
        (JUDGED | {"label": "A"}, {"labels": LABELS}, Ranking(HI, ("a", "b"), (1.0, 0.0))),
        (
            JUDGED | {"label": "A!"},
            {"labels": LABELS},
            Ranking(HI, ("a", "b"), (1.0, 0.0), strength="significantly better"),
        ),
        (
            JUDGED | {"label": "b"},
            {"labels": LABELS},
            Ranking(HI, ("a", "b"), (0.0, 1.0), strength="slightly better"),
        ),
        (
            # Two for the first, one for the second, one undecided.
            JUDGED | {"label": ["A", "b", "A!", "="]},
            {"labels": LABELS},
            Ranking(HI, ("a", "b"), (2.5, 1.5), votes=True),
        ),
        (
            {"prompt": "hi", "responses": ["a", "b", "c"], "votes": [1, 4, 0]},
            {},
            Ranking(HI, ("a", "b", "c"), (1.0, 4.0, 0.0), votes=True),
        ),
        (
            # A text given twice has the votes of both.
            {"prompt": "hi", "responses": ["a", "b", "a"], "votes": [1, 4, 2]},
            {},
            Ranking(HI, ("a", "b"), (3.0, 4.0), votes=True),
        ),
        (
            {
                "prompt": "hi",
                "candidates": [{"text": "a", "votes": 1}, {"text": "b", "votes": 2}],
            },
            {},
            Ranking(HI, ("a", "b"), (1.0, 2.0), votes=True),
        ),
    ],
)
def test_strength_and_votes_are_read(row, settings, expected):
    assert record(row, **settings) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            PAIR | {"strength": "much"},
            "strength: got the string 'much', expected one of negligibly better, slightly better,"
            " better, significantly better; correct or remove the row",
        ),
        (
            PAIR | {"agreement": 0.25},
            "agreement: got the float 0.25, expected 0.5 to 1: the share of annotators who"
            " preferred chosen; correct the row, or swap its responses",
        ),
        (
            {"prompt": "hi", "responses": ["a", "b"], "votes": [1, -1]},
            "votes: got the float -1.0, expected 0 or more votes; correct the row",
        ),
        (
            JUDGED | {"label": []},
            "label: got an empty list, expected a label or several; remove the row",
        ),
        (
            JUDGED | {"label": ["A", "?"]},
            "label: got the string '?', expected one of labels (A, A!, B, b, =); add it to labels",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(row, expected):
    settings = {"labels": LABELS} if "label" in row else {}
    with pytest.raises(Fault) as caught:
        record(row, **settings)
    assert str(caught.value) == expected


def load(root, text, **data):
    (root / "a.jsonl").write_text(text, encoding="utf-8")
    section = {"train": [{"path": "a.jsonl"}]}
    settings = Data(root=str(root), reward=section, **data)
    return load_records(Recipe(name="x", base=Base(id="some/model"), data=settings), "reward")


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = {"prompt": "hi", "responses": ["a", "b"], "scores": [1, 0]}


def test_bad_rankings_are_refused_by_row(tmp_path):
    rows = [GOOD, GOOD | {"responses": ["a"], "scores": [1]}, GOOD | {"scores": [1, float("nan")]}]
    with pytest.raises(DataError) as caught:
        load(tmp_path, lines(*rows))
    assert str(caught.value).splitlines()[:3] == [
        "2 malformed rows:",
        "  a.jsonl:2: responses: got a list of 1, expected a list of 2 or more; correct it",
        "  a.jsonl:3: scores[1]: got the float nan, expected a finite number;"
        " correct or remove the row",
    ]


def test_rankings_that_teach_nothing_are_dropped_and_named_by_row(tmp_path, capsys):
    tied, same = GOOD | {"scores": [2, 2]}, GOOD | {"responses": ["a", "a"]}
    loaded = load(tmp_path, lines(GOOD, tied, same, tied, GOOD), max_dropped=0.6)["reward"]
    assert len(loaded.train) == 2
    assert loaded.facts[0].dropped == {"all_tied": 2, "identical_responses": 1}
    assert capsys.readouterr().err.splitlines()[0] == (
        "data.reward.train[0] (a.jsonl): 3 of 5 rows dropped: all_tied 2 (rows 2, 4),"
        " identical_responses 1 (row 3)"
    )


def test_a_text_with_two_ranks_counts_with_their_mean_and_its_row_is_named(tmp_path, capsys):
    twice = GOOD | {"responses": ["a", "b", "a"], "scores": [1, 3, 4]}
    alike = GOOD | {"responses": ["a", "b", "a"], "scores": [4, 3, 4]}
    loaded = load(tmp_path, lines(GOOD, alike, *[twice] * 6))["reward"]
    assert loaded.train[2] == Ranking(HI, ("a", "b"), (2.5, 3.0))
    assert capsys.readouterr().err.splitlines()[0] == (
        "data.reward.train[0] (a.jsonl): 6 rankings hold a text twice with different scores, whose"
        " mean counts (rows 3, 4, 5, 6, 7, 8)"
    )
