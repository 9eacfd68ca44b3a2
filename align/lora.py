"""PEFT's LoRA layers in one step each: the same parameters and numbers, fewer passes over memory.

PEFT adds an adapter to a layer's output by separate operations, each of which reads and writes a
tensor as large as that output, and autograd does the same again. Here the sum is part of the matrix
products. What PEFT is for stays with PEFT: configuration, parameters, files.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def fuse(model: nn.Module) -> None:
    """Give every LoRA layer of ``model`` that allows it the fused forward pass.

    Layers of other kinds (quantised, transposed), and passes in other precisions than float32, go
    on as PEFT has them.
    """
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names and not args and not kwargs:
        output: Tensor = layer.base_layer(x)
        return output
    if len(names) != 1 or args or kwargs or not _is_plain(layer, names[0], x):
        output = Linear.forward(layer, x, *args, **kwargs)
        return output
    base, a, b = layer.base_layer, layer.lora_A[names[0]], layer.lora_B[names[0]]
    output = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, base.weight, base.bias, a.weight, b.weight, layer.scaling[names[0]]
    )
    return output


def _is_plain(layer: Any, name: str, x: Tensor) -> bool:
    """Return whether a LoRA is nothing but ``scaling * B A x``, all of it in float32."""
    weight = layer.base_layer.weight
    dropout = layer.lora_dropout[name]
    return (
        x.dtype == weight.dtype == layer.lora_A[name].weight.dtype == torch.float32
        and not torch.is_autocast_enabled(x.device.type)
        and not weight.requires_grad
        and not layer.merged
        and not layer.disable_adapters
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        and name not in layer.lora_variant
        and (isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0.0)
    )


class _LoraLinear(Function):
    """``y = W x + bias + s B A x`` with ``W`` frozen (Hu et al. 2021, equation 3).

    For many rows ``W + s B A`` is added up first: two thin products less in each direction. It is
    made anew where it is needed, so that it never takes memory beside ``W``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # The operations of a product with A and B per row, against those of B A once.
        ctx.summed = len(rows) * sum(weight.shape) > weight.numel()
        if ctx.summed:
            output = F.linear(rows, torch.addmm(weight, b, a, alpha=scaling), bias)
        else:
            output = F.linear(rows, weight, bias).addmm_(rows @ a.T, b.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b = ctx.saved_tensors
        d_output = d_output.reshape(-1, d_output.shape[-1])
        d_x = d_a = d_b = None
        d_inner = (d_output @ b).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            if ctx.summed:
                d_x = d_output @ torch.addmm(weight, b, a, alpha=ctx.scaling)
            else:
                d_x = (d_output @ weight).addmm_(d_inner, a)
            d_x = d_x.view(ctx.shape)
        if ctx.needs_input_grad[3]:
            d_a = d_inner.T @ rows
        if ctx.needs_input_grad[4]:
            # Transposed at the end: the product the other way round takes half as long again.
            d_b = ((rows @ a.T).T @ d_output).mul_(ctx.scaling).T
        return d_x, None, None, d_a, d_b, None
