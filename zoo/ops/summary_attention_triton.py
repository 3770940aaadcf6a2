"""The kernels of attention over blocks and their learned projections, as operators of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.attention_triton import attention_flops, error_of_results, weighted
from zoo.ops.backend import Kernel
from zoo.ops.operator import operator
from zoo.ops.rotary import phases, turn


@operator("zoo::summary_attention")
def summary_attention(qkv: Tensor, E: Tensor, F: Tensor, table: Tensor,
                      past_table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """qkv [B, T, 3 H, K], E, F [H, R, C], float32 phases [T, 2, K // 2] and [M R, 2, K // 2] -> y [B, T, H, K], lse,
    turned queries and keys [B, T, 2 H, K], summaries of keys and of values [B, M R, H, K].

    All of it, and qkv, are kept for the backward pass.
    """
    from zoo.kernels import attention, rotary, summaries

    H, (R, C) = E.shape[0], E.shape[1:]
    k, v = qkv[:, :, H : 2 * H], qkv[:, :, 2 * H :]
    turned = rotary.turn(qkv[:, :, : 2 * H], table)
    k_past, v_past = summaries.forward(k, v, E, F, past_table)
    y, lse = attention.forward(turned[:, :, :H], turned[:, :, H:], v, k_past, v_past, qkv.shape[3] ** -0.5, C, R, None)
    return y, lse, turned, k_past, v_past


@summary_attention.register_fake
def _(qkv: Tensor, E: Tensor, F: Tensor, table: Tensor,
      past_table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, N, K = qkv.shape
    past = (qkv.new_empty(B, past_table.shape[0], N // 3, K) for _ in range(2))
    return (qkv.new_empty(B, T, N // 3, K), qkv.new_empty(B, N // 3, (T + 63) // 64 * 64, dtype=torch.float32),
            qkv.new_empty(B, T, N // 3 * 2, K), *past)  # type: ignore[return-value]


@operator("zoo::summary_attention_backward")
def summary_attention_backward(dy: Tensor, qkv: Tensor, E: Tensor, F: Tensor, table: Tensor, past_table: Tensor,
                               y: Tensor, lse: Tensor, turned: Tensor, k_past: Tensor,
                               v_past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> the gradients of qkv, and in float32 of E and F."""
    from zoo.kernels import attention_backward, summaries

    H, (R, C) = E.shape[0], E.shape[1:]
    dqkv = qkv.new_empty(qkv.shape)
    dq, dk, dv = dqkv[:, :, :H], dqkv[:, :, H : 2 * H], dqkv[:, :, 2 * H :]
    k, v = qkv[:, :, H : 2 * H], qkv[:, :, 2 * H :]
    loaded = dy, turned[:, :, :H], turned[:, :, H:], v, k_past, v_past
    inside = attention_backward.takes_projections(C, lse, *loaded)
    *_, dk_past, dv_past = attention_backward.backward(
        *loaded, y, lse, qkv.shape[3] ** -0.5, C, R, None, (dq, dk, dv), table, past_table,
        (E, F) if inside else None)
    assert dk_past is not None
    assert dv_past is not None
    return dqkv, *summaries.backward(dk_past, dv_past, k, v, E, F, dk, dv, add=not inside)


@summary_attention_backward.register_fake
def _(dy: Tensor, qkv: Tensor, E: Tensor, F: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dE, dF = (P.new_empty(P.shape, dtype=torch.float32) for P in (E, F))
    return qkv.new_empty(qkv.shape), dE, dF


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    dqkv, dE, dF = summary_attention_backward(dy, *ctx.saved_tensors)
    E, F = ctx.saved_tensors[1:3]
    return dqkv, dE.to(E.dtype), dF.to(F.dtype), None, None


summary_attention.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.summary_attention)
def summary_attention_flops(qkv: tuple[int, ...], E: tuple[int, ...], F: tuple[int, ...], table: tuple[int, ...],
                            past_table: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two products of the pairs that see each other, and the projections."""
    (H, R, C), B, K = E, qkv[0], qkv[3]
    return attention_flops((B, qkv[1], H, K), (), (), None, None, C, R) + 4 * B * past_table[0] * C * H * K


@register_flop_formula(torch.ops.zoo.summary_attention_backward)
def summary_attention_backward_flops(dy: tuple[int, ...], qkv: tuple[int, ...], E: tuple[int, ...], *shapes: Any,
                                     **__: Any) -> int:
    H, R, C = E
    return attention_flops(dy, (), (), None, None, C, R) * 5 // 2 + 8 * dy[0] * shapes[2][0] * C * H * dy[3]


def error_of_kernels(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """The largest error of a small problem's results, as a multiple of what the dtype allows."""
    K, R, C = sizes
    B, T, H = 2, 2 * C + 30, 2
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64)
             for shape in ((B, T, 3 * H, K), (H, R, C), (H, R, C), (B, T, H, K))]
    *given, dy = (x / C**0.5 if x.ndim == 3 else x for x in given)
    t, M = torch.arange(T), -(-T // C) - 1
    table, past_table = phases(t, K), phases(torch.arange(M * R) * C / R, K)
    past = torch.arange(M).repeat_interleave(R) < t[:, None] // C
    visible = torch.cat([past, (t <= t[:, None]) & (t // C == t[:, None] // C)], 1)

    def definition(qkv: Tensor, E: Tensor, F: Tensor) -> Tensor:
        q, k, v = qkv.chunk(3, dim=2)
        k_past, v_past = (torch.einsum("hrc,bmchk->bmrhk", P, x[:, : M * C].unflatten(1, (M, C))).flatten(1, 2)
                          for P, x in ((E, k), (F, v)))
        keys = torch.cat([turn(k_past, past_table.double()), turn(k, table.double())], 1)
        return weighted(turn(q, table.double()), keys, torch.cat([v_past, v], 1), visible)

    def kernels(qkv: Tensor, E: Tensor, F: Tensor) -> Tensor:
        return summary_attention(qkv, E, F, table.to(device), past_table.to(device))[0]

    return error_of_results(kernels, definition, given, dy, device, dtype)


summary_kernel = Kernel("summary_attention", error_of_kernels, sources=("attention", "attention_backward", "rotary"),
                        file="summaries", sized="head size, rank, block")
