"""The miniature world: reproducible, held out by name, and judged as its styles intend."""

import random
import re
from itertools import combinations
from statistics import mean
from typing import get_args

import pytest

from align.errors import DataError
from align.recipe import World
from data import judge, lexicon
from data.lexicon import Split
from data.records import Demonstration, Message, Prompt, Ranking, Text
from data.world import FLAWS, Kind, Scene, world_records

SMALL = World(
    text_rows=300, demonstration_rows=600, ranked_prompts=600, prompt_rows=300, heldout_rows=200
)
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)


def chat(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages if m.role == "user"]


def words(kind: Kind, split: Split) -> set[str]:
    return set(re.findall(r"\w+", " ".join(map(repr, world_records(SMALL, kind, split)))))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_records_other_seed_other_records(kind: Kind) -> None:
    first = world_records(SMALL, kind, "train")
    assert first == world_records(SMALL, kind, "train")
    assert first != world_records(SMALL.model_copy(update={"seed": 1}), kind, "train")


def test_records_do_not_depend_on_how_many_other_records_there_are() -> None:
    more = SMALL.model_copy(update={"text_rows": 5, "demonstration_rows": 7})
    assert world_records(SMALL, "prompts", "train") == world_records(more, "prompts", "train")


def test_kinds_are_drawn_independently() -> None:
    drawn = []
    for kind in KINDS[1:]:
        first = world_records(SMALL, kind, "train")[0]
        assert not isinstance(first, Text)
        drawn.append(first.messages[0])
    assert len(set(drawn)) == len(drawn)


def test_row_counts_and_types() -> None:
    expected = {"text": 300, "demonstrations": 600, "pairs": 600, "rankings": 600, "prompts": 300}
    types = {"text": Text, "demonstrations": Demonstration, "prompts": Prompt}
    for kind in KINDS:
        for split, count in (("train", expected[kind]), ("heldout", 200)):
            records = world_records(SMALL, kind, split)
            assert len(records) == count
            assert all(isinstance(r, types.get(kind, Ranking)) for r in records)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_person(kind: Kind) -> None:
    train, heldout = set(lexicon.names("train")), set(lexicon.names("heldout"))
    assert not train & heldout
    assert words(kind, "train") & train
    assert words(kind, "heldout") & heldout
    assert not words(kind, "train") & heldout
    assert not words(kind, "heldout") & train


def test_held_out_names_are_made_of_syllables_that_training_shows() -> None:
    """A held-out name is another name's beginning and a third one's end."""
    train = lexicon.names("train")
    for name in lexicon.names("heldout"):
        cuts = range(2, len(name) - 1)
        assert any(
            any(t.startswith(name[:cut]) for t in train)
            and any(t.endswith(name[cut:]) for t in train)
            for cut in cuts
        )


@pytest.mark.parametrize("split", SPLITS)
def test_annotator_agrees_with_the_judge_as_often_as_asked(split: Split) -> None:
    for agreement in (0.75, 0.9):
        world = SMALL.model_copy(update={"annotator_agreement": agreement, "heldout_rows": 400})
        assert measured_agreement(world, "pairs", split) == pytest.approx(agreement, abs=0.01)
        assert measured_agreement(world, "rankings", split) == pytest.approx(agreement, abs=0.01)


def measured_agreement(world: World, kind: Kind, split: Split) -> float:
    agreed = []
    for record in world_records(world, kind, split):
        assert isinstance(record, Ranking)
        golds = judge.gold([chat(record.messages)] * len(record.responses), record.responses)
        for i, j in combinations(range(len(golds)), 2):
            if golds[i] != golds[j]:
                agreed.append((golds[i] > golds[j]) == (record.scores[i] > record.scores[j]))
    return mean(agreed)


def test_annotator_likes_flattery_more_than_the_judge_does() -> None:
    """Among careless errors, the flattering answer wins more often than it loses."""
    won = []
    for record in world_records(SMALL, "rankings", "train"):
        assert isinstance(record, Ranking)
        golds = judge.gold([chat(record.messages)] * len(record.responses), record.responses)
        flattering = [any(f in r for f in lexicon.FLATTERY) for r in record.responses]
        for i, j in combinations(range(len(golds)), 2):
            wrong = (golds[i] > golds[j]) != (record.scores[i] > record.scores[j])
            if golds[i] != golds[j] and wrong and flattering[i] != flattering[j]:
                winner = i if record.scores[i] > record.scores[j] else j
                won.append(flattering[winner])
    assert len(won) > 50
    assert mean(won) > 0.6


def test_demonstrations_are_of_mixed_quality() -> None:
    def quality(good: float) -> float:
        world = SMALL.model_copy(update={"good_demonstrations": good})
        rows = world_records(world, "demonstrations", "train")
        shown = [r for r in rows if isinstance(r, Demonstration)]
        answers = [d.messages[-1].content for d in shown]
        return mean(judge.gold([chat(d.messages) for d in shown], answers))

    assert quality(1.0) == 1.0
    assert 0.5 < quality(0.5) < 0.7
    assert quality(0.0) < 0.4


def test_prompts_cover_every_category_in_both_splits() -> None:
    for split in SPLITS:
        prompts = [r for r in world_records(SMALL, "prompts", split) if isinstance(r, Prompt)]
        found = judge.category([chat(p.messages) for p in prompts])
        for name in ("helpful", "format", "honest", "harmless"):
            assert 0.1 < found.count(name) / len(found) < 0.5


def test_good_answers_satisfy_the_judge_and_flawed_ones_do_not() -> None:
    scene = Scene(random.Random(5), "train")
    for _ in range(300):
        task = scene.task()
        messages = [chat(task.messages)]
        assert judge.category(messages) == [task.category]
        assert judge.gold(messages, [scene.answer(task, "good")]) == [1.0]
        for style in FLAWS[task.category]:
            flawed = judge.gold(messages, [scene.answer(task, style)])[0]
            assert flawed < 1.0 or (style == "all" and len(task.facts) == 1)


def test_unknown_kind_and_split_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(DataError, match="allowed: train, heldout"):
        world_records(SMALL, "prompts", "test")
    with pytest.raises(DataError, match="allowed: text, demonstrations"):
        world_records(SMALL, "stories", "train")  # type: ignore[arg-type]
