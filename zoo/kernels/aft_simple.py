"""AFT-simple (2105.14103, equation 5), causal, with its gate: a running softmax over the keys of every channel.

    y_t = sigmoid(q_t) * mean_t,   mean_t = num_t / den_t,   num_t, den_t = sum_{s<=t} exp(k_s) (v_s, 1)

A program walks a row of the batch, a document or a segment of one, over BC channels, in chunks of W R tokens: warp w
takes the R tokens from w R on, a thread a few channels of them, so that sums over its tokens are additions in registers
and warps meet once a chunk, for the sums of the warps before. All is kept as multiples of 2^e, e a whole number near
log2 of the sum of all weights before the chunk, so den starts a chunk in [1, 2), e moves without rounding, and a weight
is exp2(k log2(e) - e): no maximum is looked for.

Where the weights of a chunk pass BIG, or are not finite, what was written from that chunk on is done again carefully:
the same walk with the running maximum of the keys in the place of e, every exponent <= 0.

Rows too few for the GPU are cut into segments: `summary` gives the sums of each, `chain` those before it, which are
also what a state given by the caller is.

The backward pass is in zoo/kernels/aft_simple_backward.py. For it the sums at the start of every chunk are kept: beside
the inputs, 12 bytes for a chunk's tokens of a channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, LOG2E

EMPTY = tl.constexpr(-1e30)  # the key of a token that is not there, where a maximum is taken
BIG = tl.constexpr(2.0**60)  # up to where sums of weights are taken as they are
NEVER = tl.constexpr(2**31 - 1)


class Config(NamedTuple):
    """Tokens of a group that walks together, groups, channels of a program, those a thread has, stages of the loop's
    loads, most registers a thread may have. A warp is one group or several, side by side.
    """

    R: int
    W: int
    BC: int
    VEC: int
    STAGES: int
    maxnreg: int

    def launch(self) -> dict[str, int]:
        return self._asdict() | {"num_warps": max(1, self.W * self.BC // (32 * self.VEC))}


# (direction, bytes of an element); R W and BC are the same in both directions, as the sums of chunks are shared
CONFIGS = {("forward", 2): Config(4, 8, 32, 2, 3, 128), ("backward", 2): Config(4, 8, 32, 2, 1, 128),
           ("forward", 4): Config(4, 8, 32, 2, 2, 128), ("backward", 4): Config(4, 8, 32, 2, 1, 128)}
SHORTEST = 8  # chunks of a segment, at the least
PIECES = 16  # segments that `chain` takes at once


def config(direction: str, k: Tensor) -> Config:
    return Config(4, 4, 16, 1, 1, 128) if INTERPRETED else CONFIGS[direction, k.element_size()]


@triton.jit
def place(i_s, T, L, pieces, cu_seqlens, documents, BT: tl.constexpr):
    """Of segment i_s: its row in memory, its first token there, its length, the slot of its first chunk, which
    segment of its row or document it is, and how many tokens there are from its first on.

    Segments of document n, which starts at token s, have the slots from s // L + n on, its chunks those from
    s // BT + n on: there may be slots between that are nobody's, and have no tokens.
    """
    if cu_seqlens is not None:
        i_n = -1
        for i in range(0, documents, 128):
            o_n = i + tl.arange(0, 128)
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
def rows(p, stride, row, length, m_c, other: tl.constexpr, R: tl.constexpr):
    """R rows of every warp from `row` on, as a tuple of [W, BC]; `other` from `length` on.

    Addresses are made from the row's number at every use: held in registers they would be a third of all there are.
    """
    found = tl.tuple(())
    for r in tl.static_range(R):
        found += (tl.load(p + (row + r).to(tl.int64) * stride, mask=(row + r < length) & m_c, other=other),)
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
    f1, f2 = tl.exp2(m1 - m), tl.exp2(m2 - m)
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
def exponent(k):
    """log2 exp(k), no less than EMPTY."""
    x = k.to(tl.float32) * LOG2E
    return tl.where(x < EMPTY, EMPTY, x)


@triton.jit
def start_of(p_k, starts, slots, at, m):
    """e, num, den before a segment's first key, which p_k points to; starts None: nothing is before it."""
    c_e = tl.floor(exponent(tl.load(p_k, mask=m, other=0)))
    if starts is not None:
        c_d = tl.load(starts + 2 * slots + at, mask=m, other=0)
        c_e = tl.where(c_d > 0, tl.load(starts + at, mask=m, other=0), c_e)
        return c_e, tl.load(starts + slots + at, mask=m, other=0), c_d
    else:
        return c_e, c_e * 0.0, c_e * 0.0


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents", "chunks", "segments"])
def forward_kernel(q, k, v, y, states, steep, starts, cu_seqlens, T, C, L, pieces, documents, chunks, segments,
                   q_b, q_t, k_b, k_t, v_b, v_t, R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
                   STAGES: tl.constexpr):
    BT: tl.constexpr = R * W
    i_s, i_c = tl.program_id(0) // tl.cdiv(C, BC), tl.program_id(0) % tl.cdiv(C, BC)
    i_b, first, length, chunk, _, _ = place(i_s, T, L, pieces, cu_seqlens, documents, BT)
    if length <= 0:
        return
    o_t = tl.arange(0, W)[:, None] * R
    o_c = tl.max_contiguous(i_c * BC + tl.arange(0, BC), VEC)[None, :]
    m_c = o_c < C
    every = o_t * 0 + o_c  # the channels, for each warp
    p_q = q + i_b * q_b + first * q_t
    p_k = k + i_b * k_b + first * k_t
    p_v = v + i_b * v_b + first * v_t
    p_y = y + (i_b * T + first) * C + o_c
    p_s = states + chunk * C
    plane = tl.cast(chunks, tl.int64) * C
    m_s = (o_t == 0) & m_c
    c_e, c_n, c_d = start_of(p_k + every, starts, tl.cast(segments, tl.int64) * C, tl.cast(i_s, tl.int64) * C + every,
                             m_c)
    steep_at = tl.zeros([W, BC], tl.int32) + NEVER
    for i_t in tl.range(0, tl.cdiv(length, BT), num_stages=STAGES):
        row = i_t * BT + o_t
        b_k = rows(p_k + o_c, k_t, row, length, m_c, float("-inf"), R)
        b_v = rows(p_v + o_c, v_t, row, length, m_c, 0.0, R)
        b_q = rows(p_q + o_c, q_t, row, length, m_c, 0.0, R)
        tl.store(p_s + every, c_e, mask=m_s)
        tl.store(p_s + plane + every, c_n, mask=m_s)
        tl.store(p_s + 2 * plane + every, c_d, mask=m_s)
        s_n = tl.zeros([W, BC], tl.float32)
        s_d = tl.zeros([W, BC], tl.float32)
        b_n, b_d = tl.tuple(()), tl.tuple(())
        for r in tl.static_range(R):
            p = tl.exp2(b_k[r].to(tl.float32) * LOG2E - c_e)
            s_n += p * b_v[r].to(tl.float32)
            s_d += p
            b_n += (s_n,)
            b_d += (s_d,)
        steep_at = tl.where((tl.abs(s_n) < BIG) & (s_d < BIG), steep_at, tl.minimum(steep_at, i_t))
        w_n, w_d = before(s_n, s_d, False)
        for r in tl.static_range(R):
            b_y = (c_n + w_n + b_n[r]) / ((c_d + w_d + b_d[r]) * (1 + tl.exp2(b_q[r].to(tl.float32) * -LOG2E)))
            tl.store(p_y + (row + r).to(tl.int64) * C, b_y.to(y.dtype.element_ty), mask=(row + r < length) & m_c)
        s_n, s_d = tl.reduce((s_n, s_d), 0, add)
        c_n += s_n[None, :]
        c_d += s_d[None, :]
        rise, scale = binade(c_d)
        c_e, c_n, c_d = c_e + rise, c_n * scale, c_d * scale
        p_s += C
    steep_at = tl.min(tl.where(m_c, steep_at, NEVER))
    tl.store(steep + tl.program_id(0), steep_at)
    if steep_at < NEVER:
        tl.debug_barrier()
        p_s = states + (chunk + steep_at) * C
        c_m = tl.load(p_s + every, mask=m_c, other=0)
        c_n = tl.load(p_s + plane + every, mask=m_c, other=0)
        c_d = tl.load(p_s + 2 * plane + every, mask=m_c, other=1)
        for i_t in range(steep_at, tl.cdiv(length, BT)):
            row = i_t * BT + o_t
            tl.debug_barrier()  # all warps have read what the first now writes
            tl.store(p_s + every, c_m, mask=m_s)
            tl.store(p_s + plane + every, c_n, mask=m_s)
            tl.store(p_s + 2 * plane + every, c_d, mask=m_s)
            b_k = rows(p_k + o_c, k_t, row, length, m_c, float("-inf"), R)
            b_v = rows(p_v + o_c, v_t, row, length, m_c, 0.0, R)
            b_q = rows(p_q + o_c, q_t, row, length, m_c, 0.0, R)
            s_m, s_n, s_d = careful(b_k, b_v, R)
            b_m, b_n, b_d = joined_before(s_m, s_n, s_d)
            b_m, b_n, b_d = join(c_m, c_n, c_d, b_m, b_n, b_d)
            for r in tl.static_range(R):
                b_m, b_n, b_d = join(b_m, b_n, b_d, exponent(b_k[r]), b_v[r].to(tl.float32), 1.0)
                b_y = b_n / (b_d * (1 + tl.exp2(b_q[r].to(tl.float32) * -LOG2E)))
                tl.store(p_y + (row + r).to(tl.int64) * C, b_y.to(y.dtype.element_ty), mask=(row + r < length) & m_c)
            s_m, s_n, s_d = tl.reduce((s_m, s_n, s_d), 0, join)
            c_m, c_n, c_d = join(c_m, c_n, c_d, s_m[None, :], s_n[None, :], s_d[None, :])
            p_s += C


@triton.jit
def careful(b_k, b_v, R: tl.constexpr):
    """The sums of R rows as multiples of 2^(their largest exponent)."""
    s_m = exponent(b_k[0])
    s_n = b_v[0].to(tl.float32)
    s_d = s_n * 0.0 + 1.0
    for r in tl.static_range(1, R):
        s_m, s_n, s_d = join(s_m, s_n, s_d, exponent(b_k[r]), b_v[r].to(tl.float32), 1.0)
    return s_m, s_n, s_d


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents", "segments"])
def summary_kernel(k, v, sums, cu_seqlens, T, C, L, pieces, documents, segments, k_b, k_t, v_b, v_t, R: tl.constexpr,
                   W: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr):
    """max, num, den of a segment that another follows."""
    BT: tl.constexpr = R * W
    i_s, i_c = tl.program_id(0) // tl.cdiv(C, BC), tl.program_id(0) % tl.cdiv(C, BC)
    i_b, first, _, _, _, rest = place(i_s, T, L, pieces, cu_seqlens, documents, BT)
    if rest <= L:
        return
    o_t = tl.arange(0, W)[:, None] * R
    o_c = tl.max_contiguous(i_c * BC + tl.arange(0, BC), VEC)[None, :]
    m_c = o_c < C
    p_k = k + i_b * k_b + first * k_t
    p_v = v + i_b * v_b + first * v_t
    c_m = tl.zeros([W, BC], tl.float32) + EMPTY
    c_n = tl.zeros([W, BC], tl.float32)
    c_d = tl.zeros([W, BC], tl.float32)
    for i_t in tl.range(0, L // BT, num_stages=STAGES):
        row = i_t * BT + o_t
        b_k = rows(p_k + o_c, k_t, row, L, m_c, 0.0, R)
        b_v = rows(p_v + o_c, v_t, row, L, m_c, 0.0, R)
        m = c_m
        for r in tl.static_range(R):
            m = tl.maximum(m, exponent(b_k[r]))
        c_n *= tl.exp2(c_m - m)
        c_d *= tl.exp2(c_m - m)
        c_m = m
        for r in tl.static_range(R):
            p = tl.exp2(exponent(b_k[r]) - m)
            c_n += p * b_v[r].to(tl.float32)
            c_d += p
    c_m, c_n, c_d = tl.reduce((c_m, c_n, c_d), 0, join)
    o_c = i_c * BC + tl.arange(0, BC)
    p_s = sums + tl.cast(i_s, tl.int64) * C + o_c
    plane = tl.cast(segments, tl.int64) * C
    tl.store(p_s, c_m, mask=o_c < C)
    tl.store(p_s + plane, c_n, mask=o_c < C)
    tl.store(p_s + 2 * plane, c_d, mask=o_c < C)


@triton.jit
def row_slots(i_n, T, L, pieces, cu_seqlens):
    """The first segment's slot of row or document i_n, and how many it has."""
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = tl.load(cu_seqlens + i_n + 1).to(tl.int64) - start
        return start // L + i_n, tl.cdiv(length, L).to(tl.int32)
    else:
        return tl.cast(i_n, tl.int64) * pieces, pieces


@triton.jit(do_not_specialize=["T", "L", "pieces", "segments"])
def chain_kernel(sums, starts, top, num, den, cu_seqlens, T, C, L, pieces, segments, BP: tl.constexpr,
                 BC: tl.constexpr):
    """e, num, den before every segment of a row, from the sums of segments and the row's own state, if it has one."""
    i_n, i_c = tl.program_id(0) // tl.cdiv(C, BC), tl.program_id(0) % tl.cdiv(C, BC)
    slot, n = row_slots(i_n, T, L, pieces, cu_seqlens)
    o_p = tl.arange(0, BP)[:, None]
    o_c = (i_c * BC + tl.arange(0, BC))[None, :]
    m_c = o_c < C
    plane = tl.cast(segments, tl.int64) * C
    c_m = tl.zeros([1, BC], tl.float32) + EMPTY
    c_n = tl.zeros([1, BC], tl.float32)
    c_d = tl.zeros([1, BC], tl.float32)
    if top is not None:
        c_m = exponent(tl.load(top + i_n * C + o_c, mask=m_c, other=0))
        c_n = tl.load(num + i_n * C + o_c, mask=m_c, other=0)
        c_d = tl.load(den + i_n * C + o_c, mask=m_c, other=0)
    for i in range(0, n, BP):
        at = (slot + i + o_p) * C + o_c
        mask = (i + o_p < n) & m_c
        filled = (i + o_p < n - 1) & m_c
        s_m = tl.load(sums + at, mask=filled, other=EMPTY)
        s_n = tl.load(sums + plane + at, mask=filled, other=0)
        s_d = tl.load(sums + 2 * plane + at, mask=filled, other=0)
        b_m, b_n, b_d = joined_before(s_m, s_n, s_d)
        b_m, b_n, b_d = join(c_m, c_n, c_d, b_m, b_n, b_d)
        s_m, s_n, s_d = tl.reduce((s_m, s_n, s_d), 0, join)
        c_m, c_n, c_d = join(c_m, c_n, c_d, s_m[None, :], s_n[None, :], s_d[None, :])
        whole = tl.floor(b_m)
        b_n *= tl.exp2(b_m - whole)
        b_d *= tl.exp2(b_m - whole)
        rise, scale = binade(b_d)
        tl.store(starts + at, whole + rise, mask=mask)
        tl.store(starts + plane + at, b_n * scale, mask=mask)
        tl.store(starts + 2 * plane + at, b_d * scale, mask=mask)


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


def plan(k: Tensor, cu_seqlens: Tensor | None) -> Plan:
    batch, length, channels = k.shape
    each = config("forward", k)
    across, programs = triton.cdiv(channels, each.BC), 16 // each.launch()["num_warps"]
    return cut_rows(batch, length, across, each.R * each.W, programs, k.device, cu_seqlens)


def kept_shapes(k: Tensor, cu_seqlens: Tensor | None) -> tuple[tuple[int, int, int], int]:
    """Of what `forward` keeps: the sums before every chunk, and a number for every segment, of which there are no more
    than chunks."""
    batch, length, channels = k.shape
    each = config("forward", k)
    size = each.R * each.W
    chunks = batch * triton.cdiv(length, size) if cu_seqlens is None else length // size + len(cu_seqlens) - 1
    return (3, chunks, channels), chunks * triton.cdiv(channels, each.BC)


def cut(planned: Plan, k: Tensor) -> bool:
    """Whether any row may have more than one segment."""
    return k.shape[1] > planned.L


def forward(q: Tensor, k: Tensor, v: Tensor, top: Tensor | None, num: Tensor | None, den: Tensor | None,
            cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, C], the last axis contiguous; top, num, den float32 [B, C] of the tokens before, or None
    -> y [B, T, C] as q, float32 sums before every chunk [3, chunks, C], and where segments become steep, int32.
    """
    planned, each = plan(k, cu_seqlens), config("forward", k)
    channels = k.shape[2]
    blocks = triton.cdiv(channels, each.BC)
    kept_shape, steep_shape = kept_shapes(k, cu_seqlens)
    y = q.new_empty(q.shape)
    states = q.new_empty(kept_shape, dtype=torch.float32)
    steep = q.new_empty(steep_shape, dtype=torch.int32)
    if not k.numel():
        return y, states, steep
    shape = k.shape[1], channels, planned.L, planned.pieces
    starts, kept = None, each.launch()
    if top is not None or cut(planned, k):
        starts = q.new_empty((3, planned.segments, channels), dtype=torch.float32)
        sums = torch.empty_like(starts)
        if cut(planned, k):
            summary_kernel[(planned.segments * blocks,)](
                k, v, sums, cu_seqlens, *shape, planned.rows, planned.segments, *k.stride()[:2], *v.stride()[:2],
                **kept)
        width = 16 if INTERPRETED else 32
        chain_kernel[(planned.rows * triton.cdiv(channels, width),)](
            sums, starts, top, num, den, cu_seqlens, *shape, planned.segments, BP=PIECES, BC=width, num_warps=4)
    forward_kernel[(planned.segments * blocks,)](
        q, k, v, y, states, steep, starts, cu_seqlens, *shape, planned.rows, kept_shape[1], planned.segments,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], **kept)
    return y, states, steep
