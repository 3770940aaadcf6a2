"""What the kernels of AFT-simple and AFT-conv share: where segments lie, rows of a chunk, sums and how they join.

Sums of weights are multiples of a power of two. `before` adds such as have the same one; `join` and what is made of it
those that each have their own, the larger one of the two, so that no exponent is above 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, LOG2E

EMPTY = tl.constexpr(-1e30)  # the key of a token that is not there, where a maximum is taken
LOG2E_32 = tl.constexpr(1.4426950216293335)  # LOG2E in float32, as kernels have it
SHORTEST = 8  # chunks of a segment, at the least
TOGETHER = tl.constexpr(16 if INTERPRETED else 128)  # documents that are looked at together


class Plan(NamedTuple):
    """How rows are cut: L tokens a segment, a multiple of a chunk's; as many segments a row; slots for segments; rows
    or documents."""

    L: int
    pieces: int
    segments: int
    rows: int


def cut_rows(batch: int, length: int, across: int, size: int, programs: int, device: torch.device,
             cu_seqlens: Tensor | None) -> Plan:
    """Segments for `across` programs beside each other along every row, in chunks of `size` tokens, so that every
    multiprocessor has as many programs as are asked for."""
    processors = 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    chunks = triton.cdiv(batch * length * across, size * programs * processors)
    chunks = max(2 if INTERPRETED else SHORTEST, chunks)
    if cu_seqlens is not None:
        documents, most = len(cu_seqlens) - 1, min(chunks * size, triton.cdiv(length, size) * size)
        return Plan(most, 0, length // most + documents, documents)
    pieces = triton.cdiv(length, chunks * size)
    return Plan(chunks * size, pieces, batch * pieces, batch)


def in_rows(x: Tensor) -> Tensor:
    """x, or a copy where the values of a token do not lie side by side, or a row of the batch after the one before."""
    if (x.stride(-1) == 1 or x.shape[-1] == 1) and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # .contiguous() would leave a row of one token where it is


@triton.jit
def place(i_s, T, L, pieces, cu_seqlens, documents, BT: tl.constexpr):
    """Of segment i_s: its row in memory, its first token there, its length, the slot of its first chunk, which
    segment of its row or document it is, and how many tokens there are from its first on.

    Segments of document n, which starts at token s, have the slots from s // L + n on, its chunks those from
    s // BT + n on: there may be slots between that are nobody's, and have no tokens.
    """
    if cu_seqlens is not None:
        i_n = -1
        for i in range(0, documents, TOGETHER):
            o_n = i + tl.arange(0, TOGETHER)
            starts = tl.load(cu_seqlens + o_n, mask=o_n < documents, other=0).to(tl.int64)
            i_n += tl.sum(((starts // L + o_n <= i_s) & (o_n < documents)).to(tl.int32), 0)
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        end = tl.load(cu_seqlens + i_n + 1).to(tl.int64)
        piece = (i_s - start // L - i_n).to(tl.int32)
        rest = (end - start - tl.cast(piece, tl.int64) * L).to(tl.int32)
        first = start + tl.cast(piece, tl.int64) * L
        return start * 0, first, tl.minimum(rest, L), start // BT + i_n + piece * (L // BT), piece, rest
    else:
        i_b = (i_s // pieces).to(tl.int64)
        piece = i_s % pieces
        rest = T - piece * L
        return (i_b, tl.cast(piece, tl.int64) * L, tl.minimum(rest, L),
                i_b * tl.cdiv(T, BT) + piece * (L // BT), piece, rest)


@triton.jit
def row_slots(i_n, T, L, pieces, cu_seqlens):
    """The first segment's slot of row or document i_n, and how many it has."""
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int64) - start
        return start // L + i_n, tl.cdiv(length, L).to(tl.int32)
    else:
        return tl.cast(i_n, tl.int64) * pieces, pieces


@triton.jit
def exp2(x):
    """2^x by one instruction; a result under 2^-126 is 0."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def inverse(x):
    """1 / x by one instruction, to an ulp."""
    if INTERPRETED:
        return 1 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def rows(p, offset, stride, row, length, m_c, other: tl.constexpr, R: tl.constexpr):
    """R rows of every group from `row` on, `offset` from p, as a tuple of [W, BC]; `other` from `length` on."""
    found = tl.tuple(())
    for r in tl.static_range(R):
        found += (tl.load(p + (offset + stride * r), mask=(row + r < length) & m_c, other=other),)
    return found


@triton.jit
def add(n1, d1, n2, d2):
    return n1 + n2, d1 + d2


@triton.jit
def add_before(n1, before_n1, d1, before_d1, n2, before_n2, d2, before_d2):
    return n1 + n2, n1 + before_n2, d1 + d2, d1 + before_d2


@triton.jit
def before(n, d, REVERSE: tl.constexpr):
    """Sums over the rows of [W, BC] before each; after each, if REVERSE. Nothing is added that is taken off again."""
    nil = tl.zeros_like(n)
    _, sum_n, _, sum_d = tl.associative_scan((n, nil, d, nil), 0, add_before, reverse=REVERSE)
    return sum_n, sum_d


@triton.jit
def join(m1, n1, d1, m2, n2, d2):
    """Sums as multiples of 2^m."""
    m = tl.maximum(m1, m2)
    f1, f2 = exp2(m1 - m), exp2(m2 - m)
    return m, n1 * f1 + n2 * f2, d1 * f1 + d2 * f2


@triton.jit
def join_before(m1, n1, d1, before_m1, before_n1, before_d1, m2, n2, d2, before_m2, before_n2, before_d2):
    m, n, d = join(m1, n1, d1, m2, n2, d2)
    before_m, before_n, before_d = join(m1, n1, d1, before_m2, before_n2, before_d2)
    return m, n, d, before_m, before_n, before_d


@triton.jit
def joined_before(m, n, d):
    """The same as `before` for sums that are multiples of 2^m."""
    nil = tl.zeros_like(n)
    found = tl.associative_scan((m, n, d, nil + EMPTY, nil, nil), 0, join_before)
    return found[3], found[4], found[5]


@triton.jit
def binade(d):
    """log2 of the power of two at or under d > 0, and its reciprocal: exact."""
    power = d.to(tl.int32, bitcast=True) >> 23
    return (power - 127).to(tl.float32), ((254 - power) << 23).to(tl.float32, bitcast=True)


@triton.jit
def whole(k):
    """The whole number at or under log2 exp(k), no less than EMPTY."""
    x = tl.floor(k.to(tl.float32) * LOG2E)
    return tl.where(x < EMPTY, EMPTY, x)


@triton.jit
def weight(k, m):
    """exp(k) as a multiple of 2^m: rounded once where m is whole, however large k is.

    The multiply-add is asked for: where k is a masked load, the compiler would not make one of a product and a sum, and
    the same key would have one weight here and another there.
    """
    if INTERPRETED:  # which has no multiply-add
        return exp2((k.to(tl.float64) * LOG2E_32 - m).to(tl.float32))
    else:
        return exp2(tl.fma(k.to(tl.float32), LOG2E, m * -1.0))  # -m is a subtraction


@triton.jit
def join_token(m, n, d, k, v):
    own = whole(k)
    w = weight(k, own)
    return join(m, n, d, own, w * v.to(tl.float32), w)


@triton.jit
def start_of(p_k, starts, slots, at, m):
    """e, num, den before a segment's first key, which p_k points to; starts None: nothing is before it."""
    c_e = whole(tl.load(p_k, mask=m, other=0))
    if starts is not None:
        c_d = tl.load(starts + 2 * slots + at, mask=m, other=0)
        c_e = tl.where(c_d > 0, tl.load(starts + at, mask=m, other=0), c_e)
        return c_e, tl.load(starts + slots + at, mask=m, other=0), c_d
    else:
        return c_e, c_e * 0.0, c_e * 0.0


@triton.jit
def careful(b_k, b_v, R: tl.constexpr):
    """The sums of R rows as multiples of 2^m, m the largest of their `whole`."""
    s_m = whole(b_k[0])
    s_d = weight(b_k[0], s_m)
    s_n = s_d * b_v[0].to(tl.float32)
    for r in tl.static_range(1, R):
        s_m, s_n, s_d = join_token(s_m, s_n, s_d, b_k[r], b_v[r])
    return s_m, s_n, s_d
