"""PEFT's LoRA layers in one step each: the same parameters and numbers, fewer passes over memory.

PEFT adds an adapter to a layer's output by separate operations, each of which reads and writes a
tensor as large as that output, and autograd does the same again. Here the sum is part of the matrix
products. What PEFT is for stays with PEFT: configuration, parameters, files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def summed(model: nn.Module) -> Iterator[None]:
    """Have every fused layer keep ``W + s B A`` of the adapter that is on: for sampling.

    A product in the place of three for each token, and as much memory as the layers' own weights.
    Only for passes without gradients, while neither weights nor adapters change.
    """
    layers: list[Any] = [m for m in model.modules() if _is_fused(m)]
    found = [(layer, parts) for layer in layers if (parts := _parts(layer)) is not None]
    for layer, (weight, a, b, scaling) in found:
        layer.summed = torch.addmm(weight, b, a, alpha=scaling).detach()
    try:
        yield
    finally:
        for layer, _ in found:
            del layer.summed


def _is_fused(module: nn.Module) -> bool:
    return getattr(module.forward, "__func__", None) is _forward


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    output: Tensor
    base, summed = layer.base_layer, vars(layer).get("summed")
    if summed is not None:
        return F.linear(x, summed, base.bias)
    if not args and not kwargs:
        if not _names(layer):
            output = base(x)
            return output
        parts = _parts(layer)
        low = x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type)
        if parts is not None and not low:
            weight, a, b, scaling = parts
            output = _LoraLinear.apply(  # type: ignore[no-untyped-call]
                x, weight, base.bias, a, b, scaling
            )
            return output
    output = Linear.forward(layer, x, *args, **kwargs)
    return output


def _names(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _parts(layer: Any) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Return W, A, B and s of a layer that is ``W x + s B A x`` and no more, all in float32."""
    names, weight = _names(layer), layer.base_layer.weight
    if len(names) != 1:
        return None
    (name,) = names
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    plain = (
        weight.dtype == a.weight.dtype == torch.float32
        and not weight.requires_grad
        and not layer.merged
        and not layer.disable_adapters
        and a.bias is None
        and b.bias is None
        and name not in layer.lora_variant
        and (isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0.0)
    )
    return (weight, a.weight, b.weight, layer.scaling[name]) if plain else None


class _LoraLinear(Function):
    """``y = W x + bias + s B A x`` with ``W`` frozen (Hu et al. 2021, equation 3).

    For many rows ``W + s B A`` is added up first: two thin products less in each direction. It is
    made anew where it is needed, so that it takes no memory beside ``W``.
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
