"""The Triton kernels of exact attention as operators of PyTorch: registration, gradients, FLOPs, self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.ops.backend import Kernel
from zoo.ops.documents import check_documents

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
    dy = draw(B, T, H, K).to(dtype)
    narrow = [x.to(device, dtype).requires_grad_() for x in given]
    wide = [x.to(dtype).double().requires_grad_() for x in given]

    tensors = narrow if block else [*narrow, None, None]
    y, _ = attention(*tensors, block, R if block else 0, None)
    keys, values = (torch.cat([*wide[3 + i : 4 + i], wide[1 + i]], 1) for i in range(2))
    scores = torch.einsum("bthk,bshk->bhts", wide[0], keys) * K**-0.5
    expected = torch.einsum("bhts,bshk->bthk", scores.masked_fill(~visible, -torch.inf).softmax(-1), values)
    got = [y.detach(), *torch.autograd.grad(y, narrow, dy.to(device))]
    want = [expected.detach(), *torch.autograd.grad(expected, wide, dy.double())]
    allowed = {torch.float32: 2e-5, torch.float16: 2e-3}.get(dtype, 1.6e-2)
    error = torch.stack([(a.cpu() - b).norm() / b.norm() for a, b in zip(got, want, strict=True)])
    return float(error.max()) / allowed if bool(error.isfinite().all()) else float("inf")


causal_kernel = Kernel("attention", lambda device, dtype, sizes: error_of_kernels(device, dtype, sizes[0], 0),
                       sources=("attention_backward", "attention_hopper", "attention_hopper_backward"))
block_kernel = Kernel("block_attention", lambda device, dtype, sizes: error_of_kernels(device, dtype, sizes[0], 48),
                      sources=("attention_backward",), file="attention")
