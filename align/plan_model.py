"""Sizes of a language model from its configuration alone: matrices, parameters, bytes as stored.

No torch here: the numbers are those that the models of transformers have, and tests compare them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from align.errors import InputError
from align.recipe_adapter import Adapter
from align.recipe_pretrain import SmallModel

Quantization = Literal["none", "nf4", "fp4", "int8"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FOUR_BIT = ("nf4", "fp4")
_BLOCK, _SCALES_BLOCK = 64, 256  # numbers per scale; scales per scale of scales (QLoRA, section 3)
_CODE, _SCALES_CODE = 16, 256  # levels in the tables that bitsandbytes keeps with every matrix


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer inside the blocks of a model; its weight has ``inputs x outputs`` numbers."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Numbers in the weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how much memory a decoder takes; every block has the same ``matrices``."""

    family: Literal["llama", "gpt"]
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    matrices: tuple[Matrix, ...]
    norms: int  # parameters of a block's norms
    other: int  # token and position embeddings, last norm
    tied: bool  # the output embeddings are the token embeddings
    # Tensors of the MLP's inner width that its activation keeps for the backward pass: SwiGLU both
    # branches and the product's factor, tanh-GELU written out four, a fused GELU its input.
    mlp_kept: int

    @property
    def linear(self) -> int:
        """Weights of all linear layers in the blocks: what quantisation applies to."""
        return self.layers * sum(m.weights for m in self.matrices)

    @property
    def rest(self) -> int:
        """Parameters beside them and the output embeddings: embeddings, norms, biases."""
        biases = sum(m.outputs for m in self.matrices if m.bias)
        return self.layers * (self.norms + biases) + self.other

    @property
    def head(self) -> int:
        """Parameters of the output embeddings; 0 where they are the token embeddings."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.linear + self.rest + self.head

    def adapted_layers(self, adapter: Adapter) -> int:
        """Return how many blocks, from the top, carry adapters."""
        share = {"all": 1, "top-half": 2, "top-quarter": 4}[adapter.layers]
        return -(-self.layers // share)

    def targets(self, adapter: Adapter) -> tuple[Matrix, ...]:
        """Return a block's matrices that adapters are put on.

        Raises:
            InputError: the recipe names one that the model does not have.
        """
        if isinstance(adapter.targets, str):
            return self.matrices
        names = {m.name for m in self.matrices}
        unknown = sorted(set(adapter.targets) - names)
        if unknown:
            raise InputError(
                f"adapter.targets={', '.join(unknown)}: no such linear layers; the base has"
                f" {', '.join(sorted(names))}"
            )
        return tuple(m for m in self.matrices if m.name in adapter.targets)

    def lora_tensors(self, adapter: Adapter) -> list[int]:
        """Return the numbers in each tensor of a LoRA adapter: ``r x inputs``, ``outputs x r``."""
        sizes = [s * adapter.r for m in self.targets(adapter) for s in (m.inputs, m.outputs)]
        return sizes * self.adapted_layers(adapter)


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Read the shape off a model's ``config.json``.

    Raises:
        InputError: the model is of a kind that is not known here, or a size is missing.
    """
    kind = config.get("model_type")
    try:
        if kind in ("llama", "mistral", "qwen2", "qwen3"):
            return _llama(config, kind)
        if kind == "gpt2":
            return _gpt2(config)
        if kind == "gpt_neox":
            return _gpt_neox(config)
    except KeyError as error:
        raise InputError(f"config.json: {error.args[0]} is missing") from None
    known = "llama, mistral, qwen2, qwen3, gpt2, gpt_neox"
    raise InputError(f"config.json: model_type={kind}: not one that plan knows; allowed: {known}")


def small_llama(section: SmallModel, vocab: int) -> Shape:
    """Return the shape of the model that the pretrain stage makes."""
    config = {
        "vocab_size": vocab,
        "hidden_size": section.hidden_size,
        "num_hidden_layers": section.num_layers,
        "num_attention_heads": section.num_heads,
        "num_key_value_heads": section.num_kv_heads,
        "intermediate_size": section.intermediate_size,
        "tie_word_embeddings": True,
    }
    return _llama(config, "llama")


def small_bert(
    section: SmallModel, vocab: int, *, segments: int = 1, pooler: bool = False
) -> Shape:
    """Return the shape of the encoder that the pretrain stage makes, without what lies above it.

    Args:
        pooler: it has one from the start; else that comes later.
    """
    hidden, inner = section.hidden_size, section.intermediate_size
    other = (vocab + section.max_positions + segments + 2) * hidden  # and a norm
    if pooler:
        other += hidden * hidden + hidden
    return Shape(
        family="gpt",
        vocab=vocab,
        hidden=hidden,
        layers=section.num_layers,
        heads=section.num_heads,
        kv_heads=section.num_heads,
        head_dim=hidden // section.num_heads,
        intermediate=inner,
        matrices=(
            *(Matrix(name, hidden, hidden, True) for name in ("query", "key", "value", "dense")),
            Matrix("dense", hidden, inner, True),
            Matrix("dense", inner, hidden, True),
        ),
        norms=4 * hidden,
        other=other,
        tied=True,
        mlp_kept=1,
    )


def _llama(config: Mapping[str, Any], kind: str) -> Shape:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    wide, inner, narrow = heads * head_dim, config["intermediate_size"], kv_heads * head_dim
    bias = kind == "qwen2" or bool(config.get("attention_bias"))
    out_bias, mlp_bias = bias and kind != "qwen2", bool(config.get("mlp_bias"))
    return Shape(
        family="llama",
        vocab=config["vocab_size"],
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        matrices=(
            Matrix("q_proj", hidden, wide, bias),
            Matrix("k_proj", hidden, narrow, bias),
            Matrix("v_proj", hidden, narrow, bias),
            Matrix("o_proj", wide, hidden, out_bias),
            Matrix("gate_proj", hidden, inner, mlp_bias),
            Matrix("up_proj", hidden, inner, mlp_bias),
            Matrix("down_proj", inner, hidden, mlp_bias),
        ),
        norms=2 * hidden + (2 * head_dim if kind == "qwen3" else 0),
        other=config["vocab_size"] * hidden + hidden,
        tied=bool(config.get("tie_word_embeddings", False)),
        mlp_kept=3,
    )


def _gpt2(config: Mapping[str, Any]) -> Shape:
    hidden, vocab = config["n_embd"], config["vocab_size"]
    inner = config.get("n_inner") or 4 * hidden
    return _gpt(
        vocab,
        config["n_layer"],
        config["n_head"],
        (
            Matrix("c_attn", hidden, 3 * hidden, True),
            Matrix("c_proj", hidden, hidden, True),
            Matrix("c_fc", hidden, inner, True),
            Matrix("c_proj", inner, hidden, True),
        ),
        other=(vocab + config["n_positions"]) * hidden + 2 * hidden,
        tied=bool(config.get("tie_word_embeddings", True)),
        mlp_kept=4,
    )


def _gpt_neox(config: Mapping[str, Any]) -> Shape:
    hidden, vocab, inner = (
        config[key] for key in ("hidden_size", "vocab_size", "intermediate_size")
    )
    bias = bool(config.get("attention_bias", True))
    return _gpt(
        vocab,
        config["num_hidden_layers"],
        config["num_attention_heads"],
        (
            Matrix("query_key_value", hidden, 3 * hidden, bias),
            Matrix("dense", hidden, hidden, bias),
            Matrix("dense_h_to_4h", hidden, inner, True),
            Matrix("dense_4h_to_h", inner, hidden, True),
        ),
        other=vocab * hidden + 2 * hidden,
        tied=bool(config.get("tie_word_embeddings", False)),
        mlp_kept=1,
    )


def _gpt(
    vocab: int,
    layers: int,
    heads: int,
    matrices: tuple[Matrix, Matrix, Matrix, Matrix],
    **more: Any,
) -> Shape:
    """Return the shape of a model with one matrix for queries, keys and values, and a plain MLP.

    The third of the matrices leads into the MLP.
    """
    _, _, up, _ = matrices
    return Shape(
        family="gpt",
        vocab=vocab,
        hidden=up.inputs,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=up.inputs // heads,
        intermediate=up.outputs,
        matrices=matrices,
        norms=4 * up.inputs,
        **more,
    )


def quantized_bytes(matrix: Matrix, quantization: Quantization, double: bool) -> tuple[int, int]:
    """Return the bytes of a quantised weight and those of the constants kept with it.

    4 bits: a float32 scale for 64 numbers; doubly quantised, the scales take 8 bits and every 256
    of them a float32 scale (Dettmers et al. 2023). int8: a float32 scale per output.
    """
    if quantization == "int8":
        return matrix.weights, 4 * matrix.outputs
    blocks = -(-matrix.weights // _BLOCK)
    if double:
        scales = blocks + 4 * -(-blocks // _SCALES_BLOCK) + 4 * (_SCALES_CODE + 1)
    else:
        scales = 4 * blocks
    return -(-matrix.weights // 2), scales + 4 * _CODE


def linear_bytes(shape: Shape, quantization: Quantization, double: bool) -> tuple[int, int]:
    """Return the same for the linear layers of all blocks."""
    pairs = [quantized_bytes(m, quantization, double) for m in shape.matrices]
    return shape.layers * sum(w for w, _ in pairs), shape.layers * sum(c for _, c in pairs)
