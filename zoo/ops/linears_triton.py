"""The Triton kernels of linears in operators of PyTorch: registration, gradients, FLOPs, self-test."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.backend import Kernel
from zoo.ops.operator import operator
from zoo.ops.token_mix_triton import check_shapes, largest_error

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("zoo::linears")
def _forward(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Five:
    """x [N, D], weights [F, D] -> four y [N, F], and the weights [4, F, D] in x's dtype, kept for the backward pass."""
    from zoo.kernels.linears import rounded

    with torch.autocast(x0.device.type, enabled=False):
        w = rounded([w0, w1, w2, w3], x0.dtype)
        a, b, c, d = (torch.mm(x, each.mT) for x, each in zip((x0, x1, x2, x3), w, strict=True))
        return a, b, c, d, w


@_forward.register_fake
def _(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Five:
    a, b, c, d = (x.new_empty(x.shape[0], w0.shape[0]) for x in (x0, x1, x2, x3))
    return a, b, c, d, x0.new_empty(4, *w0.shape)


@operator("zoo::linears_backward")
def _backward(dy: list[Tensor], x: list[Tensor], w: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """-> four dx, then four dW in that dtype; beside them parts of dW to fill the GPU once."""
    from zoo.kernels.linears import gradients

    with torch.autocast(w.device.type, enabled=False):
        dy = [each.contiguous() for each in dy]
        return [*(torch.mm(each, one) for each, one in zip(dy, w, strict=True)), *gradients(dy, x, dtype)]


@_backward.register_fake
def _(dy: list[Tensor], x: list[Tensor], w: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [*(each.new_empty(each.shape) for each in x), *(w.new_empty(w.shape[1:], dtype=dtype) for _ in x)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Five) -> None:
    ctx.save_for_backward(*inputs[:4], output[4])
    ctx.dtype = inputs[4].dtype
    ctx.mark_non_differentiable(output[4])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    *x, w = ctx.saved_tensors
    dy = [each.new_zeros(len(each), w.shape[1]) if one is None else one for one, each in zip(given[:4], x, strict=True)]
    return tuple(_backward(dy, x, w, ctx.dtype))


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.linears)
def _forward_flops(x0: torch.Size, x1: torch.Size, x2: torch.Size, x3: torch.Size, w0: torch.Size, *_: Any,
                   **__: Any) -> int:
    return 8 * x0[0] * math.prod(w0)


@register_flop_formula(torch.ops.zoo.linears_backward)
def _backward_flops(dy: list[torch.Size], x: list[torch.Size], w: torch.Size, *_: Any, **__: Any) -> int:
    return 4 * dy[0][0] * math.prod(w)


def linears_triton(*given: Tensor) -> tuple[Tensor, ...]:
    """linears by the kernels: four x, four weights."""
    x, weights = given[:4], given[4:]
    D, F = x[0].shape[-1], len(weights[0])
    for i in range(4):
        check_shapes(x[0], {f"input {i}": (x[i], x[0].shape), f"weight {i}": (weights[i], (F, D))})
    flat = [each.reshape(-1, D).contiguous() for each in x]
    return tuple(y.view(*x[0].shape[:-1], F) for y in _forward(*flat, *(each.contiguous() for each in weights))[:4])


def _self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """Several segments of tokens, the last ragged, against float64."""
    from zoo.ops.linears import linears

    F, D = sizes
    generator = torch.Generator().manual_seed(0)
    x, dy = ([torch.randn(1, 1333, width, generator=generator).to(device) for _ in range(4)] for width in (D, F))
    weights = [(torch.randn(F, D, generator=generator) / D**0.5).to(device, dtype) for _ in range(4)]
    return largest_error(lambda *given: linears_triton(*given[:-1]), lambda *given: linears(given[:4], given[4:]),
                         [*(each.to(dtype) for each in x), *weights], dy) / 2e-2


KERNEL = Kernel("linears", _self_test, most=1 << 20, dtypes=(torch.bfloat16,), sized="widths")
