"""What a recipe may say about pretraining: the model to make, and what it learns from text."""

from typing import Literal

from pydantic import model_validator

from align.recipe_types import (
    Optimisation,
    Positive,
    PositiveFloat,
    Section,
    check_divides,
    refuse,
)


class SmallModel(Section):
    """Shape of what the pretrain stage makes: a Llama (RMSNorm, SwiGLU, RoPE, GQA) or a BERT."""

    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive | None = None  # null: num_heads
    intermediate_size: Positive
    max_positions: Positive
    # Spread of the first weights. A small, tied model learns to copy sooner from a larger one.
    initializer_range: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _check(self) -> "SmallModel":
        if self.hidden_size % (2 * self.num_heads):
            refuse(
                "hidden_size",
                f"each of the num_heads={self.num_heads} heads needs an even width; allowed:"
                f" multiples of {2 * self.num_heads}",
            )
        check_divides(
            "num_kv_heads", self.num_kv_heads or self.num_heads, "num_heads", self.num_heads
        )
        return self


MASKED = 0.15  # of the tokens, that a masked model has to guess (Devlin et al. 2019)
# Tokens of [CLS] A [SEP] B [SEP]: of one fewer, a document of three would leave a row of one.
SHORTEST_PAIR = 6


class Pretrain(Optimisation):
    """A base made from plain text."""

    # causal: a decoder, the base of all stages. masked: an encoder, for reward.base (Devlin 2019).
    objective: Literal["causal", "masked"] = "causal"
    # With masked: also say whether the second half of a row follows the first (Devlin et al. 2019).
    next_sentence: bool = False
    model: SmallModel
    steps: Positive
    sequence_length: Positive

    @model_validator(mode="after")
    def _check(self) -> "Pretrain":
        if self.objective == "masked" and self.model.num_kv_heads is not None:
            refuse("model.num_kv_heads", "an encoder has none of its own; allowed: null")
        if self.next_sentence and self.objective != "masked":
            refuse("next_sentence", f"objective={self.objective} reads no pairs; allowed: false")
        if self.next_sentence and self.sequence_length < SHORTEST_PAIR:
            needed = "has no room for [CLS] A [SEP] B [SEP]; allowed with next_sentence=true"
            refuse("sequence_length", f"{needed}: at least {SHORTEST_PAIR}")
        if self.sequence_length > self.model.max_positions:
            refuse(
                "sequence_length",
                "exceeds the model's positions; allowed: at most"
                f" model.max_positions={self.model.max_positions}",
            )
        return self
