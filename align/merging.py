"""Adapters inside the weights of their base: added for good, or for a while and taken out exactly.

PEFT's own way back, subtracting what was added, leaves rounding errors: about 1e-8 in float32, but
in bfloat16 after 20 times a tenth of a weight. Weights in 4 or 8 bits are never merged into: an
adapter's change of a weight is smaller than their steps and would be rounded away (PEFT issue
1043).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from align.errors import InputError
from align.quantization import is_quantized
from align.roles import add_adapters


def merged(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the model with a folder's adapter added to its own weights; ``model`` is used up.

    Every sum is formed in float32 and rounded once; one layer at a time is in float32.

    Args:
        dtype: of all parameters of the result.

    Raises:
        InputError: the model is quantised; see ``align.quantization.dequantize``.
        ParentError: the adapter does not fit the model.
    """
    _refuse_quantized(model)
    peft: Any = add_adapters(model, {"merged": folder})
    for layer in _adapted_layers(peft):
        weight = layer.get_base_layer().weight
        weight.data = weight.data.float()
        layer.merge(safe_merge=True)
        weight.data = weight.data.to(dtype)
    return in_dtype(cast(PreTrainedModel, peft.unload()), dtype)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round the model's parameters, in place; buffers, like rotary frequencies, stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@contextmanager
def merged_in(model: PeftModel, adapter_name: str) -> Iterator[PeftModel]:
    """Add one of the model's adapters to the weights for a while: layers then cost no more.

    Afterwards the weights are the very tensors that they were before, bit for bit in any dtype;
    meanwhile the adapted matrices exist twice.

    Raises:
        InputError: the model is quantised, or has no such adapter.
        ValueError: the sum is not finite (PEFT).
    """
    _refuse_quantized(model)
    if adapter_name not in model.peft_config:
        found = ", ".join(model.peft_config)
        raise InputError(f"{adapter_name}: the model has no such adapter; it has {found}")
    before = [
        (layer, layer.get_base_layer().weight.data, list(layer.merged_adapters))
        for layer in _adapted_layers(model)
    ]
    base: Any = model.base_model
    try:
        base.merge_adapter([adapter_name], safe_merge=True)  # into copies
        yield model
    finally:
        for layer, weight, names in before:
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters[:] = names


def _adapted_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _refuse_quantized(model: Any) -> None:
    if is_quantized(model):
        raise InputError(
            "an adapter cannot be merged into weights in 4 or 8 bits, which would round it away;"
            " use it as an adapter, or dequantise the base first"
        )
