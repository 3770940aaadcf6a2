"""The Triton kernels of linear attention as operators of PyTorch: registration, gradients, FLOPs, self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.ops.backend import Kernel
from zoo.ops.documents import check_documents
from zoo.ops.operator import operator

CHUNK = 64  # tokens between the states that are kept for the backward pass


def kept_states(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """The shape of the states that are kept, none where they would outweigh the tensors or a GPU's registers.

    One every CHUNK tokens of a row or document, in the products' type; rows of documents have a bound of them.
    """
    B, T, H, K = q.shape
    if max(K, v.shape[3]) > CHUNK or product_type(q, k, v).dtype.itemsize > 2:
        return (0,)
    chunks = B * -(-T // CHUNK) if cu_seqlens is None else T // CHUNK + cu_seqlens.shape[0] - 1
    return chunks, H, K, v.shape[3]


@operator("zoo::linear_attention")
def linear_attention(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
                     keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], initial_state [N, H, K, V] -> y [B, T, H, V], last states in float32, kept.

    The inputs are kept for the backward pass; if `keep`, also a state every 64 tokens where inputs are 16-bit and K and
    V at most 64 (`kept_states`): 2 K V / 64 bytes a token and head. Where rows are cut into R segments, the states
    before them are in memory while a pass lasts, 8 R H K V bytes; the backward pass without kept states has two sets.
    float32 of K over 64 takes ceil(K / 64) parts of y in float32.
    """
    from zoo.kernels.linear_attention import forward

    kept = torch.empty(kept_states(q, k, v, cu_seqlens) if keep else 0, dtype=product_type(q, k, v).dtype,
                       device=q.device)
    return *forward(q, k, v, initial_state, cu_seqlens, kept if kept.numel() else None), kept


@linear_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
      keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kept = q.new_empty(kept_states(q, k, v, cu_seqlens) if keep else (0,), dtype=product_type(q, k, v).dtype)
    return v.new_empty(v.shape), v.new_empty(rows, *q.shape[2:], v.shape[3], dtype=torch.float32), kept


@operator("zoo::linear_attention_backward")
def linear_attention_backward(dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
                              initial_state: Tensor | None, cu_seqlens: Tensor | None,
                              kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv in their inputs' types, the initial state's gradient in float32."""
    from zoo.kernels.linear_attention_backward import backward

    return backward(dy, dlast, q, k, v, initial_state, cu_seqlens, kept if kept.numel() else None)


@linear_attention_backward.register_fake
def _(dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None,
      cu_seqlens: Tensor | None, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dfirst = v.new_empty(rows, *q.shape[2:], v.shape[3], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dfirst


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, first, cu_seqlens, kept = ctx.saved_tensors
    if dy is None and dlast is None:
        return (None,) * 6
    dy = torch.zeros_like(v) if dy is None else dy
    dq, dk, dv, dfirst = linear_attention_backward(dy, dlast, q, k, v, first, cu_seqlens, kept)
    return dq, dk, dv, None if first is None else dfirst.to(first.dtype), None, None


linear_attention.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.linear_attention)
def linear_attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """A state that each token is added to and reads once: what must be done, less than the chunks' way of doing it."""
    B, T, H, K = q
    return 4 * B * T * H * K * v[3]


@register_flop_formula(torch.ops.zoo.linear_attention_backward)
def linear_attention_backward_flops(dy: tuple[int, ...], dlast: tuple[int, ...] | None, q: tuple[int, ...],
                                    k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """The state's gradient likewise, read twice; and the state once more, for dq."""
    return 10 * linear_attention_flops(q, k, v) // 4


def product_type(*tensors: Tensor) -> Tensor:
    """One of the tensors whose dtype products are taken in: float64, else a 16-bit type, else float32."""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for x in tensors:
            if x.dtype == dtype:
                return x
    return tensors[0]


def on_triton(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None,
              cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """`linear_attention` by kernels."""
    if cu_seqlens is not None:
        check_documents(q, cu_seqlens)
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ZooError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; allowed: two of [B, T, H, K] and one "
                       "of [B, T, H, V]")
    states = (len(q) if cu_seqlens is None else len(cu_seqlens) - 1, *q.shape[2:], v.shape[3])
    if initial_state is not None and initial_state.shape != states:
        raise ZooError(f"initial_state {list(initial_state.shape)}; allowed: {list(states)}")
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, initial_state))
    y, last, _ = linear_attention(q, k, v, initial_state, cu_seqlens, keep)
    return y, last


def error_of_kernels(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """The largest error of a small problem's results, as a multiple of what the dtype allows."""
    B, T, H, (K, V) = 2, 300, 2, sizes
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
             for shape in ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, H, K, V), (B, T, H, V), (B, H, K, V))]
    given[0][0, 7] *= 5  # an outlier
    narrow, wide = ([x.to(device, type_).requires_grad_(i < 4) for i, x in enumerate(given)]
                    for type_ in (dtype, torch.float64))

    def results(found: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        cotangents = [x.to(y.dtype) for x, y in zip(inputs[4:], found, strict=True)]
        return [*found, *torch.autograd.grad(found, inputs[:4], cotangents)]

    q, k, v, state = wide[:4]
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    y = torch.einsum("bhts,bshv->bthv", scores, v) + torch.einsum("bthk,bhkv->bthv", q, state)
    want = results((y, state + torch.einsum("bthk,bthv->bhkv", k, v)), wide)
    got = results(linear_attention(*narrow[:4], None, True)[:2], narrow)
    allowed = {torch.float32: 2e-5, torch.float16: 2e-3}.get(dtype, 1.6e-2)
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(got, want, strict=True)]
    errors = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
    return float(errors.max()) / allowed if bool(errors.isfinite().all()) else float("inf")


kernel = Kernel("linear_attention", error_of_kernels, sources=("linear_attention_backward",))
