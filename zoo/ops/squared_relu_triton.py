"""The Triton kernel of squared_relu in operators of PyTorch: registration, gradients, FLOPs, self-test."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.backend import Kernel
from zoo.ops.operator import operator
from zoo.ops.token_mix_triton import check_shapes, largest_error


@operator("zoo::squared_relu")
def _forward(x: Tensor, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """-> y [N, D] and h [N, F], which is kept for the backward pass beside the inputs."""
    from zoo.kernels.squared_relu import product

    with torch.autocast(x.device.type, enabled=False):
        h = product(x, inner.mT, None)
        return torch.mm(h, outer.mT), h


@_forward.register_fake
def _(x: Tensor, inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], outer.shape[0]), x.new_empty(x.shape[0], inner.shape[0])


@operator("zoo::squared_relu_backward")
def _backward(dy: Tensor, x: Tensor, inner: Tensor, outer: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x, inner, outer; beside them one tensor like h."""
    from zoo.kernels.squared_relu import product

    with torch.autocast(x.device.type, enabled=False):
        dy = dy.contiguous()
        douter = torch.mm(dy.mT, h)
        dk = product(dy, outer, h)
        return torch.mm(dk, inner), torch.mm(dk.mT, x), douter


@_backward.register_fake
def _(dy: Tensor, x: Tensor, inner: Tensor, outer: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), inner.new_empty(inner.shape), outer.new_empty(outer.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if dy is None else _backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.squared_relu)
def _forward_flops(x: torch.Size, inner: torch.Size, *_: Any, **__: Any) -> int:
    """Two products."""
    return 4 * x[0] * math.prod(inner)


@register_flop_formula(torch.ops.zoo.squared_relu_backward)
def _backward_flops(dy: torch.Size, x: torch.Size, inner: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _forward_flops(x, inner)


def squared_relu_triton(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """squared_relu by the kernel."""
    D = x.shape[-1]
    check_shapes(x, {"inner": (inner, (inner.shape[0], D)), "outer": (outer, (D, inner.shape[0]))})
    return _forward(x.reshape(-1, D).contiguous(), inner.contiguous(), outer.contiguous())[0].view(x.shape)


def _self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """Several tiles of tokens, the last ragged, against float64."""
    from zoo.ops.squared_relu import squared_relu

    F, D = sizes
    x, inner, outer, dy = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device)
                           for i, shape in enumerate([(333, D), (F, D), (D, F), (333, D)]))
    given = [x.to(dtype), (inner / D**0.5).to(dtype), (outer / F**0.5).to(dtype)]
    return largest_error(lambda x, inner, outer, _: (squared_relu_triton(x, inner, outer),),
                         lambda x, inner, outer: (squared_relu(x, inner, outer),), given, [dy]) / 2e-2


KERNEL = Kernel("squared_relu", _self_test, most=1 << 20, dtypes=(torch.bfloat16,), sized="widths")
