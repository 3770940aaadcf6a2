"""Backward of AFT with position biases; names and factors as in zoo/kernels/aft.py.

With a_t = dy_t sigmoid(q_t) / den_t as a multiple of exp(-e_i) and b_t = -a_t mean_t, both made once (`rows`),

    dv_s = sum_{t>=s} A_ts exp(k_s - e_i) a_t,    dk_s = v_s dv_s + sum_{t>=s} A_ts exp(k_s - e_i) b_t,
    dw_ts = A_ts sum over batch and channels of exp(k_s - e_i) (a_t v_s + b_t).

`columns` walks from the last rows back to a block of keys, its two sums as multiples of exp(-e_i): e never falls, so
the factor from one block to the one before is <= 1. `tiles` makes the sums of dw_ts a tile at a time over a share of
batch and channels; shares are added in a fixed order. Blocks whose keys rise past LIMIT are treated one row at a time,
as in the forward pass, where den is held as a multiple of exp(the running maximum) instead of exp(e_i).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, dot, power_of_two
from zoo.kernels.aft import FLOOR, LIMIT, Problem, document, locate, make_table, operand, prepare

SHARES = 288  # programs of `tiles` to aim at


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["T", "P", "chunks", "slots"])
def rows_kernel(q, k, dy, mean, den, dq, a, b, far, tops, seen, cu_seqlens, blocks, slots, T, P, C, chunks, q_b, q_t,
                k_b, k_t, dy_b, dy_t, BT: tl.constexpr, BC: tl.constexpr, LOCAL: tl.constexpr,
                DOCUMENTS: tl.constexpr):
    """dq, a, b; LOCAL: seen [2, chunks, C], the sums of a and b over a block, weighed as by a key far back."""
    i_c = tl.program_id(0) // slots
    i_n, i_t = locate(tl.program_id(0) % slots, blocks, T, BT, DOCUMENTS)
    if i_n < 0:
        return
    i_b, start, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    if i_t * BT >= length:
        return
    chunk += i_t
    o_c, o_t = i_c * BC + tl.arange(0, BC), i_t * BT + tl.arange(0, BT)
    m_c = o_c < C
    row = o_t[:, None].to(tl.int64)
    mask = (row < length) & m_c[None, :]
    at = (i_b * T + start + row) * C + o_c[None, :]
    b_q = tl.load(q + i_b * q_b + (start + row) * q_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    b_dy = tl.load(dy + i_b * dy_b + (start + row) * dy_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    b_mean = tl.load(mean + at, mask=mask, other=0).to(tl.float32)
    gate = tl.sigmoid(b_q)
    tl.store(dq + at, (b_dy * b_mean * gate * (1 - gate)).to(dq.dtype.element_ty), mask=mask)
    b_a = b_dy * gate / tl.load(den + at, mask=mask, other=1)
    plane = tl.cast(chunks, tl.int64) * C
    top = tl.load(tops + chunk * C + o_c, mask=m_c, other=0)
    steep = tl.load(tops + plane + chunk * C + o_c, mask=m_c, other=0) - top > LIMIT
    if tl.max(steep.to(tl.int32), 0) > 0:
        b_k = tl.load(k + i_b * k_b + (start + row) * k_t + o_c[None, :], mask=mask, other=float("-inf"))
        b_m = tl.maximum(tl.associative_scan(b_k.to(tl.float32), 0, larger), top[None, :])
        b_a *= tl.where(steep[None, :], tl.exp(top[None, :] - b_m), 1.0)
    b_b = -b_a * b_mean
    tl.store(a + at, b_a.to(a.dtype.element_ty), mask=mask)
    tl.store(b + at, b_b.to(b.dtype.element_ty), mask=mask)
    if LOCAL:
        b_far = tl.load(far + o_t)[:, None]
        tl.store(seen + chunk * C + o_c, tl.sum(b_far * b_a, 0), mask=m_c)
        tl.store(seen + plane + chunk * C + o_c, tl.sum(b_far * b_b, 0), mask=m_c)


@triton.jit(do_not_specialize=["T", "P", "chunks"])
def sum_back_kernel(seen, tops, cu_seqlens, T, P, C, chunks, BT: tl.constexpr, BC: tl.constexpr,
                    DOCUMENTS: tl.constexpr):
    """In place: `seen` of a block and all later ones, as multiples of exp(-e_i)."""
    i_n, i_c = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64), tl.program_id(0) % tl.cdiv(C, BC)
    _, _, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    plane = tl.cast(chunks, tl.int64) * C
    n = tl.cdiv(length, BT)
    c_a = tl.zeros([BC], tl.float32)
    c_b = tl.zeros([BC], tl.float32)
    for i in range(0, n):
        at = (chunk + n - 1 - i) * C + o_c
        top = tl.load(tops + at, mask=m_c, other=0)
        fall = tl.exp(top - tl.load(tops + plane + at, mask=m_c, other=0))
        c_a = c_a * fall + tl.load(seen + at, mask=m_c, other=0)
        c_b = c_b * fall + tl.load(seen + plane + at, mask=m_c, other=0)
        tl.store(seen + at, c_a, mask=m_c)
        tl.store(seen + plane + at, c_b, mask=m_c)


@triton.jit(do_not_specialize=["T", "P", "chunks", "slots"])
def columns_kernel(q, k, v, dy, mean, den, a, b, dk, dv, table, tops, seen, cu_seqlens, blocks, slots, T, P, columns, C,
                   chunks, q_b, q_t, k_b, k_t, v_b, v_t, dy_b, dy_t, BT: tl.constexpr, BS: tl.constexpr,
                   BC: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
                   LOCAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    i_c = tl.program_id(0) // slots
    i_n, i_t = locate(tl.program_id(0) % slots, blocks, T, BT, DOCUMENTS)
    if i_n < 0:
        return
    if not DOCUMENTS:
        i_t = tl.cdiv(T, BT) - 1 - i_t  # the first keys have the longest sums
    i_b, start, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    if i_t * BT >= length:
        return
    o_c, o_k, o_s = i_c * BC + tl.arange(0, BC), i_t * BT + tl.arange(0, BT), tl.arange(0, BS)
    m_c = o_c < C
    plane = tl.cast(chunks, tl.int64) * C
    p_tops = tops + chunk * C + o_c
    own, after = tl.load(p_tops + i_t * C, mask=m_c, other=0), tl.load(p_tops + plane + i_t * C, mask=m_c, other=0)
    steep = after - own > LIMIT
    slow = tl.max(steep.to(tl.int32), 0) > 0

    n = tl.cdiv(length, BT)
    last = n - 1
    if LOCAL:
        last = tl.minimum(i_t + NB, last)
    end = tl.where(slow, i_t + 1, i_t)  # the block that the walk back ends with
    top = tl.load(p_tops + last * C, mask=m_c, other=0)
    top = tl.where(slow & (last == i_t), after, top)
    b_dv = tl.zeros([BT, BC], tl.float32)
    b_rest = tl.zeros([BT, BC], tl.float32)
    if LOCAL:  # noqa: SIM102 - decided while compiling
        if last + 1 < n:
            fall = tl.exp(top - tl.load(p_tops + (last + 1) * C, mask=m_c, other=0))
            p_seen = seen + (chunk + last + 1) * C + o_c
            b_dv += (fall * tl.load(p_seen, mask=m_c, other=0))[None, :]
            b_rest += (fall * tl.load(p_seen + plane, mask=m_c, other=0))[None, :]
    first = (i_b * T + start) * C + o_c[None, :]
    steps = (last + 1 - end) * (BT // BS)
    for i in tl.range(0, steps, num_stages=STAGES):
        i_s = (last + 1) * BT - (i + 1) * BS
        row = (i_s + o_s)[:, None].to(tl.int64)
        mask = (row < length) & m_c[None, :]
        base = i_s * 0
        if LOCAL:
            base = (i_s // BT - NB) * BT
        b_table = tl.load(table + row * columns + (o_k - base)[None, :])
        b_a = tl.load(a + first + row * C, mask=mask, other=0)
        b_b = tl.load(b + first + row * C, mask=mask, other=0)
        here = tl.load(p_tops + (i_s // BT) * C, mask=m_c, other=0)
        fall = tl.exp(here - top)[None, :]
        top = here
        b_dv = dot(tl.trans(b_table), b_a, b_dv * fall, PRECISION)
        b_rest = dot(tl.trans(b_table), b_b, b_rest * fall, PRECISION)
    row = o_k[:, None].to(tl.int64)
    mask = (row < length) & m_c[None, :]
    b_k = tl.load(k + i_b * k_b + (start + row) * k_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    p = tl.exp(tl.minimum(b_k - top[None, :], LIMIT))
    b_dv *= p
    b_rest *= p
    if slow:
        c_m = own
        for i_s in range(i_t * BT, tl.minimum(i_t * BT + BT, length)):
            at = start + i_s
            c_k = tl.load(k + i_b * k_b + at * k_t + o_c, mask=m_c, other=0).to(tl.float32)
            c_m = tl.maximum(c_m, c_k)
            c_q = tl.load(q + i_b * q_b + at * q_t + o_c, mask=m_c, other=0).to(tl.float32)
            c_dy = tl.load(dy + i_b * dy_b + at * dy_t + o_c, mask=m_c, other=0).to(tl.float32)
            c_mean = tl.load(mean + (i_b * T + at) * C + o_c, mask=m_c, other=0).to(tl.float32)
            c_a = c_dy * tl.sigmoid(c_q) / tl.load(den + (i_b * T + at) * C + o_c, mask=m_c, other=1)
            b_table = tl.load(table + tl.cast(i_s, tl.int64) * columns + o_k - (i_t - NB) * BT * LOCAL).to(tl.float32)
            p = b_table[:, None] * tl.exp(tl.minimum(b_k - tl.where(steep, c_m, own)[None, :], LIMIT))
            b_dv += p * c_a[None, :]
            b_rest -= p * (c_a * c_mean)[None, :]
    b_v = tl.load(v + i_b * v_b + (start + row) * v_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(dv + first + row * C, b_dv.to(dv.dtype.element_ty), mask=mask)
    tl.store(dk + first + row * C, (b_v * b_dv + b_rest).to(dk.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "P", "chunks", "documents", "shares"])
def tiles_kernel(k, v, a, b, sums, tops, cu_seqlens, documents, shares, T, P, columns, C, chunks, k_b, k_t, v_b, v_t,
                 BT: tl.constexpr, BC: tl.constexpr, NB: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
                 LOCAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """sums [shares, P, columns] of dw_ts / A_ts, but for the steep channels of blocks on the diagonal."""
    share = tl.program_id(0) % shares
    i_t, i_j = (tl.program_id(0) // shares) // (columns // BT), (tl.program_id(0) // shares) % (columns // BT)
    at_column = i_j * BT
    if LOCAL:
        i_j += i_t - NB
    if (i_j > i_t) | (i_j < 0):
        return
    o_r, o_c = tl.arange(0, BT), tl.arange(0, BC)
    row, key = (i_t * BT + o_r)[:, None].to(tl.int64), (i_j * BT + o_r)[:, None].to(tl.int64)
    plane = tl.cast(chunks, tl.int64) * C
    b_sum = tl.zeros([BT, BT], tl.float32)
    n = tl.cdiv(C, BC)
    for i in tl.range(share, documents * n, shares, num_stages=STAGES):
        i_b, start, length, chunk = document(cu_seqlens, tl.cast(i // n, tl.int64), T, P, BT, DOCUMENTS)
        at_c = (i % n) * BC + o_c
        m_c = (at_c < C) & (i_t * BT < length)
        m_row, m_key = (row < length) & m_c[None, :], (key < length) & m_c[None, :]
        p_rows = (i_b * T + start + row) * C + at_c[None, :]
        b_a = tl.load(a + p_rows, mask=m_row, other=0)
        b_b = tl.load(b + p_rows, mask=m_row, other=0)
        b_k = tl.load(k + i_b * k_b + (start + key) * k_t + at_c[None, :], mask=m_key, other=float("-inf"))
        b_v = tl.load(v + i_b * v_b + (start + key) * v_t + at_c[None, :], mask=m_key, other=0).to(tl.float32)
        p_tops = tops + (chunk + i_t) * C + at_c
        top = tl.load(p_tops, mask=m_c, other=0)
        steep = (tl.load(p_tops + plane, mask=m_c, other=0) - top > LIMIT) & (i_j == i_t)
        p = tl.exp(tl.minimum(b_k.to(tl.float32) - top[None, :], LIMIT))
        p = tl.where(steep[None, :], 0.0, p)
        b_sum = dot(b_a, tl.trans((p * b_v).to(b_a.dtype)), b_sum, PRECISION)
        b_sum = dot(b_b, tl.trans(p.to(b_a.dtype)), b_sum, PRECISION)
    p_sum = sums + (tl.cast(share, tl.int64) * tl.cdiv(P, BT) * BT + row) * columns + at_column + o_r[None, :]
    tl.store(p_sum, b_sum)


@triton.jit(do_not_specialize=["T", "P", "chunks", "documents", "shares"])
def steep_kernel(q, k, v, dy, mean, den, sums, tops, cu_seqlens, documents, shares, T, P, C, chunks, q_b, q_t, k_b, k_t,
                 v_b, v_t, dy_b, dy_t, BT: tl.constexpr, BC: tl.constexpr, DOCUMENTS: tl.constexpr):
    """sums [shares, P, BT], zero before, of dw_ts / A_ts on the diagonal: what `tiles` leaves out, row by row."""
    share = tl.program_id(0) % shares
    i_t = tl.program_id(0) // shares
    o_r, o_c = tl.arange(0, BT), tl.arange(0, BC)
    key = (i_t * BT + o_r)[:, None].to(tl.int64)
    plane = tl.cast(chunks, tl.int64) * C
    n = tl.cdiv(C, BC)
    p_sum = sums + (tl.cast(share, tl.int64) * tl.cdiv(P, BT) + i_t) * BT * BT + o_r
    for i in range(share, documents * n, shares):
        i_b, start, length, chunk = document(cu_seqlens, tl.cast(i // n, tl.int64), T, P, BT, DOCUMENTS)
        at_c = (i % n) * BC + o_c
        m_c = (at_c < C) & (i_t * BT < length)
        p_tops = tops + (chunk + i_t) * C + at_c
        c_m = tl.load(p_tops, mask=m_c, other=0)
        steep = tl.load(p_tops + plane, mask=m_c, other=0) - c_m > LIMIT
        if tl.max(steep.to(tl.int32), 0) > 0:
            mask = (key < length) & steep[None, :]
            b_k = tl.load(k + i_b * k_b + (start + key) * k_t + at_c[None, :], mask=mask, other=float("-inf"))
            b_v = tl.load(v + i_b * v_b + (start + key) * v_t + at_c[None, :], mask=mask, other=0).to(tl.float32)
            for i_s in range(i_t * BT, tl.minimum(i_t * BT + BT, length)):
                at = start + i_s
                c_k = tl.load(k + i_b * k_b + at * k_t + at_c, mask=steep, other=0).to(tl.float32)
                c_m = tl.maximum(c_m, c_k)
                c_q = tl.load(q + i_b * q_b + at * q_t + at_c, mask=steep, other=0).to(tl.float32)
                c_dy = tl.load(dy + i_b * dy_b + at * dy_t + at_c, mask=steep, other=0).to(tl.float32)
                c_mean = tl.load(mean + (i_b * T + at) * C + at_c, mask=steep, other=0).to(tl.float32)
                c_a = c_dy * tl.sigmoid(c_q) / tl.load(den + (i_b * T + at) * C + at_c, mask=steep, other=1)
                p = tl.exp(tl.minimum(b_k.to(tl.float32) - c_m[None, :], 0.0))
                b_sum = tl.sum(p * c_a[None, :] * (b_v - c_mean[None, :]), 1)
                p_row = p_sum + (i_s - i_t * BT) * BT
                tl.store(p_row, tl.load(p_row) + b_sum)
                tl.debug_barrier()


@triton.jit(do_not_specialize=["bias_t", "rows", "columns", "W", "shares", "few"])
def bias_kernel(bias, dbias, sums, steep, bias_t, rows, columns, W, shares, few, BT: tl.constexpr, BC: tl.constexpr,
                NB: tl.constexpr, LOCAL: tl.constexpr):
    """dbias [rows, W] from the shares of dw_ts / A_ts, in their order."""
    i_t = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BC)
    p_bias = bias + i_t * bias_t
    within = W if LOCAL else tl.minimum(W, i_t + 1)
    largest = tl.full([BC], 0.0 if LOCAL else float("-inf"), tl.float32)
    for i in range(0, within, BC):
        largest = tl.maximum(largest, tl.load(p_bias + i + o, mask=i + o < within, other=float("-inf")).to(tl.float32))
    r = tl.max(largest, 0)
    padded = tl.cdiv(rows, BT).to(tl.int64) * BT
    for i in range(0, W, BC):
        at = i + o
        mask = (at < W) & (at <= i_t)
        column = i_t % BT + NB * BT - at if LOCAL else at
        total = tl.zeros([BC], tl.float32)
        for share in range(0, shares):
            total += tl.load(sums + (share * padded + i_t) * columns + column, mask=mask, other=0)
        inside = column - (NB * BT if LOCAL else i_t // BT * BT)  # its column in the block on the diagonal
        for share in range(0, few):
            total += tl.load(steep + (share * padded + i_t) * BT + inside, mask=mask & (inside >= 0), other=0)
        b = tl.load(p_bias + at, mask=mask, other=0).to(tl.float32) - r
        db = tl.where(mask & (b >= FLOOR), tl.exp(tl.minimum(b, 0.0)) * total, 0.0)
        tl.store(dbias + i_t * W + at, db.to(dbias.dtype.element_ty), mask=at < W)


def backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dy: Tensor, mean: Tensor, den: Tensor, local: bool,
             cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv [B, T, C], dbias, each as its input."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not q.numel():
        return dq, dk, dv, bias.new_zeros(bias.shape)
    p = Problem(k, v, bias, local, cu_seqlens)
    kind = operand(v)
    table, far = make_table(bias, p, kind)
    tops, _ = prepare(k, v, p)
    seen = torch.empty_like(tops) if local else tops
    a, b = (v.new_empty(v.shape, dtype=kind) for _ in range(2))
    strides_q, strides_k, strides_v, strides_dy = (x.stride()[:2] for x in (q, k, v, dy))
    packed = cu_seqlens is not None
    BC = 16 if INTERPRETED else 32
    rows_kernel[(p.slots * triton.cdiv(p.channels, BC),)](
        q, k, dy, mean, den, dq, a, b, far, tops, seen, cu_seqlens, p.blocks, p.slots, p.length, p.rows, p.channels,
        p.chunks, *strides_q, *strides_k, *strides_dy, BT=p.BT, BC=BC, LOCAL=local, DOCUMENTS=packed, num_warps=4)
    if local:
        sum_back_kernel[(p.documents * triton.cdiv(p.channels, BC),)](
            seen, tops, cu_seqlens, p.length, p.rows, p.channels, p.chunks, BT=p.BT, BC=BC, DOCUMENTS=packed,
            num_warps=1)
    c, options = p.options("columns")
    columns_kernel[(p.slots * triton.cdiv(p.channels, options["BC"]),)](
        q, k, v, dy, mean, den, a, b, dk, dv, table, tops, seen, cu_seqlens, p.blocks, p.slots, p.length, p.rows,
        p.columns, p.channels, p.chunks, *strides_q, *strides_k, *strides_v, *strides_dy, BS=c.BS, NB=p.NB,
        PRECISION=p.PRECISION, **options)
    return dq, dk, dv, _bias(q, k, v, bias, dy, mean, den, a, b, tops, p)


def _bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dy: Tensor, mean: Tensor, den: Tensor, a: Tensor, b: Tensor,
          tops: Tensor, p: Problem) -> Tensor:
    """The gradient of the bias."""
    _, options = p.options("table")
    blocks = p.table_shape[0] // p.BT
    tiles = blocks * (p.NB + 1) if p.local else blocks * (blocks + 1) // 2
    work = p.documents * triton.cdiv(p.channels, options["BC"])
    shares, few = min(work, triton.cdiv(SHARES, tiles)), min(work, triton.cdiv(SHARES, blocks))
    sums = bias.new_empty(shares, *p.table_shape, dtype=torch.float32)
    tiles_kernel[(shares * blocks * (p.columns // p.BT),)](
        k, v, a, b, sums, tops, p.cu_seqlens, p.documents, shares, p.length, p.rows, p.columns, p.channels, p.chunks,
        *k.stride()[:2], *v.stride()[:2], NB=p.NB, PRECISION=p.PRECISION, **options)
    steep = bias.new_zeros(few, p.table_shape[0], p.BT, dtype=torch.float32)
    BC = 16 if INTERPRETED else 32
    steep_kernel[(few * blocks,)](
        q, k, v, dy, mean, den, steep, tops, p.cu_seqlens, p.documents, few, p.length, p.rows, p.channels, p.chunks,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dy.stride()[:2], BT=p.BT, BC=BC,
        DOCUMENTS=p.cu_seqlens is not None, num_warps=4)
    whole = p.rows == len(bias) and (p.local or p.rows == bias.shape[1])
    dbias = bias.new_empty(bias.shape) if whole else bias.new_zeros(bias.shape)
    BC = min(1024, power_of_two(bias.shape[1])) if p.local else 1024  # full: columns are as many as tokens
    bias_kernel[(p.rows,)](bias, dbias, sums, steep, bias.stride(0), p.rows, p.columns, bias.shape[1], shares, few,
                           BT=p.BT, BC=BC, NB=p.NB, LOCAL=p.local, num_warps=4)
    return dbias
