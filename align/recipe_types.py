"""The kinds of value that a recipe's keys take, and how a section refuses a combination of them."""

from typing import Annotated, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A description, where one is given, is what an error message names as allowed.
FunctionName = Annotated[
    str,
    Field(
        pattern=r"^[^:\s]+:[A-Za-z_]\w*$",
        description="a Python function as module:function or path.py:function",
    ),
]
RunName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=80,
        description="at most 80 letters, digits, dots, dashes and underscores; first a letter or"
        " digit",
    ),
]
Dtype = Literal["float32", "bfloat16", "float16"]
Strings = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class Section(BaseModel):
    """Every section: frozen, no unknown keys, no silent type conversion."""

    # Validators are built when a recipe is read: half of the time that `align --help` takes else.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


def refuse_all(problems: list[tuple[str, str]]) -> NoReturn:
    """Raise for a section's problems: the dotted key within the section, and what is wrong."""
    text = "; ".join(f"{key}: {problem}" for key, problem in problems)
    raise PydanticCustomError("recipe", "{text}", {"text": text, "problems": problems})


def refuse(key: str, problem: str) -> NoReturn:
    """Raise for one problem."""
    refuse_all([(key, problem)])


def check_exactly_one(section: Section, keys: tuple[str, str, str]) -> None:
    """Refuse a section that gives none of three keys, or several."""
    given = [key for key in keys if getattr(section, key) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        allowed = f"exactly one of {keys[0]}, {keys[1]} and {keys[2]}"
        refuse(given[-1] if given else "", f"found {found}; allowed: {allowed}")


def check_divides(key: str, part: int, whole_key: str, whole: int) -> None:
    """Refuse a ``part`` that does not divide the ``whole``; the message lists what does."""
    if whole % part:
        divisors = [d for d in range(1, min(whole, 4096) + 1) if whole % d == 0]
        allowed = ", ".join(map(str, divisors[-8:]))  # the largest: the likely choices
        refuse(key, f"does not divide {whole_key}={whole}; allowed: {allowed}")


OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


class Optimisation(Section):
    """What every training stage says about its optimiser."""

    # 8bit: its states in 8 bits, of tensors with 4096 numbers or more. paged: in memory that a GPU
    # moves to the host when it runs short (Dettmers et al. 2023); on a CPU the same as without.
    optimizer: OptimizerName = "adamw"
    lr: PositiveFloat
    batch_size: Positive  # rows per optimiser step, over all processes
    micro_batch_size: Positive | None = None  # rows per forward pass; null: the whole batch
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Fraction = 0.03
    weight_decay: NotNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    log_every: Positive = 10

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> "Optimisation":
        if self.micro_batch_size is not None:
            check_divides("micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
        return self


class Watched(Optimisation):
    """A training that may look at its held-out rows on the way."""

    heldout_every: Positive | None = None  # optimiser steps between two looks; null: none
    # best: the weights of the look with the lowest loss (sft) or the highest accuracy (reward).
    keep: Literal["best", "last"] = "last"

    @model_validator(mode="after")
    def _best_of_looks(self) -> "Watched":
        if self.keep == "best" and self.heldout_every is None:
            refuse("keep", "is decided by looks at held-out rows: needs heldout_every")
        return self
