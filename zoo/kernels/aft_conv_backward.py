"""Backward of AFT-conv; names, chunks and segments as in zoo/kernels/aft_conv.py.

With g_t = dy_t sigmoid(q_t), delta_t = g_t . mean_t and p_ts = exp(k_s + w_{t-s} - lse_t),

    dq_t = g_t mean_t (1 - sigmoid(q_t)),   dv_s = sum_{t>=s} p_ts g_t,   dS_ts = p_ts (v_s . g_t - delta_t),

dk_s the sum of dS_ts over t, dw_d that over all t - s = d. Over all s the dS_ts of a row add up to 0, and over the keys
within the window to what is left of that: delta must be that of the very g and p which are used here, or the rounding
of y and g shows in dw. So the forward kernel first walks again, for dq, g as it is stored, and delta of that; then a
program walks back along its row. A chunk's keys meet the
rows of their own chunk and of the next one in four small products; rows further on have left two sums, of g and delta
as multiples of exp(-e), e the least of their lse, which no key before them exceeds: every exponent is <= 0.

Where the biases stand in a tile is the same for every chunk, so a program adds up its two tiles of dS in registers,
writes them once, and `bias` adds the tiles of all programs along their diagonals: no atomics, bit-equal from run to
run. Programs for other values of the same head each have a share of dk and of dw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import LOG2E, dot
from zoo.kernels.aft_conv import LN2, chain, keys, make_table, plan, sizes, tile, walk
from zoo.kernels.aft_sums import exp2, in_rows, place

LAST = tl.constexpr(1e30)  # lse of a row that is not there


@triton.jit
def absorb_rows(c_e, c_a, c_b, b_l, b_r, b_g, b_delta):
    """Sums with the rows of a chunk, whose lse is b_l + b_r log(2)."""
    e = tl.minimum(c_e, tl.min(b_l + b_r * LN2, 0))
    f, p = exp2((e - c_e) * LOG2E), exp2((e - b_l) * LOG2E - b_r)
    return e, c_a * f + tl.sum(p[:, None] * b_g.to(tl.float32), 0), c_b * f + tl.sum(p * b_delta, 0)


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents", "segments", "plane", "dk_v"])
def backward_kernel(k, v, table, g, delta, lse, dk, dv, tiles, ends, cu_seqlens, T, H, K, L, pieces, documents,
                    segments, plane, k_t, v_t, v_h, dk_v, BT: tl.constexpr, BV: tl.constexpr,
                    STAGES: tl.constexpr, PRECISION: tl.constexpr):
    i_v, i_h = tl.program_id(0) % tl.cdiv(K, BV), tl.program_id(0) // tl.cdiv(K, BV) % H
    i_s = tl.program_id(0) // (tl.cdiv(K, BV) * H)
    i_b, first, length, _, _, rest = place(i_s, T, L, pieces, cu_seqlens, documents, BT)
    o_t = tl.arange(0, BT)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = (o_v < K)[None, :]
    own = (i_b * T + first) * H + i_h
    p_k = k + (i_b * T + first) * k_t + i_h
    p_v = v + (i_b * T + first) * v_t + i_h * v_h + o_v[None, :]
    p_g, p_dv = g + own * K + o_v[None, :], dv + own * K + o_v[None, :]
    p_l, p_d, p_dk = lse + own, delta + i_v * plane + own, dk + tl.cast(i_v, tl.int64) * dk_v + own
    if ends is None:
        c_e = tl.cast(LAST, tl.float32)
        c_a = tl.zeros([BV], tl.float32)
        c_b = tl.cast(0.0, tl.float32)
    else:
        slots = tl.cast(segments, tl.int64) * H * K
        p_s = ends + (tl.cast(i_s, tl.int64) * H + i_h) * K
        c_e = -tl.load(p_s + i_v * BV, mask=rest > L, other=-LAST)
        c_a = tl.load(p_s + slots + o_v, mask=(o_v < K) & (rest > L), other=0)
        c_b = tl.load(p_s + 2 * slots + i_v * BV, mask=rest > L, other=0)
    n = tl.cdiv(length, BT)
    t_own = tl.zeros([BT, BT], tl.float32)
    t_next = tl.zeros([BT, BT], tl.float32)
    for i in tl.range(0, n, num_stages=STAGES):
        row = (n - 1 - i) * BT + o_t
        m_t, m_next = row < length, row + BT < rest
        row, after = row.to(tl.int64), (row + BT).to(tl.int64)
        b_k = keys(p_k + row * k_t, m_t)
        b_v = tl.load(p_v + row[:, None] * v_t, mask=m_t[:, None] & m_v, other=0)
        b_g = tl.load(p_g + row[:, None] * (H * K), mask=m_t[:, None] & m_v, other=0)
        g_next = tl.load(p_g + after[:, None] * (H * K), mask=m_next[:, None] & m_v, other=0)
        b_l = tl.load(p_l + row * H, mask=m_t, other=LAST)
        b_r = tl.load(p_l + plane + row * H, mask=m_t, other=0)
        l_next = tl.load(p_l + after * H, mask=m_next, other=LAST)
        r_next = tl.load(p_l + plane + after * H, mask=m_next, other=0)
        b_d = tl.load(p_d + row * H, mask=m_t, other=0)
        d_next = tl.load(p_d + after * H, mask=m_next, other=0)
        f = exp2((b_k - c_e) * LOG2E)
        w = tile(table, i_h, 0, BT)  # keys down, rows across
        p = exp2((b_k[:, None] - b_l[None, :]) * LOG2E + (w - b_r[None, :]))
        b_dv = dot(p.to(v.dtype.element_ty), b_g, f[:, None] * c_a[None, :], PRECISION)
        p *= dot(b_v, tl.trans(b_g), tl.zeros([BT, BT], tl.float32), PRECISION) - b_d[None, :]
        b_dk = tl.sum(p, 1)
        t_own += p
        w = tile(table, i_h, 1, BT)
        p = exp2((b_k[:, None] - l_next[None, :]) * LOG2E + (w - r_next[None, :]))
        b_dv = dot(p.to(v.dtype.element_ty), g_next, b_dv, PRECISION)
        tl.store(p_dv + row[:, None] * (H * K), b_dv.to(dv.dtype.element_ty), mask=m_t[:, None] & m_v)
        p *= dot(b_v, tl.trans(g_next), tl.zeros([BT, BT], tl.float32), PRECISION) - d_next[None, :]
        b_dk += tl.sum(p, 1)
        t_next += p
        b_dk += f * (tl.sum(b_v.to(tl.float32) * c_a[None, :], 1) - c_b)
        tl.store(p_dk + row * H, b_dk.to(dk.dtype.element_ty), mask=m_t)
        c_e, c_a, c_b = absorb_rows(c_e, c_a, c_b, l_next, r_next, g_next, d_next)
    p_t = tiles + tl.cast(tl.program_id(0), tl.int64) * 2 * BT * BT + o_t[:, None] * BT + o_t[None, :]
    tl.store(p_t, t_own)
    tl.store(p_t + BT * BT, t_next)


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents", "segments", "plane"])
def summary_kernel(g, delta, lse, sums, cu_seqlens, T, H, K, L, pieces, documents, segments, plane, BT: tl.constexpr,
                   BV: tl.constexpr, STAGES: tl.constexpr):
    """-e and the sums of g and delta of a segment that another precedes, without its first chunk and with that of the
    next; for every value, as `chain_kernel` asks."""
    i_v, i_h = tl.program_id(0) % tl.cdiv(K, BV), tl.program_id(0) // tl.cdiv(K, BV) % H
    i_s = tl.program_id(0) // (tl.cdiv(K, BV) * H)
    i_b, first, length, _, piece, rest = place(i_s, T, L, pieces, cu_seqlens, documents, BT)
    if (length <= 0) | (piece == 0):
        return
    o_v = i_v * BV + tl.arange(0, BV)
    own = (i_b * T + first) * H + i_h
    c_e = tl.cast(LAST, tl.float32)
    c_a = tl.zeros([BV], tl.float32)
    c_b = tl.cast(0.0, tl.float32)
    for i_t in tl.range(1, tl.cdiv(tl.minimum(rest, L + BT), BT), num_stages=STAGES):
        row = i_t * BT + tl.arange(0, BT)
        m_t = row < rest
        at = own + row.to(tl.int64) * H
        b_g = tl.load(g + at[:, None] * K + o_v[None, :], mask=m_t[:, None] & (o_v < K)[None, :], other=0)
        b_l = tl.load(lse + at, mask=m_t, other=LAST)
        b_r = tl.load(lse + plane + at, mask=m_t, other=0)
        b_d = tl.load(delta + i_v * plane + at, mask=m_t, other=0)
        c_e, c_a, c_b = absorb_rows(c_e, c_a, c_b, b_l, b_r, b_g, b_d)
    slots = tl.cast(segments, tl.int64) * H * K
    p_s = sums + (tl.cast(i_s, tl.int64) * H + i_h) * K + o_v
    tl.store(p_s, c_a * 0.0 - c_e, mask=o_v < K)
    tl.store(p_s + slots, c_a, mask=o_v < K)
    tl.store(p_s + 2 * slots, c_a * 0.0 + c_b, mask=o_v < K)


@triton.jit(do_not_specialize=["W", "programs"])
def bias_kernel(tiles, dbias, H, W, programs, blocks, BT: tl.constexpr, BP: tl.constexpr):
    """One bias's gradient: its diagonal in the tiles of all programs of its head, one after the other."""
    i_h, distance = tl.program_id(0) // W, tl.program_id(0) % W
    o_s = tl.arange(0, BT)
    after = o_s + distance  # of a key, its row: in its own chunk, or in the next
    at = tl.where(after < BT, o_s * BT + after, (BT + o_s) * BT + after - BT)
    total = tl.zeros([BP, BT], tl.float32)
    for i in range(0, programs, BP):
        o_p = i + tl.arange(0, BP)
        program = ((o_p // blocks) * H + i_h) * blocks + o_p % blocks
        total += tl.load(tiles + program.to(tl.int64)[:, None] * 2 * BT * BT + at[None, :],
                         mask=(o_p < programs)[:, None] & (after < 2 * BT)[None, :], other=0)
    tl.store(dbias + tl.program_id(0), tl.sum(tl.sum(total, 1), 0).to(dbias.dtype.element_ty))


def backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dy: Tensor, lse: Tensor,
             cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, dbias, each as its input."""
    q, k, v, dy, bias = in_rows(q), in_rows(k), in_rows(v), in_rows(dy), bias.contiguous()
    planned, each = plan(v, bias, cu_seqlens), sizes(v, bias)
    _, length, heads, width = v.shape
    dq, dv = q.new_empty(q.shape), v.new_empty(v.shape)
    if not v.numel():
        return dq, k.new_empty(k.shape), dv, torch.zeros_like(bias)
    blocks = triton.cdiv(width, each.BV)
    grid = (planned.segments * heads * blocks,)
    shape = length, heads, width
    cuts = planned.L, planned.pieces, planned.rows, planned.segments, k.numel()
    g, delta = v.new_empty(v.shape), lse.new_empty((blocks, *k.shape))
    walk(q, k, v, make_table(bias, each.BT, False), planned, each, cu_seqlens, dy=dy, dq=dq, g=g, delta=delta)
    dk = k.new_empty((blocks, *k.shape), dtype=k.dtype if blocks == 1 else torch.float32)
    tiles = lse.new_empty((grid[0], 2, each.BT, each.BT))
    dbias = bias.new_empty(bias.shape)
    ends = None
    if cu_seqlens is not None or length > planned.L:
        sums = lse.new_empty((3, planned.segments, heads * width))
        summary_kernel[grid](g, delta, lse, sums, cu_seqlens, *shape, *cuts, BT=each.BT, BV=each.BV,
                             STAGES=2, num_warps=4)
        ends = chain(sums, length, planned, cu_seqlens, True)
    backward_kernel[grid](k, v, make_table(bias, each.BT, True), g, delta, lse, dk, dv, tiles, ends, cu_seqlens, *shape,
                          *cuts, k.stride(1), *v.stride()[1:3], dk.stride(0), BT=each.BT, BV=each.BV,
                          STAGES=each.backward[1], PRECISION="ieee", num_warps=each.backward[0])
    bias_kernel[(bias.numel(),)](tiles, dbias, heads, bias.shape[1], planned.segments * blocks, blocks, BT=each.BT,
                                 BP=8, num_warps=4)
    return dq, dk[0] if blocks == 1 else dk.sum(0).to(k.dtype), dv, dbias
