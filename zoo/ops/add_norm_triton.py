"""The kernels of a residual sum and the norm after it, as operators of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.backend import Kernel
from zoo.ops.operator import operator

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@operator("zoo::add_norm")
def add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Four:
    """x, y [..., D] -> x + y in x's type, its norm in `dtype`; and kept: h in `dtype`, 1 / deviation in float32."""
    from zoo.kernels.add_norm import forward

    return forward(x, y, weight, bias, eps, dtype)


@add_norm.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Four:
    n, h = (x.new_empty(x.shape, dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), n, h, x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator("zoo::add_norm_backward")
def add_norm_backward(dn: Tensor, ds: Tensor | None, h: Tensor, scale: Tensor, weight: Tensor, x_dtype: torch.dtype,
                      y_dtype: torch.dtype) -> Four:
    """-> dx; dy, empty where it is dx; gradients of weight and bias in float32, from up to 8 D KiB of partial sums."""
    from zoo.kernels.add_norm import backward

    return backward(dn.contiguous(), None if ds is None else ds.contiguous(), h, scale, weight, x_dtype, y_dtype)


@add_norm_backward.register_fake
def _(dn: Tensor, ds: Tensor | None, h: Tensor, scale: Tensor, weight: Tensor, x_dtype: torch.dtype,
      y_dtype: torch.dtype) -> Four:
    dy = dn.new_empty(h.shape if x_dtype != y_dtype else (0,), dtype=y_dtype)
    dw, db = (weight.new_empty(weight.shape, dtype=torch.float32) for _ in range(2))
    return dn.new_empty(h.shape, dtype=x_dtype), dy, dw, db


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    x, y, weight, bias, _, _ = inputs
    ctx.save_for_backward(*output[2:], weight)
    ctx.dtypes = x.dtype, y.dtype, bias.dtype
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, ds: Tensor | None, dn: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    h, scale, weight = ctx.saved_tensors
    x_dtype, y_dtype, b_dtype = ctx.dtypes
    if dn is None:
        return ds, None if ds is None else ds.to(y_dtype), None, None, None, None
    dx, dy, dw, db = add_norm_backward(dn, ds, h, scale, weight, x_dtype, y_dtype)
    return dx, dx if x_dtype == y_dtype else dy, dw.to(weight.dtype), db.to(b_dtype), None, None


add_norm.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.add_norm)
def _add_norm_flops(*_: Any, **__: Any) -> int:
    """No products of matrices."""
    return 0


@register_flop_formula(torch.ops.zoo.add_norm_backward)
def _add_norm_backward_flops(*_: Any, **__: Any) -> int:
    return 0


def _self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """With y and n in `dtype`, and x and the parameters as in training in float32."""
    D, N = sizes[0], 1111
    generator = torch.Generator().manual_seed(0)
    x, y, ds, dn = (torch.randn(N, D, generator=generator) for _ in range(4))
    x[7] += 10
    given = [x, y.to(dtype), 1 + 0.1 * torch.randn(D, generator=generator), torch.randn(D, generator=generator)]
    leaves, wide = ([x.to(device, kind or x.dtype).requires_grad_() for x in given] for kind in (None, torch.float64))
    s, n, *_ = add_norm(*leaves, 1e-5, dtype)
    dn = dn.to(dtype)
    ours = [s, n, *torch.autograd.grad([s, n], leaves, [ds.to(device), dn.to(device)])]
    s = wide[0] + wide[1]
    n = F.layer_norm(s, (D,), wide[2], wide[3])
    exact = [s, n, *torch.autograd.grad([s, n], wide, [ds.to(device).double(), dn.to(device).double()])]
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    errors = [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) / allowed
              for a, b in zip(ours, exact, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


KERNEL = Kernel("add_norm", _self_test, most=4096, sized="widths")
