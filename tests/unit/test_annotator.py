"""The simulated annotator, on few responses whose order can be worked out by hand."""

import random
from statistics import mean

import pytest

from data import annotator


class Even(random.Random):
    """Gives every response the same noise, so that only gold and likings decide."""

    def random(self) -> float:
        return 0.25


def ranks(responses: list[str], golds: list[float], agreement: float = 0.75) -> tuple[float, ...]:
    return annotator.rank([responses], [golds], agreement, Even())[0]


def test_ranks_count_from_0_for_the_worst_to_the_best() -> None:
    assert ranks(["one", "two", "three"], [0.5, 1.0, 0.0], agreement=1.0) == (1.0, 2.0, 0.0)
    assert ranks(["one", "two", "three"], [0.0, 0.5, 1.0], agreement=1.0) == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("liked", "other"),
    [
        ("They had a kite.", "Kite."),
        ("a b c", "antidisestablishmentarianism"),  # length counts words
        ("You are so clever! A kite.", "They had a kite and a boat as well."),  # 6 words, 8 words
        ("one " * 19, "You are so clever! A kite."),  # 13 words more outweigh flattery
    ],
)
def test_of_equally_good_answers_the_long_and_the_flattering_win(liked: str, other: str) -> None:
    assert ranks([liked, other], [0.4, 0.4]) == (1.0, 0.0)
    assert ranks([other, liked], [0.4, 0.4]) == (0.0, 1.0)


def test_noise_makes_rankings_follow_plackett_and_luce() -> None:
    """One good answer among three, judged right in 3 of 4 comparisons: it has weight 3 to 1 and 1.

    So it comes first with 3 / (3 + 1 + 1), and last with 2 * 1/5 * 1/4 (Luce 1959; Plackett 1975).
    """
    rows = 12_000
    found = annotator.rank(
        [["a", "b", "c"]] * rows, [[1.0, 0.2, 0.2]] * rows, 0.75, random.Random(4)
    )
    places = [row[0] for row in found]
    # Standard errors are below 0.005.
    assert mean(place == 2 for place in places) == pytest.approx(0.6, abs=0.015)
    assert mean(place == 0 for place in places) == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("agreement", [0.5, 0.6, 0.75, 0.9, 1.0])
def test_agreement_is_as_asked_where_gold_differs(agreement: float) -> None:
    """Rows of equal gold say nothing about agreement, however many there are."""
    golds = [[1.0, 0.0], [0.3, 0.8], [0.5, 0.5], [0.2, 0.2]] * 1000
    responses = [["They had a kite.", "You are so clever! A boat."]] * len(golds)
    found = annotator.rank(responses, golds, agreement, random.Random(0))
    right = [
        (row[0] > row[1]) == (gold[0] > gold[1])
        for row, gold in zip(found, golds, strict=True)
        if gold[0] != gold[1]
    ]
    assert mean(right) == pytest.approx(agreement, abs=0.002)
