"""Memory arithmetic of training: optimiser states, activations, caches, and ZeRO's share of a GPU.

Pure functions on numbers; all results are bytes, rounded up. No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from align.plan_model import Shape
from align.recipe_adapter import Adapter

CHUNK_ELEMENTS = 2**21  # align.logprobs: numbers in the logits of one chunk
_BLOCK_8BIT, _SMALLEST_8BIT = 256, 4096  # bitsandbytes: numbers per scale; smaller tensors stay
FLOAT = 4


@dataclass(frozen=True, slots=True)
class Compute:
    """How a role's passes are computed.

    Attributes:
        width: bytes of a number in the activations.
        adapter: the LoRA adapter that is trained; None where all weights are.
        adapter_width: bytes of a number in the adapter; Align trains them in float32.
        expanded: keys and values are copied for every query head, which attention with a mask
            needs (the trainers' padded batches).
        joined: attention's outputs are copied once more, to join the texts of a packed row.
        dropout: every matrix of the adapter drops inputs of its own: a copy, and a GPU's byte each.
    """

    width: int
    adapter: Adapter | None
    adapter_width: int = FLOAT
    expanded: bool = False
    joined: bool = False
    dropout: bool = False


def adam_bytes(tensors: Sequence[int], optimizer: str = "adamw") -> int:
    """Return the bytes of Adam's two moments for tensors of so many numbers each."""
    if not optimizer.endswith("8bit"):
        return 2 * FLOAT * sum(tensors)
    total = 0
    for size in tensors:
        small = size < _SMALLEST_8BIT
        total += 2 * (FLOAT * size if small else size + FLOAT * ceil(size / _BLOCK_8BIT))
    return total


def kept_per_token(shape: Shape, compute: Compute) -> int:
    """Return what one block keeps of one token for the backward pass.

    Counted on the code of transformers and PEFT: the inputs of both norms; the inputs of trained
    matrices (frozen ones need none), copied where their precision is another; queries, keys,
    values, output and normaliser of a fused attention; the activation of the MLP.
    """
    width, hidden = compute.width, shape.hidden
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    full = compute.adapter is None
    norm = FLOAT if shape.family == "llama" or full else width
    norms = 2 * norm * hidden * (2 if full and shape.family == "llama" else 1)
    keys = wide if compute.expanded else narrow
    attention = width * (2 * wide + 2 * keys) + FLOAT * shape.heads
    return norms + attention + width * shape.mlp_kept * shape.intermediate + _inputs(shape, compute)


def _inputs(shape: Shape, compute: Compute) -> int:
    """Return the inputs of the trained matrices, and of the second matrices of LoRA, per token.

    The latter are a little too much where ``align.lora`` fuses the layers: it keeps none.
    """
    if compute.adapter is None:
        trained, stored, copied = shape.matrices, compute.width, compute.width != FLOAT
        ranks = 0
    else:
        trained = shape.targets(compute.adapter)
        stored = compute.adapter_width
        copied = compute.adapter_width != compute.width
        ranks = stored * compute.adapter.r * len(trained)
    if compute.dropout:
        return (stored + 1) * sum(m.inputs for m in trained) + ranks
    if copied:  # every matrix makes a copy of its own
        return stored * sum(m.inputs for m in trained) + ranks
    # Else those side by side share one; attention's output is kept already, unless it was joined.
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}
    inputs = {groups.get(m.name, f"{m.name}{m.inputs}"): m.inputs for m in trained}
    out = next((m for m in trained if m.name in ("o_proj", "dense")), None)
    if out is None and shape.family == "gpt":
        out = next((m for m in trained if m.name == "c_proj" and m.inputs == shape.hidden), None)
    if out is not None and not compute.joined:
        del inputs[f"{out.name}{out.inputs}"]
    return stored * sum(inputs.values()) + ranks


def working_per_token(shape: Shape, compute: Compute) -> int:
    """Return what one block needs of one token while it is computed, beside what it keeps."""
    copy = FLOAT if compute.width != FLOAT else 0
    return compute.width * 3 * (shape.hidden + shape.intermediate) + copy * shape.intermediate


def activation_bytes(
    shape: Shape, compute: Compute, tokens: int, layers: int, *, checkpointing: bool
) -> int:
    """Return what a pass with gradients keeps and needs at most.

    Args:
        layers: blocks through which gradients flow.
        checkpointing: blocks keep their input only, and are computed again one at a time.
    """
    each, once = activation_terms(shape, compute, checkpointing=checkpointing)
    return tokens * (layers * each + once)


def activation_terms(shape: Shape, compute: Compute, *, checkpointing: bool) -> tuple[int, int]:
    """Return what a pass with gradients takes per token: in every block, and once."""
    kept, working = kept_per_token(shape, compute), working_per_token(shape, compute)
    return (compute.width * shape.hidden, kept + working) if checkpointing else (kept, working)


def logprob_chunk_bytes(vocab: int, width: int) -> int:
    """Return what log-probabilities straight from hidden states need at a time.

    Logits as computed and in float32, log-softmax, probabilities and their slope.
    """
    return chunk_tokens(vocab) * vocab * chunk_width(width)


def chunk_tokens(vocab: int) -> int:
    """Return how many tokens' logits make a chunk."""
    return max(1, CHUNK_ELEMENTS // vocab)


def chunk_width(width: int) -> int:
    """Return the bytes that a chunk needs for each of its logits, of ``width`` bytes itself."""
    return (0 if width == FLOAT else width) + 4 * FLOAT


def cache_bytes(shape: Shape, rows: int, tokens: int, width: int) -> int:
    """Return the key-value cache of a generation: two tensors per block."""
    return 2 * shape.layers * rows * tokens * shape.kv_heads * shape.head_dim * width


def sampling_bytes(rows: int, vocab: int, width: int) -> int:
    """Return what choosing a token for every row needs: logits, float32, exponentials, sums."""
    return rows * vocab * (width + 3 * FLOAT)


def zero_per_gpu(weights: int, gradients: int, states: int, gpus: int) -> tuple[int, int, int, int]:
    """Return the bytes per GPU at ZeRO stages 0 to 3 (Rajbhandari et al. 2020, figure 1).

    Stage 1 partitions the optimiser's states, 2 the gradients as well, 3 also the weights.
    """
    whole = weights + gradients + states
    first = weights + gradients + ceil(states / gpus)
    second = weights + ceil((gradients + states) / gpus)
    return whole, first, second, ceil(whole / gpus)


def deepspeed_bytes(
    parameters: int,
    largest_layer: int,
    gpus: int,
    *,
    stage: Literal[2, 3],
    offload: Literal["none", "optimizer", "all"],
) -> int:
    """Return DeepSpeed's own, more careful estimate per GPU for full training in 16 bits.

    (``deepspeed.runtime.zero`` ``estimate_zero2_...`` and ``estimate_zero3_...``.) Stage 2 offloads
    the optimiser only.
    """
    if stage == 2:
        return (
            2 * parameters if offload != "none" else 4 * parameters + ceil(16 * parameters / gpus)
        )
    share = {"none": 18, "optimizer": 2, "all": 0}[offload]
    return 4 * largest_layer + ceil(share * parameters / gpus)


def deepspeed_host_bytes(parameters: int, gpus: int) -> int:
    """Return DeepSpeed's estimate of main memory for stage 2 with the optimiser offloaded."""
    return ceil(parameters * max(4 * gpus, 16) * 1.5)
