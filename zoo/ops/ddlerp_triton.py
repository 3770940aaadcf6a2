"""The Triton kernels of ddlerp as operators of PyTorch: registration, gradients, FLOPs, self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.backend import Kernel
from zoo.ops.documents import check_documents
from zoo.ops.operator import operator
from zoo.ops.token_mix_triton import check_shapes, largest_error

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("zoo::ddlerp")
def _forward(x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor, cu_seqlens: Tensor | None) -> Six:
    """-> low [B, T, 5 R], which is kept for the backward pass beside the inputs, and five mixtures."""
    from zoo.kernels.ddlerp import forward

    low, (w, k, v, r, g) = forward(x, base, down, mix, up, cu_seqlens)
    return low, w, k, v, r, g


@_forward.register_fake
def _(x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor, cu_seqlens: Tensor | None) -> Six:
    w, k, v, r, g = (x.new_empty(x.shape) for _ in range(5))
    return x.new_empty(x.shape[0], x.shape[1], down.shape[1]), w, k, v, r, g


@operator("zoo::ddlerp_backward")
def _backward(dy: list[Tensor], x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor, low: Tensor,
              cu_seqlens: Tensor | None) -> Five:
    """-> gradients of x, base, down, mix, up.

    Beside these: a tensor like x, 10 R numbers a token, and 5 R for each block of channels (256, float32: 128); in
    float32 the gradients of up and mix as often as programs fill the GPU.
    """
    from zoo.kernels.ddlerp import backward

    return backward([each.contiguous() for each in dy], x, base, down, mix, up, low, cu_seqlens)


@_backward.register_fake
def _(dy: list[Tensor], x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor, low: Tensor,
      cu_seqlens: Tensor | None) -> Five:
    dx, dbase, ddown, dmix, dup = (each.new_empty(each.shape) for each in (x, base, down, mix, up))
    return dx, dbase, ddown, dmix, dup


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Six) -> None:
    *given, cu_seqlens = inputs
    ctx.save_for_backward(*given, output[0], cu_seqlens)
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, _: Tensor | None, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    x, *rest = ctx.saved_tensors
    return *_backward([torch.zeros_like(x) if dy is None else dy for dy in given], x, *rest), None


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.ddlerp)
def _forward_flops(x: torch.Size, base: torch.Size, down: torch.Size, *_: Any, **__: Any) -> int:
    """The products with down and with up."""
    return 4 * x[0] * x[1] * x[2] * down[1]


@register_flop_formula(torch.ops.zoo.ddlerp_backward)
def _backward_flops(dy: list[torch.Size], x: torch.Size, base: torch.Size, down: torch.Size, *_: Any,
                    **__: Any) -> int:
    """That with up once more, and those of both products' gradients."""
    return 5 * _forward_flops(x, base, down) // 2


def ddlerp_triton(x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor,
                  cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """ddlerp by kernels."""
    if cu_seqlens is not None:
        check_documents(x, cu_seqlens)
    D, R = x.shape[-1], up.shape[1]
    check_shapes(x, {"base": (base, (D,)), "down": (down, (D, 5 * R)), "mix": (mix, (5, D)), "up": (up, (5, R, D))})
    x, base, down, mix, up = (each.contiguous() for each in (x, base, down, mix, up))
    return _forward(x, base, down, mix, up, cu_seqlens)[1:]


def _self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """Two rows of several tiles and segments, the last ragged, against float64."""
    from zoo.ops.token_mix import ddlerp

    D, R = sizes
    shapes = [(2, 1111, D), (D,), (D, 5 * R), (5, D), (5, R, D)] + [(2, 1111, D)] * 5
    x, base, down, mix, up, *dys = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device)
                                    for i, shape in enumerate(shapes))
    given = [x.to(dtype), base, down / D**0.5, mix, up / R**0.5]
    allowed = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    return largest_error(ddlerp_triton, ddlerp, given, dys) / allowed


KERNEL = Kernel("ddlerp", _self_test, most=4096, sources=("token_mix",), sized="channels and rank")
