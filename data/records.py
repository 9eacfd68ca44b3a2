"""What a row of data is once it has been read: the only types that the stages see.

A richer record may stand in for a poorer one (a ranking's best response is a demonstration, any
record's beginning is a prompt), so that one file can feed several stages; ``as_*`` say how.
"""

from dataclasses import dataclass, field

from align.recipe_reward import Reads, Strength

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``role`` is one of ``ROLES``; ``content`` has no white space at its ends."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, for pretraining."""

    text: str
    origin: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends on a user turn. ``origin`` is ``file:row``, for messages."""

    messages: tuple[Message, ...]
    origin: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A conversation that ends on an assistant turn; every assistant turn is learned from."""

    messages: tuple[Message, ...]
    origin: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Ranking:
    """A prompt and K >= 2 responses with a score each: higher is better, equal is a tie.

    A chosen/rejected pair is the ranking with scores (1, 0). ``margin`` says how much better the
    best is, in the unit of the reward model's scores (Llama 2, section 3.2.2), and ``strength``
    says so in words. ``votes``: the scores are numbers or shares of annotators, each of whom
    preferred one response. ``judged_twice``: a text stood in the row more than once, with different
    scores; what is here is their mean, of votes their sum.
    """

    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    scores: tuple[float, ...]
    margin: float | None = None
    strength: Strength | None = None
    votes: bool = False
    subset: str | None = None  # of the benchmark that the row is from
    origin: str = field(default="", compare=False)
    judged_twice: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Labelled:
    """What a classifier learns from: a text, two texts, or a response to a prompt, with its label.

    ``texts`` are one or two, or the response alone; ``messages`` are its prompt, of mere texts
    none. ``label`` is as the row has it, not checked against any list.
    """

    texts: tuple[str, ...]
    label: str
    messages: tuple[Message, ...] = ()
    origin: str = field(default="", compare=False)

    @property
    def reads(self) -> Reads:
        """What a classifier that learns from this reads."""
        if self.messages:
            return "response"
        return "text" if len(self.texts) == 1 else "pair"


Record = Text | Prompt | Demonstration | Ranking | Labelled


def as_prompt(record: Prompt | Demonstration | Ranking) -> Prompt:
    """Return the record without its answer: what PPO draws from."""
    if isinstance(record, Demonstration):
        return Prompt(record.messages[:-1], record.origin)
    return Prompt(record.messages, record.origin)


def as_demonstration(record: Demonstration | Ranking) -> Demonstration:
    """Return the record with its best response as the last turn."""
    if isinstance(record, Demonstration):
        return record
    best = max(range(len(record.scores)), key=record.scores.__getitem__)
    answer = Message("assistant", record.responses[best])
    return Demonstration((*record.messages, answer), record.origin)
