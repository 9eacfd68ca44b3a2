"""What the report says of a reward model whose stage has looked for biases."""

from pathlib import Path

from pipelines.report import render
from pipelines.reward_card import reward_card
from pipelines.run_facts import read_run
from tests.run_tree import write_stage
from tests.stand_ins import RECIPE

METRICS = {
    "accuracy": 0.7,
    "accuracy/low": 0.65,
    "accuracy/high": 0.75,
    "accuracy/longer_wins": 0.6,
    "accuracy/bag_of_words": 0.66,
    "accuracy/bag_of_words/low": 0.6,
    "accuracy/bag_of_words/high": 0.7,
    "accuracy/source/<b>.jsonl": 0.8,
    "accuracy/source/<b>.jsonl/low": 0.7,
    "accuracy/source/<b>.jsonl/high": 0.9,
    "accuracy/source/<b>.jsonl/pairs": 40.0,
    "accuracy/length/longer": 0.9,
    "accuracy/length/longer/pairs": 60.0,
    "accuracy/length/shorter": 0.4,
    "accuracy/length/shorter/pairs": 20.0,
    "calibration/ece": 0.12,
    "calibration/ece_scaled": 0.03,
    "calibration/temperature": 2.5,
    "calibration/bin0/said": 0.55,
    "calibration/bin0/right": 0.5,
    "calibration/bin0/pairs": 50.0,
    "calibration/bin1/said": 0.95,
    "calibration/bin1/right": 0.8,
    "calibration/bin1/pairs": 30.0,
    "length/prefers_longer": 0.8,
    "length/prefers_longer/low": 0.75,
    "length/prefers_longer/high": 0.85,
    "length/labels_prefer_longer": 0.6,
    "length/bias": 0.2,
    "length/bias/low": 0.15,
    "length/bias/high": 0.25,
    "pairs": 80.0,
    "probe_wins/empty": 0.5,
    "probe_wins/empty/low": 0.44,
    "probe_wins/empty/high": 0.56,
}


def test_the_card_names_biases_parts_and_calibration(tmp_path: Path) -> None:
    write_stage(tmp_path / "reward", "reward", [], METRICS)
    card = reward_card(read_run(tmp_path))
    assert card is not None
    assert card.warnings == (
        "PPO could exploit this: length bias: the longer answer scores higher in 80% of pairs; the"
        " labels prefer it in 60%.",
        "PPO could exploit this: an empty answer scores higher than the chosen answer in 50% of"
        " pairs; the rejected answer does in 30%.",
    )
    text = " ".join(card.sentences).replace("\u00a0", " ")
    assert "A linear model on the answers' words (TF-IDF) gets 66.0 %, which it does not" in text
    assert "It is too sure: with its scores over 2.50 it would be off by 3.0 %" in text
    length, source = card.parts
    assert [(part.label, part.pairs) for part in length[1]] == [
        ("shorter than the other", "20"),
        ("longer than the other", "60"),
    ]
    assert source[1][0].label == "<b>.jsonl"
    assert [part.pairs for part in card.reliability] == [50.0, 30.0]
    assert [bar.label for bar in card.bars][2] == "words alone"


def sentences(run: Path, **more: float) -> str:
    """Return what the card says of these metrics, as one text."""
    names = {key.replace("__", "/"): value for key, value in more.items()}
    write_stage(run / "reward", "reward", [], METRICS | names)
    card = reward_card(read_run(run))
    assert card is not None
    return " ".join(card.sentences).replace("\u00a0", " ")


def test_the_card_says_how_scores_follow_length(tmp_path: Path) -> None:
    text = sentences(tmp_path / "more", length__correlation=0.31)
    assert (
        "The longer answer scores higher in 80.0 % of pairs (90 % interval 75.0 to 85.0 %); the"
        " labels prefer it in 60.0 %: a length bias of +20.0 points (90 % interval +15.0 to +25.0)."
        in text
    )
    assert "Within prompts, differences of score and of length correlate with 0.31." in text
    fewer = {"length__bias": -0.05, "length__bias__low": -0.1, "length__bias__high": 0.002}
    text = sentences(tmp_path / "less", length__correlation=-0.2, **fewer)
    assert "a length bias of -5.0 points (90 % interval -10.0 to +0.2)." in text
    assert "correlate with -0.20." in text
    assert "correlate" not in sentences(tmp_path / "none")


def test_the_card_has_the_brier_score(tmp_path: Path) -> None:
    text = sentences(tmp_path / "scaled", calibration__brier=0.187, calibration__brier_scaled=0.17)
    assert "Its Brier score is 0.187, so scaled 0.170 (always saying one half: 0.250)." in text
    text = sentences(tmp_path / "plain", calibration__brier=0.187)
    assert "Its Brier score is 0.187 (always saying one half: 0.250)." in text
    assert "Brier" not in sentences(tmp_path / "none")


def test_the_page_holds_it_escaped(tmp_path: Path) -> None:
    write_stage(tmp_path / "reward", "reward", [], METRICS)
    page = render(read_run(tmp_path), tmp_path)
    assert "PPO could exploit this: length bias" in page
    assert "&lt;b&gt;.jsonl" in page
    assert "<b>.jsonl" not in page
    assert 'aria-label="Reliability diagram"' in page
    assert page.count("an empty answer") == 2


def test_a_temperature_that_does_not_help_is_not_advised(tmp_path: Path) -> None:
    write_stage(tmp_path / "reward", "reward", [], METRICS | {"calibration/ece_scaled": 0.12})
    card = reward_card(read_run(tmp_path))
    assert card is not None
    text = " ".join(card.sentences).replace("\u00a0", " ")
    assert "Dividing its scores by a temperature does not help: 12.0 %" in text
    assert "too sure" not in text


def ensemble(run: Path, members: int, accuracies: dict[int, float]) -> list[str]:
    """Write a run whose recipe says how many members there are; return what is said of them."""
    write_stage(run / "reward", "reward", [], METRICS)
    data = "data:\n  reward: {train: [{world: rankings}]}\n"
    section = f"reward: {{members: {members}, lr: 1e-3, batch_size: 2}}\n"
    (run / "recipe.yaml").write_text(RECIPE.replace("data:\n", data) + section)
    for number, accuracy in accuracies.items():
        folder = run / "members" / f"member-{number}" / "reward"
        write_stage(folder, "reward", [], METRICS | {"accuracy": accuracy})
    card = reward_card(read_run(run))
    assert card is not None
    return [text.replace("\xa0", " ") for text in card.sentences if "seed" in text]


def test_the_card_names_the_other_members_of_an_ensemble(tmp_path: Path) -> None:
    assert ensemble(tmp_path, 3, {2: 0.68, 3: 0.725}) == [
        "It is one of 3 that differ by their seed; the others: 68.0 %, 72.5 %."
    ]


def test_a_member_that_an_earlier_recipe_left_is_none_of_the_ensemble(tmp_path: Path) -> None:
    """The recipe had three, then two with another learning rate: member-3 is not made again."""
    assert ensemble(tmp_path / "two", 2, {2: 0.68, 3: 0.725}) == [
        "It is one of 2 that differ by their seed; the others: 68.0 %."
    ]
    assert ensemble(tmp_path / "one", 1, {2: 0.68, 3: 0.725}) == []


def test_members_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    found = ensemble(tmp_path, 10, {number: 0.6 + number / 100 for number in range(2, 11)})
    (said,) = [text.partition("the others: ")[2] for text in found]
    assert said == ", ".join(f"{60 + number}.0 %" for number in range(2, 11)) + "."


def test_members_of_a_run_without_a_readable_recipe_are_not_told(tmp_path: Path) -> None:
    ensemble(tmp_path, 2, {2: 0.68})
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    card = reward_card(read_run(tmp_path))
    assert card is not None
    assert not [text for text in card.sentences if "seed" in text]
