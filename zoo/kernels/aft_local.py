"""AFT-local (2105.14103, equation 4): a band of NB blocks back and the rows' own, the past beyond it as running sums.
Names as in aft_parts.py, equations as in aft_full.py; exponentials are made where they are used, as a key block meets
NB + 1 blocks of rows only.

Backward, a program of `band` has a block of keys and a share of batch and channels: it makes the gradients of keys and
values, and the sums over its share of dw_ts / A_ts for the rows that see the block, one factor exp2(l_j - ref) for each
block of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import LOG2E, dot
from zoo.kernels.aft_parts import (
    Problem,
    before,
    document,
    flagged,
    gated,
    locate,
    lowered,
    power,
    raised,
    shares_of,
    steep_row,
    steep_sums,
)


@triton.jit(do_not_specialize=["T", "P", "chunks", "slots"])
def forward_kernel(q, k, v, y, inv, table, far, planes, flags, cu_seqlens, blocks, slots, T, P, C, Cp, chunks,
                   q_b, q_t, k_b, k_t, v_b, v_t, BT: tl.constexpr, BC: tl.constexpr, NB: tl.constexpr,
                   STAGES: tl.constexpr, PRECISION: tl.constexpr, FLAG: tl.constexpr, DOCUMENTS: tl.constexpr):
    i_n, i_t, i_c = locate(tl.program_id(0), blocks, slots, 0, T, Cp, BT, BC, True, DOCUMENTS)
    if i_n < 0:
        return
    i_b, start, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    if i_t * BT >= length:
        return
    columns: tl.constexpr = (NB + 1) * BT
    o_c, o_t = i_c * BC + tl.arange(0, BC), tl.arange(0, BT)
    m_c = (o_c < C)[None, :]
    plane = tl.cast(chunks, tl.int64) * Cp
    p_plane = planes + (chunk + i_t) * Cp + o_c
    row = (i_t * BT + o_t)[:, None].to(tl.int64)
    m_own = (row < length) & m_c
    b_q = tl.load(q + i_b * q_b + (start + row) * q_t + o_c[None, :], mask=m_own, other=0)
    ref = tl.load(p_plane + plane)
    slow = i_t * 0
    if raised(flags, chunk + i_t, i_c, Cp, BC, FLAG):
        slow = tl.max((ref < tl.load(p_plane)).to(tl.int32), 0)
    b_num = tl.zeros([BT, BC], tl.float32)
    b_den = tl.zeros([BT, BC], tl.float32)
    if i_t > NB:
        p_far = p_plane - (NB + 1) * Cp
        fall = tl.load(p_far + 2 * plane) - ref
        b_far = tl.load(far + i_t * BT + o_t)[:, None]
        b_num += b_far * lowered(tl.load(p_far + 4 * plane), fall)[None, :]
        b_den += b_far * lowered(tl.load(p_far + 5 * plane), fall)[None, :]
    p_table = table + (i_t * BT + o_t)[:, None] * columns + o_t[None, :]
    for j in tl.range(tl.maximum(i_t - NB, 0), i_t + 1 - slow, num_stages=STAGES):
        row = (j * BT + o_t)[:, None].to(tl.int64)
        mask = (row < length) & m_c
        b_k = tl.load(k + i_b * k_b + (start + row) * k_t + o_c[None, :], mask=mask, other=float("-inf"))
        b_v = tl.load(v + i_b * v_b + (start + row) * v_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
        b_a = tl.load(p_table + (j - i_t + NB) * BT)
        p = power(b_k.to(tl.float32), ref, inv.dtype.element_ty == tl.float32)
        b_num = dot(b_a, (p * b_v).to(b_a.dtype), b_num, PRECISION)
        b_den = dot(b_a, p.to(b_a.dtype), b_den, PRECISION)
    if slow > 0:
        at = start + i_t * BT
        p_diagonal = table + i_t * BT * columns + NB * BT
        b_num, b_den = steep_sums(k + i_b * k_b + at * k_t, v + i_b * v_b + at * v_t, p_diagonal, b_num, b_den, ref,
                                  tl.minimum(BT, length - i_t * BT), o_c, C, k_t, v_t, columns, BT)
    at = (i_b * T + start + (i_t * BT + o_t)[:, None]) * C + o_c[None, :]
    b_y, b_inv = gated(b_q, b_num, b_den, inv.dtype.element_ty == tl.float32)
    tl.store(y + at, b_y.to(y.dtype.element_ty), mask=m_own)
    tl.store(inv + at, b_inv.to(inv.dtype.element_ty), mask=m_own)


@triton.jit
def steep_rows(q, k, v, dy, y, inv, dk, dv, p_table, p_sum, i_b, start, length, i_t, o_c, C, ref, steep, T, q_b, q_t,
               k_b, k_t, v_b, v_t, dy_b, dy_t, d_t, BT: tl.constexpr, COLUMNS: tl.constexpr):
    """The steep channels' part of the block on the diagonal, row by row: added to dk and dv, and to p_sum [BT, BT]."""
    o_r = tl.arange(0, BT)
    key = (i_t * BT + o_r)[:, None].to(tl.int64)
    mask = (key < length) & steep[None, :]
    b_x = tl.load(k + i_b * k_b + (start + key) * k_t + o_c[None, :], mask=mask, other=float("-inf"))
    b_x = b_x.to(tl.float32) * LOG2E
    b_v = tl.load(v + i_b * v_b + (start + key) * v_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    at_key = (i_b * T + start + key) * d_t + o_c[None, :]
    b_dv = b_v * 0
    b_rest = b_v * 0
    c_m = ref
    for i_s in range(0, tl.minimum(BT, length - i_t * BT)):
        c_x, c_a, c_b = steep_row(q, k, dy, y, inv, i_b, start + i_t * BT + i_s, steep, o_c, T, C, q_b, q_t, k_b, k_t,
                                  dy_b, dy_t)
        c_m = tl.maximum(c_m, c_x)
        p = tl.exp2(tl.minimum(b_x - c_m[None, :], 0.0))
        p_row = p_sum + i_s * COLUMNS + o_r
        tl.store(p_row, tl.load(p_row) + tl.sum(p * (c_a[None, :] * b_v + c_b[None, :]), 1))
        p *= tl.load(p_table + i_s * COLUMNS + o_r).to(tl.float32)[:, None]
        b_dv += p * c_a[None, :]
        b_rest += p * c_b[None, :]
        tl.debug_barrier()
    b_rest += b_v * b_dv
    tl.store(dv + at_key, (tl.load(dv + at_key, mask=mask, other=0) + b_dv).to(dv.dtype.element_ty), mask=mask)
    tl.store(dk + at_key, (tl.load(dk + at_key, mask=mask, other=0) + b_rest).to(dk.dtype.element_ty), mask=mask)


@triton.jit
def seen_by(p_ab, p_plane, level, plane, d, there, Cp, BT: tl.constexpr):
    """a, b of the d-th block of rows from the keys' own on, and l_j - ref between the two [1, channels]."""
    fall = level - tl.load(p_plane + plane + d * Cp, mask=there, other=1e30)
    b_a = tl.load(p_ab + d * BT * Cp, mask=there, other=0)
    b_b = tl.load(p_ab + plane * BT + d * BT * Cp, mask=there, other=0)
    return b_a, b_b, fall[None, :]


@triton.jit
def keys_of(k, v, planes, seen, plane, i_n, i_c, cu_seqlens, i_t, T, P, C, Cp, k_b, k_t, v_b, v_t, d_t,
            BT: tl.constexpr, BC: tl.constexpr, EXACT: tl.constexpr, DOCUMENTS: tl.constexpr):
    """exp2(x - l_j) of block i_t of row or document i_n, as such and with v; where gradients go; the row's length.

    EXACT: with v less the row's last mean. Where one key outweighs all others, its v (sum of a) + (sum of b), which
    should vanish, is the difference of two long sums; of v and means less that one, both are small.
    """
    i_b, start, length, chunk = document(cu_seqlens, i_n.to(tl.int64), T, P, BT, DOCUMENTS)
    o_c = i_c * BC + tl.arange(0, BC)
    row = (i_t * BT + tl.arange(0, BT))[:, None].to(tl.int64)
    mask = (row < length) & (o_c < C)[None, :]
    b_k = tl.load(k + i_b * k_b + (start + row) * k_t + o_c[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    b_v = tl.load(v + i_b * v_b + (start + row) * v_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    level = tl.load(planes + (chunk + i_t) * Cp + o_c, mask=i_t * BT < length, other=0)
    if EXACT:
        b_v -= tl.load(seen + 2 * plane + (chunk + i_t) * Cp + o_c, mask=i_t * BT < length, other=0)[None, :]
    p = power(b_k, level, EXACT)
    return p, p * b_v, level, o_c, (i_b * T + start + row) * d_t + o_c[None, :], mask, chunk + i_t, length


@triton.jit(do_not_specialize=["T", "P", "chunks", "documents", "shares"])
def band_kernel(q, k, v, dy, y, inv, ab, seen, dk, dv, table, planes, flags, sums, cu_seqlens, documents, shares, T, P,
                C, Cp, chunks, q_b, q_t, k_b, k_t, v_b, v_t, dy_b, dy_t, d_t, BT: tl.constexpr, BC: tl.constexpr,
                NB: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, FLAG: tl.constexpr,
                DOCUMENTS: tl.constexpr):
    """dk, dv of a block of keys, tokens d_t apart; sums [shares, P, (NB + 1) BT] of dw_ts / A_ts of its rows."""
    share, i_t = tl.program_id(0) % shares, tl.program_id(0) // shares
    columns: tl.constexpr = (NB + 1) * BT
    EXACT: tl.constexpr = inv.dtype.element_ty == tl.float32
    o_r = tl.arange(0, BT)
    plane = tl.cast(chunks, tl.int64) * Cp
    n, blocks = Cp // BC, tl.cdiv(P, BT)
    count = tl.cdiv(documents * n - share, shares)
    p_table = table + (i_t * BT + o_r)[:, None] * columns + o_r[None, :] + NB * BT
    below = i_t + 1 < blocks
    b_own = tl.trans(tl.load(p_table))  # [keys, rows]
    b_next = tl.trans(tl.load(p_table + BT * columns - BT, mask=below, other=0))
    w_own = tl.zeros([BT, BT], tl.float32)
    w_next = tl.zeros([BT, BT], tl.float32)
    unit, row_step, channel_step = share + (count - 1) * shares, shares // n, shares % n
    i_n, i_c = unit // n, unit % n  # the last first: what was made a moment ago, the L2 cache still has
    rise = tl.zeros([1, BC], tl.float32)  # how far a block's level is above its rows' ref
    if flagged(flags, cu_seqlens, share, shares, count, i_t, NB + 1, T, P, n, BT, DOCUMENTS):
        for _ in tl.range(0, count, num_stages=STAGES):
            p, p_v, level, o_c, at, mask, chunk, length = keys_of(
                k, v, planes, seen, plane, i_n, i_c, cu_seqlens, i_t, T, P, C, Cp, k_b, k_t, v_b, v_t, d_t, BT, BC,
                EXACT, DOCUMENTS)
            i_n, i_c = before(i_n, i_c, row_step, channel_step, n)
            p_plane = planes + chunk * Cp + o_c
            p_ab = ab + (chunk * BT + o_r[:, None]) * Cp + o_c[None, :]
            b_a, b_b, fall = seen_by(p_ab, p_plane, level, plane, 0, i_t * BT < length, Cp, BT)
            rise = tl.maximum(rise, fall)
            fall = tl.where(fall > 0, -1e30, fall)  # steep: row by row, below
            zero = tl.zeros([BT, BC], tl.float32)
            b_dv = lowered(dot(b_own, b_a, zero, PRECISION), fall)
            b_rest = lowered(dot(b_own, b_b, zero, PRECISION), fall)
            w_own = dot(b_a, tl.trans(lowered(p_v, fall).to(b_a.dtype)), w_own, PRECISION)
            w_own = dot(b_b, tl.trans(lowered(p, fall).to(b_a.dtype)), w_own, PRECISION)
            b_a, b_b, fall = seen_by(p_ab, p_plane, level, plane, 1, (i_t + 1) * BT < length, Cp, BT)
            b_dv += lowered(dot(b_next, b_a, zero, PRECISION), fall)
            b_rest += lowered(dot(b_next, b_b, zero, PRECISION), fall)
            w_next = dot(b_a, tl.trans(lowered(p_v, fall).to(b_a.dtype)), w_next, PRECISION)
            w_next = dot(b_b, tl.trans(lowered(p, fall).to(b_a.dtype)), w_next, PRECISION)
            for d in range(2, NB + 1):
                b_a, b_b, fall = seen_by(p_ab, p_plane, level, plane, d, (i_t + d) * BT < length, Cp, BT)
                b_far = tl.trans(tl.load(p_table + d * BT * columns - d * BT, mask=i_t + d < blocks, other=0))
                b_dv += lowered(dot(b_far, b_a, zero, PRECISION), fall)
                b_rest += lowered(dot(b_far, b_b, zero, PRECISION), fall)
            beyond = (i_t + NB + 1) * BT < length
            to = level - tl.load(p_plane + plane + (NB + 1) * Cp, mask=beyond, other=1e30)
            p_seen = seen + (chunk + NB + 1) * Cp + o_c
            b_dv += lowered(tl.load(p_seen, mask=beyond, other=0), to)[None, :]
            b_rest += lowered(tl.load(p_seen + plane, mask=beyond, other=0), to)[None, :]
            tl.store(dv + at, (p * b_dv).to(dv.dtype.element_ty), mask=mask)
            tl.store(dk + at, (p_v * b_dv + p * b_rest).to(dk.dtype.element_ty), mask=mask)
    else:  # the same where all factors are 1
        for _ in tl.range(0, count, num_stages=STAGES):
            p, p_v, level, o_c, at, mask, chunk, length = keys_of(
                k, v, planes, seen, plane, i_n, i_c, cu_seqlens, i_t, T, P, C, Cp, k_b, k_t, v_b, v_t, d_t, BT, BC,
                EXACT, DOCUMENTS)
            i_n, i_c = before(i_n, i_c, row_step, channel_step, n)
            p_ab = ab + (chunk * BT + o_r[:, None]) * Cp + o_c[None, :]
            there, after, beyond = i_t * BT < length, (i_t + 1) * BT < length, (i_t + NB + 1) * BT < length
            b_a = tl.load(p_ab, mask=there, other=0)
            b_b = tl.load(p_ab + plane * BT, mask=there, other=0)
            c_a = tl.load(p_ab + BT * Cp, mask=after, other=0)
            c_b = tl.load(p_ab + BT * Cp + plane * BT, mask=after, other=0)
            p_seen = seen + (chunk + NB + 1) * Cp + o_c
            far_a = tl.load(p_seen, mask=beyond, other=0)[None, :]
            far_b = tl.load(p_seen + plane, mask=beyond, other=0)[None, :]
            b_p, b_v = p.to(b_a.dtype), p_v.to(b_a.dtype)
            b_dv = dot(b_own, b_a, tl.zeros([BT, BC], tl.float32) + far_a, PRECISION)
            b_dv = dot(b_next, c_a, b_dv, PRECISION)
            b_rest = dot(b_own, b_b, tl.zeros([BT, BC], tl.float32) + far_b, PRECISION)
            b_rest = dot(b_next, c_b, b_rest, PRECISION)
            w_own = dot(b_a, tl.trans(b_v), w_own, PRECISION)
            w_own = dot(b_b, tl.trans(b_p), w_own, PRECISION)
            w_next = dot(c_a, tl.trans(b_v), w_next, PRECISION)
            w_next = dot(c_b, tl.trans(b_p), w_next, PRECISION)
            for d in range(2, NB + 1):
                seen_d = (i_t + d) * BT < length
                b_far = tl.trans(tl.load(p_table + d * BT * columns - d * BT, mask=i_t + d < blocks, other=0))
                b_dv = dot(b_far, tl.load(p_ab + d * BT * Cp, mask=seen_d, other=0), b_dv, PRECISION)
                b_b = tl.load(p_ab + d * BT * Cp + plane * BT, mask=seen_d, other=0)
                b_rest = dot(b_far, b_b, b_rest, PRECISION)
            tl.store(dv + at, (p * b_dv).to(dv.dtype.element_ty), mask=mask)
            tl.store(dk + at, (p_v * b_dv + p * b_rest).to(dk.dtype.element_ty), mask=mask)
    p_sum = sums + (tl.cast(share, tl.int64) * blocks * BT + i_t * BT) * columns + NB * BT
    at_sum = o_r[:, None] * columns + o_r[None, :]
    tl.store(p_sum + at_sum, w_own)
    tl.store(p_sum + at_sum + BT * columns - BT, w_next, mask=below)
    for d in range(2, NB + 1):
        if i_t + d < blocks:
            w = tl.zeros([BT, BT], tl.float32)
            for i in tl.range(0, count, num_stages=1):
                u = share + i * shares
                p, p_v, level, o_c, at, mask, chunk, length = keys_of(
                    k, v, planes, seen, plane, u // n, u % n, cu_seqlens, i_t, T, P, C, Cp, k_b, k_t, v_b, v_t, d_t, BT,
                    BC, EXACT, DOCUMENTS)
                p_ab = ab + (chunk * BT + o_r[:, None]) * Cp + o_c[None, :]
                p_plane = planes + chunk * Cp + o_c
                b_a, b_b, fall = seen_by(p_ab, p_plane, level, plane, d, (i_t + d) * BT < length, Cp, BT)
                w = dot(b_a, tl.trans(lowered(p_v, fall).to(b_a.dtype)), w, PRECISION)
                w = dot(b_b, tl.trans(lowered(p, fall).to(b_a.dtype)), w, PRECISION)
            tl.store(p_sum + at_sum + d * BT * columns - d * BT, w)
    if tl.max(tl.max(rise, 1), 0) > 0:  # steep
        tl.debug_barrier()
        for i in tl.range(0, count, num_stages=1):
            u = share + i * shares
            i_b, start, length, chunk = document(cu_seqlens, (u // n).to(tl.int64), T, P, BT, DOCUMENTS)
            at_c = (u % n) * BC + tl.arange(0, BC)
            p_plane = planes + (chunk + i_t) * Cp + at_c
            there = (i_t * BT < length) & (at_c < C)
            ref = tl.load(p_plane + plane, mask=there, other=0)
            steep = ref < tl.load(p_plane, mask=there, other=0)
            if tl.max(steep.to(tl.int32), 0) > 0:
                steep_rows(q, k, v, dy, y, inv, dk, dv, table + i_t * BT * columns + NB * BT, p_sum, i_b, start, length,
                           i_t, at_c, C, ref, steep, T, q_b, q_t, k_b, k_t, v_b, v_t, dy_b, dy_t, d_t, BT, columns)


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, far: Tensor, planes: Tensor, flags: Tensor,
            p: Problem, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> y, and 1 / den as multiples of exp2(-ref)."""
    y, inv = q.new_empty(q.shape), q.new_empty(q.shape, dtype=p.kind)
    options = p.products("local")
    forward_kernel[(p.chunks * (p.Cp // options["BC"]),)](
        q, k, v, y, inv, table, far, planes, flags, p.cu_seqlens, blocks, p.chunks, p.length, p.rows,
        p.channels, p.Cp, p.chunks, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], NB=p.NB, **options)
    return y, inv


def backward(dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, y: Tensor, inv: Tensor, ab: Tensor,
             seen: Tensor, table: Tensor, planes: Tensor, flags: Tensor, p: Problem) -> Tensor:
    """Fills dk, dv, which have one stride between tokens and no gaps between rows -> shares of dw_ts / A_ts."""
    options = p.products("band")
    n = p.table_shape[0] // p.BT
    shares = shares_of(n, p.documents * (p.Cp // options["BC"]))
    sums = table.new_empty(shares, *p.table_shape, dtype=torch.float32)
    band_kernel[(shares * n,)](
        q, k, v, dy, y, inv, ab, seen, dk, dv, table, planes, flags, sums, p.cu_seqlens, p.documents, shares, p.length,
        p.rows, p.channels, p.Cp, p.chunks, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dy.stride()[:2],
        dk.stride(1), NB=p.NB, **options)
    return sums
