"""AFT-full (2105.14103, equation 2): its products of the table with operands in memory. Names as in aft_parts.py.

    num_t, den_t = sum_{s<=t} A_ts exp2(x_s - ref) (v_s, 1)                                     `forward`
    dv_s = exp2(x_s - l_j) sum_{t>=s} A_ts a_t,  dk_s = v_s dv_s + exp2(x_s - l_j) sum A_ts b_t  `columns`
    dw_ts / A_ts = sum over batch and channels of exp2(x_s - l_j) (a_t v_s + b_t)                `tiles`

a_t = dy_t sigmoid(q_t) / den_t and b_t = -dy_t y_t / den_t as multiples of exp2(-ref). Where levels differ, operands or
sums take the power of two between them, in a loop of its own: the usual one reads shared memory alone. Steep blocks go
row by row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import LOG2E, dot
from zoo.kernels.aft_parts import (
    Problem,
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


@triton.jit(do_not_specialize=["T", "P", "chunks", "slots", "last"])
def forward_kernel(q, k, v, y, inv, table, pairs, planes, flags, cu_seqlens, blocks, slots, last, T, P, columns, C, Cp,
                   chunks, q_b, q_t, k_b, k_t, v_b, v_t, BT: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
                   STAGES: tl.constexpr, PRECISION: tl.constexpr, FLAG: tl.constexpr, DOCUMENTS: tl.constexpr):
    i_n, i_t, i_c = locate(tl.program_id(0), blocks, slots, last, T, Cp, BT, BC, True, DOCUMENTS)
    if i_n < 0:
        return
    i_b, start, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    if i_t * BT >= length:
        return
    o_c, o_t, o_s = i_c * BC + tl.arange(0, BC), tl.arange(0, BT), tl.arange(0, BS)
    plane = tl.cast(chunks, tl.int64) * Cp
    p_level = planes + chunk * Cp + o_c
    p_own = p_level + i_t * Cp
    ref = tl.zeros([BC], tl.float32)
    slow = i_t * 0
    scaled = raised(flags, chunk + i_t, i_c, Cp, BC, FLAG)
    if scaled:
        ref = tl.load(p_own + plane)
        slow = tl.max((ref < tl.load(p_own)).to(tl.int32), 0)
    p_a = table + i_t.to(tl.int64) * BT * columns + o_t[:, None] * columns + o_s[None, :]
    p_v = pairs + (chunk * BT + o_s[:, None]) * Cp + o_c[None, :]
    p_p = p_v + plane * BT
    b_num = tl.zeros([BT, BC], tl.float32)
    b_den = tl.zeros([BT, BC], tl.float32)
    end = (i_t + 1 - slow) * BT
    if scaled:
        for i_s in tl.range(0, end, BS, num_stages=1):
            fall = (tl.load(p_level + (i_s // BT) * Cp) - ref)[None, :]
            b_a = tl.load(p_a + i_s)
            b_num = dot(b_a, lowered(tl.load(p_v).to(tl.float32), fall).to(b_a.dtype), b_num, PRECISION)
            b_den = dot(b_a, lowered(tl.load(p_p).to(tl.float32), fall).to(b_a.dtype), b_den, PRECISION)
            p_v += BS * Cp
            p_p += BS * Cp
    else:
        for i_s in tl.range(0, end, BS, num_stages=STAGES):
            b_a = tl.load(p_a + i_s)
            b_num = dot(b_a, tl.load(p_v), b_num, PRECISION)
            b_den = dot(b_a, tl.load(p_p), b_den, PRECISION)
            p_v += BS * Cp
            p_p += BS * Cp
    if slow > 0:
        at = start + i_t * BT
        p_diagonal = table + i_t.to(tl.int64) * BT * columns + i_t * BT
        b_num, b_den = steep_sums(k + i_b * k_b + at * k_t, v + i_b * v_b + at * v_t, p_diagonal, b_num, b_den, ref,
                                  tl.minimum(BT, length - i_t * BT), o_c, C, k_t, v_t, columns, BT)
    row = (i_t * BT + o_t)[:, None].to(tl.int64)
    mask = (row < length) & (o_c < C)[None, :]
    b_q = tl.load(q + i_b * q_b + (start + row) * q_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    at = (i_b * T + start + row) * C + o_c[None, :]
    b_y, b_inv = gated(b_q, b_num, b_den, inv.dtype.element_ty == tl.float32)
    tl.store(y + at, b_y.to(y.dtype.element_ty), mask=mask)
    tl.store(inv + at, b_inv.to(inv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "P", "chunks", "slots", "last"])
def columns_kernel(q, k, v, dy, y, inv, ab, dk, dv, table, planes, flags, cu_seqlens, blocks, slots, last, T, P,
                   columns, C, Cp, chunks, q_b, q_t, k_b, k_t, v_b, v_t, dy_b, dy_t, BT: tl.constexpr, BS: tl.constexpr,
                   BC: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, FLAG: tl.constexpr,
                   DOCUMENTS: tl.constexpr):
    i_n, i_t, i_c = locate(tl.program_id(0), blocks, slots, last, T, Cp, BT, BC, True, DOCUMENTS)
    if i_n < 0:
        return
    if not DOCUMENTS:
        i_t = tl.cdiv(T, BT) - 1 - i_t  # the first keys have the longest sums
    i_b, start, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    if i_t * BT >= length:
        return
    o_c, o_k, o_s = i_c * BC + tl.arange(0, BC), tl.arange(0, BT), tl.arange(0, BS)
    plane = tl.cast(chunks, tl.int64) * Cp
    p_ref = planes + plane + chunk * Cp + o_c
    n = tl.cdiv(length, BT)
    level, ref = tl.load(p_ref - plane + i_t * Cp), tl.load(p_ref + i_t * Cp)
    scaled = raised(flags, chunk + n - 1, i_c, Cp, BC, FLAG)
    slow = i_t * 0
    if scaled | raised(flags, chunk + i_t, i_c, Cp, BC, FLAG):
        slow = tl.max((ref < level).to(tl.int32), 0)
    first = (i_t + slow) * BT
    p_table = table + first.to(tl.int64) * columns + o_s[:, None] * columns + i_t * BT + o_k[None, :]
    p_a = ab + (chunk * BT + first + o_s[:, None]) * Cp + o_c[None, :]
    p_b = p_a + plane * BT
    b_dv = tl.zeros([BT, BC], tl.float32)
    b_rest = tl.zeros([BT, BC], tl.float32)
    if scaled:
        for i_s in tl.range(first, n * BT, BS, num_stages=1):
            fall = (level - tl.load(p_ref + (i_s // BT) * Cp))[None, :]
            b_table = tl.trans(tl.load(p_table))
            b_dv = dot(b_table, lowered(tl.load(p_a).to(tl.float32), fall).to(b_table.dtype), b_dv, PRECISION)
            b_rest = dot(b_table, lowered(tl.load(p_b).to(tl.float32), fall).to(b_table.dtype), b_rest, PRECISION)
            p_table += BS * columns
            p_a += BS * Cp
            p_b += BS * Cp
    else:
        for _ in tl.range(first, n * BT, BS, num_stages=STAGES):
            b_table = tl.trans(tl.load(p_table))
            b_dv = dot(b_table, tl.load(p_a), b_dv, PRECISION)
            b_rest = dot(b_table, tl.load(p_b), b_rest, PRECISION)
            p_table += BS * columns
            p_a += BS * Cp
            p_b += BS * Cp
    row = (i_t * BT + o_k)[:, None].to(tl.int64)
    mask = (row < length) & (o_c < C)[None, :]
    b_k = tl.load(k + i_b * k_b + (start + row) * k_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    p = power(b_k, level, inv.dtype.element_ty == tl.float32)
    b_dv *= p
    b_rest *= p
    if slow > 0:
        c_m = ref
        for i_s in range(0, tl.minimum(BT, length - i_t * BT)):
            c_x, c_a, c_b = steep_row(q, k, dy, y, inv, i_b, start + i_t * BT + i_s, o_c < C, o_c, T, C, q_b, q_t, k_b,
                                      k_t, dy_b, dy_t)
            c_m = tl.maximum(c_m, c_x)
            b_table = tl.load(table + (i_t * BT + i_s).to(tl.int64) * columns + i_t * BT + o_k).to(tl.float32)
            p = b_table[:, None] * tl.exp2(tl.minimum(b_k * LOG2E - c_m[None, :], 0.0))
            b_dv += p * c_a[None, :]
            b_rest += p * c_b[None, :]
    b_v = tl.load(v + i_b * v_b + (start + row) * v_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    at = (i_b * T + start + row) * C + o_c[None, :]
    tl.store(dv + at, b_dv.to(dv.dtype.element_ty), mask=mask)
    tl.store(dk + at, (b_v * b_dv + b_rest).to(dk.dtype.element_ty), mask=mask)


@triton.jit
def steep_rows(q, k, v, dy, y, inv, p_sum, columns, i_b, start, length, i_t, o_c, C, ref, steep, T, q_b, q_t, k_b, k_t,
               v_b, v_t, dy_b, dy_t, BT: tl.constexpr):
    """Add to p_sum [BT, BT] the steep channels' part of dw_ts / A_ts on the diagonal, row by row."""
    o_r = tl.arange(0, BT)
    key = (i_t * BT + o_r)[:, None].to(tl.int64)
    mask = (key < length) & steep[None, :]
    b_x = tl.load(k + i_b * k_b + (start + key) * k_t + o_c[None, :], mask=mask, other=float("-inf"))
    b_x = b_x.to(tl.float32) * LOG2E
    b_v = tl.load(v + i_b * v_b + (start + key) * v_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    c_m = ref
    for i_s in range(0, tl.minimum(BT, length - i_t * BT)):
        c_x, c_a, c_b = steep_row(q, k, dy, y, inv, i_b, start + i_t * BT + i_s, steep, o_c, T, C, q_b, q_t, k_b, k_t,
                                  dy_b, dy_t)
        c_m = tl.maximum(c_m, c_x)
        p = tl.exp2(tl.minimum(b_x - c_m[None, :], 0.0))
        b_sum = tl.sum(p * (c_a[None, :] * b_v + c_b[None, :]), 1)
        p_row = p_sum + i_s * columns + o_r
        tl.store(p_row, tl.load(p_row) + b_sum)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "P", "chunks", "documents", "shares"])
def tiles_kernel(q, k, v, dy, y, inv, ab, pairs, planes, flags, sums, cu_seqlens, documents, shares, T, P, columns, C,
                 Cp, chunks, q_b, q_t, k_b, k_t, v_b, v_t, dy_b, dy_t, BT: tl.constexpr, BC: tl.constexpr,
                 STAGES: tl.constexpr, PRECISION: tl.constexpr, FLAG: tl.constexpr, DOCUMENTS: tl.constexpr):
    """sums [shares, P, columns] of dw_ts / A_ts, a share of batch and channels each."""
    share, tile = tl.program_id(0) % shares, tl.program_id(0) // shares
    i_t = ((tl.sqrt(8.0 * tile + 1) - 1) / 2).to(tl.int32)  # the tile's row of the triangle, or one beside it
    i_t += (((i_t + 1) * (i_t + 2)) // 2 <= tile).to(tl.int32) - ((i_t * (i_t + 1)) // 2 > tile).to(tl.int32)
    i_j = tile - (i_t * (i_t + 1)) // 2
    o_r, o_c = tl.arange(0, BT), tl.arange(0, BC)
    at_tile = o_r[:, None] * Cp + o_c[None, :]
    plane = tl.cast(chunks, tl.int64) * Cp
    n = Cp // BC
    count = tl.cdiv(documents * n - share, shares)
    dirty = flagged(flags, cu_seqlens, share, shares, count, i_t, 0, T, P, n, BT, DOCUMENTS)
    b_sum = tl.zeros([BT, BT], tl.float32)
    if dirty:
        for i in tl.range(0, count, num_stages=1):
            u = share + i * shares
            _, _, length, chunk = document(cu_seqlens, (u // n).to(tl.int64), T, P, BT, DOCUMENTS)
            at = (u % n) * BC + o_c
            if i_t * BT < length:
                p_level = planes + chunk * Cp + at
                level, ref = tl.load(p_level + i_j * Cp), tl.load(p_level + plane + i_t * Cp)
                fall = tl.where((i_t == i_j) & (ref < level), -1e30, tl.minimum(level - ref, 0.0))[None, :]
                for which in range(0, 2):
                    b_a = tl.load(ab + which * plane * BT + ((chunk + i_t) * BT + o_r[:, None]) * Cp + at[None, :])
                    b_p = tl.load(pairs + which * plane * BT + ((chunk + i_j) * BT + o_r[:, None]) * Cp + at[None, :])
                    b_p = lowered(b_p.to(tl.float32), fall).to(b_a.dtype)
                    b_sum = dot(b_a, tl.trans(b_p), b_sum, PRECISION)
    else:
        i_n, i_c, row_step, channel_step = share // n, share % n, shares // n, shares % n
        for i in tl.range(0, 2 * count, num_stages=STAGES):  # a with exp2(x - l) v, then b with exp2(x - l)
            _, _, length, chunk = document(cu_seqlens, i_n.to(tl.int64), T, P, BT, DOCUMENTS)
            at = (i % 2) * plane * BT + i_c * BC
            i_c += (i % 2) * channel_step
            i_n += (i % 2) * row_step + (i_c >= n).to(tl.int32)
            i_c = tl.where(i_c < n, i_c, i_c - n)
            p_a = ab + (at + (chunk + i_t) * BT * Cp) + at_tile
            p_p = pairs + (at + (chunk + i_j) * BT * Cp) + at_tile
            if DOCUMENTS:
                b_a = tl.load(p_a, mask=i_t * BT < length, other=0)
                b_p = tl.load(p_p, mask=i_t * BT < length, other=0)
            else:
                b_a = tl.load(p_a)
                b_p = tl.load(p_p)
            b_sum = dot(b_a, tl.trans(b_p), b_sum, PRECISION)
    padded = tl.cdiv(P, BT) * BT
    p_sum = sums + (tl.cast(share, tl.int64) * padded + i_t * BT) * columns + i_j * BT
    tl.store(p_sum + o_r[:, None] * columns + o_r[None, :], b_sum)
    if dirty & (i_t == i_j):
        tl.debug_barrier()
        for i in range(0, count):
            u = share + i * shares
            i_b, start, length, chunk = document(cu_seqlens, (u // n).to(tl.int64), T, P, BT, DOCUMENTS)
            at = (u % n) * BC + o_c
            p_level = planes + (chunk + i_t) * Cp + at
            there = (i_t * BT < length) & (at < C)
            ref = tl.load(p_level + plane, mask=there, other=0)
            steep = ref < tl.load(p_level, mask=there, other=0)
            if tl.max(steep.to(tl.int32), 0) > 0:
                steep_rows(q, k, v, dy, y, inv, p_sum, columns, i_b, start, length, i_t, at, C, ref, steep, T, q_b, q_t,
                           k_b, k_t, v_b, v_t, dy_b, dy_t, BT)


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, pairs: Tensor, planes: Tensor, flags: Tensor,
            p: Problem, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> y, and 1 / den as multiples of exp2(-ref)."""
    y, inv = q.new_empty(q.shape), q.new_empty(q.shape, dtype=p.kind)
    options = p.products("forward")
    forward_kernel[(p.chunks * (p.Cp // options["BC"]),)](
        q, k, v, y, inv, table, pairs, planes, flags, p.cu_seqlens, blocks, p.chunks, p.last("forward"), p.length,
        p.rows, p.columns, p.channels, p.Cp, p.chunks, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        BS=p.config("forward").BS, **options)
    return y, inv


def backward(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, y: Tensor, inv: Tensor, ab: Tensor, table: Tensor,
             pairs: Tensor, planes: Tensor, flags: Tensor, p: Problem,
             blocks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> dk, dv, and shares of dw_ts / A_ts."""
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dy.stride()[:2]
    options = p.products("columns")
    columns_kernel[(p.chunks * (p.Cp // options["BC"]),)](
        q, k, v, dy, y, inv, ab, dk, dv, table, planes, flags, p.cu_seqlens, blocks, p.chunks, p.last("columns"),
        p.length, p.rows, p.columns, p.channels, p.Cp, p.chunks, *strides, BS=p.config("columns").BS, **options)
    options = p.products("tiles")
    n = p.columns // p.BT
    tiles = n * (n + 1) // 2
    shares = shares_of(tiles, p.documents * (p.Cp // options["BC"]))
    sums = table.new_empty(shares, *p.table_shape, dtype=torch.float32)
    tiles_kernel[(shares * tiles,)](
        q, k, v, dy, y, inv, ab, pairs, planes, flags, sums, p.cu_seqlens, p.documents, shares, p.length, p.rows,
        p.columns, p.channels, p.Cp, p.chunks, *strides, **options)
    return dk, dv, sums
