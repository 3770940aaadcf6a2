"""AFT-conv's kernels as ops that torch.compile, autograd and the FLOP counter see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.ops.backend import Kernel, use_backend
from zoo.ops.documents import check_documents


def conv(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """aft_conv without a state, on its kernels."""
    if cu_seqlens is not None:
        check_documents(q, cu_seqlens)
    if bias.ndim != 2 or len(bias) != q.shape[2] or k.shape != q.shape[:3]:
        raise ZooError(f"q is {list(q.shape)}, k {list(k.shape)}, bias {list(bias.shape)}; "
                       "allowed: [B, T, H, K], [B, T, H], [H, W]")
    return _conv(q, k, v, bias, cu_seqlens)[0]


@torch.library.custom_op("zoo::aft_conv", mutates_args=())
def _conv(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> y, and for the backward pass the float32 log of the rows' sums of weights [2, B, T, H]."""
    from zoo.kernels import aft_conv

    return aft_conv.forward(q, k, v, bias, cu_seqlens)


@_conv.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty((2, *k.shape), dtype=torch.float32)


@torch.library.custom_op("zoo::aft_conv_backward", mutates_args=())
def _conv_backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dy: Tensor, lse: Tensor,
                   cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from zoo.kernels import aft_conv_backward

    return aft_conv_backward.backward(q, k, v, bias, dy, lse, cu_seqlens)


@_conv_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dy: Tensor, lse: Tensor,
      cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias.new_empty(bias.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _vjp(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    q, k, v, bias, cu_seqlens, lse = ctx.saved_tensors
    return *_conv_backward(q, k, v, bias, dy, lse, cu_seqlens), None


_conv.register_autograd(_vjp, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.aft_conv)
def _flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], bias: tuple[int, ...], *args: Any,
           **kwargs: Any) -> int:
    """A multiply-add a value, and one for den, for every (row, key) pair with a bias, and for what is further back."""
    return 2 * q[0] * q[2] * (q[3] + 1) * q[1] * min(q[1], bias[1] + 1)


@register_flop_formula(torch.ops.zoo.aft_conv_backward)
def _backward_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], bias: tuple[int, ...], *args: Any,
                    **kwargs: Any) -> int:
    return 2 * _flops(q, k, v, bias)


def _self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """Rows that are cut, a ragged end, an outlier, more values than a program has; against eager float64."""
    from zoo.ops import aft

    generator, window = torch.Generator().manual_seed(0), sizes[0]
    length = 9 * 2 * max(32, window)  # longer than the shortest segment
    q, v, dy = torch.randn(3, 2, length - 5, 2, 80, generator=generator, dtype=torch.float64).unbind()
    k = torch.randn(2, length - 5, 2, generator=generator, dtype=torch.float64)
    k[1, length // 2] = 60
    bias = torch.randn(2, window, generator=generator).to(device)
    q, k, v, dy = (x.to(device, dtype) for x in (q, k, v, dy))
    leaves = [x.double().requires_grad_() for x in (q, k, v, bias)]
    with use_backend("eager"):
        exact = aft.aft_conv(leaves[0], leaves[1], leaves[2], leaves[3])
    gradients = torch.autograd.grad(exact, leaves, dy.double())
    y, lse = _conv(q, k, v, bias, None)
    ours = [y, *_conv_backward(q, k, v, bias, dy, lse, None)]
    errors = [(x.double() - e).norm() / e.norm() for x, e in zip(ours, [exact.detach(), *gradients], strict=True)]
    worst = torch.stack(errors).max().item()  # NaN where one is
    return worst / (1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps)


CONV = Kernel("aft_conv", _self_test, most=65, sources=("aft_conv_backward", "aft_sums"), sized="windows")
