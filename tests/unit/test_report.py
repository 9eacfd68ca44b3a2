"""What the report reads from a run directory, and the words and drawings it makes of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.errors import InputError, ParentError
from align.manifest import read_manifest
from align.recipe import StageName
from pipelines import charts, results
from pipelines.report import duration, render
from pipelines.results import number, percent
from pipelines.reward_card import reward_card
from pipelines.run_facts import StageFacts, _read_rows, read_run
from pipelines.samples import MAX_CHARACTERS, Examples, examples
from tests.run_tree import write_run, write_stage


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0042, "0.004"),
        (0.07, "0.07"),
        (-2.314, "-2.31"),
        (12.54, "12.5"),
        (141.2, "141"),
        (21034.6, "21,035"),
        (3.2e-5, "3.2e-05"),
        (4.2e7, "4.2e+07"),
    ],
)
def test_numbers_are_written_short(value: float, text: str) -> None:
    assert number(value) == text


def test_percent_and_duration() -> None:
    assert percent(0.7119) == "71.2\u00a0%"
    assert [duration(s) for s in (9.4, 75, 3845)] == ["9 s", "1 min 15 s", "1 h 04 min"]


def test_running_mean_by_hand() -> None:
    # Window 3: each value with its neighbours.
    assert charts.running_mean([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]
    assert charts.running_mean([1.0, 5.0], 1) == [1.0, 5.0]


def test_headline_gives_scores_and_win_rate_with_interval(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "mini"))
    headline = results.headline(run, 20)
    text = " ".join(headline.sentences).replace("\u00a0", " ")
    assert "On 20 held-out prompts the mean gold score went from 0.42 (SFT) to 0.61 (PPO)." in text
    assert "71.2 % of prompts (90 % interval 66.3 to 76.0 %; ties count half)" in text
    assert text.endswith("PPO made the answers better.")
    values = [figure.value.replace("\u00a0", " ") for figure in headline.figures]
    assert values == ["0.42 \u2192 0.61", "71.2 %", "13.1 nats", "68.4 %"]


def test_headline_says_where_ppo_selected_its_policy_on_the_same_prompts(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "mini"))
    metrics = run["evaluate"].final() | {"prompts/selected_on": 12.0}
    write_stage(tmp_path / "mini" / "evaluate", "evaluate", [], metrics)
    sentences = results.headline(read_run(tmp_path / "mini"), 20).sentences
    assert sentences[1].startswith("PPO has selected its policy on 12 of them, so that its figures")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.31, 0.42, "PPO made them worse."), (0.46, 0.55, "does not show a difference.")],
)
def test_headline_does_not_praise(low: float, high: float, verdict: str, tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "mini"))
    metrics = dict(run["evaluate"].final())
    metrics |= {"ppo/win_rate/mean": (low + high) / 2, "ppo/win_rate/low": low}
    metrics["ppo/win_rate/high"] = high
    write_stage(tmp_path / "mini" / "evaluate", "evaluate", [], metrics)
    headline = results.headline(read_run(tmp_path / "mini"), 20)
    assert headline.sentences[-1].endswith(verdict)


def test_without_gold_the_reward_is_not_taken_for_quality(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "mini", gold=False))
    text = " ".join(results.headline(run, 20).sentences)
    assert "mean reward score went from -0.08 (SFT) to 1.94 (PPO)" in text
    assert "By the reward itself" in text
    assert "not that answers are better" in text
    assert "cannot show" in results.overoptimisation_finding(results.probes(run))


def test_unevaluated_run_says_so_and_shows_its_stages(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "mini", ["pretrain", "sft"]))
    headline = results.headline(run, 0)
    assert headline.sentences == ("Not evaluated yet: pretrain, sft finished.",)
    assert [figure.value for figure in headline.figures][:2] == ["4.95", "2.46"]


def test_results_table_holds_each_model_with_its_interval(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "mini"))
    table = {row.label: row.cells for row in results.results_table(results.evaluation(run))}
    assert table["Gold score"] == (
        ("0.12", "0.09 to 0.15"),
        ("0.42", "0.39 to 0.45"),
        ("0.61", "0.58 to 0.64"),
    )
    assert [value for value, _ in table["KL to SFT"]] == ["41.2", "0", "13.1"]
    assert "Gold score" not in {
        row.label for row in results.results_table({"sft/length/mean": 3.0, "base/eos_rate": 0.5})
    }


def test_gold_by_category_counts_its_prompts() -> None:
    metrics = {"sft/gold/a": 0.5, "ppo/gold/a": 0.75, "sft/gold/b": 0.25}
    names, counts, values = results.gold_by_category(metrics, ["b", "a", "a"])
    assert (names, counts) == (["a", "b"], [2, 1])
    assert values == {"sft": [0.5, 0.25], "ppo": [0.75, None]}


@pytest.mark.parametrize(
    ("longer", "low", "words"),
    [
        (0.54, 0.654, "Choosing the longer answer gets 54.0 %, so it knows more than length."),
        (0.66, 0.654, "Choosing the longer answer gets 66.0 %, which this does not clearly beat."),
        (0.31, 0.654, "Choosing the shorter answer gets 69.0 %, which this does not clearly beat."),
    ],
)
def test_reward_card_compares_with_length(
    longer: float, low: float, words: str, tmp_path: Path
) -> None:
    metrics = {
        "reward/accuracy": 0.681,
        "reward/accuracy/low": low,
        "reward/accuracy/high": 0.707,
        "reward/accuracy/longer_wins": longer,
        "sft/eos_rate": 1.0,
    }
    write_stage(tmp_path / "evaluate", "evaluate", [], metrics)
    card = reward_card(read_run(tmp_path))
    assert card is not None
    assert words in " ".join(card.sentences).replace("\u00a0", " ")


def test_reward_card_falls_back_on_the_reward_stage(tmp_path: Path) -> None:
    card = reward_card(read_run(write_run(tmp_path / "mini", ["sft", "reward"])))
    assert card is not None
    assert card.bars[0].value == 0.684
    assert reward_card(read_run(write_run(tmp_path / "other", ["sft"]))) is None


def test_probes_take_the_root_of_kl_and_find_the_best_gold(tmp_path: Path) -> None:
    rows = [
        {"step": 0.0, "probe/kl": -1e-7, "probe/score": 0.0, "probe/gold": 0.4},
        {"step": 5.0, "score/mean": 1.0},
        {"step": 10.0, "probe/kl": 4.0, "probe/score": 1.0, "probe/gold": 0.7},
        {"step": 20.0, "probe/kl": 9.0, "probe/score": 2.0, "probe/gold": 0.5},
    ]
    write_stage(tmp_path / "ppo", "ppo", rows, {})
    looks = results.probes(read_run(tmp_path))
    assert [look.distance for look in looks] == [0.0, 2.0, 3.0]
    assert results.overoptimisation_finding(looks) == (
        "In this run gold was highest, 0.70, at step 10; at the last look, step 20, it was 0.50."
    )
    assert "no over-optimisation so far" in results.overoptimisation_finding(looks[:2])
    equal = [replace(look, gold=0.0) for look in looks]
    assert "no over-optimisation so far" in results.overoptimisation_finding(equal)


def test_series_are_ordered_and_keep_the_training_number(tmp_path: Path) -> None:
    # The stage's last row repeats a step with held-out numbers.
    last = {"step": 2.0, "loss": 9.0, "perplexity": 5.0}
    rows = [{"step": 2.0, "loss": 2.0}, {"step": 1.0, "loss": 3.0}, last]
    write_stage(tmp_path / "sft", "sft", rows, {})
    assert read_run(tmp_path)["sft"].series("loss") == ([1.0, 2.0], [3.0, 2.0])
    assert read_run(tmp_path)["sft"].series("perplexity") == ([2.0], [5.0])
    assert read_run(tmp_path)["sft"].seconds() == 270.0


def test_killed_stage_is_shown_as_unfinished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mini", ["pretrain"])
    (run / "sft").mkdir()
    (run / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    facts = read_run(run)["sft"]
    assert facts.manifest is None
    assert facts.series("loss") == ([1], [2.5])
    assert "not finished; last step 1" in render(read_run(run), run)


def test_parents_in_other_runs_are_found(tmp_path: Path) -> None:
    write_run(tmp_path / "first", ["pretrain", "sft"])
    write_run(tmp_path / "second", ["pretrain", "sft", "reward"])
    moved = tmp_path / "second" / "sft"
    manifest = tmp_path / "second" / "reward" / "stage.json"
    manifest.write_text(manifest.read_text().replace('"../sft"', '"../../first/sft"'))
    for file in moved.iterdir():
        file.unlink()
    moved.rmdir()
    facts = read_run(tmp_path / "second")
    assert list(facts) == ["pretrain", "sft", "reward"]
    assert facts["sft"].directory.resolve() == tmp_path / "first" / "sft"


def test_a_reward_model_that_ppo_was_given_is_not_the_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "other", ["sft", "reward"])
    run = write_run(tmp_path / "mini", ["sft", "ppo"])
    path, made = run / "ppo" / "stage.json", tmp_path / "other" / "reward"
    manifest = json.loads(path.read_text())
    given = {"stage": "reward", "path": "../../other/reward", "in_chain": False}
    manifest["parents"].append(given | {"sha256": read_manifest(made, "reward").outputs_sha256()})
    path.write_text(json.dumps(manifest))
    facts = read_run(run)
    assert list(facts) == ["sft", "ppo"]
    assert reward_card(facts) is None
    manifest["parents"][-1]["in_chain"] = True
    path.write_text(json.dumps(manifest))
    assert list(read_run(run)) == ["sft", "reward", "ppo"]


def test_a_kill_inside_a_character_leaves_the_last_row_out(tmp_path: Path) -> None:
    whole = json.dumps({"response": "caf\u00e9"}, ensure_ascii=False).encode()
    cut = whole[: whole.index(b"\xa9")]
    assert cut.endswith(b"\xc3")
    (tmp_path / "samples.jsonl").write_bytes(whole + b"\n" + cut)
    assert _read_rows(tmp_path / "samples.jsonl") == [{"response": "caf\u00e9"}]


def test_wrong_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such run directory"):
        read_run(tmp_path / "absent")
    with pytest.raises(InputError, match="no stage in it has begun"):
        read_run(tmp_path)
    run = write_run(tmp_path / "mini", ["pretrain"])
    (run / "pretrain" / "metrics.jsonl").write_text('{"step": 1}\nloss 3\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not JSON"):
        read_run(run)
    (run / "pretrain" / "stage.json").write_text("{}")
    with pytest.raises(ParentError, match="not a manifest"):
        read_run(run)


def test_changed_parent_is_pointed_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mini", ["pretrain", "sft"])
    assert "changed since</span>" not in render(read_run(run), run)
    rows = [{"step": 1.0, "loss": 1.0}]
    write_stage(run / "pretrain", "pretrain", rows, {"perplexity": 2.0})
    assert "changed since</span>" in render(read_run(run), run)


def examples_of(rows: list[dict[str, Any]], stage: StageName = "evaluate") -> Examples:
    """Choose examples from samples that lie in a made-up stage."""
    chosen = examples({stage: StageFacts(stage, Path(), None, [], rows)})
    assert chosen is not None
    return chosen


def test_examples_are_the_first_and_the_worst() -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "responses": {
                "sft": {"text": "a", "gold": 0.5, "ended": True},
                "ppo": {"text": "b" * 3000, "gold": gold, "ended": False},
            },
        }
        for i, gold in enumerate([0.5, 0.9, 0.1, 0.4] + [0.6] * 20)
    ]
    chosen = examples_of(rows)
    assert [e.turns[0][1] for e in chosen.first] == [f"question {i}" for i in range(8)]
    assert [e.turns[0][1] for e in chosen.worst] == ["question 2", "question 3"]
    after = chosen.first[0].after
    assert after is not None
    assert after.scores == "gold 0.50, cut at the length limit"
    assert after.text == "b" * MAX_CHARACTERS + f" ... ({3000 - MAX_CHARACTERS} more characters)"


def test_examples_without_evaluation_are_the_first_and_last_look_of_ppo() -> None:
    prompt = [{"role": "user", "content": "hello"}]
    rows = [
        {"step": step, "prompt": prompt, "response": f"at {step}", "score": step}
        for step in (0, 10, 20)
    ]
    example = examples_of(rows, "ppo").first[0]
    assert example.before is not None
    assert example.after is not None
    assert (example.before.text, example.after.text) == ("at 0", "at 20")


def test_separators_inside_a_response_do_not_end_a_row(tmp_path):
    rows = [{"response": "a\u2028b\u0085c\x1cd"}, {"response": "e"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(text, encoding="utf-8")
    assert _read_rows(tmp_path / "samples.jsonl") == rows
