"""AFT's kernels as ops that torch.compile, autograd and the FLOP counter see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.ops.backend import Kernel, use_backend
from zoo.ops.documents import check_documents
from zoo.ops.operator import operator


def _rows(x: Tensor) -> Tensor:
    """x, or a copy where its last axis is not contiguous; the kernels take any other stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def local_in_row(qkv: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """aft_local_in_row on its kernels."""
    if cu_seqlens is not None:
        check_documents(qkv, cu_seqlens)
    elif len(bias) != qkv.shape[1]:
        raise ZooError(f"bias is {list(bias.shape)} for T={qkv.shape[1]}; allowed: [T, W]")
    return _in_row(_rows(qkv), _rows(bias), cu_seqlens)[0]


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, local: bool, cu_seqlens: Tensor | None) -> Tensor:
    """aft_local or aft_full without a state, under one bias for the batch, on their kernels."""
    if cu_seqlens is not None:
        check_documents(q, cu_seqlens)
    elif len(bias) != q.shape[1] or not (local or bias.shape[1] == q.shape[1]):
        raise ZooError(f"bias is {list(bias.shape)} for T={q.shape[1]}; allowed: [T, {'W' if local else 'T'}]")
    return _biased(_rows(q), _rows(k), _rows(v), _rows(bias), local, cu_seqlens)[0]


Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("zoo::aft_biased", mutates_args=())
def _biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, local: bool, cu_seqlens: Tensor | None) -> Seven:
    """-> y, and what the backward pass keeps beside the inputs and y, in operands of e bytes (2 for bf16, else 4):
    full 3 e B T C for the keys' exponentials and 1 / den, and e T^2 for the biases'; local e B T C, and less than
    e T (W + 2 block); both 16 or 24 bytes a block and channel.

    While it lasts the backward pass has two more operands [B, T, C], and float32 tiles of the bias's gradient, one
    [T, T] (full) or [T, W + 2 block] (local) for each of a few shares.
    """
    from zoo.kernels import aft

    return aft.forward(q, k, v, bias, local, cu_seqlens)


@_biased.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, local: bool, cu_seqlens: Tensor | None) -> Seven:
    from zoo.kernels import aft

    return aft.results(q, v, bias, local, cu_seqlens)


@torch.library.custom_op("zoo::aft_biased_backward", mutates_args=())
def _biased_backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dy: Tensor, y: Tensor, kept: list[Tensor],
                     local: bool, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from zoo.kernels import aft

    return aft.backward(q, k, v, bias, _rows(dy), y, kept, local, cu_seqlens)


@_biased_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dy: Tensor, y: Tensor, kept: list[Tensor], local: bool,
      cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias.new_empty(bias.shape)


def _biased_setup(ctx: Any, inputs: tuple[Any, ...], output: Seven) -> None:
    ctx.save_for_backward(*inputs[:4], inputs[5], *output)
    ctx.local = inputs[4]
    ctx.set_materialize_grads(False)


def _biased_vjp(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    q, k, v, bias, cu_seqlens, y, *kept = ctx.saved_tensors
    return *_biased_backward(q, k, v, bias, dy, y, kept, ctx.local, cu_seqlens), None, None


_biased.register_autograd(_biased_vjp, setup_context=_biased_setup)


@register_flop_formula(torch.ops.zoo.aft_biased)
def _biased_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], bias: tuple[int, ...], local: bool,
                  *args: Any, **kwargs: Any) -> int:
    """Two multiply-adds a channel for every (row, key) pair with a bias, and for what is further back."""
    pairs = q[1] * min(q[1], bias[1] + 1) if local else q[1] * (q[1] + 1) // 2
    return 4 * q[0] * q[2] * pairs


@register_flop_formula(torch.ops.zoo.aft_biased_backward)
def _biased_backward_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], bias: tuple[int, ...],
                           dy: tuple[int, ...], y: tuple[int, ...], kept: list[tuple[int, ...]], local: bool,
                           *args: Any, **kwargs: Any) -> int:
    """The products for keys and values, and those for the bias."""
    return 2 * _biased_flops(q, k, v, bias, local)


@operator("zoo::aft_local_in_row")
def _in_row(qkv: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> Seven:
    """AFT-local of q, k, v side by side [B, T, 3 C]; results as of zoo::aft_biased."""
    from zoo.kernels import aft

    q, k, v = qkv.chunk(3, dim=-1)
    return aft.forward(q, k, v, bias, True, cu_seqlens)


@_in_row.register_fake
def _(qkv: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> Seven:
    from zoo.kernels import aft

    q, _, v = qkv.chunk(3, dim=-1)
    return aft.results(q, v, bias, True, cu_seqlens)


@operator("zoo::aft_local_in_row_backward")
def _in_row_backward(qkv: Tensor, bias: Tensor, dy: Tensor, y: Tensor, kept: list[Tensor],
                     cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> the gradients of qkv, in one piece, and of the bias."""
    from zoo.kernels import aft

    (q, k, v), row = qkv.chunk(3, dim=-1), qkv.new_empty(qkv.shape)
    return row, aft.backward(q, k, v, bias, _rows(dy), y, kept, True, cu_seqlens, row)[3]


@_in_row_backward.register_fake
def _(qkv: Tensor, bias: Tensor, dy: Tensor, y: Tensor, kept: list[Tensor],
      cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _in_row_setup(ctx: Any, inputs: tuple[Any, ...], output: Seven) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _in_row_vjp(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    qkv, bias, cu_seqlens, y, *kept = ctx.saved_tensors
    return *_in_row_backward(qkv, bias, dy, y, kept, cu_seqlens), None


_in_row.register_autograd(_in_row_vjp, setup_context=_in_row_setup)


@register_flop_formula(torch.ops.zoo.aft_local_in_row)
def _in_row_flops(qkv: tuple[int, ...], bias: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    q = *qkv[:2], qkv[2] // 3
    return _biased_flops(q, q, q, bias, True)


@register_flop_formula(torch.ops.zoo.aft_local_in_row_backward)
def _in_row_backward_flops(qkv: tuple[int, ...], bias: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * _in_row_flops(qkv, bias)


def _largest_error(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> float:
    """Over tensors, the error's norm relative to the tensor's, as a multiple of what is allowed."""
    errors = [(x.double() - e).norm() / e.norm() for x, e in zip(ours, exact, strict=True)]
    worst = torch.stack(errors).max().item()  # NaN where one is
    return worst / (1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps)


def _test(op: str, device: torch.device, dtype: torch.dtype) -> float:
    """More than two blocks, ragged, with an outlier that takes the slow way; against eager float64."""
    from zoo.ops import aft

    length, generator = 300, torch.Generator().manual_seed(0)
    q, k, v, dy = torch.randn(4, 2, length, 40, generator=generator, dtype=torch.float64).unbind()
    k[1, length // 2] = 120
    q, k, v, dy = (x.to(device, dtype) for x in (q, k, v, dy))
    columns = {"full": length, "local": 20}[op]
    bias = torch.randn(length, columns, generator=generator).to(device)
    leaves = [x.double().requires_grad_() for x in (q, k, v, bias)]
    with use_backend("eager"):
        exact = getattr(aft, f"aft_{op}")(*leaves)
    gradients = torch.autograd.grad(exact, leaves, dy.double())
    y, *kept = _biased(q, k, v, bias, op == "local", None)
    ours = [y, *_biased_backward(q, k, v, bias, dy, y, kept, op == "local", None)]
    return _largest_error(ours, [exact.detach(), *gradients], dtype)


SOURCES = "aft", "aft_parts", "aft_passes"
LOCAL = Kernel("aft_local", lambda device, dtype, _: _test("local", device, dtype), sources=SOURCES)
FULL = Kernel("aft_full", lambda device, dtype, _: _test("full", device, dtype), sources=SOURCES)
