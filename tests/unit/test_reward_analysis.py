"""What is said of a reward model beyond its accuracy: hand arithmetic, and planted biases."""

import math
from collections.abc import Sequence

import pytest
import torch

from align.errors import InputError
from align.recipe_reward import Strength
from data.records import Message, Ranking
from pipelines.ranked_tokens import RankedTokens
from pipelines.reward_report import measure, probe_response, quick_look
from reward.analysis import (
    accuracy_by,
    calibration_metrics,
    length_metrics,
    length_names,
    margin_names,
    warnings,
)
from reward.baseline import bag_of_words_outcomes
from reward.scorer import Row

HI = (Message("user", "hi"),)
END = 1


def test_accuracy_by_part_by_hand() -> None:
    outcomes, owners = torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.arange(4)
    found = accuracy_by("source", ["a", "b", "a", "b"], outcomes, owners)
    assert (found["accuracy/source/a"], found["accuracy/source/a/pairs"]) == (1.0, 2.0)
    assert (found["accuracy/source/b"], found["accuracy/source/b/pairs"]) == (0.25, 2.0)
    assert found["accuracy/source/a/low"] < 1.0 == found["accuracy/source/a/high"]
    assert accuracy_by("source", ["a"] * 4, outcomes, owners) == {}
    assert accuracy_by("strength", [None] * 4, outcomes, owners) == {}
    some = accuracy_by("strength", ["better", None, None, None], outcomes, owners)
    assert some["accuracy/strength/better/pairs"] == 1.0


def test_lengths_within_a_tenth_are_matched() -> None:
    better, worse = torch.tensor([10, 9, 8, 10, 5]), torch.tensor([10, 10, 10, 8, 5])
    assert length_names(better, worse) == ["matched", "matched", "shorter", "longer", "matched"]


def test_margins_are_cut_in_thirds_and_equal_ones_stay_together() -> None:
    assert margin_names(torch.tensor([1.0, 2.0, 3.0])) == ["low", "middle", "high"]
    ranks = torch.tensor([1.0, 1, 1, 2, 2, 3])  # of four ranked responses
    assert margin_names(ranks) == ["low"] * 3 + ["middle"] * 2 + ["high"]
    assert margin_names(torch.tensor([1.0, 1.0])) == [None, None]
    assert margin_names(torch.zeros(0)) == []


def test_length_by_hand() -> None:
    # The model takes the longer one three times of four, the labels twice.
    better, worse = torch.tensor([5, 9, 3, 2, 7]), torch.tensor([3, 4, 8, 4, 7])
    scores = torch.tensor([1.0, 2.0, -1.0, 1.0, 9.0])
    found = length_metrics(scores, better, worse, torch.arange(5))
    assert found["length/prefers_longer"] == 0.75
    assert found["length/labels_prefer_longer"] == 0.5
    assert found["length/bias"] == pytest.approx(0.25)
    assert found["length/bias/low"] < 0.25 < found["length/bias/high"]
    # (2 * 1 + 5 * 2 + 5 * 1 - 2 * 1) / sqrt(4 + 25 + 25 + 4) / sqrt(1 + 4 + 1 + 1 + 81)
    assert found["length/correlation"] == pytest.approx(15 / math.sqrt(58 * 88))
    assert length_metrics(scores, better, better, torch.arange(5)) == {}


def test_calibration_is_given_before_and_after_scaling() -> None:
    differences = torch.tensor([2.0, 2.0, 2.0, -2.0] * 2)
    found = calibration_metrics(differences, torch.tensor([0] * 4 + [1] * 4))
    said = 1 / (1 + math.exp(-2))
    assert found["calibration/ece"] == pytest.approx(said - 0.75)
    assert found["calibration/ece_scaled"] == pytest.approx(0.0, abs=1e-6)
    assert found["calibration/temperature"] == pytest.approx(2 / math.log(3))
    assert found["calibration/bin0/pairs"] == 8
    alone = calibration_metrics(differences, torch.zeros(8).long())
    assert "calibration/ece_scaled" not in alone


def planted(length: float, quality: float, vain_labels: bool = False) -> dict[str, float]:
    """Measure a made-up model of 400 pairs that scores length and quality with these weights.

    The labels follow quality, or where they are vain, length.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 50, (400, 2), generator=generator)
    qualities = torch.randn(400, 2, generator=generator)
    scores = length * lengths / 13 + quality * qualities  # 13: the spread of the lengths
    truth = lengths.float() if vain_labels else qualities
    rows, answers = [], {}
    for i in range(400):
        texts = [[100 + 2 * i + k] * int(lengths[i, k]) + [END] for k in range(2)]
        answers |= {tuple(text): scores[i, k] for k, text in enumerate(texts)}
        targets = tuple(float(v) for v in truth[i].double())
        rows.append(RankedTokens([i], tuple(texts), Ranking(HI, (f"a {i}", f"b {i}"), targets)))

    def score(given: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        # Of a probe only the length is known.
        return torch.stack(
            [answers.get(tuple(a), torch.tensor(length * len(a) / 13)) for _, a in given]
        )

    notes: list[str] = []
    return measure(score, rows[:5], rows, max_response_tokens=60, note=notes.append)


def test_the_accuracy_by_file_strength_and_margin_by_hand() -> None:
    # Of each pair: file, strength, margin, the difference of its targets, whether it is right.
    # The margins rise as the differences fall; 3 is that of the pair without a margin. The first
    # row is a tie and no pair.
    table: list[tuple[str, Strength | None, float | None, float, bool]] = [
        ("c.jsonl:1", "better", 9.0, 0.0, True),
        ("a.jsonl:1", "significantly better", 1.0, 6.0, True),
        ("a.jsonl:2", "slightly better", 2.0, 5.0, True),
        ("b.jsonl:1", "slightly better", None, 3.0, True),
        ("a.jsonl:3", "significantly better", 4.0, 2.5, False),
        ("b.jsonl:2", "slightly better", 5.0, 2.0, False),
        ("b.jsonl:3", None, 6.0, 1.0, False),
    ]
    rows = [
        RankedTokens(
            [5 + number],
            ([3 if right else 2, END], [2 if right else 3, END]),
            Ranking(HI, ("a", "b"), (gap, 0.0), margin, strength, origin=origin),
        )
        for number, (origin, strength, margin, gap, right) in enumerate(table)
    ]

    def score(given: Sequence[Row]) -> torch.Tensor:
        return torch.tensor([float(answer[0]) for _, answer in given])

    metrics = measure(score, rows, rows, max_response_tokens=9, note=lambda text: None)
    # All lengths are matched: one part alone is not said.
    expected = {
        "source/a.jsonl": (2 / 3, 3),
        "source/b.jsonl": (1 / 3, 3),
        "strength/significantly better": (1 / 2, 2),
        "strength/slightly better": (2 / 3, 3),
        "margin/low": (1.0, 2),
        "margin/middle": (1 / 2, 2),
        "margin/high": (0.0, 2),
    }
    counted = {key for key in metrics if key.startswith("accuracy/") and key.endswith("/pairs")}
    assert counted == {f"accuracy/{part}/pairs" for part in expected}
    for part, (share, pairs) in expected.items():
        assert metrics[f"accuracy/{part}"] == pytest.approx(share), part
        assert metrics[f"accuracy/{part}/pairs"] == pairs, part


def test_a_planted_length_bias_is_found_and_named() -> None:
    metrics = planted(length=1.0, quality=0.5)
    found = warnings(metrics)
    assert found[0].startswith("length bias: the longer answer scores higher in ")
    assert any(text.startswith("the chosen answer given twice over scores") for text in found)
    assert metrics["length/correlation"] > 0.7
    assert metrics["accuracy/length/longer"] > metrics["accuracy/length/shorter"] + 0.3
    (short,) = (w for w in warnings(planted(length=-1.0, quality=0.5)) if "length bias" in w)
    assert short.startswith("length bias: the shorter answer scores higher in ")


def test_a_bias_that_the_labels_share_is_found_too() -> None:
    (found,) = (w for w in warnings(planted(1.0, 0.5, vain_labels=True)) if "length bias" in w)
    assert "the labels prefer it in 100%" in found


def test_a_model_that_follows_quality_is_not_accused() -> None:
    metrics = planted(length=0.0, quality=1.0)
    assert metrics["accuracy"] == 1.0
    assert [text for text in warnings(metrics) if "length bias" in text] == []


def test_a_quick_look_is_the_mean_over_rankings_of_their_pairs() -> None:
    # Scored 3, 1 and 2 where the order is the first, the second, the third: differences 2, 1, -1.
    three = RankedTokens([5], ([3], [1], [2]), Ranking(HI, ("a", "b", "c"), (2.0, 1.0, 0.0)))
    one = RankedTokens([5], ([4], [4]), Ranking(HI, ("a", "b"), (0.0, 1.0)))
    found = quick_look(lambda rows: torch.tensor([float(a[0]) for _, a in rows]), [three, one])
    of_three = sum(math.log1p(math.exp(-d)) for d in (2, 1, -1)) / 3
    assert found == {
        "loss": pytest.approx((of_three + math.log(2)) / 2),
        "accuracy": pytest.approx((2 + 0.5) / 4),
    }
    ties = RankedTokens([5], ([4], [3]), Ranking(HI, ("a", "b"), (1.0, 1.0)))
    with pytest.raises(InputError, match="ties only"):
        quick_look(lambda rows: torch.zeros(len(rows)), [ties])


def test_probes_are_built_from_the_best_answer() -> None:
    rows = [
        RankedTokens([5], ([9, END], [6, 7, 8, END]), Ranking(HI, ("a", "b"), (0.0, 1.0))),
        RankedTokens([5], ([4, END], [3, END]), Ranking(HI, ("a", "b"), (1.0, 0.0))),
        RankedTokens([2], ([6, 7, 8, END], [3, END]), Ranking(HI, ("a", "b"), (1.0, 0.0))),
        RankedTokens([3], ([7, END], [3, END]), Ranking(HI, ("a", "b"), (1.0, 0.0))),
    ]

    def made(name: str, number: int = 0, limit: int = 7) -> list[int] | None:
        return probe_response(name, number, rows, limit)

    assert made("empty") == [END]
    assert made("truncated") == [6, END]
    assert made("truncated", 1) is None
    assert made("repeated") == [6, 7, 8, 6, 7, 8, END]
    assert made("repeated", limit=6) is None
    # The second has the same prompt, the third the same answer.
    assert made("other_prompt") == [7, END]
    assert made("other_prompt", 3) == [6, 7, 8, END]
    assert probe_response("other_prompt", 0, rows[:2], 7) is None


def test_probes_are_compared_with_the_best_answer() -> None:
    rows = [
        RankedTokens(
            [5], ([7, END], [9, END], [8, END]), Ranking(HI, tuple("abc"), (0.0, 1.0, 2.0))
        ),
        RankedTokens([6], ([7, END], [8, END]), Ranking(HI, ("a", "b"), (0.0, 1.0))),
        RankedTokens([7], ([8, END], [7, END]), Ranking(HI, ("a", "b"), (1.0, 0.0))),
    ]
    # The best ones score 2, an answer given twice 3, and an empty one 1, but 2 to the last prompt.
    known = {(8, END): 2.0, (8, 8, END): 3.0, (END,): 1.0}

    def score(given: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        found = [known.get(tuple(answer), 0.0) for _, answer in given]
        last = [p == [7] and answer == [END] for p, answer in given]
        return torch.tensor(found) + torch.tensor(last).float()

    metrics = measure(score, rows, rows, max_response_tokens=9, note=lambda text: None)
    assert metrics["probe_wins/empty"] == pytest.approx(0.5 / 3)  # equal counts half
    assert metrics["probe_wins/repeated"] == 1.0
    assert "probe_wins/truncated" not in metrics
    assert "probe_wins/other_prompt" not in metrics


def test_a_probe_that_beats_the_chosen_answer_is_named() -> None:
    metrics = {"accuracy": 0.7, "probe_wins/empty": 0.5, "probe_wins/empty/low": 0.4}
    (found,) = warnings(metrics)
    assert found == (
        "an empty answer scores higher than the chosen answer in 50% of pairs; the rejected answer"
        " does in 30%"
    )
    assert warnings(metrics | {"probe_wins/empty/low": 0.29}) == []


def test_words_that_decide_are_learned() -> None:
    pytest.importorskip("sklearn", reason="the bag of words needs scikit-learn")
    train = [(f"yes {i} kite", f"no {i} kite") for i in range(20)]
    outcomes = bag_of_words_outcomes(train, [("yes a", "no b"), ("no", "yes"), ("c", "d")])
    assert outcomes.tolist() == [1.0, 0.0, 0.5]


def test_the_bag_of_words_learns_from_all_files(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the bag of words needs scikit-learn")
    monkeypatch.setattr("pipelines.reward_report.BASELINE_PAIRS", 20)

    def pair(texts: tuple[str, str]) -> RankedTokens:
        return RankedTokens([5], ([9, END], [6, END]), Ranking(HI, texts, (1.0, 0.0)))

    first = [pair((f"yes {i}", f"no {i}")) for i in range(20)]
    second = [pair((f"kite {i}", f"boat {i}")) for i in range(20)]
    heldout = [pair((f"kite {i}", f"boat {i}")) for i in range(90, 95)]
    for train in (first + second, second + first):
        metrics = measure(
            lambda given: torch.zeros(len(given)),
            train,
            heldout,
            max_response_tokens=9,
            note=print,
        )
        assert metrics["accuracy/bag_of_words"] == 1.0


def test_without_scikit_learn_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("No module named 'sklearn'")

    monkeypatch.setattr("pipelines.reward_report.bag_of_words_outcomes", missing)
    rows = [RankedTokens([5], ([9, END], [6, END]), Ranking(HI, ("a", "b"), (0.0, 1.0)))]
    notes: list[str] = []
    metrics = measure(
        lambda given: torch.tensor([float(len(given))] * len(given)),
        rows,
        rows,
        max_response_tokens=9,
        note=notes.append,
    )
    assert metrics["accuracy"] == 0.5
    assert "accuracy/bag_of_words" not in metrics
    assert notes[0].endswith("install it: pip install 'scikit-learn>=1.9,<1.10'")
