"""AFT's passes beside its products: the table of biases, levels and operands of keys, factors of the gradients, sums of
shares. Names as in aft_parts.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, LOG2E, power_of_two
from zoo.kernels.aft_parts import (
    FLOOR,
    HEAD,
    LIMIT,
    Problem,
    document,
    exponential,
    locate,
    lowered,
    opening,
    power,
    raised,
    reciprocal,
)


@triton.jit(do_not_specialize=["bias_t", "rows", "W"])
def table_kernel(bias, table, largest, bias_t, rows, columns, W, BT: tl.constexpr, BC: tl.constexpr, NB: tl.constexpr,
                 LOCAL: tl.constexpr):
    """A_ts = exp(w_ts - r_t) [rows, columns], r_t the row's largest bias, 0 for keys of the future and past the last
    row. largest [2, rows]: r_t, and for LOCAL A of what no window reaches. Full: nothing right of the diagonal."""
    i_t = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BC)
    p_bias = bias + i_t * bias_t
    within = tl.where(i_t < rows, tl.minimum(W, i_t + 1) if not LOCAL else W, 0)  # biases that count
    r = tl.full([BC], 0.0 if LOCAL else float("-inf"), tl.float32)
    for i in range(0, within, BC):
        r = tl.maximum(r, tl.load(p_bias + i + o, mask=i + o < within, other=float("-inf")).to(tl.float32))
    r = tl.where(within > 0, tl.max(r, 0), 0.0)
    beyond = tl.exp(tl.maximum(0.0 - r, FLOOR))
    end = columns + i_t * 0 if LOCAL else (i_t // BT + 1) * BT
    for i in range(0, end, BC):
        at = i + o
        if LOCAL:
            at = i_t % BT + NB * BT - at  # the distance
        seen = (at >= 0) & (i_t < rows)
        b = tl.load(p_bias + at, mask=seen & (at < within), other=float("-inf")).to(tl.float32)
        a = tl.minimum(tl.maximum(b - r, FLOOR), 0.0)
        a = exponential(a, 0.0) if table.dtype.element_ty == tl.float32 else tl.exp(a)
        if LOCAL:
            a = tl.where(at < within, a, beyond)
        else:
            seen = seen & (at <= i_t)
        tl.store(table + i_t * columns + i + o, tl.where(seen, a, 0.0).to(table.dtype.element_ty), mask=i + o < end)
    tl.store(largest + i_t, r)
    if LOCAL:
        tl.store(largest + tl.num_programs(0) + i_t, tl.where(i_t < rows, beyond, 0.0))


@triton.jit(do_not_specialize=["T", "P", "chunks", "slots"])
def prepare_kernel(k, v, pairs, planes, cu_seqlens, blocks, slots, T, P, C, Cp, chunks, k_b, k_t, v_b, v_t,
                   BT: tl.constexpr, BC: tl.constexpr, LOCAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """planes[0], [3]: level and largest key of the block. Full: pairs [2, chunks BT, Cp] of exp2(x - level) (v, 1);
    LOCAL: planes[4], [5]: their sums."""
    i_n, i_t, i_c = locate(tl.program_id(0), blocks, slots, 0, T, Cp, BT, BC, False, DOCUMENTS)
    if i_n < 0:
        return
    i_b, start, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    if i_t * BT >= length:
        return
    chunk += i_t
    o_c, o_t = i_c * BC + tl.arange(0, BC), tl.arange(0, BT)
    m_c = (o_c < C)[None, :]
    p_k = k + i_b * k_b + start * k_t + o_c
    row = (i_t * BT + o_t)[:, None].to(tl.int64)
    m_t = row < length
    first = tl.floor(tl.load(p_k, mask=o_c < C, other=0).to(tl.float32) * LOG2E) + LIMIT
    b_k = tl.load(p_k[None, :] + row * k_t, mask=m_t & m_c, other=0).to(tl.float32)
    b_v = tl.load(v + i_b * v_b + (start + row) * v_t + o_c[None, :], mask=m_t & m_c, other=0).to(tl.float32)
    b_k = tl.where(m_t, b_k, float("-inf"))
    top = tl.max(b_k, 0) * LOG2E
    level = tl.maximum(first, tl.ceil(top) - HEAD)
    b_p = power(b_k, level, pairs.dtype.element_ty == tl.float32)
    p_plane = planes + chunk * Cp + o_c
    plane = tl.cast(chunks, tl.int64) * Cp
    tl.store(p_plane, level)
    tl.store(p_plane + 3 * plane, top)
    if LOCAL:
        tl.store(p_plane + 4 * plane, tl.sum(b_p * b_v, 0))
        tl.store(p_plane + 5 * plane, tl.sum(b_p, 0))
    else:
        p_pairs = pairs + (chunk * BT + o_t[:, None]) * Cp + o_c[None, :]
        tl.store(p_pairs, (b_p * b_v).to(pairs.dtype.element_ty))
        tl.store(p_pairs + plane * BT, b_p.to(pairs.dtype.element_ty))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def joined(e, x, y, e_b, x_b, y_b):
    """Sums x, y as multiples of exp2(e), put together."""
    top = tl.maximum(e, e_b)
    return (top, lowered(x, e - top) + lowered(x_b, e_b - top), lowered(y, e - top) + lowered(y_b, e_b - top))


@triton.jit(do_not_specialize=["T", "P", "chunks"])
def scan_kernel(k, planes, flags, cu_seqlens, T, P, C, Cp, chunks, k_b, k_t, BT: tl.constexpr, BN: tl.constexpr,
                BC: tl.constexpr, LOCAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """planes[1]: ref; planes[2]: the least level so far (full) or the largest (LOCAL), and planes[4], [5] become the
    sums up to the block's end, as multiples of its exp2. flags [chunks, Cp / BC]: whether any channel has a level up to
    the block's that is not ref."""
    i_n, i_c = (tl.program_id(0) // (Cp // BC)).to(tl.int64), tl.program_id(0) % (Cp // BC)
    i_b, start, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    o_c, o_n = i_c * BC + tl.arange(0, BC), tl.arange(0, BN)
    plane = tl.cast(chunks, tl.int64) * Cp
    first = tl.load(k + i_b * k_b + start * k_t + o_c, mask=(o_c < C) & (length > 0), other=0).to(tl.float32) * LOG2E
    low, high, top = tl.full([BC], float("inf"), tl.float32), tl.full([BC], float("-inf"), tl.float32), first
    num, den = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    n = tl.cdiv(length, BT)
    for i in range(0, n, BN):
        at = (i + o_n)[:, None]
        there = at < n
        p_at = planes + (chunk + at) * Cp + o_c[None, :]
        level = tl.load(p_at, mask=there, other=float("-inf"))
        own = tl.load(p_at + 3 * plane, mask=there, other=float("-inf"))
        before = tl.load(p_at - Cp, mask=there & (at > i), other=float("-inf"))
        largest = tl.load(p_at + 3 * plane - Cp, mask=there & (at > i), other=float("-inf"))
        e_b = tl.maximum(tl.associative_scan(before, 0, larger), high[None, :])
        m_b = tl.maximum(tl.associative_scan(largest, 0, larger), top[None, :])
        e = tl.maximum(e_b, level)
        ref = tl.where(e - m_b > LIMIT, tl.maximum(e_b, tl.ceil(m_b)), e)
        tl.store(p_at + plane, ref, mask=there)
        if LOCAL:
            s_num = tl.load(p_at + 4 * plane, mask=there, other=0)
            s_den = tl.load(p_at + 5 * plane, mask=there, other=0)
            s, s_num, s_den = tl.associative_scan((tl.where(there, level, -1e30), s_num, s_den), 0, joined)
            fall = tl.maximum(high[None, :], -1e30) - e
            s_num = lowered(s_num, s - e) + lowered(num[None, :], fall)
            s_den = lowered(s_den, s - e) + lowered(den[None, :], fall)
            tl.store(p_at + 2 * plane, e, mask=there)
            tl.store(p_at + 4 * plane, s_num, mask=there)
            tl.store(p_at + 5 * plane, s_den, mask=there)
            num = tl.sum(tl.where(at == i + BN - 1, s_num, 0.0), 0)
            den = tl.sum(tl.where(at == i + BN - 1, s_den, 0.0), 0)
        least = tl.minimum(tl.associative_scan(tl.where(there, level, float("inf")), 0, smaller), low[None, :])
        if not LOCAL:
            tl.store(p_at + 2 * plane, least, mask=there)
        dirty = tl.max(((least != ref) | (level > ref)).to(tl.int32), 1)
        tl.store(flags + (chunk + i + o_n) * (Cp // BC) + i_c, dirty, mask=i + o_n < n)
        low = tl.min(least, 0)
        high = tl.max(e, 0)
        top = tl.maximum(top, tl.max(own, 0))


@triton.jit(do_not_specialize=["T", "P", "chunks", "slots"])
def rows_kernel(q, k, dy, y, inv, dq, ab, planes, flags, seen, far, cu_seqlens, blocks, slots, T, P, C, Cp,
                chunks, q_b, q_t, k_b, k_t, dy_b, dy_t, dq_t, BT: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
                FLAG: tl.constexpr, LOCAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """dq, tokens dq_t apart; ab [2, chunks BT, Cp]: a, b, as multiples of exp2(-ref); LOCAL: seen [3, chunks, Cp],
    their sums over the block, weighed as by a key far back, and for float32 what values are taken less of in the
    gradients of keys and biases, and b with them. A program has BS rows, LOCAL all BT of the block."""
    part = tl.program_id(0) % (BT // BS) * BS
    i_n, i_t, i_c = locate(tl.program_id(0) // (BT // BS), blocks, slots, 0, T, Cp, BT, BC, False, DOCUMENTS)
    if i_n < 0:
        return
    i_b, start, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    if i_t * BT >= length:
        return
    chunk += i_t
    o_c, o_t = i_c * BC + tl.arange(0, BC), part + tl.arange(0, BS)
    row = (i_t * BT + o_t)[:, None].to(tl.int64)
    mask = (row < length) & (o_c < C)[None, :]
    at = (i_b * T + start + row) * C + o_c[None, :]
    b_q = tl.load(q + i_b * q_b + (start + row) * q_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    b_dy = tl.load(dy + i_b * dy_b + (start + row) * dy_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    b_y = tl.load(y + at, mask=mask, other=0).to(tl.float32)
    b_inv = tl.load(inv + at, mask=mask, other=0).to(tl.float32)
    EXACT: tl.constexpr = inv.dtype.element_ty == tl.float32
    by = opening(b_q, EXACT)
    gate = reciprocal(by, EXACT)
    p_dq = dq + (i_b * T + start + row) * dq_t + o_c[None, :]
    tl.store(p_dq, (b_dy * b_y * (1 - gate)).to(dq.dtype.element_ty), mask=mask)
    plane = tl.cast(chunks, tl.int64) * Cp
    if raised(flags, chunk, i_c, Cp, BC, FLAG):
        p_level = planes + chunk * Cp + o_c
        ref = tl.load(p_level + plane)
        steep = tl.max((ref < tl.load(p_level)).to(tl.int32), 0) > 0
        b_m = tl.zeros([BS, BC], tl.float32) + ref[None, :]
        for i_s in range(0, tl.where(steep, tl.minimum(part + BS, length - i_t * BT), 0)):
            p_x = k + i_b * k_b + (start + i_t * BT + i_s) * k_t + o_c
            b_x = tl.load(p_x, mask=o_c < C, other=0).to(tl.float32)[None, :] * LOG2E
            b_m = tl.where(o_t[:, None] >= i_s, tl.maximum(b_m, b_x), b_m)
        b_inv *= tl.exp2(ref[None, :] - b_m)
    b_a = (b_dy * gate * b_inv).to(ab.dtype.element_ty).to(tl.float32)
    b_mean = b_y * by
    if LOCAL and EXACT:  # the row's last mean, rounded so that it is one number everywhere: see `keys_of`
        p_last = start + tl.maximum(length, 1) - 1
        c_q = tl.load(q + i_b * q_b + p_last * q_t + o_c, mask=o_c < C, other=0).to(tl.float32)
        c_mean = tl.load(y + (i_b * T + p_last) * C + o_c, mask=o_c < C, other=0).to(tl.float32) * opening(c_q, EXACT)
        c_mean = c_mean.to(tl.bfloat16).to(tl.float32)
        tl.store(seen + 2 * plane + chunk * Cp + o_c, c_mean)
        b_mean -= c_mean[None, :]
    b_b = -b_a * b_mean  # of the a that is stored: its rounding is the same in both, whose difference counts
    p_ab = ab + (chunk * BT + o_t[:, None]) * Cp + o_c[None, :]
    tl.store(p_ab, b_a.to(ab.dtype.element_ty))
    tl.store(p_ab + plane * BT, b_b.to(ab.dtype.element_ty))
    if LOCAL:
        b_far = tl.load(far + i_t * BT + o_t)[:, None]
        tl.store(seen + chunk * Cp + o_c, tl.sum(b_far * b_a, 0))
        tl.store(seen + plane + chunk * Cp + o_c, tl.sum(b_far * b_b, 0))


@triton.jit(do_not_specialize=["T", "P", "chunks"])
def scan_back_kernel(seen, planes, cu_seqlens, T, P, Cp, chunks, BT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
                     DOCUMENTS: tl.constexpr):
    """In place: `seen` of a block and all later ones, as multiples of exp2(-ref)."""
    i_n, i_c = (tl.program_id(0) // (Cp // BC)).to(tl.int64), tl.program_id(0) % (Cp // BC)
    _, _, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    o_c, o_n = i_c * BC + tl.arange(0, BC), tl.arange(0, BN)
    plane = tl.cast(chunks, tl.int64) * Cp
    c_a, c_b = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    c_e = tl.full([BC], -1e30, tl.float32)
    n = tl.cdiv(length, BT)
    for i in range(0, n, BN):
        at = n - 1 - (i + o_n)[:, None]
        there = at >= 0
        p_seen = seen + (chunk + at) * Cp + o_c[None, :]
        e = -tl.load(planes + plane + (chunk + at) * Cp + o_c[None, :], mask=there, other=1e30)
        b_a = tl.load(p_seen, mask=there, other=0)
        b_b = tl.load(p_seen + plane, mask=there, other=0)
        e, b_a, b_b = tl.associative_scan((e, b_a, b_b), 0, joined)  # ref never falls: e is its own maximum
        fall = c_e[None, :] - tl.maximum(e, c_e[None, :])
        b_a += lowered(c_a[None, :], fall)
        b_b += lowered(c_b[None, :], fall)
        tl.store(p_seen, b_a, mask=there)
        tl.store(p_seen + plane, b_b, mask=there)
        last = (i + o_n)[:, None] == i + BN - 1
        c_a, c_b = tl.sum(tl.where(last, b_a, 0.0), 0), tl.sum(tl.where(last, b_b, 0.0), 0)
        c_e = tl.max(tl.where(last, e, -1e30), 0)


@triton.jit(do_not_specialize=["bias_t", "rows", "columns", "W", "shares"])
def bias_kernel(bias, dbias, sums, largest, bias_t, rows, columns, W, shares, BT: tl.constexpr, BW: tl.constexpr,
                SH: tl.constexpr, NB: tl.constexpr, LOCAL: tl.constexpr):
    """dbias [rows, W] from the shares of dw_ts / A_ts [shares, rows, columns], added in one order."""
    i_t = tl.program_id(0).to(tl.int64)
    at, o_h = tl.program_id(1) * BW + tl.arange(0, BW), tl.arange(0, SH)
    mask = (at < W) & (at <= i_t)
    column = i_t % BT + NB * BT - at if LOCAL else at
    padded = tl.cdiv(rows, BT).to(tl.int64) * BT
    total = tl.zeros([BW], tl.float32)
    for i in range(0, shares, SH):
        share = (i + o_h)[:, None]
        part = tl.load(sums + (share * padded + i_t) * columns + column[None, :],
                       mask=(share < shares) & mask[None, :], other=0)
        total += tl.sum(part, 0)
    b = tl.load(bias + i_t * bias_t + at, mask=mask, other=0).to(tl.float32) - tl.load(largest + i_t)
    db = tl.where(mask & (b >= FLOOR), tl.exp(tl.minimum(b, 0.0)) * total, 0.0)
    tl.store(dbias + i_t * W + at, db.to(dbias.dtype.element_ty), mask=at < W)


def make_table(bias: Tensor, p: Problem) -> tuple[Tensor, Tensor]:
    """A, and of its rows the largest bias and A of what no window reaches."""
    table = bias.new_empty(p.table_shape, dtype=p.kind)
    largest = bias.new_empty(2, len(table), dtype=torch.float32)
    BC = min(1024, power_of_two(p.columns)) if p.local else 1024  # full: columns are as many as tokens
    table_kernel[(len(table),)](bias, table, largest, bias.stride(0), p.rows, p.columns, bias.shape[1],
                                BT=p.BT, BC=BC, NB=p.NB, LOCAL=p.local, num_warps=4)
    return table, largest


def prepare(k: Tensor, v: Tensor, p: Problem, blocks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> pairs (full), planes [4 (full) or 6, chunks, Cp], flags."""
    pairs = v.new_empty(p.operand_shape if not p.local else (0,), dtype=p.kind)
    planes = v.new_empty(6 if p.local else 4, p.chunks, p.Cp, dtype=torch.float32)
    options = p.options("sums" if p.local else "prepare")
    prepare_kernel[(p.chunks * (p.Cp // options["BC"]),)](
        k, v, pairs, planes, p.cu_seqlens, blocks, p.chunks, p.length, p.rows, p.channels, p.Cp,
        p.chunks, *k.stride()[:2], *v.stride()[:2], LOCAL=p.local, **options)
    flags = v.new_empty(p.chunks * (p.Cp // p.flag), dtype=torch.int32)
    scan_kernel[(p.documents * (p.Cp // p.flag),)](
        k, planes, flags, p.cu_seqlens, p.length, p.rows, p.channels, p.Cp, p.chunks, *k.stride()[:2], BT=p.BT,
        BN=4 if INTERPRETED else 16, BC=p.flag, LOCAL=p.local, DOCUMENTS=p.cu_seqlens is not None, num_warps=4)
    return pairs, planes, flags


def factors(dq: Tensor, q: Tensor, k: Tensor, dy: Tensor, y: Tensor, inv: Tensor, planes: Tensor, flags: Tensor,
            largest: Tensor, p: Problem, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fills dq, which has no gaps between rows -> ab, and for local `seen` of a block and all later ones."""
    ab = q.new_empty(p.operand_shape, dtype=p.kind)
    seen = planes.new_empty(3, p.chunks, p.Cp) if p.local else planes
    options = p.options("local rows" if p.local else "rows")
    BS = p.BT if p.local else min(p.BT, p.config("rows").BS)
    rows_kernel[(p.chunks * (p.Cp // options["BC"]) * (p.BT // BS),)](
        q, k, dy, y, inv, dq, ab, planes, flags, seen, largest[1], p.cu_seqlens, blocks, p.chunks,
        p.length, p.rows, p.channels, p.Cp, p.chunks, *q.stride()[:2], *k.stride()[:2], *dy.stride()[:2], dq.stride(1),
        BS=BS, FLAG=p.flag, LOCAL=p.local, **options)
    if p.local:
        BC = min(32, p.Cp)
        scan_back_kernel[(p.documents * (p.Cp // BC),)](
            seen, planes, p.cu_seqlens, p.length, p.rows, p.Cp, p.chunks, BT=p.BT, BN=4 if INTERPRETED else 32, BC=BC,
            DOCUMENTS=p.cu_seqlens is not None, num_warps=4)
    return ab, seen


def bias_gradient(bias: Tensor, sums: Tensor, largest: Tensor, p: Problem) -> Tensor:
    """From sums [shares, rows, columns] of dw_ts / A_ts."""
    whole = p.rows == len(bias) and (p.local or p.rows == bias.shape[1])
    dbias = bias.new_empty(bias.shape) if whole else bias.new_zeros(bias.shape)
    BW = min(512, power_of_two(bias.shape[1])) if p.local else 512
    bias_kernel[(p.rows, triton.cdiv(bias.shape[1], BW))](
        bias, dbias, sums, largest, bias.stride(0), p.rows, p.columns, bias.shape[1], len(sums), BT=p.BT, BW=BW,
        SH=8, NB=p.NB, LOCAL=p.local, num_warps=4)
    return dbias
