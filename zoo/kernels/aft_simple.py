"""AFT-simple (2105.14103, equation 5), causal, with its gate: a running softmax over the keys of every channel.

    y_t = sigmoid(q_t) * mean_t,   mean_t = num_t / den_t,   num_t, den_t = sum_{s<=t} exp(k_s) (v_s, 1)

A program walks a row of the batch, a document or a segment of one, over BC channels, in chunks of W R tokens: warp w
takes the R tokens from w R on, a thread a few channels of them, so that sums over its tokens are additions in registers
and warps meet once a chunk, for the sums of the warps before. All is kept as multiples of 2^e, e a whole number near
log2 of the sum of all weights before the chunk, so den starts a chunk in [1, 2), e moves without rounding, and a weight
is exp2(k log2(e) - e): no maximum is looked for.

Where the weights of a chunk pass STEEP, or are not finite, what was written from that chunk on is done again carefully:
the same walk with the running maximum of the keys, as a whole number too, in the place of e, and no weight over 2.

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
from zoo.kernels.aft_sums import (
    EMPTY,
    Plan,
    add,
    before,
    binade,
    careful,
    cut_rows,
    exp2,
    in_rows,
    inverse,
    join,
    join_token,
    joined_before,
    place,
    row_slots,
    rows,
    start_of,
    weight,
    whole,
)

BIG = tl.constexpr(2.0**60)  # up to where sums are taken as they are
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
PIECES = 16  # segments that `chain` takes at once


def config(direction: str, k: Tensor) -> Config:
    return Config(4, 4, 16, 1, 1, 128) if INTERPRETED else CONFIGS[direction, k.element_size()]


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents", "chunks", "segments"])
def forward_kernel(q, k, v, y, states, steep, starts, cu_seqlens, T, C, L, pieces, documents, chunks, segments,
                   x_t, R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
                   STAGES: tl.constexpr, STEEP: tl.constexpr):
    BT: tl.constexpr = R * W
    i_s, i_c = tl.program_id(0) // tl.cdiv(C, BC), tl.program_id(0) % tl.cdiv(C, BC)
    i_b, first, length, chunk, _, _ = place(i_s, T, L, pieces, cu_seqlens, documents, BT)
    if length <= 0:
        return
    o_t = tl.arange(0, W)[:, None] * R
    o_c = tl.max_contiguous(i_c * BC + tl.arange(0, BC), VEC)[None, :]
    m_c = o_c < C
    every = o_t * 0 + o_c  # the channels, for each warp
    o_x, o_y = o_t * x_t + o_c, o_t * C + o_c
    here, step = (i_b * T + first) * x_t, tl.cast(x_t, tl.int64) * BT
    p_q, p_k, p_v, p_y = q + here, k + here, v + here, y + (i_b * T + first) * C
    p_s = states + chunk * C
    plane = tl.cast(chunks, tl.int64) * C
    m_s = (o_t == 0) & m_c
    c_e, c_n, c_d = start_of(p_k + every, starts, tl.cast(segments, tl.int64) * C,
                             tl.cast(i_s, tl.int64) * C + every, m_c)
    steep_at = tl.zeros([W, BC], tl.int32) + NEVER
    for i_t in tl.range(0, tl.cdiv(length, BT), num_stages=STAGES):
        row = i_t * BT + o_t
        b_k = rows(p_k, o_x, x_t, row, length, m_c, float("-inf"), R)
        b_v = rows(p_v, o_x, x_t, row, length, m_c, 0.0, R)
        b_q = rows(p_q, o_x, x_t, row, length, m_c, 0.0, R)
        tl.store(p_s + every, c_e, mask=m_s)
        tl.store(p_s + plane + every, c_n, mask=m_s)
        tl.store(p_s + 2 * plane + every, c_d, mask=m_s)
        s_n = tl.zeros([W, BC], tl.float32)
        s_d = tl.zeros([W, BC], tl.float32)
        b_n, b_d = tl.tuple(()), tl.tuple(())
        for r in tl.static_range(R):
            p = weight(b_k[r], c_e)
            s_n += p * b_v[r].to(tl.float32)
            s_d += p
            b_n += (s_n,)
            b_d += (s_d,)
        steep_at = tl.where((tl.abs(s_n) < BIG) & (s_d < STEEP), steep_at, tl.minimum(steep_at, i_t))
        w_n, w_d = before(s_n, s_d, False)
        w_n, w_d = w_n + c_n, w_d + c_d
        for r in tl.static_range(R):
            b_y = (w_n + b_n[r]) * inverse((w_d + b_d[r]) * (1 + exp2(b_q[r].to(tl.float32) * -LOG2E)))
            tl.store(p_y + (o_y + C * r), b_y.to(y.dtype.element_ty), mask=(row + r < length) & m_c)
        s_n, s_d = tl.reduce((s_n, s_d), 0, add)
        c_n += s_n[None, :]
        c_d += s_d[None, :]
        rise, scale = binade(c_d)
        c_e, c_n, c_d = c_e + rise, c_n * scale, c_d * scale
        p_q, p_k, p_v, p_y, p_s = p_q + step, p_k + step, p_v + step, p_y + BT * C, p_s + C
    steep_at = tl.min(tl.where(m_c, steep_at, NEVER))
    tl.store(steep + tl.program_id(0), steep_at)
    if steep_at < NEVER:
        tl.debug_barrier()
        first += tl.cast(steep_at, tl.int64) * BT
        here = (i_b * T + first) * x_t
        p_q, p_k, p_v, p_y = q + here, k + here, v + here, y + (i_b * T + first) * C
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
            b_k = rows(p_k, o_x, x_t, row, length, m_c, float("-inf"), R)
            b_v = rows(p_v, o_x, x_t, row, length, m_c, 0.0, R)
            b_q = rows(p_q, o_x, x_t, row, length, m_c, 0.0, R)
            s_m, s_n, s_d = careful(b_k, b_v, R)
            b_m, b_n, b_d = joined_before(s_m, s_n, s_d)
            b_m, b_n, b_d = join(c_m, c_n, c_d, b_m, b_n, b_d)
            for r in tl.static_range(R):
                b_m, b_n, b_d = join_token(b_m, b_n, b_d, b_k[r], b_v[r])
                b_y = b_n * inverse(b_d * (1 + exp2(b_q[r].to(tl.float32) * -LOG2E)))
                tl.store(p_y + (o_y + C * r), b_y.to(y.dtype.element_ty), mask=(row + r < length) & m_c)
            s_m, s_n, s_d = tl.reduce((s_m, s_n, s_d), 0, join)
            c_m, c_n, c_d = join(c_m, c_n, c_d, s_m[None, :], s_n[None, :], s_d[None, :])
            p_q, p_k, p_v, p_y, p_s = p_q + step, p_k + step, p_v + step, p_y + BT * C, p_s + C


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents", "segments"])
def summary_kernel(k, v, sums, cu_seqlens, T, C, L, pieces, documents, segments, x_t, R: tl.constexpr,
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
    o_x = o_t * x_t + o_c
    p_k, p_v = k + (i_b * T + first) * x_t, v + (i_b * T + first) * x_t
    c_m = tl.zeros([W, BC], tl.float32) + EMPTY
    c_n = tl.zeros([W, BC], tl.float32)
    c_d = tl.zeros([W, BC], tl.float32)
    for i_t in tl.range(0, L // BT, num_stages=STAGES):
        row = i_t * BT + o_t
        b_k = rows(p_k, o_x, x_t, row, L, m_c, 0.0, R)
        b_v = rows(p_v, o_x, x_t, row, L, m_c, 0.0, R)
        m = c_m
        for r in tl.static_range(R):
            m = tl.maximum(m, whole(b_k[r]))
        c_n *= exp2(c_m - m)
        c_d *= exp2(c_m - m)
        c_m = m
        for r in tl.static_range(R):
            p = weight(b_k[r], m)
            c_n += p * b_v[r].to(tl.float32)
            c_d += p
        p_k += tl.cast(x_t, tl.int64) * BT
        p_v += tl.cast(x_t, tl.int64) * BT
    c_m, c_n, c_d = tl.reduce((c_m, c_n, c_d), 0, join)
    o_c = i_c * BC + tl.arange(0, BC)
    p_s = sums + tl.cast(i_s, tl.int64) * C + o_c
    plane = tl.cast(segments, tl.int64) * C
    tl.store(p_s, c_m, mask=o_c < C)
    tl.store(p_s + plane, c_n, mask=o_c < C)
    tl.store(p_s + 2 * plane, c_d, mask=o_c < C)


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
        b_t = tl.load(top + i_n * C + o_c, mask=m_c, other=0)
        c_m = whole(b_t)
        c_n = tl.load(num + i_n * C + o_c, mask=m_c, other=0) * weight(b_t, c_m)
        c_d = tl.load(den + i_n * C + o_c, mask=m_c, other=0) * weight(b_t, c_m)
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
        rise, scale = binade(b_d)
        tl.store(starts + at, b_m + rise, mask=mask)
        tl.store(starts + plane + at, b_n * scale, mask=mask)
        tl.store(starts + 2 * plane + at, b_d * scale, mask=mask)


def steepest(k: Tensor) -> float:
    """Up to where a chunk's weights, relative to all before it, are taken as they are. One of 2^n has the rounding of
    n, which float32 would show where the rows after a large key are another segment's."""
    return 2.0**60 if k.element_size() == 2 else 2.0**16


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


def cut(planned: Plan, k: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether any row may have more than one segment. For documents always, so that longer ones compile nothing new;
    a document that is one segment adds nothing."""
    return cu_seqlens is not None or k.shape[1] > planned.L


def alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, or copies, so that a token is at the same place in all three, a row of the batch after the one before:
    that saves registers, and builds. Splits of one projection are already so."""
    q, k, v = in_rows(q), in_rows(k), in_rows(v)
    if not q.stride(1) == k.stride(1) == v.stride(1) < 2**24:
        q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    return q, k, v


def forward(q: Tensor, k: Tensor, v: Tensor, top: Tensor | None, num: Tensor | None, den: Tensor | None,
            cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, C]; top, num, den float32 [B, C] of the tokens before, or None
    -> y [B, T, C] as q, float32 sums before every chunk [3, chunks, C], and where segments become steep, int32.
    """
    q, k, v = alike(q, k, v)
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
    if top is not None or cut(planned, k, cu_seqlens):
        starts = q.new_empty((3, planned.segments, channels), dtype=torch.float32)
        sums = torch.empty_like(starts)
        if cut(planned, k, cu_seqlens):
            summary_kernel[(planned.segments * blocks,)](
                k, v, sums, cu_seqlens, *shape, planned.rows, planned.segments, k.stride(1), **kept)
        width = 16 if INTERPRETED else 32
        chain_kernel[(planned.rows * triton.cdiv(channels, width),)](
            sums, starts, top, num, den, cu_seqlens, *shape, planned.segments, BP=PIECES, BC=width, num_warps=4)
    forward_kernel[(planned.segments * blocks,)](
        q, k, v, y, states, steep, starts, cu_seqlens, *shape, planned.rows, kept_shape[1], planned.segments,
        k.stride(1), STEEP=steepest(k), **kept)
    return y, states, steep
