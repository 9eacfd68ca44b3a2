"""What a recipe may say about the reward model: the losses, and which of them go together."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from align.recipe_adapter import Adapter, Method
from align.recipe_types import (
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Strings,
    Watched,
    refuse,
    refuse_all,
)

# How much better the better response is, in the words of Llama 2's annotators (Touvron et al. 2023,
# section 3.1), from the weakest.
Strength = Literal["negligibly better", "slightly better", "better", "significantly better"]
STRENGTHS: tuple[Strength, ...] = get_args(Strength)
# What a label of a pair says: which response is better and, where it does, how much.
Label = Literal[
    "first",
    "first negligibly better",
    "first slightly better",
    "first better",
    "first significantly better",
    "second",
    "second negligibly better",
    "second slightly better",
    "second better",
    "second significantly better",
    "tie",
]
# Llama 2's two tables of margins (table 27), in the order of STRENGTHS.
MARGINS = {"small": (0.0, 1 / 3, 2 / 3, 1.0), "large": (0.0, 1.0, 2.0, 3.0)}


Pooling = Literal["cls", "mean"]


# What a classifier reads: a text, two texts, or a response with its prompt.
Reads = Literal["text", "pair", "response"]


class Classes(Section):
    """What a classifier tells apart. A label's place in the list, from 0, is its number."""

    labels: Strings

    @model_validator(mode="after")
    def _check(self) -> "Classes":
        if len(self.labels) < 2:
            refuse("labels", "names one class; allowed: two or more")
        twice = next((label for label in self.labels if self.labels.count(label) > 1), None)
        if twice is not None:
            refuse("labels", f"names {twice!r} twice; allowed: every label once")
        if "" in self.labels:
            refuse("labels", "holds an empty label; allowed: text")
        return self

    @property
    def numbers(self) -> Mapping[str, int]:
        """Return the number of every label as rows may write it: its name, or its number.

        Where a name looks like a number itself, as with stars from 1 to 5, only names count.
        """
        return _numbers(tuple(self.labels))


@lru_cache(maxsize=8)  # every row asks
def _numbers(labels: tuple[str, ...]) -> Mapping[str, int]:
    named = {label: number for number, label in enumerate(labels)}
    if any(label.lstrip("+-").isdecimal() for label in labels):
        return named
    return named | {str(number): number for number in named.values()}


class RewardBase(Section):
    """An encoder (BERT and its like) that the reward model starts from, instead of the SFT model.

    It is loaded in float32 with its own tokenizer, and reads the text of prompt and response.
    """

    id: str  # "pretrain": what this recipe's pretrain stage makes; else a hub id or a folder
    revision: str | None = None
    # Where the score is read. cls: through the head that transformers' classifier of this kind has
    # on the first token. mean: by a linear head on the mean of all tokens' states.
    pooling: Pooling = "cls"
    adapter: Adapter | None = None  # null: the recipe's

    @model_validator(mode="after")
    def _check(self) -> "RewardBase":
        if self.adapter is not None and self.adapter.method == "prefix":
            refuse("adapter.method", f"{_NO_PREFIX}; allowed for it: any other")
        return self


class Head(Section):
    """What makes a score, or a classifier's logits, of a state: linear maps, a GELU between two."""

    depth: Positive = 1  # how many maps
    width: Positive | None = None  # of the states between two; null: the base's

    @model_validator(mode="after")
    def _check(self) -> "Head":
        if self.width is not None and self.depth == 1:
            refuse("width", "is of the states between two maps; allowed with depth=1: null")
        return self

    def widths(self, hidden_size: int) -> tuple[int, ...]:
        """Return how wide the states between the maps are, on a base of that width."""
        return (self.width or hidden_size,) * (self.depth - 1)


_NO_PREFIX = "an encoder has no cache for keys and values"


class Reward(Watched):
    """The ranking reward model. ``batch_size`` counts prompts, each with all its responses."""

    base: RewardBase | None = None  # null: the SFT model
    head: Head = Head()
    members: Positive = 1  # reward models that differ by their seed alone: an ensemble
    epochs: PositiveFloat = 1.0
    # pairs: Bradley-Terry on all pairs of a prompt. listwise: Plackett-Luce on its whole order.
    # classes: cross-entropy on rows with a label each; the model is a classifier.
    loss: Literal["pairs", "listwise", "classes"] = "pairs"
    classes: Classes | None = None  # with loss=classes
    # Subtracted from the difference of a pair's scores (Llama 2, eq. 2): the rows' own column, or
    # what their column `strength` stands for in one of Llama 2's tables.
    margin: Literal["none", "column", "small", "large"] = "none"
    # The share of labels that are wrong, where it is known; of classes, the share of a row that is
    # spread over all of them.
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    # Learn the share of annotators who preferred a response, where rows hold their votes.
    soft_labels: bool = False
    # Weight of the squared sum of a pair's scores, which keeps the scores around 0.
    centering_coef: NotNegativeFloat = 0.0
    # Weight of language modelling on the best responses, which keeps the backbone's language.
    aux_lm_coef: NotNegativeFloat = 0.0
    center_on: Literal["demonstrations", "none"] = "demonstrations"
    # Bring the scores of these to a standard deviation of 1 as well.
    scale_on: Literal["demonstrations", "none"] = "none"

    @model_validator(mode="after")
    def _check(self) -> "Reward":
        if (self.loss == "classes") != (self.classes is not None):
            needed = "goes with loss=classes, and loss=classes needs it: {labels: [...]}"
            refuse("classes", needed)
        if self.loss == "classes":
            self._check_classes()
            return self
        if self.scale_on != self.center_on == "none":
            refuse("scale_on", "needs center_on=demonstrations; allowed without it: none")
        of_pairs = [
            name
            for name, given in (
                ("margin", self.margin != "none"),
                ("label_smoothing", self.label_smoothing > 0),
                ("soft_labels", self.soft_labels),
            )
            if given
        ]
        if of_pairs and self.loss == "listwise":
            refuse(of_pairs[0], "is a matter of pairs, and loss=listwise has none; allowed: pairs")
        if len(of_pairs) > 1:
            given = " and ".join(of_pairs)
            refuse(
                of_pairs[1],
                f"found {given}: they say different things of how sure a label is; allowed: one"
                " of margin, label_smoothing and soft_labels",
            )
        return self

    def _check_classes(self) -> None:
        """Refuse what is a matter of rankings."""
        of_rankings = {
            "margin": "none",
            "soft_labels": False,
            "centering_coef": 0.0,
            "aux_lm_coef": 0.0,
            "center_on": "none",
            "scale_on": "none",
            "members": 1,
        }
        why = "is a matter of ranked responses, and loss=classes has none; allowed:"
        problems = [
            (key, f"{why} {str(allowed).lower()}")
            for key, allowed in of_rankings.items()
            if getattr(self, key) != allowed
        ]
        if problems:
            refuse_all(problems)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of a classifier; of a reward model none."""
        return self.classes.labels if self.classes is not None else ()

    def problems_with_adapter(self, method: Method) -> list[tuple[str, str]]:
        """Return what is refused beside ``adapter.method``: key and what is wrong with it."""
        if self.base is not None:
            return self._problems_with_encoder(self.base, method)
        if self.aux_lm_coef == 0 or method != "head_only":
            return []
        why = "moves the backbone alone, of which adapter.method=head_only trains nothing"
        return [("reward.aux_lm_coef", f"{why}; allowed with it: 0")]

    def _problems_with_encoder(self, base: RewardBase, method: Method) -> list[tuple[str, str]]:
        problems = []
        if self.head.depth > 1 and base.pooling == "cls":
            why = "pooling=cls has the head of transformers' classifier"
            problems.append(("reward.head.depth", f"{why}; allowed with it: 1"))
        if self.aux_lm_coef:
            why = "reads output embeddings, which the encoder of reward.base has none of"
            problems.append(("reward.aux_lm_coef", f"{why}; allowed with it: 0"))
        if base.adapter is None and method == "prefix":
            needed = "give reward.base.adapter another method"
            problems.append(("adapter.method", f"{_NO_PREFIX}; {needed}"))
        return problems
