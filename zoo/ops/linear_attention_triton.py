"""The Triton kernels of linear attention as operators of PyTorch: registration, gradients, FLOPs, self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.ops.backend import Kernel
from zoo.ops.documents import check_documents


@torch.library.custom_op("zoo::linear_attention", mutates_args=())
def linear_attention(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None,
                     cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], initial_state [N, H, K, V] -> y [B, T, H, V], last states in float32.

    Nothing but the inputs is kept for the backward pass. Where rows are cut into R segments, the states before them
    are in memory while a pass lasts, 8 R H K V bytes; the backward pass has two sets.
    """
    from zoo.kernels.linear_attention import forward

    return forward(q, k, v, initial_state, cu_seqlens)


@linear_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None,
      cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(v.shape), v.new_empty(rows, *q.shape[2:], v.shape[3], dtype=torch.float32)


@torch.library.custom_op("zoo::linear_attention_backward", mutates_args=())
def linear_attention_backward(dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
                              initial_state: Tensor | None,
                              cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv in their inputs' types, the initial state's gradient in float32."""
    from zoo.kernels.linear_attention import backward

    return backward(dy, dlast, q, k, v, initial_state, cu_seqlens)


@linear_attention_backward.register_fake
def _(dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None,
      cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dfirst = v.new_empty(rows, *q.shape[2:], v.shape[3], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dfirst


def _setup(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, first, cu_seqlens = ctx.saved_tensors
    if dy is None and dlast is None:
        return (None,) * 5
    dy = torch.zeros_like(v) if dy is None else dy
    dq, dk, dv, dfirst = linear_attention_backward(dy, dlast, q, k, v, first, cu_seqlens)
    return dq, dk, dv, None if first is None else dfirst.to(first.dtype), None


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
    return linear_attention(q, k, v, initial_state, cu_seqlens)


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
    got = results(linear_attention(*narrow[:4], None), narrow)
    allowed = {torch.float32: 2e-5, torch.float16: 2e-3}.get(dtype, 1.6e-2)
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(got, want, strict=True)]
    errors = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
    return float(errors.max()) / allowed if bool(errors.isfinite().all()) else float("inf")


kernel = Kernel("linear_attention", error_of_kernels)
