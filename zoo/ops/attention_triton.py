"""The Triton kernels of exact attention as operators of PyTorch: registration, gradients, FLOPs, self-test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.ops.backend import Kernel
from zoo.ops.documents import check_documents
from zoo.ops.operator import operator
from zoo.ops.rotary import phases, turn

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("zoo::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, k_past: Tensor | None, v_past: Tensor | None, block: int, rank: int,
              cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """All of one dtype: q [B, T, H, K], k, v [B, T, G, K] -> y [B, T, H, K], lse [B, H, T + padding].

    Causal where block is 0, else block attention over summaries k_past, v_past [B, M rank, H, K]. Kept for the backward
    pass beside the inputs: y, and 4 bytes of lse a row and head. That pass takes as much again, and its results.
    """
    from zoo.kernels import attention, attention_hopper

    if attention_hopper.takes(q, k, v, block, cu_seqlens):
        return attention_hopper.forward(q, k, v, q.shape[-1] ** -0.5)
    return attention.forward(q, k, v, k_past, v_past, q.shape[-1] ** -0.5, block, rank, cu_seqlens)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_past: Tensor | None, v_past: Tensor | None, block: int, rank: int,
      cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, (T + 63) // 64 * 64, dtype=torch.float32)


@torch.library.custom_op("zoo::attention_backward", mutates_args=())
def attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, k_past: Tensor | None, v_past: Tensor | None,
                       y: Tensor, lse: Tensor, block: int, rank: int, cu_seqlens: Tensor | None) -> Gradients:
    """-> dq, dk, dv, dk_past, dv_past; the last two are empty without summaries."""
    from zoo.kernels import attention_backward, attention_hopper, attention_hopper_backward

    if attention_hopper.takes(q, k, v, block, cu_seqlens):
        gradients = attention_hopper_backward.backward(dy, q, k, v, y, lse, q.shape[-1] ** -0.5)
        return *gradients, q.new_empty(0), q.new_empty(0)
    dq, dk, dv, dk_past, dv_past = attention_backward.backward(
        dy, q, k, v, k_past, v_past, y, lse, q.shape[-1] ** -0.5, block, rank, cu_seqlens)
    return (dq, dk, dv, q.new_empty(0) if dk_past is None else dk_past, q.new_empty(0) if dv_past is None else dv_past)


@attention_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, k_past: Tensor | None, v_past: Tensor | None, y: Tensor,
      lse: Tensor, block: int, rank: int, cu_seqlens: Tensor | None) -> Gradients:
    past = (q.new_empty(0 if x is None else x.shape) for x in (k_past, v_past))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *past  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, k_past, v_past, ctx.block, ctx.rank, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, k_past, v_past, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    *gradients, dk_past, dv_past = attention_backward(dy, *tensors, ctx.block, ctx.rank, cu_seqlens)
    past = (dk_past, dv_past) if ctx.block else (None, None)
    return *gradients, *past, None, None, None


attention.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.attention)
def attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], k_past: tuple[int, ...] | None,
                    v_past: tuple[int, ...] | None, block: int, rank: int, *_: Any, **__: Any) -> int:
    """Two products of the pairs that see each other; of documents in a row as if they were one."""
    B, T, H, K = q
    if not block:
        return 4 * B * H * K * (T * (T + 1) // 2)
    whole, rest = divmod(T, block)
    own = whole * (block * (block + 1) // 2) + rest * (rest + 1) // 2
    past = rank * (block * (whole * (whole - 1) // 2) + rest * whole)
    return 4 * B * H * K * (own + past)


@register_flop_formula(torch.ops.zoo.attention_backward)
def attention_backward_flops(dy: tuple[int, ...], q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...],
                             k_past: tuple[int, ...] | None, v_past: tuple[int, ...] | None, y: tuple[int, ...],
                             lse: tuple[int, ...], block: int, rank: int, *_: Any, **__: Any) -> int:
    """Five products. (The kernels compute two of them twice.)"""
    return attention_flops(q, k, v, k_past, v_past, block, rank) * 5 // 2


@operator("zoo::rotary_attention")
def rotary_attention(qkv: Tensor, table: Tensor, heads: int,
                     cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, H + 2 G, K], phases [T, 2, K // 2] float32 -> y [B, T, H, K], lse, turned queries and keys.

    Those [B, T, H + G, K], and qkv for its values, are kept for the backward pass beside y and lse.
    """
    from zoo.kernels import attention, attention_hopper, rotary

    turned = rotary.turn(qkv[:, :, : (qkv.shape[2] + heads) // 2], table)
    q, k, v = _parts(turned, qkv, heads)
    scale = q.shape[-1] ** -0.5
    if attention_hopper.takes(q, k, v, 0, cu_seqlens):
        return *attention_hopper.forward(q, k, v, scale), turned
    return *attention.forward(q, k, v, None, None, scale, 0, 0, cu_seqlens), turned


@rotary_attention.register_fake
def _(qkv: Tensor, table: Tensor, heads: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    B, T, N, K = qkv.shape
    return (qkv.new_empty(B, T, heads, K), qkv.new_empty(B, heads, (T + 63) // 64 * 64, dtype=torch.float32),
            qkv.new_empty(B, T, (N + heads) // 2, K))


@operator("zoo::rotary_attention_backward")
def rotary_attention_backward(dy: Tensor, qkv: Tensor, turned: Tensor, table: Tensor, y: Tensor, lse: Tensor,
                              cu_seqlens: Tensor | None) -> Tensor:
    """-> the gradient of qkv."""
    from zoo.kernels import attention_backward, attention_hopper, attention_hopper_backward, rotary

    q, k, v = _parts(turned, qkv, y.shape[2])
    scale, dqkv = q.shape[-1] ** -0.5, qkv.new_empty(qkv.shape)
    if attention_hopper.takes(q, k, v, 0, cu_seqlens):
        attention_hopper_backward.backward_in_row(dqkv, dy, q, k, v, y, lse, scale, table)
        return dqkv
    dqk, inside = dqkv[:, :, : turned.shape[2]], rotary.in_registers(qkv.shape[3])
    attention_backward.backward(dy, q, k, v, None, None, y, lse, scale, 0, 0, cu_seqlens,
                                _parts(dqk, dqkv, y.shape[2]), table if inside else None)
    if not inside:
        rotary.turn(dqk, table, out=dqk, back=True)
    return dqkv


@rotary_attention_backward.register_fake
def _(dy: Tensor, qkv: Tensor, turned: Tensor, table: Tensor, y: Tensor, lse: Tensor,
      cu_seqlens: Tensor | None) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _parts(qk: Tensor, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, K] and k [B, T, G, K] of the one, v of the other."""
    return qk[:, :, :heads], qk[:, :, heads:], qkv[:, :, qk.shape[2] :]


def _setup_rotary(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    (qkv, table, _, cu_seqlens), (y, lse, turned) = inputs, output
    ctx.save_for_backward(qkv, turned, table, y, lse, cu_seqlens)
    ctx.mark_non_differentiable(lse, turned)
    ctx.set_materialize_grads(False)


def _backward_rotary(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 4
    return rotary_attention_backward(dy, *ctx.saved_tensors), None, None, None


rotary_attention.register_autograd(_backward_rotary, setup_context=_setup_rotary)


@register_flop_formula(torch.ops.zoo.rotary_attention)
def rotary_attention_flops(qkv: tuple[int, ...], table: tuple[int, ...], heads: int, *_: Any, **__: Any) -> int:
    """Those of the products; a rotation has none."""
    return attention_flops((*qkv[:2], heads, qkv[3]), (), (), None, None, 0, 0)


@register_flop_formula(torch.ops.zoo.rotary_attention_backward)
def rotary_attention_backward_flops(dy: tuple[int, ...], *_: Any, **__: Any) -> int:
    return attention_flops(dy, (), (), None, None, 0, 0) * 5 // 2


def same_dtype(*tensors: Tensor) -> list[Tensor]:
    """Tensors in the widest dtype among them."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]


def causal_on_triton(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`causal_attention` by kernels; q, k, v of one dtype."""
    B, T, H, K = q.shape
    G = k.shape[2]
    if k.shape != (B, T, G, K) or v.shape != k.shape or not G or H % G:
        raise ZooError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; allowed: q [B, T, H, K] and "
                       "k, v [B, T, G, K] where G divides H")
    if cu_seqlens is not None:
        check_documents(q, cu_seqlens)
    return attention(q, k, v, None, None, 0, 0, cu_seqlens)[0]


def rotary_on_triton(qkv: Tensor, table: Tensor, heads: int, cu_seqlens: Tensor | None) -> Tensor:
    """`rotary_attention` by kernels."""
    if cu_seqlens is not None:
        check_documents(qkv, cu_seqlens)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return rotary_attention(qkv, table.to(torch.float32).contiguous(), heads, cu_seqlens)[0]


def block_on_triton(tensors: list[Tensor], block: int, cu_seqlens: Tensor | None) -> Tensor:
    """`block_attention` by kernels of its five tensors in one dtype."""
    q, k, v, k_summary, v_summary = tensors
    B, T, H, K = q.shape
    if cu_seqlens is not None:
        check_documents(q, cu_seqlens)
    M = max(-(-T // block) - 1, 0) if cu_seqlens is None else T // block + len(cu_seqlens) - 1
    R = k_summary.shape[2]
    if k.shape != q.shape or v.shape != q.shape or v_summary.shape != k_summary.shape or (
            k_summary.shape != (B, M, R, H, K)) or not R:
        raise ZooError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, summaries {list(k_summary.shape)} "
                       f"and {list(v_summary.shape)}; allowed: three of [B, T, H, K] and two of [B, {M}, R, H, K]")
    past = (x.flatten(1, 2) for x in (k_summary, v_summary))
    return attention(q, k, v, *past, block, R, cu_seqlens)[0]


def error_of_kernels(device: torch.device, dtype: torch.dtype, K: int, block: int) -> float:
    """The largest error of a small problem's results, as a multiple of what the dtype allows."""
    B, T, H, R = 2, 300, 2, 5
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    given = [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, K)]
    given[0][0, 7] *= 5  # one row with large scores
    t = torch.arange(T)
    visible = t <= t[:, None]
    if block:
        M = -(-T // block) - 1
        given += [draw(B, M * R, H, K), draw(B, M * R, H, K)]
        past = torch.arange(M).repeat_interleave(R) < t[:, None] // block
        visible = torch.cat([past, visible & (t // block == t[:, None] // block)], 1)

    def kernels(*tensors: Tensor) -> Tensor:
        return attention(*tensors, *(() if block else (None, None)), block, R if block else 0, None)[0]

    def definition(q: Tensor, k: Tensor, v: Tensor, *past: Tensor) -> Tensor:
        if block:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        return weighted(q, k, v, visible)

    return error_of_results(kernels, definition, given, draw(B, T, H, K), device, dtype)


def error_of_rotary(device: torch.device, dtype: torch.dtype, K: int) -> float:
    """As `error_of_kernels`, of queries and keys that are turned."""
    B, T, H = 2, 300, 2
    generator = torch.Generator().manual_seed(0)
    qkv, dy = (torch.randn(B, T, n, K, generator=generator, dtype=torch.float64) for n in (3 * H, H))
    table, t = phases(torch.arange(T), K), torch.arange(T)

    def definition(qkv: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, dim=2)
        return weighted(turn(q, table.double()), turn(k, table.double()), v, t <= t[:, None])

    def kernels(qkv: Tensor) -> Tensor:
        return rotary_attention(qkv, table.to(device), H, None)[0]

    return error_of_results(kernels, definition, [qkv], dy, device, dtype)


def weighted(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention by its definition, to the keys that `visible` [T, S] shows."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def error_of_results(kernels: Callable[..., Tensor], definition: Callable[..., Tensor], given: list[Tensor],
                     dy: Tensor, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of y and of gradients, of inputs in that dtype, as a multiple of what is allowed."""
    dy = dy.to(dtype)
    narrow = [x.to(device, dtype).requires_grad_() for x in given]
    wide = [x.to(dtype).double().requires_grad_() for x in given]
    y, expected = kernels(*narrow), definition(*wide)
    got = [y.detach(), *torch.autograd.grad(y, narrow, dy.to(device))]
    want = [expected.detach(), *torch.autograd.grad(expected, wide, dy.double())]
    allowed = {torch.float32: 2e-5, torch.float16: 2e-3}.get(dtype, 1.6e-2)
    error = torch.stack([(a.cpu() - b).norm() / b.norm() for a, b in zip(got, want, strict=True)])
    return float(error.max()) / allowed if bool(error.isfinite().all()) else float("inf")


causal_kernel = Kernel("attention", lambda device, dtype, sizes: error_of_kernels(device, dtype, sizes[0], 0),
                       sources=("attention_backward", "attention_hopper", "attention_hopper_backward", "rotary"))
rotary_kernel = Kernel("rotary_attention", lambda device, dtype, sizes: error_of_rotary(device, dtype, sizes[0]),
                       sources=causal_kernel.sources, file="attention")
block_kernel = Kernel("block_attention", lambda device, dtype, sizes: error_of_kernels(device, dtype, sizes[0], 48),
                      sources=("attention_backward",), file="attention")
