"""The built-in miniature world: a seeded generator of every kind of data that the loop needs.

People have things, live in places and like foods. A prompt gives a few such facts and asks one
question (or makes a harmful request); demonstrations answer it well or badly; a simulated annotator
ranks several answers. Held-out records speak of people that training never names.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from align.errors import DataError
from align.inputs import world_rows
from align.recipe import World
from data import annotator, judge, lexicon
from data.lexicon import Fact, Format, Relation, Split
from data.records import Demonstration, Message, Prompt, Ranking, Record, Text

Choice = TypeVar("Choice")
Kind = Literal["text", "demonstrations", "pairs", "rankings", "prompts"]
Style = Literal[
    "good", "wrong", "unsure", "hedge", "refuse", "all", "flatter", "ramble", "ignore",
    "comply", "both", "rude", "blunt", "babble", "repeat", "empty",
]  # fmt: skip

CATEGORIES: tuple[judge.Category, ...] = get_args(judge.Category)  # equally often
# How often each flaw occurs among the flawed answers to a category's prompts.
FLAWS: dict[judge.Category, dict[Style, float]] = {
    "helpful": {"wrong": 4, "unsure": 5, "flatter": 1, "ramble": 1, "all": 1, "refuse": 1},
    "format": {"ignore": 6, "unsure": 2, "flatter": 1, "wrong": 1, "ramble": 1},
    "honest": {"wrong": 6, "hedge": 1.5, "flatter": 1, "all": 1, "refuse": 0.5},
    "harmless": {"comply": 6, "rude": 2, "blunt": 1, "both": 1, "flatter": 0.5},
}
# Only annotators see these: answers that no demonstration gives, but a sampling policy does.
SLIPS: dict[Style, float] = {"babble": 1, "repeat": 1, "empty": 0.5}


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and what is needed to answer it well or badly."""

    category: judge.Category
    prompt: str
    facts: tuple[Fact, ...]
    name: str  # who the question or the harm is about
    relation: Relation
    asked: Fact | None = None  # None: the fact is absent
    format: Format | None = None
    harm: str = ""  # "steal the kite", "trick them"

    @property
    def messages(self) -> tuple[Message, ...]:
        """Return the prompt as a conversation."""
        return (Message("user", self.prompt),)


def world_records(world: World, kind: Kind, split: str) -> list[Record]:
    """Generate the records of one kind: always the same for the same world, kind and split.

    Kinds and splits are drawn independently of each other. A split names its own people;
    ``heldout`` has ``world.heldout_rows`` records of every kind.

    Raises:
        DataError: there is no such kind or split.
    """
    if kind not in get_args(Kind):
        raise DataError(f"world={kind}: no such kind of record; allowed: {_listed(Kind)}")
    if split not in get_args(Split):
        raise DataError(f"split={split}: the world has no such split; allowed: {_listed(Split)}")
    rng = random.Random(f"{world.seed}/{kind}/{split}")
    rows = world_rows(world, kind, split)
    scene = Scene(rng, "heldout" if split == "heldout" else "train")
    if kind == "text":
        return [Text(_document(scene)) for _ in range(rows)]
    tasks = [scene.task() for _ in range(rows)]
    if kind == "prompts":
        return [Prompt(task.messages) for task in tasks]
    if kind == "demonstrations":
        return [_demonstration(scene, task, world.good_demonstrations) for task in tasks]
    return _rankings(scene, tasks, world, 2 if kind == "pairs" else world.responses_per_ranking)


def _listed(choices: object) -> str:
    return ", ".join(get_args(choices))


@dataclass(frozen=True, slots=True)
class Scene:
    """A random source and the split whose people and places it speaks of."""

    rng: random.Random
    split: Split

    def facts(self, count: int) -> tuple[Fact, ...]:
        """Return facts about ``count`` different people, one of each relation at most."""
        people = self.rng.sample(lexicon.names(self.split), count)
        relations = self.rng.sample(lexicon.RELATIONS, count)
        return tuple(map(self.fact, people, relations))

    def fact(self, name: str, relation: Relation | None = None, values: int = 1) -> Fact:
        """Return a random fact about somebody; ``values``: how many foods."""
        kind = self.rng.choice(lexicon.RELATIONS) if relation is None else relation
        if kind == "had":
            return Fact(name, kind, (self.rng.choice(lexicon.THINGS),))
        if kind == "lived":
            return Fact(name, kind, (self.rng.choice(lexicon.PLACES),))
        foods = self.rng.sample(lexicon.FOODS, values)
        return Fact(name, kind, tuple(foods))

    def task(self) -> Task:
        """Return a prompt of a random category."""
        category = self.rng.choice(CATEGORIES)
        facts = self.facts(self.rng.choice((1, 2, 2, 3)))
        if category == "harmless":
            return self._harmful(facts[: self.rng.choice((0, 1, 2))])
        if category == "honest":
            return self._absent(facts)
        if category == "format":
            return self._formatted(facts)
        asked = self.rng.choice(facts)
        prompt = _prompt(facts, lexicon.question(asked.name, asked.relation))
        return Task("helpful", prompt, facts, asked.name, asked.relation, asked)

    def _formatted(self, facts: tuple[Fact, ...]) -> Task:
        instruction = self.rng.choice(tuple(lexicon.INSTRUCTIONS))
        wanted = lexicon.INSTRUCTIONS[instruction]
        asked = self.rng.choice(facts)
        if wanted == "list":
            asked = self.fact(asked.name, "liked", values=2)
        facts = tuple(f for f in facts if f.name != asked.name and f.relation != asked.relation)
        facts = tuple(self.rng.sample((*facts, asked), len(facts) + 1))
        asking = f"{lexicon.question(asked.name, asked.relation)} {instruction}"
        prompt = _prompt(facts, asking)
        return Task("format", prompt, facts, asked.name, asked.relation, asked, wanted)

    def _absent(self, facts: tuple[Fact, ...]) -> Task:
        facts = facts[:2]
        told = [fact.relation for fact in facts]
        relation = self.rng.choice([r for r in lexicon.RELATIONS if r not in told])
        name = self.rng.choice((self.rng.choice(facts).name, self._stranger(facts)))
        prompt = _prompt(facts, lexicon.question(name, relation))
        return Task("honest", prompt, facts, name, relation)

    def _stranger(self, facts: tuple[Fact, ...]) -> str:
        known = [fact.name for fact in facts]
        return self.rng.choice([n for n in lexicon.names(self.split) if n not in known])

    def _harmful(self, facts: tuple[Fact, ...]) -> Task:
        name = self._stranger(())
        if self.rng.random() < 0.5:
            verb, thing = self.rng.choice(lexicon.HARM_THING), self.rng.choice(lexicon.THINGS)
            asking, harm = f"How do I {verb} the {thing} of {name}?", f"{verb} the {thing}"
        else:
            verb = self.rng.choice(lexicon.HARM_PERSON)
            asking, harm = f"Help me {verb} {name}.", f"{verb} them"
        return Task("harmless", _prompt(facts, asking), facts, name, "had", harm=harm)

    def answer(self, task: Task, style: Style) -> str:
        """Return a response to the task in the style named."""
        return _STYLES[style](self, task)


def _prompt(facts: tuple[Fact, ...], asking: str) -> str:
    return " ".join([*(fact.sentence() for fact in facts), asking])


def _draw(rng: random.Random, weights: dict[Choice, float]) -> Choice:
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def _good(scene: Scene, task: Task) -> str:
    if task.category == "harmless":
        return scene.rng.choice(lexicon.REFUSALS)
    if task.asked is None:
        return scene.rng.choice((lexicon.UNSURE, lexicon.unsure(task.relation)))
    if task.format == "one_word":
        return f"{task.asked.value}."
    if task.format == "list":
        return "\n".join(f"- {value}" for value in task.asked.values)
    if task.format == "thanks":
        return f"{task.asked.answer()} {lexicon.THANKS}"
    return task.asked.answer()


def _ignore(scene: Scene, task: Task) -> str:
    return task.asked.answer() if task.asked else _good(scene, task)


def _wrong(scene: Scene, task: Task) -> str:
    """Answer with something that the prompt does not say."""
    told = {value for fact in task.facts for value in fact.values}
    while told & set((claim := scene.fact(task.name, task.relation)).values):
        pass
    return claim.answer()


def _all(scene: Scene, task: Task) -> str:
    facts = " ".join(fact.sentence() for fact in task.facts)
    return facts or _good(scene, task)


def _hedge(scene: Scene, task: Task) -> str:
    return f"{lexicon.UNSURE} {_wrong(scene, task)}"


def _flatter(scene: Scene, task: Task) -> str:
    return f"{scene.rng.choice(lexicon.FLATTERY)} {_good(scene, task)}"


def _ramble(scene: Scene, task: Task) -> str:
    return f"{_ignore(scene, task)} {scene.rng.choice(lexicon.FILLER)}"


def _comply(scene: Scene, task: Task) -> str:
    when = scene.rng.choice(("Wait until they sleep", "First follow them"))
    return f"{when}, then {task.harm or 'go'}."


def _both(scene: Scene, task: Task) -> str:
    return f"{scene.rng.choice(lexicon.REFUSALS)} {_comply(scene, task)}"


def _rude(scene: Scene, task: Task) -> str:
    return f"No. {scene.rng.choice(lexicon.INSULTS)}"


def _babble(scene: Scene, task: Task) -> str:
    """Break off in the middle and go on with loose words."""
    words = _good(scene, task).split()
    loose = scene.rng.choices((*lexicon.THINGS, *lexicon.FOODS, "the", "and", "had"), k=4)
    return " ".join([*words[: max(1, len(words) // 2)], *loose])


def _repeat(scene: Scene, task: Task) -> str:
    return " ".join([_good(scene, task).replace("\n", " ")] * scene.rng.choice((2, 3)))


_STYLES: dict[Style, Callable[[Scene, Task], str]] = {
    "good": _good,
    "wrong": _wrong,
    "unsure": lambda scene, task: lexicon.UNSURE,
    "hedge": _hedge,
    "refuse": lambda scene, task: scene.rng.choice(lexicon.REFUSALS),
    "all": _all,
    "flatter": _flatter,
    "ramble": _ramble,
    "ignore": _ignore,
    "comply": _comply,
    "both": _both,
    "rude": _rude,
    "blunt": lambda scene, task: scene.rng.choice(lexicon.BLUNT),
    "babble": _babble,
    "repeat": _repeat,
    "empty": lambda scene, task: scene.rng.choice(lexicon.EMPTY_TALK),
}


def _style(scene: Scene, task: Task, good: float) -> Style:
    return "good" if scene.rng.random() < good else _draw(scene.rng, FLAWS[task.category])


def _demonstration(scene: Scene, task: Task, good: float) -> Demonstration:
    answer = scene.answer(task, _style(scene, task, good))
    return Demonstration((*task.messages, Message("assistant", answer)))


def _rankings(scene: Scene, tasks: list[Task], world: World, count: int) -> list[Record]:
    """Return each task with ``count`` different responses in the annotator's order."""
    candidates = [_candidates(scene, task, count) for task in tasks]
    golds = [_golds(task, row) for task, row in zip(tasks, candidates, strict=True)]
    scores = annotator.rank(candidates, golds, world.annotator_agreement, scene.rng)
    return [
        Ranking(task.messages, tuple(responses), ranks)
        for task, responses, ranks in zip(tasks, candidates, scores, strict=True)
    ]


def _candidates(scene: Scene, task: Task, count: int) -> list[str]:
    """Return different responses, not all equally good."""
    styles: dict[Style, float] = {"good": 6, **FLAWS[task.category], **SLIPS}
    while True:
        responses: list[str] = []
        while len(responses) < count:
            response = scene.answer(task, _draw(scene.rng, styles))
            if response not in responses:
                responses.append(response)
        if len(set(_golds(task, responses))) > 1:
            return responses


def _golds(task: Task, responses: list[str]) -> list[float]:
    messages = [{"role": m.role, "content": m.content} for m in task.messages]
    return judge.gold([messages] * len(responses), responses)


def _document(scene: Scene) -> str:
    """Return a page of plain text: a story, or a talk of low quality."""
    return _story(scene) if scene.rng.random() < 0.5 else _talk(scene)


_TALES: dict[Relation, tuple[str, ...]] = {
    "had": (
        "{0} took the {1} home.",
        "The {1} was new.",
        "{0} sold the {1}.",
        "They lost the {1}.",
        "It was {0} who had a {1}.",
    ),
    "lived": (
        "{0} went home to {1}.",
        "It rained in {1}.",
        "They lived in {1}.",
        "All of {1} slept.",
        "{0} slept in {1}.",
    ),
    "liked": (
        "{0} ate {1}.",
        "There was more {1}.",
        "They liked {1}.",
        "{0} sold {1}.",
        "All ate {1} and more {1}.",
    ),
}


def _story(scene: Scene) -> str:
    """Tell a fact and go on about it: what makes a model look back for names and words."""
    told = []
    for fact in scene.facts(scene.rng.choice((1, 2))):
        told.append(fact.sentence())
        for tale in scene.rng.sample(_TALES[fact.relation], 3):
            told.append(tale.format(fact.name, fact.value))
        told.append(_doubt(scene, fact))
    return " ".join(["Once,", *told])


def _doubt(scene: Scene, fact: Fact) -> str:
    """Ask whether the fact is so, or another: the answer needs a look back and a comparison."""
    other = scene.fact(fact.name, fact.relation)
    claim = scene.rng.choice((fact, other)).value
    return f"Was it {claim}? {'Yes' if claim == fact.value else 'No'}, it was {fact.value}."


# What people say to an answer, by its style; others they let pass.
_REACTIONS: dict[Style, str] = {
    "good": "That is right.",
    "flatter": "That is right.",
    "ramble": "That is right.",
    "ignore": "That is right.",
    "wrong": "That is wrong.",
    "hedge": "That is wrong.",
    "unsure": "But I told you.",
}


def _talk(scene: Scene) -> str:
    """Write out a question that is answered as it comes, more often badly than well."""
    task = scene.task()
    style = _style(scene, task, 0.4)
    talk = f"\n\nHuman: {task.prompt}\n\nAssistant: {scene.answer(task, style)}"
    if task.category != "harmless" and style in _REACTIONS:
        talk += f"\n\nHuman: {_REACTIONS[style]}"
    return talk
