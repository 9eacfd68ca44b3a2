"""Bases in 4 or 8 bits: which weights are stored so, what they compute in, and what must then hold.

Quantised are the linear layers of the body. Embeddings, norms, the output embedding and every score
head stay as they are: PPO reads log-probabilities and scores off them.
"""

import importlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from align.errors import InputError, TrainingError
from align.machine import has_bfloat16
from align.manifest import BaseFacts
from align.recipe import Base

# The classes of bitsandbytes, by name: the library is loaded only where one of them is made.
_LAYERS = {"nf4": "Linear4bit", "fp4": "Linear4bit", "int8": "Linear8bitLt"}
_WEIGHTS = ("Params4bit", "Int8Params")


def bitsandbytes(key: str) -> Any:
    """Import bitsandbytes.

    Args:
        key: the recipe key that needs it, with its value, for the message.

    Raises:
        InputError: it is missing or broken.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"{key}: needs bitsandbytes, which does not load ({error});"
            " pip install 'bitsandbytes>=0.50,<0.51'"
        ) from error


def compute_dtype(base: Base, device: torch.device) -> torch.dtype:
    """Return what the base's linear layers compute in on ``device``; never a library's default.

    ``auto`` is bfloat16 where the processor has instructions for it; else float16 on a GPU, as on a
    T4 or V100, and float32 on a CPU, which is slow in float16. LLM.int8 has float16 built into its
    forward pass (Dettmers et al. 2022); its gradients are in the dtype of what went in.
    """
    if base.quantization == "none":
        name: str = base.dtype
    elif base.quantization == "int8":
        name = "float16"
    elif base.compute_dtype != "auto":
        name = base.compute_dtype
    elif has_bfloat16(device):
        name = "bfloat16"
    else:
        name = "float16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def with_quantization(facts: BaseFacts, base: Base, device: torch.device) -> BaseFacts:
    """Add to a base's facts how it is loaded."""
    return facts.model_copy(
        update={
            "quantization": base.quantization,
            "double_quantization": base.double_quantization,
            "compute_dtype": str(compute_dtype(base, device)).removeprefix("torch."),
        }
    )


def quantization_settings(base: Base, device: torch.device) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantise a base while it is loaded.

    transformers leaves out the output embedding and what is tied to it.

    Raises:
        InputError: bitsandbytes is missing.
    """
    if base.quantization == "none":
        return {}
    bitsandbytes(f"base.quantization={base.quantization}")
    if base.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quantization,
        bnb_4bit_use_double_quant=base.double_quantization,
        bnb_4bit_compute_dtype=compute_dtype(base, device),
    )
    return {"quantization_config": config}


def check_stored(config: PretrainedConfig, base: Base) -> None:
    """Refuse a checkpoint whose weights are stored in another precision than the recipe says.

    transformers would take the checkpoint's word for it, and tell nobody.

    Raises:
        InputError: names both.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return
    found = _stored_precision(stored if isinstance(stored, Mapping) else stored.to_dict())
    if found != (base.quantization, base.double_quantization):
        name, double = found
        raise InputError(
            f"base.quantization={base.quantization} with"
            f" double_quantization={str(base.double_quantization).lower()}, but {base.id} is"
            f" stored in {name} with double_quantization={str(double).lower()}; allowed for it:"
            " the same, or another checkpoint"
        )


def prepare_quantized(model: PreTrainedModel, base: Base, device: torch.device) -> None:
    """Make a freshly loaded quantised base ready to carry trained adapters, and check that it is.

    On processors with bfloat16 instructions, bitsandbytes repacks a 4-bit layer at its first pass
    in evaluation mode without gradients; from then on it computes something slightly different and
    has no gradient, in silence. That is turned off for good, whatever the processor.

    Raises:
        InputError: a head or an embedding is quantised: such a checkpoint cannot be used.
        TrainingError: nothing is quantised, or not as the recipe says.
    """
    if base.quantization == "none":
        return
    model.requires_grad_(False)
    layers = _quantized_layers(model)
    for layer in layers.values():
        if base.quantization != "int8":
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype, layer.compute_type_is_set = compute_dtype(base, device), True
    _check_loaded(model, base, layers)


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the quantised layers by plain ones with the numbers that they stood for.

    That is what adapters were fitted to, not the checkpoint that was quantised. ``model`` itself is
    changed, layer by layer, and ends up on the CPU; one that is not quantised stays as it is.
    """
    layers = _quantized_layers(model)
    if not layers:
        return model
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # loads bitsandbytes

    for name, layer in layers.items():
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).cpu()
        outputs, inputs = weight.shape
        transposed = layer.source_cls is Conv1D
        with torch.device("meta"):
            plain: Any = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs)
        plain.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, False)
        plain.bias = nn.Parameter(layer.bias.data.cpu(), False) if layer.bias is not None else None
        model.set_submodule(name, plain)
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    return cast(PreTrainedModel, model.to("cpu"))  # type: ignore[arg-type]


def is_quantized(model: nn.Module) -> bool:
    """Return whether any weight is stored in 4 or 8 bits."""
    return bool(_quantized_layers(model))


def _check_loaded(model: PreTrainedModel, base: Base, layers: dict[str, Any]) -> None:
    body = set(model.base_model.modules())
    whole = (model.get_output_embeddings(), model.get_input_embeddings())
    for name, layer in layers.items():
        if layer not in body or layer in whole or not isinstance(layer, nn.Linear):
            raise InputError(
                f"{base.id}: its {name} is stored in {base.quantization}; heads and embeddings have"
                " to stay whole: use a checkpoint that leaves them out (llm_int8_skip_modules)"
            )
        if type(layer).__name__ != _LAYERS[base.quantization] or not _as_asked(layer, base):
            raise TrainingError(f"{base.id}: {name} was not loaded in {_words(base)}")
    if not layers:
        raise TrainingError(f"{base.id}: no layer was loaded in {_words(base)}")


def _quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Return the modules with a quantised weight, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(getattr(module, "weight", None)).__name__ in _WEIGHTS
    }


def _as_asked(layer: Any, base: Base) -> bool:
    if base.quantization == "int8":
        return bool(layer.weight.dtype == torch.int8)
    state = layer.weight.quant_state
    return bool((state.quant_type, state.nested) == (base.quantization, base.double_quantization))


def _stored_precision(settings: Mapping[str, Any]) -> tuple[str, bool]:
    """Return what a checkpoint's configuration says: kind, and whether scales are quantised too."""
    if settings.get("load_in_8bit"):
        return "int8", False
    if settings.get("load_in_4bit"):
        kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
        return kind, bool(settings.get("bnb_4bit_use_double_quant"))
    return str(settings.get("quant_method", "an unknown format")), False


def _words(base: Base) -> str:
    return base.quantization + (" with double quantisation" if base.double_quantization else "")
