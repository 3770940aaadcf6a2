"""Rotary positions by a table of phases: one read and one write of what is turned, all heads of a token at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, power_of_two

TILE = 1024  # channel pairs of a head at a time: 8 to each of 128 threads, which are 16 bytes of bf16


@triton.jit
def turned(b, p_table, o_t, m_t, sign, K: tl.constexpr):
    """Rows b [N, K] of a tile, K a power of two, by sign times the phases of the rows o_t where m_t, else to 0."""
    HALF: tl.constexpr = K // 2
    p_table += o_t.to(tl.int64)[:, None] * K + tl.arange(0, HALF)[None, :]
    b_cos = tl.load(p_table, mask=m_t[:, None], other=0.0)
    b_sin = tl.load(p_table + HALF, mask=m_t[:, None], other=0.0) * sign
    b_a, b_b = tl.split(tl.permute(tl.reshape(b, [b.shape[0], 2, HALF]), (0, 2, 1)))
    b = tl.join(b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin)
    return tl.reshape(tl.permute(b, (0, 2, 1)), [b.shape[0], K])


@triton.jit(do_not_specialize=["T", "NT"])
def turn_kernel(p_x, p_y, p_table, T, NT, sign, x_b, x_t, x_h, y_b, y_t, y_h, H: tl.constexpr, K: tl.constexpr,
                BT: tl.constexpr, BK: tl.constexpr):
    """Pairs (i, i + K // 2) of x [B, T, H, K] by sign times the phases [T, 2, K // 2]; x and y may be one tensor."""
    HALF: tl.constexpr = K // 2
    i_b, i_t = (tl.program_id(0) // NT).to(tl.int64), tl.program_id(0) % NT
    o_t, o_k = i_t * BT + tl.arange(0, BT), tl.arange(0, BK)
    mask = (o_t < T)[:, None] & (o_k < HALF)[None, :]
    p_table += o_t[:, None] * (2 * HALF) + o_k[None, :]
    b_cos = tl.load(p_table, mask=mask, other=0.0)
    b_sin = tl.load(p_table + HALF, mask=mask, other=0.0) * sign
    o_t = o_t.to(tl.int64)
    p_x += i_b * x_b + o_t[:, None] * x_t + o_k[None, :]
    p_y += i_b * y_b + o_t[:, None] * y_t + o_k[None, :]
    for i_h in tl.range(0, H, loop_unroll_factor=4):
        b_a = tl.load(p_x + i_h * x_h, mask=mask, other=0.0).to(tl.float32)
        b_b = tl.load(p_x + i_h * x_h + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_y + i_h * y_h, (b_a * b_cos - b_b * b_sin).to(p_y.dtype.element_ty), mask=mask)
        tl.store(p_y + i_h * y_h + HALF, (b_b * b_cos + b_a * b_sin).to(p_y.dtype.element_ty), mask=mask)
        if K % 2:  # the odd channel stays as it is
            last = (o_t < T)[:, None] & (o_k == 0)[None, :]
            tl.store(p_y + i_h * y_h + 2 * HALF, tl.load(p_x + i_h * x_h + 2 * HALF, mask=last), mask=last)


def in_registers(K: int) -> bool:
    """Whether `turned` takes tiles with heads of K."""
    return K >= 16 and power_of_two(K) == K


def turn(x: Tensor, table: Tensor, *, out: Tensor | None = None, back: bool = False) -> Tensor:
    """x [B, T, H, K] with channels side by side, turned by the phases [T, 2, K // 2] in float32, or back by them.

    Into `out`, which may be x itself, or a new tensor without gaps.
    """
    B, T, H, K = x.shape
    y = x.new_empty(x.shape) if out is None else out
    if x.numel():
        BK = power_of_two(max(K // 2, 1))
        BT = max(1, TILE // BK)
        NT = cdiv(T, BT)
        with torch.cuda.device_of(x):
            turn_kernel[(NT * B,)](x, y, table, T, NT, -1.0 if back else 1.0, *x.stride()[:3], *y.stride()[:3],
                                   H=H, K=K, BT=BT, BK=BK, num_warps=4)
    return y
