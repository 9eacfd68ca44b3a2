"""What a memory plan says of a recipe on its base: each thing with its bytes and arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from align.plan_items import Item
from align.plan_memory import (
    FLOAT,
    Compute,
    activation_bytes,
    activation_terms,
    adam_bytes,
    cache_bytes,
    sampling_bytes,
    working_per_token,
)
from align.plan_model import DTYPE_BYTES, Matrix, Quantization, Shape, linear_bytes
from align.recipe import Recipe, StageData, StageName
from align.recipe_ppo import Ppo
from align.recipe_types import Optimisation

# What a stage's process takes beside the tensors, in MiB: Python and the libraries, measured on a
# CPU as they are imported and 30 more for what stages load while they work. A GPU's context and
# allocator take about as much of the GPU: 0.4 to 0.85 GB in published measurements of 7B to 70B.
LIBRARIES: dict[StageName, int] = {
    "pretrain": 517,
    "sft": 535,
    "reward": 517,
    "ppo": 434,
    "evaluate": 434,
}


@dataclass(frozen=True)
class Setup:
    """A recipe and the base's shape, and what both say together."""

    recipe: Recipe
    shape: Shape
    on_cpu: bool = False

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
    def full(self) -> bool:
        """Whether sft and reward train all weights, and there is no frozen base."""
        return self.recipe.adapter.method == "full"

    @property
    def adapted(self) -> int:
        """Blocks that are trained or carry adapters: those through which gradients flow."""
        return self.shape.layers if self.full else self.shape.adapted_layers(self.recipe.adapter)

    def compute(self, *, joined: bool = False, expanded: bool = False) -> Compute:
        """Return how adapters on the base are trained in PPO, which has no dropout."""
        return Compute(self.width, self.recipe.adapter, expanded=expanded, joined=joined)

    def padded(self) -> Compute:
        """Return how the stages before PPO train them: on padded rows."""
        if self.full:
            return Compute(self.width, None, expanded=True)
        dropout = self.recipe.adapter.dropout > 0
        return Compute(self.width, self.recipe.adapter, expanded=True, dropout=dropout)

    def packed(self) -> Compute:
        """Return how the reward stage trains them: on rows that share their prompts."""
        return replace(self.padded(), expanded=False, joined=True)

    def base(self, *, head: bool = True) -> list[Item]:
        """Return the frozen base, with its output embeddings or without."""
        shape, width, kind = self.shape, self.width, self.quantization
        rest = shape.rest + (shape.head if head else 0)
        if kind == "none":
            count = shape.linear + rest
            layers = (shape.linear // shape.layers * width,) * shape.layers
            return [Item("base", count * width, f"{count:,} x {width} B", "weights", layers)]
        double = self.recipe.base.double_quantization
        stored, constants = linear_bytes(shape, kind, double)
        layers = (stored // shape.layers,) * shape.layers
        share = "1" if kind == "int8" else "0.5"
        scales = f"{shape.linear:,} / 64 x {'(1 + 4 / 256)' if double else '4'} B; and tables"
        if kind == "int8":
            outputs = shape.layers * sum(m.outputs for m in shape.matrices)
            scales = f"{outputs:,} x {FLOAT} B"
        return [
            Item(f"base in {kind}", stored, f"{shape.linear:,} x {share} B", "weights", layers),
            Item("quantisation constants", constants, scales, "weights"),
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
        how = f"{count:,} x {FLOAT} B; r={self.recipe.adapter.r}"
        return Item(f"adapter: {role}", count * FLOAT, how, "weights")

    def model(self, role: str, *, head: bool = True) -> tuple[list[Item], list[int]]:
        """Return the weights of what sft or reward train and stand on; sizes of trained tensors.

        Args:
            head: with the output embeddings.
        """
        if not self.full:
            tensors = self.shape.lora_tensors(self.recipe.adapter)
            return [*self.base(head=head), self.adapter(role)], tensors
        count = self.shape.parameters - (0 if head else self.shape.head)
        return [Item(f"model: {role}", count * FLOAT, f"{count:,} x {FLOAT} B", "weights")], [count]

    def maps(self) -> list[int]:
        """Return the sizes of the maps in the head of the recipe's own reward model."""
        section, hidden = self.recipe.reward, self.shape.hidden
        if section is None:
            return [hidden]
        sizes = (hidden, *section.head.widths(hidden), len(section.labels) or 1)
        return [a * b for a, b in pairwise(sizes)]

    def head(self, role: str, weights: int) -> Item:
        """Return a role's score head, whose shift and scale count as two numbers.

        Args:
            weights: in its maps, of all their copies.
        """
        count = weights + 2
        return Item(f"head: {role}", count * FLOAT, f"{count:,} x {FLOAT} B", "weights")

    def activations(
        self, compute: Compute, tokens: int, layers: int, *, whole: bool = False
    ) -> Item:
        """Return a pass with gradients; what it would take otherwise is in its arithmetic.

        Args:
            whole: without checkpointing, whatever the recipe says.
        """
        on = self.checkpointing and not whole
        each, once = activation_terms(self.shape, compute, checkpointing=on)
        how = f"{tokens:,} tokens x ({layers} blocks x {each:,} + {once:,}) B"
        if not whole:
            other = activation_bytes(self.shape, compute, tokens, layers, checkpointing=not on)
            how += f"; {'without' if on else 'with'} checkpointing {other / 2**30:.2f} GiB"
        return Item("activations", tokens * (layers * each + once), how)

    def masks(self, rows: int, tokens: int, *, whole: bool = False) -> Item:
        """Return the attention mask of padded rows, and the copy that each block makes of it.

        Attention takes a mask of true and false, and keeps it in the numbers that it computes in.

        Args:
            whole: in float32 and without checkpointing, whatever the recipe says.
        """
        copies, width = 1 if self.checkpointing else self.adapted, self.width
        if whole:
            copies, width = self.shape.layers, FLOAT
        how = f"{rows} rows x {tokens}^2 x (1 + {copies} blocks x {width}) B"
        return Item("attention masks", rows * tokens**2 * (1 + copies * width), how)

    def repeated_keys(self, rows: int) -> Item:
        """Return keys and values of prompt and response for rows that share their prompt.

        Attention keeps them together for each response but the first.
        """
        shape, layers = self.shape, 1 if self.checkpointing else self.adapted
        each = 2 * shape.kv_heads * shape.head_dim * self.width
        how = f"{rows} rows x {self.longest} tokens x {layers} blocks x {each:,} B"
        return Item("prompts' keys, repeated", rows * self.longest * layers * each, how)

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
        choice = sampling_bytes(1, 1, width)
        sampled = f"{rows} rows x {shape.vocab:,} x {choice} B"
        return [
            Item("key-value cache", cache, how),
            self.forward(rows * prompt),
            Item("choice of tokens", rows * shape.vocab * choice, sampled),
            *self.dequantized(),
        ]

    def summed(self) -> list[Item]:
        """Return the weights that sampling adds an adapter to; see ``align.lora.summed``.

        Not those of GPT-2, whose layers are transposed; none where memory comes before time.
        """
        matrices = [m for m in self.shape.targets(self.recipe.adapter) if not _transposed(m)]
        count = self.adapted * sum(m.weights for m in matrices)
        low = self.width != FLOAT or self.quantization != "none"
        if low or self.full or self.checkpointing or not count:
            return []
        return [Item("weights with the adapter added", count * FLOAT, f"{count:,} x {FLOAT} B")]


def _transposed(matrix: Matrix) -> bool:
    return matrix.name.startswith("c_")


def training_items(tensors: Sequence[int], section: Optimisation) -> tuple[Item, Item]:
    """Return gradients and optimiser states of trained tensors of so many numbers each."""
    optimizer, count = section.optimizer, sum(tensors)
    gradients = Item("gradients", FLOAT * count, f"{count:,} x {FLOAT} B", "gradients")
    how = f"2 x {count:,} x {FLOAT} B"
    if optimizer.endswith("8bit"):
        how = f"2 x {count:,} x (1 + 4 / 256) B; more where a tensor is small"
    states = Item(f"optimiser ({optimizer})", adam_bytes(tensors, optimizer), how, "states")
    return gradients, states


def overhead(stage: StageName) -> Item:
    """Return what a stage's process takes before any tensor."""
    size = LIBRARIES[stage] * 2**20
    return Item("interpreter and libraries", size, f"{LIBRARIES[stage]} x 2^20 B; measured")


def logits_item(name: str, tokens: int, vocab: int, width: int) -> Item:
    """Return logits and what is computed from them, ``width`` bytes for each in all."""
    return Item(name, tokens * vocab * width, f"{tokens:,} tokens x {vocab:,} x {width} B")


def responses_per_ranking(recipe: Recipe) -> int:
    """Return how many responses a ranking has: two, where only its file could say more.

    A classifier's row is one.
    """
    if recipe.reward is not None and recipe.reward.classes is not None:
        return 1
    data: StageData | None = recipe.data.reward
    worlds = [s.world for s in data.train] if data is not None else []
    return recipe.data.world.responses_per_ranking if "rankings" in worlds else 2


def ranking_tokens(recipe: Recipe) -> int:
    """Return the tokens of the longest ranking: its prompt stands once."""
    data = recipe.data
    return data.max_prompt_tokens + responses_per_ranking(recipe) * data.max_response_tokens


def rows_per_pass(section: Ppo, longest: int) -> int:
    """Return how many of the longest rows go through one pass of the update."""
    if section.max_tokens_per_microbatch is not None:
        return min(max(1, section.max_tokens_per_microbatch // longest), section.minibatch_size)
    return section.micro_batch_size or section.minibatch_size
