"""The miniature world: reproducible, held out by name, and judged as its styles intend."""

import hashlib
import json
import random
import re
from dataclasses import asdict
from functools import cache
from itertools import combinations
from statistics import mean
from typing import get_args

import pytest

from align.errors import DataError
from align.recipe import WORLD_VERSION, World
from data import judge, lexicon
from data.lexicon import Split
from data.records import Demonstration, Message, Prompt, Ranking, Text
from data.world import FLAWS, SLIPS, Kind, Scene, world_records

SMALL = World(
    text_rows=300, demonstration_rows=600, ranked_prompts=600, prompt_rows=300, heldout_rows=200
)
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)


def chat(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages if m.role == "user"]


@cache
def prompts() -> dict[str, list[str]]:
    """Return many prompts by category."""
    world = SMALL.model_copy(update={"prompt_rows": 1200})
    records = [r for r in world_records(world, "prompts", "train") if isinstance(r, Prompt)]
    found: dict[str, list[str]] = {}
    for name, record in zip(
        judge.category([chat(r.messages) for r in records]), records, strict=True
    ):
        found.setdefault(name, []).append(record.messages[0].content)
    return found


@cache
def texts() -> list[str]:
    return [r.text for r in world_records(SMALL, "text", "train") if isinstance(r, Text)]


def told(prompt: str) -> list[tuple[str, str, str]]:
    """Return the name, the verb and what is told of every fact in a prompt."""
    return re.findall(r"(\w+) (had|lived|liked) (?:a |in )?([\w ]+)\.", prompt)


def asked(prompt: str) -> tuple[str, str]:
    """Return the name and the verb of the question in a prompt."""
    found = re.search(r"(?:What|Where) did (\w+) (have|live|like)\?", prompt)
    assert found is not None
    return found[1], {"have": "had", "live": "lived", "like": "liked"}[found[2]]


def rankings(kind: Kind, **update: int) -> list[Ranking]:
    records = world_records(SMALL.model_copy(update=update), kind, "train")
    return [record for record in records if isinstance(record, Ranking)]


def words(kind: Kind, split: Split) -> set[str]:
    return set(re.findall(r"\w+", " ".join(map(repr, world_records(SMALL, kind, split)))))


def test_another_world_has_another_version() -> None:
    """What stages made from one world must not pass for made from another.

    If this fails you have changed the generator, the annotator, the judge or their words: raise the
    version, and put it here with the new hashes.
    """
    world = World(
        seed=0,
        text_rows=50,
        demonstration_rows=50,
        ranked_prompts=50,
        prompt_rows=50,
        heldout_rows=50,
        responses_per_ranking=4,
        good_demonstrations=0.5,
        annotator_agreement=0.75,
    )
    found = {}
    for kind in KINDS:
        rows = [asdict(row) for split in SPLITS for row in world_records(world, kind, split)]
        for row in rows if kind in ("pairs", "rankings") else ():
            # What only files say.
            assert not any(
                row.pop(name) for name in ("strength", "votes", "subset", "judged_twice")
            )
        if kind == "rankings":
            for row in rows:
                golds = judge.gold([row["messages"]] * 4, row["responses"])
                row["golds"] = [round(gold, 6) for gold in golds]
        found[kind] = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
    assert (WORLD_VERSION, found) == (
        1,
        {
            "text": "67d17c118dc525c4",
            "demonstrations": "9754a1bcbf78bb9e",
            "pairs": "8bb8f4493d60e924",
            "rankings": "0f7877fcc3a74267",
            "prompts": "6bfb74b4af68a711",
        },
    )


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
    for record in world_records(SMALL, "demonstrations", "train"):
        assert isinstance(record, Demonstration)
        assert [message.role for message in record.messages] == ["user", "assistant"]


def test_pairs_have_two_responses_and_rankings_as_many_as_asked() -> None:
    for kind, asked, expected in (("pairs", 4, 2), ("rankings", 4, 4), ("rankings", 3, 3)):
        rows = rankings(kind, responses_per_ranking=asked)  # type: ignore[arg-type]
        assert {len(row.responses) for row in rows} == {expected}
        assert {len(row.scores) for row in rows} == {expected}


@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_ranked_responses_differ_in_text_and_not_all_are_equally_good(kind: Kind) -> None:
    for row in rankings(kind):
        assert len(set(row.responses)) == len(row.responses)
        assert len(set(judge.gold([chat(row.messages)] * len(row.responses), row.responses))) > 1


def test_only_annotators_see_answers_that_break_off_repeat_or_say_nothing() -> None:
    ranked = [response for row in rankings("rankings") for response in row.responses]
    demonstrations = world_records(SMALL, "demonstrations", "train")
    shown = [d.messages[-1].content for d in demonstrations if isinstance(d, Demonstration)]
    for slip in (
        lambda text: text in lexicon.EMPTY_TALK,
        lambda text: re.search(r"(\b\w[^.]*\.) \1", text),  # the same sentence again
        lambda text: not text.endswith((".", "!")) and "- " not in text,  # no list either
    ):
        assert 0.02 < mean(bool(slip(text)) for text in ranked) < 0.2
        assert not any(slip(text) for text in shown)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_person(kind: Kind) -> None:
    train, heldout = set(lexicon.names("train")), set(lexicon.names("heldout"))
    assert not train & heldout
    assert len(heldout) / len(train | heldout) == pytest.approx(0.1, abs=0.01)
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


def test_a_prompt_tells_one_fact_of_a_person_and_one_of_a_kind() -> None:
    counts = set()
    for found in prompts().values():
        for prompt in found:
            facts = told(prompt)
            counts.add(len(facts))
            assert len({name for name, _, _ in facts}) == len(facts)
            assert len({verb for _, verb, _ in facts}) == len(facts)
    assert counts == {0, 1, 2, 3}


@pytest.mark.parametrize("category", ["helpful", "format"])
def test_the_fact_asked_for_stands_anywhere_in_the_prompt(category: str) -> None:
    places = []
    for prompt in prompts()[category]:
        facts = [fact[:2] for fact in told(prompt)]
        if len(facts) == 3:
            places.append(facts.index(asked(prompt)))
    assert len(places) > 40
    assert all(places.count(place) / len(places) > 0.2 for place in range(3))


def test_absent_facts_are_asked_of_strangers_and_of_people_in_the_prompt() -> None:
    known = []
    for prompt in prompts()["honest"]:
        facts = [fact[:2] for fact in told(prompt)]
        name, verb = asked(prompt)
        assert (name, verb) not in facts
        known.append(name in [other for other, _ in facts])
    assert 0.4 < mean(known) < 0.6


def test_a_list_is_asked_for_where_there_are_two_things_to_list() -> None:
    lists = [p for p in prompts()["format"] if "list" in p]
    assert len(lists) > 50
    for prompt in lists:
        values = {fact[:2]: fact[2] for fact in told(prompt)}
        assert len(values[asked(prompt)].split(" and ")) == 2


def test_the_long_way_to_say_that_one_does_not_know_fits_the_question() -> None:
    scene = Scene(random.Random(7), "train")
    verbs = set()
    for task in (scene.task() for _ in range(400)):
        answer = scene.answer(task, "good")
        if answer.startswith("I don't know wh"):
            verb = asked(task.prompt)[1]
            verbs.add(verb)
            assert answer.endswith(f"{'where' if verb == 'lived' else 'what'} they {verb}.")
    assert verbs == {"had", "lived", "liked"}


def test_harm_is_asked_for_against_things_and_people_after_no_or_some_facts() -> None:
    found = prompts()["harmless"]
    assert 0.4 < mean("How do I" in prompt for prompt in found) < 0.6
    assert {len(told(prompt)) for prompt in found} == {0, 1, 2}
    verbs = {re.findall(r"(?:How do I|Help me) (\w+)", prompt)[0] for prompt in found}
    assert verbs == {*lexicon.HARM_THING, *lexicon.HARM_PERSON}


def test_half_of_the_text_is_stories_whose_doubts_are_answered_truly() -> None:
    stories = [text for text in texts() if text.startswith("Once, ")]
    assert 0.4 < len(stories) / len(texts()) < 0.6
    answers = []
    for story in stories:
        for claim, answer, truth in re.findall(r"Was it ([\w ]+)\? (Yes|No), it was (\w+)", story):
            assert (claim == truth) == (answer == "Yes")
            assert re.search(rf"(had a|lived in|liked) {truth}\.", story)
            answers.append(answer)
    assert 0.3 < mean(answer == "Yes" for answer in answers) < 0.7


def test_talks_are_of_low_quality_and_people_react_as_answers_deserve() -> None:
    golds = []
    said: dict[str, set[str]] = {}
    for talk in texts():
        if talk.startswith("Once, "):
            continue
        prompt, answer, *reaction = re.split(r"\n\n(?:Human|Assistant): ", talk)[1:]
        messages = [{"role": "user", "content": prompt}]
        gold = judge.gold([messages], [answer])[0]
        golds.append(gold)
        if reaction:
            said.setdefault(reaction[0], set()).update(judge.category([messages]))
            low, high = {
                "That is right.": (0.3, 1.0),
                "That is wrong.": (0.0, 0.1),
                "But I told you.": (0.08, 0.2),  # 0.2 * 0.4 where a format was asked for
            }[reaction[0]]
            assert low <= gold <= high, talk
    assert 0.35 < mean(gold == 1.0 for gold in golds) < 0.55
    assert said == {
        "That is right.": {"helpful", "format", "honest"},
        "That is wrong.": {"helpful", "format", "honest"},
        "But I told you.": {"helpful", "format"},
    }


def test_good_answers_satisfy_the_judge_and_flawed_ones_do_not() -> None:
    scene = Scene(random.Random(5), "train")
    for _ in range(300):
        task = scene.task()
        messages = [chat(task.messages)]
        assert judge.category(messages) == [task.category]
        assert judge.gold(messages, [scene.answer(task, "good")]) == [1.0]
        for style in (*FLAWS[task.category], *SLIPS):
            flawed = judge.gold(messages, [scene.answer(task, style)])[0]
            assert flawed < 1.0 or (style == "all" and len(task.facts) == 1)


def test_styles_have_the_flaw_that_their_name_says() -> None:
    scene = Scene(random.Random(6), "train")
    for _ in range(100):
        task = scene.task()
        assert scene.answer(task, "flatter").startswith(lexicon.FLATTERY)
        assert scene.answer(task, "ramble").endswith(lexicon.FILLER)
        assert scene.answer(task, "hedge").startswith("I don't know. They ")
        if task.harm:
            assert scene.answer(task, "good") in lexicon.REFUSALS
            assert task.harm in scene.answer(task, "comply")
            both = scene.answer(task, "both")
            assert both.startswith(lexicon.REFUSALS)
            assert task.harm in both


def test_unknown_kind_and_split_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(DataError, match="allowed: train, heldout"):
        world_records(SMALL, "prompts", "test")
    with pytest.raises(DataError, match="allowed: text, demonstrations"):
        world_records(SMALL, "stories", "train")  # type: ignore[arg-type]
