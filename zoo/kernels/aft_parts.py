"""What AFT's kernels with position biases share: references of exponentials, tables, sums over blocks, factors.

Keys are taken in units of log2: x = k log2(e). Every block j of BT tokens has, per channel, a level l_j that is no less
than its keys, and exp2(x - l_j) is what enters a product as an operand. A level is a whole number, HEAD above the
largest of the sequence's first keys, and stays that, unless a block has a larger key, when that block's is HEAD above
its own. So factors between levels are powers of two, exact, and nearly always 1.

Sums up to a row of block i are held as multiples of exp2(ref_i), ref_i the largest level so far. They underflow only
where all keys up to a row lie far below: a row needs den >= exp2(-LIMIT) exp(FLOOR). Where the largest key before block
i (for i = 0 the first key) is not within LIMIT of ref_i, the block is steep in that channel: its own keys then enter
one by one with a running maximum that begins at ref_i, for such a block the largest level before it. ref never falls.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, LOG2E, document_chunks, power_of_two

FLOOR = tl.constexpr(-60.0)  # how far below the largest of its row a bias can count, in units of e
HEAD = tl.constexpr(12.0)  # how far a new level stands above the keys that it is made from
LIMIT = tl.constexpr(32.0)  # how far below ref_i all keys before a block of rows may be
TINY = tl.constexpr(2.0**-12)  # exp2(-HEAD)
LN2 = tl.constexpr(0.6931471805599453)
FIRST = tl.constexpr(16)  # keys that make the first level


class Config(NamedTuple):
    """BT rows and keys of a block, BS of them at once, BC channels; the most registers of a thread (None: any)."""

    BT: int
    BS: int
    BC: int
    warps: int
    stages: int
    registers: int | None = None


# (kernel, bytes of an operand)
CONFIGS = {
    ("forward", 2): Config(128, 64, 64, 4, 3), ("forward", 4): Config(64, 32, 32, 4, 2),
    ("columns", 2): Config(128, 64, 64, 4, 3), ("columns", 4): Config(64, 32, 32, 4, 2),
    ("tiles", 2): Config(128, 128, 64, 4, 3), ("tiles", 4): Config(64, 64, 32, 4, 2),
    ("local", 2): Config(64, 64, 32, 4, 2), ("local", 4): Config(64, 64, 32, 4, 2),
    ("band", 2): Config(64, 64, 32, 4, 2), ("band", 4): Config(64, 64, 32, 4, 1),
    ("prepare", 2): Config(0, 0, 32, 4, 1), ("prepare", 4): Config(0, 0, 32, 4, 1),
    ("sums", 2): Config(0, 0, 64, 4, 1), ("sums", 4): Config(0, 0, 32, 4, 1),
    ("rows", 2): Config(0, 32, 64, 4, 1), ("rows", 4): Config(0, 32, 32, 4, 1),
    ("local rows", 2): Config(0, 0, 32, 4, 1), ("local rows", 4): Config(0, 0, 32, 4, 1),
}
PROGRAMS = 264  # of the kernels that sum over the batch, at a time: two for each of a GPU's processors


def config(kernel: str, size: int) -> Config:
    """The configuration on this machine: Triton's interpreter gets small blocks, to have several."""
    return Config(16, 16, 16, 4, 1) if INTERPRETED else CONFIGS[kernel, size]


@triton.jit
def document(cu_seqlens, i_n, T, P, BT: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of row or document i_n: its row in memory, its first token there, its length, its first block of all."""
    if DOCUMENTS:
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)
        return i_n * 0, start, tl.minimum(length, P), start // BT + i_n
    else:
        return i_n, i_n * 0, T, i_n * tl.cdiv(T, BT)


@triton.jit
def locate(pid, blocks, slots, last, T, C, BT: tl.constexpr, BC: tl.constexpr, BACK: tl.constexpr,
           DOCUMENTS: tl.constexpr):
    """Of program pid: its row or document (-1: none), its block there, its channels.

    All blocks of a row's channels one after the other, from the last: they share operands, and as their sums differ in
    length, programs that run at a time are not all at their ends, which ask memory for the most. For the `last` of
    (row, channels) one block of all after the other, so that no long sum begins late. BACK: from the last row, whose
    operands, made a moment ago, the L2 cache still has.
    """
    if DOCUMENTS:
        slot = pid % slots
        return tl.load(blocks + 2 * slot).to(tl.int64), tl.load(blocks + 2 * slot + 1), pid // slots
    else:
        n, tiles = tl.cdiv(T, BT), tl.cdiv(C, BC)
        pairs = slots // n * tiles
        rest = pid - (pairs - last) * n
        pair, i_t = pid // n, n - 1 - pid % n
        if rest >= 0:
            pair, i_t = pairs - last + rest % last, n - 1 - rest // last
        if BACK:
            pair = pairs - 1 - pair
        return (pair // tiles).to(tl.int64), i_t, pair % tiles


@triton.jit
def before(i_n, i_c, row_step, channel_step, n):
    """Rows and channels so many units of n a row before, without a division."""
    i_c -= channel_step
    i_n -= row_step + (i_c < 0).to(tl.int32)
    return i_n, tl.where(i_c < 0, i_c + n, i_c)


@triton.jit
def raised(flags, chunk, i_c, Cp, BC: tl.constexpr, FLAG: tl.constexpr):
    """Whether a block is flagged in any of a program's channels."""
    n: tl.constexpr = BC // FLAG if BC > FLAG else 1
    return tl.max(tl.load(flags + chunk * (Cp // FLAG) + i_c * BC // FLAG + tl.arange(0, n)), 0) > 0


@triton.jit
def reciprocal(x, EXACT: tl.constexpr):
    """1 / x of finite x > 0; not EXACT: to 2^-21, in fewer instructions than a division."""
    if EXACT:
        return 1 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def opening(b_q):
    """1 / sigmoid(q), at most 2^100."""
    return 1 + tl.exp2(tl.minimum(b_q.to(tl.float32) * -LOG2E, 100.0))


@triton.jit
def gated(b_q, b_num, b_den, EXACT: tl.constexpr):
    """sigmoid(q) num / den and 1 / den."""
    by = opening(b_q)
    if EXACT:
        b_inv = 1 / b_den
        return b_num * b_inv / by, b_inv
    else:
        b_inv = reciprocal(b_den * by, False)
        return b_num * b_inv, b_inv * by


@triton.jit
def power(b_k, level):
    """exp2(x - level) of keys [rows, channels] that are no larger.

    The difference is taken first, and from HEAD lower, near the keys: there it is rounded the least.
    """
    return tl.exp2(tl.minimum((b_k - ((level - HEAD) * LN2)[None, :]) * LOG2E, HEAD)) * TINY


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
        a = tl.exp(tl.minimum(tl.maximum(b - r, FLOOR), 0.0))
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
    o_c, o_t, o_f = i_c * BC + tl.arange(0, BC), tl.arange(0, BT), tl.arange(0, FIRST)
    m_c = (o_c < C)[None, :]
    p_k = k + i_b * k_b + start * k_t + o_c[None, :]
    row = (i_t * BT + o_t)[:, None].to(tl.int64)
    m_t = row < length
    b_f = tl.load(p_k + o_f[:, None].to(tl.int64) * k_t, mask=(o_f[:, None] < length) & m_c, other=0).to(tl.float32)
    b_k = tl.load(p_k + row * k_t, mask=m_t & m_c, other=0).to(tl.float32)
    b_v = tl.load(v + i_b * v_b + (start + row) * v_t + o_c[None, :], mask=m_t & m_c, other=0).to(tl.float32)
    first = tl.ceil(tl.max(tl.where(o_f[:, None] < length, b_f * LOG2E, float("-inf")), 0)) + HEAD
    b_k = tl.where(m_t, b_k, float("-inf"))
    top = tl.max(b_k, 0) * LOG2E
    level = tl.where(top > first, tl.ceil(top) + HEAD, first)
    b_p = power(b_k, level)
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
    f, f_b = tl.exp2(e - top), tl.exp2(e_b - top)
    return top, x * f + x_b * f_b, y * f + y_b * f_b


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
        ref = tl.where(e - m_b > LIMIT, tl.where(at == 0, first[None, :], e_b), e)
        tl.store(p_at + plane, ref, mask=there)
        if LOCAL:
            s_num = tl.load(p_at + 4 * plane, mask=there, other=0)
            s_den = tl.load(p_at + 5 * plane, mask=there, other=0)
            s, s_num, s_den = tl.associative_scan((tl.where(there, level, -1e30), s_num, s_den), 0, joined)
            fall = tl.exp2(high[None, :] - e)
            back = tl.exp2(s - e)
            s_num = s_num * back + num[None, :] * fall
            s_den = s_den * back + den[None, :] * fall
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


@triton.jit
def flagged(flags, cu_seqlens, share, shares, count, i_t, NB: tl.constexpr, T, P, n, BT: tl.constexpr,
            DOCUMENTS: tl.constexpr):
    """Whether any unit of a share, of a flag's channels each, is flagged at block i_t, which may be steep, or at i_t +
    NB, or its row's last."""
    o_u = tl.arange(0, 128)
    worst = tl.zeros([128], tl.int32)
    for i in range(0, count, 128):
        u = share + (i + o_u) * shares
        there = i + o_u < count
        i_n = (u // n).to(tl.int64)
        if DOCUMENTS:
            start = tl.load(cu_seqlens + i_n, mask=there, other=0).to(tl.int64)
            length = tl.load(cu_seqlens + i_n + 1, mask=there, other=0).to(tl.int64) - start
            chunk = start // BT + i_n
            last = tl.cdiv(tl.minimum(length, P), BT) - 1
        else:
            chunk = i_n * tl.cdiv(T, BT)
            last = i_n * 0 + tl.cdiv(T, BT) - 1
        there = there & (i_t <= last)
        at = flags + chunk * n + u % n
        worst = tl.maximum(worst, tl.load(at + i_t * n, mask=there, other=0))
        if NB > 0:
            worst = tl.maximum(worst, tl.load(at + tl.minimum(i_t + NB, last) * n, mask=there, other=0))
    return tl.max(worst, 0) > 0


@triton.jit(do_not_specialize=["T", "P", "chunks", "slots"])
def rows_kernel(q, k, dy, y, inv, dq, ab, planes, flags, seen, far, cu_seqlens, blocks, slots, T, P, C, Cp,
                chunks, q_b, q_t, k_b, k_t, dy_b, dy_t, BT: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
                FLAG: tl.constexpr, LOCAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """dq; ab [2, chunks BT, Cp]: a, b, as multiples of exp2(-ref); LOCAL: seen [2, chunks, Cp], their sums over the
    block, weighed as by a key far back. A program has BS rows, LOCAL all BT of the block."""
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
    gate = reciprocal(opening(b_q), inv.dtype.element_ty == tl.float32)
    b_b = b_dy * b_y
    tl.store(dq + at, (b_b * (1 - gate)).to(dq.dtype.element_ty), mask=mask)
    plane = tl.cast(chunks, tl.int64) * Cp
    if raised(flags, chunk, i_c, Cp, BC, FLAG):  # steep, perhaps
        ref = tl.load(planes + plane + chunk * Cp + o_c)
        b_m = tl.zeros([BS, BC], tl.float32) + ref[None, :]
        for i_s in range(0, tl.minimum(part + BS, length - i_t * BT)):
            p_x = k + i_b * k_b + (start + i_t * BT + i_s) * k_t + o_c
            b_x = tl.load(p_x, mask=o_c < C, other=0).to(tl.float32)[None, :] * LOG2E
            b_m = tl.where(o_t[:, None] >= i_s, tl.maximum(b_m, b_x), b_m)
        b_inv *= tl.exp2(ref[None, :] - b_m)
    b_a = b_dy * gate * b_inv
    b_b = -b_b * b_inv
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
        fall = tl.exp2(c_e[None, :] - tl.maximum(e, c_e[None, :]))
        b_a += c_a[None, :] * fall
        b_b += c_b[None, :] * fall
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


def operand(v: Tensor) -> torch.dtype:
    """The type of the factors of the products."""
    return torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32


class Problem:
    """Shapes, and what goes with the launches of one call."""

    def __init__(self, v: Tensor, bias: Tensor, local: bool, cu_seqlens: Tensor | None):
        self.batch, self.length, self.channels = v.shape
        self.local, self.cu_seqlens = local, cu_seqlens
        self.kind = operand(v)
        self.size = self.kind.itemsize
        kernels = ("local", "sums", "local rows", "band") if local else (
            "forward", "prepare", "rows", "columns", "tiles")
        self.BT = self.config(kernels[0]).BT
        widest = max(self.config(kernel).BC for kernel in kernels)
        widest = min(widest, max(32, power_of_two(self.channels)))  # with 16, ptxas loses addresses of tiles
        self.Cp = -(-self.channels // widest) * widest  # channels in memory of our own: whole blocks
        self.flag = self.channel_block(kernels[-1])  # channels of a flag
        self.NB = max(1, -(-(bias.shape[1] - 1) // self.BT)) if local else 0
        self.rows = self.length if cu_seqlens is None else min(self.length, len(bias))
        padded = -(-self.rows // self.BT) * self.BT
        self.columns = (self.NB + 1) * self.BT if local else padded
        self.table_shape = padded, self.columns
        self.PRECISION = "tf32" if v.dtype == torch.float16 else "tf32x3"
        if cu_seqlens is None:
            self.documents, self.chunks = self.batch, self.batch * -(-self.length // self.BT)
        else:
            self.documents = len(cu_seqlens) - 1
            self.chunks = self.length // self.BT + self.documents
        self.operand_shape = 2, self.chunks * self.BT, self.Cp

    def config(self, kernel: str) -> Config:
        return config(kernel, self.size)

    def blocks(self) -> Tensor | None:
        """Of each of `chunks` programs, its document and its block there."""
        return None if self.cu_seqlens is None else document_chunks(self.cu_seqlens, self.length, self.BT)

    def channel_block(self, kernel: str) -> int:
        return min(self.config(kernel).BC, self.Cp)

    def last(self, kernel: str) -> int:
        """For `locate`: as many (row, channels) as two rounds of programs take."""
        pairs = self.batch * (self.Cp // self.channel_block(kernel))
        return min(pairs, -(-2 * PROGRAMS // -(-self.length // self.BT)))

    def options(self, kernel: str) -> dict[str, Any]:
        """The constants of a kernel's build."""
        c = self.config(kernel)
        return {"BT": self.BT, "BC": self.channel_block(kernel), "DOCUMENTS": self.cu_seqlens is not None,
                "num_warps": c.warps, "maxnreg": c.registers}

    def products(self, kernel: str) -> dict[str, Any]:
        """The same for one with products."""
        return {**self.options(kernel), "STAGES": self.config(kernel).stages, "PRECISION": self.PRECISION,
                "FLAG": self.flag}


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


def factors(q: Tensor, k: Tensor, dy: Tensor, y: Tensor, inv: Tensor, planes: Tensor, flags: Tensor, largest: Tensor,
            p: Problem, blocks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, ab, and for local `seen` of a block and all later ones."""
    dq, ab = q.new_empty(q.shape), q.new_empty(p.operand_shape, dtype=p.kind)
    seen = planes.new_empty(2, p.chunks, p.Cp) if p.local else planes
    options = p.options("local rows" if p.local else "rows")
    BS = p.BT if p.local else min(p.BT, p.config("rows").BS)
    rows_kernel[(p.chunks * (p.Cp // options["BC"]) * (p.BT // BS),)](
        q, k, dy, y, inv, dq, ab, planes, flags, seen, largest[1], p.cu_seqlens, blocks, p.chunks,
        p.length, p.rows, p.channels, p.Cp, p.chunks, *q.stride()[:2], *k.stride()[:2], *dy.stride()[:2], BS=BS,
        FLAG=p.flag, LOCAL=p.local, **options)
    if p.local:
        BC = min(32, p.Cp)
        scan_back_kernel[(p.documents * (p.Cp // BC),)](
            seen, planes, p.cu_seqlens, p.length, p.rows, p.Cp, p.chunks, BT=p.BT, BN=4 if INTERPRETED else 32, BC=BC,
            DOCUMENTS=p.cu_seqlens is not None, num_warps=4)
    return dq, ab, seen


def bias_gradient(bias: Tensor, sums: Tensor, largest: Tensor, p: Problem) -> Tensor:
    """From sums [shares, rows, columns] of dw_ts / A_ts."""
    whole = p.rows == len(bias) and (p.local or p.rows == bias.shape[1])
    dbias = bias.new_empty(bias.shape) if whole else bias.new_zeros(bias.shape)
    BW = min(512, power_of_two(bias.shape[1])) if p.local else 512
    bias_kernel[(p.rows, triton.cdiv(bias.shape[1], BW))](
        bias, dbias, sums, largest, bias.stride(0), p.rows, p.columns, bias.shape[1], len(sums), BT=p.BT, BW=BW,
        SH=8, NB=p.NB, LOCAL=p.local, num_warps=4)
    return dbias


def shares_of(tiles: int, units: int) -> int:
    """How many programs share the sums over `units` of each of `tiles`, to fill the GPU's rounds best."""
    def cost(shares: int) -> int:  # 2: what a sum costs beside its units, in units
        return -(-tiles * shares // PROGRAMS) * (-(-units // shares) + 2)
    return min(range(1, min(units, 32) + 1), key=cost)
