"""What a memory plan says of a recipe on its base: each thing with its bytes and arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

from align.plan_items import Item
from align.plan_memory import (
    FLOAT,
    Compute,
    activation_bytes,
    adam_bytes,
    cache_bytes,
    sampling_bytes,
    working_per_token,
)
from align.plan_model import DTYPE_BYTES, Quantization, Shape, linear_bytes
from align.recipe import Recipe
from align.recipe_types import Optimisation

# What Python, torch and its allocator take beside the tensors: 0.4 to 0.85 GB in published
# measurements of 7B to 70B models on one GPU, 0.6 GB for a process on a CPU.
OVERHEAD = 600 * 2**20


@dataclass(frozen=True)
class Setup:
    """A recipe and the base's shape, and what both say together."""

    recipe: Recipe
    shape: Shape

    @property
    def width(self) -> int:
        """Bytes of a number in the base and in its activations."""
        return DTYPE_BYTES[self.recipe.base.dtype]

    @property
    def quantization(self) -> Quantization:
        return self.recipe.base.quantization

    @property
    def checkpointing(self) -> bool:
        return self.recipe.base.gradient_checkpointing

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation in the stages before PPO."""
        return self.recipe.data.max_prompt_tokens + self.recipe.data.max_response_tokens

    @property
    def adapted(self) -> int:
        """Blocks that carry adapters: those through which gradients flow."""
        return self.shape.adapted_layers(self.recipe.adapter)

    def compute(self, *, joined: bool = False, expanded: bool = False) -> Compute:
        """Return how adapters on the base are trained."""
        return Compute(self.width, self.recipe.adapter, expanded=expanded, joined=joined)

    def base(self, *, head: bool = True) -> list[Item]:
        """Return the frozen base, with its output embeddings or without."""
        shape, width, kind = self.shape, self.width, self.quantization
        rest = shape.rest + (shape.head if head else 0)
        if kind == "none":
            count = shape.linear + rest
            return [Item("base", count * width, f"{count:,} x {width} B", "weights")]
        double = self.recipe.base.double_quantization
        stored, constants = linear_bytes(shape, kind, double)
        bits = "8" if kind == "int8" else "4"
        how = f"scales of {shape.layers * len(shape.matrices):,} matrices"
        return [
            Item(f"base in {kind}", stored, f"{shape.linear:,} x {bits} bits", "weights"),
            Item(
                "quantisation constants",
                constants,
                f"{how}{', doubly quantised' if double else ''}",
                "weights",
            ),
            Item("embeddings and norms", rest * width, f"{rest:,} x {width} B", "weights"),
        ]

    def dequantized(self) -> list[Item]:
        """Return the one matrix that is there as it is computed with, while it is."""
        if self.quantization == "none":
            return []
        largest = max(m.weights for m in self.shape.matrices)
        return [Item("a dequantised matrix", largest * self.width, f"{largest:,} x {self.width} B")]

    def adapter(self, role: str) -> Item:
        """Return a role's adapter."""
        count = sum(self.shape.lora_tensors(self.recipe.adapter))
        how = f"{count:,} x {FLOAT} B (r={self.recipe.adapter.r})"
        return Item(f"adapter: {role}", count * FLOAT, how, "weights")

    def head(self, role: str, copies: int = 1) -> Item:
        """Return a role's score head, whose shift and scale count as two numbers."""
        count = copies * self.shape.hidden + 2
        return Item(f"head: {role}", count * FLOAT, f"{count:,} x {FLOAT} B", "weights")

    def activations(self, compute: Compute, tokens: int, layers: int) -> Item:
        """Return a pass with gradients; both ways of doing it are in its arithmetic."""
        both = [
            activation_bytes(self.shape, compute, tokens, layers, checkpointing=on)
            for on in (False, True)
        ]
        how = f"{tokens:,} tokens, {layers} blocks"
        other = f"{'without' if self.checkpointing else 'with'} checkpointing"
        how = f"{how}; {other} {both[not self.checkpointing] / 2**30:.2f} GiB"
        return Item("activations", both[self.checkpointing], how)

    def forward(self, tokens: int) -> Item:
        """Return a pass without gradients."""
        each = working_per_token(self.shape, self.compute())
        return Item("one block at work", tokens * each, f"{tokens:,} tokens x {each:,} B")

    def generation(self, rows: int, prompt: int, response: int) -> list[Item]:
        """Return what sampling needs: the cache, the prompts' pass, the choice of tokens."""
        shape, width = self.shape, self.width
        cache = cache_bytes(shape, rows, prompt + response, width)
        how = (
            f"2 x {shape.layers} blocks x {rows} rows x {prompt + response} tokens x"
            f" {shape.kv_heads * shape.head_dim} x {width} B"
        )
        choice = sampling_bytes(rows, shape.vocab, width)
        return [
            Item("key-value cache", cache, how),
            self.forward(rows * prompt),
            Item("choice of tokens", choice, f"{rows} rows x {shape.vocab:,} logits"),
            *self.dequantized(),
        ]


def training_items(tensors: Sequence[int], section: Optimisation) -> tuple[Item, Item]:
    """Return gradients and optimiser states of trained tensors of so many numbers each."""
    optimizer, count = section.optimizer, sum(tensors)
    gradients = Item("gradients", FLOAT * count, f"{count:,} x {FLOAT} B", "gradients")
    how = f"two moments of {count:,} numbers"
    states = Item(f"optimiser ({optimizer})", adam_bytes(tensors, optimizer), how, "states")
    return gradients, states


def overhead() -> Item:
    """Return what a process takes before any tensor."""
    return Item("libraries, allocator", OVERHEAD, "a flat allowance")


def mask_item(rows: int, tokens: int) -> Item:
    """Return a batch's attention mask, one byte for each pair of tokens in a row."""
    return Item("attention mask", rows * tokens**2, f"{rows} rows x {tokens}^2 x 1 B")


def logits_item(name: str, tokens: int, vocab: int, width: int) -> Item:
    """Return logits and what is computed from them, ``width`` bytes for each in all."""
    return Item(name, tokens * vocab * width, f"{tokens:,} tokens x {vocab:,} x {width} B")
