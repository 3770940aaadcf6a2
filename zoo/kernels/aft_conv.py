"""AFT-conv (2105.14103, section 3.2), causal, with its gate: one key a head, and biases of the distance alone.

    y_t = sigmoid(q_t) * mean_t,   mean_t = sum_{s<=t} exp(k_s + w_{t-s}) v_s / sum_{s<=t} exp(k_s + w_{t-s})

with w = 0 from distance W on. As keys are numbers, not vectors, a chunk is attention with scores k_s + w_{t-s}: its BT
rows meet the keys of their own chunk and of the one before, where all biases are (W <= BT + 1), in two small products;
all that is older is one more key, the sums (max, num, den) that a program carries along its row. Every exponent is
taken relative to the row's largest score.

Kept for the backward pass (zoo/kernels/aft_conv_backward.py), beside the inputs: the log of the row's sum of
weights, float32 [2, B, T, H]: the largest key, and how far above that it is, as a power of two; one number would have
the key's rounding. Rows too few for the GPU are cut into segments, as in zoo/kernels/aft_simple.py: what `summary` sums
of a segment begins a chunk early and ends a chunk early, since the chunk before is no part of the past.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, LOG2E, dot, power_of_two
from zoo.kernels.aft_sums import EMPTY, Plan, cut_rows, exp2, in_rows, place, row_slots

LN2 = tl.constexpr(0.6931471805599453)
PIECES = 16  # segments that are joined at once
PROGRAMS = 2  # on every multiprocessor, to aim at by cutting rows


class Sizes(NamedTuple):
    """Tokens of a chunk, values of a program; warps and stages of the loop's loads, forward and backward."""

    BT: int
    BV: int
    forward: tuple[int, int]
    backward: tuple[int, int]


# tokens of a chunk (64 at the most, for 65 biases) times the bytes of an element. float32 products are multiply-adds:
# as tf32x3 the backward pass has 8 KB of spills a thread
CONFIGS = {64: ((8, 1), (4, 1)), 128: ((8, 1), (8, 1)), 256: ((16, 1), (8, 1))}


def sizes(v: Tensor, bias: Tensor) -> Sizes:
    width = max(16, min(64, power_of_two(v.shape[3])))
    if INTERPRETED:
        return Sizes(max(16, power_of_two(bias.shape[1] - 1)), 16, (4, 1), (4, 1))
    size = max(32, power_of_two(max(1, bias.shape[1] - 1)))
    return Sizes(size, width, *CONFIGS[size * v.element_size()])


@triton.jit(do_not_specialize=["W"])
def table_kernel(bias, table, W, bias_h, BT: tl.constexpr, KEYS_DOWN: tl.constexpr):
    """log2 exp(w) of every row and key of a chunk, and of every row with the keys of the chunk before: [H, 2, BT, BT].
    EMPTY where the key comes after the row."""
    i_h, i_before = tl.program_id(0) // 2, tl.program_id(0) % 2
    o_t = tl.arange(0, BT)
    distance = o_t[:, None] - o_t[None, :]
    if KEYS_DOWN:
        distance = o_t[None, :] - o_t[:, None]
    distance += i_before * BT
    w = tl.load(bias + i_h * bias_h + distance, mask=(distance >= 0) & (distance < W), other=0).to(tl.float32) * LOG2E
    tl.store(table + tl.program_id(0) * BT * BT + o_t[:, None] * BT + o_t[None, :], tl.where(distance >= 0, w, EMPTY))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def keys(p, m):
    """No less than EMPTY, which is also the key of a token that is not there."""
    k = tl.load(p, mask=m, other=EMPTY).to(tl.float32)
    return tl.where(k < EMPTY, EMPTY, k)


@triton.jit
def tile(table, i_h, i_before, BT: tl.constexpr):
    """Read where it is used: held in registers, tiles and pointers to them would be half of all there are."""
    o_t = tl.arange(0, BT)
    return tl.load(table + (i_h * 2 + i_before) * BT * BT + o_t[:, None] * BT + o_t[None, :])


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents", "segments", "plane"])
def forward_kernel(q, k, v, table, y, lse, dy, dq, g, delta, starts, cu_seqlens, T, H, K, L, pieces, documents,
                   segments, plane, q_t, q_h, k_t, v_t, v_h, dy_t, dy_h, BT: tl.constexpr, BV: tl.constexpr,
                   STAGES: tl.constexpr, PRECISION: tl.constexpr, GRADIENTS: tl.constexpr, SPLIT: tl.constexpr):
    """y and lse; or with GRADIENTS dq, g and delta, the mean found again more precisely (SPLIT: weights as a sum of
    two numbers of v's type). A program for some values of a head has a share of delta."""
    i_v, i_h = tl.program_id(0) % tl.cdiv(K, BV), tl.program_id(0) // tl.cdiv(K, BV) % H
    i_s = tl.program_id(0) // (tl.cdiv(K, BV) * H)
    i_b, first, length, _, piece, _ = place(i_s, T, L, pieces, cu_seqlens, documents, BT)
    if length <= 0:
        return
    o_t = tl.arange(0, BT)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = (o_v < K)[None, :]
    p_q = q + (i_b * T + first) * q_t + i_h * q_h + o_v[None, :]
    p_k = k + (i_b * T + first) * k_t + i_h
    p_v = v + (i_b * T + first) * v_t + i_h * v_h + o_v[None, :]
    own = (i_b * T + first) * H + i_h
    at = own * K + o_v[None, :]
    if starts is not None:
        slots = tl.cast(segments, tl.int64) * H * K
        p_s = starts + (tl.cast(i_s, tl.int64) * H + i_h) * K
        c_d = tl.load(p_s + 2 * slots + i_v * BV)
        c_m = tl.where(c_d > 0, tl.load(p_s + i_v * BV), EMPTY)
        c_n = tl.load(p_s + slots + o_v, mask=o_v < K, other=0)
    else:
        c_m = tl.cast(EMPTY, tl.float32)
        c_d = tl.cast(0.0, tl.float32)
        c_n = tl.zeros([BV], tl.float32)
    for i_t in tl.range(0, tl.cdiv(length, BT), num_stages=STAGES):
        row = i_t * BT + o_t
        wide, old = row.to(tl.int64), (row - BT).to(tl.int64)
        m_t, m_old = row < length, (row >= BT) | (piece > 0)
        b_k = keys(p_k + wide * k_t, m_t)
        b_old = keys(p_k + old * k_t, m_old)
        b_v = tl.load(p_v + wide[:, None] * v_t, mask=m_t[:, None] & m_v, other=0)
        b_v_old = tl.load(p_v + old[:, None] * v_t, mask=m_old[:, None] & m_v, other=0)
        b_q = tl.load(p_q + wide[:, None] * q_t, mask=m_t[:, None] & m_v, other=0).to(tl.float32)
        largest = tl.maximum(tl.associative_scan(b_k, 0, larger), tl.maximum(tl.max(b_old, 0), c_m))  # key of each row
        near = (b_k[None, :] - largest[:, None]) * LOG2E + tile(table, i_h, 0, BT)
        before = (b_old[None, :] - largest[:, None]) * LOG2E + tile(table, i_h, 1, BT)
        far = (c_m - largest) * LOG2E
        top = tl.maximum(tl.maximum(tl.max(near, 1), tl.max(before, 1)), far)
        near, before, far = exp2(near - top[:, None]), exp2(before - top[:, None]), exp2(far - top)
        b_d = tl.sum(near, 1) + tl.sum(before, 1) + far * c_d
        b_n = far[:, None] * c_n[None, :]
        if SPLIT:
            b_n = dot((near - near.to(v.dtype.element_ty).to(tl.float32)).to(v.dtype.element_ty), b_v, b_n, PRECISION)
            rest = (before - before.to(v.dtype.element_ty).to(tl.float32)).to(v.dtype.element_ty)
            b_n = dot(rest, b_v_old, b_n, PRECISION)
        b_n = dot(near.to(v.dtype.element_ty), b_v, b_n, PRECISION)
        b_n = dot(before.to(v.dtype.element_ty), b_v_old, b_n, PRECISION)
        mean, gate, there = b_n / b_d[:, None], tl.sigmoid(b_q), wide[:, None] * (H * K)
        if GRADIENTS:
            b_dy = tl.load(dy + (i_b * T + first) * dy_t + i_h * dy_h + o_v[None, :] + wide[:, None] * dy_t,
                           mask=m_t[:, None] & m_v, other=0).to(tl.float32)
            b_g = (b_dy * gate).to(g.dtype.element_ty)
            tl.store(g + at + there, b_g, mask=m_t[:, None] & m_v)
            tl.store(dq + at + there, (b_dy * mean * gate * (1 - gate)).to(dq.dtype.element_ty),
                     mask=m_t[:, None] & m_v)
            b_delta = tl.sum(tl.where(m_v, b_g.to(tl.float32) * mean, 0.0), 1)
            tl.store(delta + i_v * plane + own + wide * H, b_delta, mask=m_t)
        else:
            tl.store(y + at + there, (mean * gate).to(y.dtype.element_ty), mask=m_t[:, None] & m_v)
            if i_v == 0:
                tl.store(lse + own + wide * H, largest, mask=m_t)
                tl.store(lse + plane + own + wide * H, top + tl.log2(b_d), mask=m_t)
        c_m, c_n, c_d = absorb(c_m, c_n, c_d, b_old, b_v_old, m_old)


@triton.jit
def absorb(c_m, c_n, c_d, b_k, b_v, m_t):
    """Sums with the tokens of a chunk, where m_t."""
    top = tl.maximum(c_m, tl.max(b_k, 0))
    p = tl.where(m_t, exp2((b_k - top) * LOG2E), 0.0)
    f = exp2((c_m - top) * LOG2E)
    return top, c_n * f + tl.sum(p[:, None] * b_v.to(tl.float32), 0), c_d * f + tl.sum(p, 0)


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents", "segments"])
def summary_kernel(k, v, sums, cu_seqlens, T, H, K, L, pieces, documents, segments, k_t, v_t, v_h,
                   BT: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr):
    """max, num, den of a segment that another follows, a chunk early; for every value, as `chain_kernel` asks."""
    i_v, i_h = tl.program_id(0) % tl.cdiv(K, BV), tl.program_id(0) // tl.cdiv(K, BV) % H
    i_s = tl.program_id(0) // (tl.cdiv(K, BV) * H)
    i_b, first, _, _, piece, rest = place(i_s, T, L, pieces, cu_seqlens, documents, BT)
    if rest <= L:
        return
    o_t = tl.arange(0, BT)
    o_v = i_v * BV + tl.arange(0, BV)
    m_v = o_v < K
    p_k = k + (i_b * T + first) * k_t + i_h
    p_v = v + (i_b * T + first) * v_t + i_h * v_h + o_v[None, :]
    c_m = tl.cast(EMPTY, tl.float32)
    c_d = tl.cast(0.0, tl.float32)
    c_n = tl.zeros([BV], tl.float32)
    for i_t in tl.range(0, L // BT, num_stages=STAGES):
        row = ((i_t - 1) * BT + o_t).to(tl.int64)
        m_t = (row >= 0) | (piece > 0)
        b_k = keys(p_k + row * k_t, m_t)
        b_v = tl.load(p_v + row[:, None] * v_t, mask=m_t[:, None] & m_v[None, :], other=0)
        c_m, c_n, c_d = absorb(c_m, c_n, c_d, b_k, b_v, m_t)
    slots = tl.cast(segments, tl.int64) * H * K
    p_s = sums + (tl.cast(i_s, tl.int64) * H + i_h) * K + o_v
    tl.store(p_s, c_m + c_n * 0.0, mask=m_v)
    tl.store(p_s + slots, c_n, mask=m_v)
    tl.store(p_s + 2 * slots, c_d + c_n * 0.0, mask=m_v)


@triton.jit
def join_keys(m1, n1, d1, m2, n2, d2):
    """Sums as multiples of exp(m), m as keys are: what is made of log2 exp(m) would have its rounding."""
    m = tl.maximum(m1, m2)
    f1, f2 = exp2((m1 - m) * LOG2E), exp2((m2 - m) * LOG2E)
    return m, n1 * f1 + n2 * f2, d1 * f1 + d2 * f2


@triton.jit
def join_keys_before(m1, n1, d1, before_m1, before_n1, before_d1, m2, n2, d2, before_m2, before_n2, before_d2):
    m, n, d = join_keys(m1, n1, d1, m2, n2, d2)
    before_m, before_n, before_d = join_keys(m1, n1, d1, before_m2, before_n2, before_d2)
    return m, n, d, before_m, before_n, before_d


@triton.jit(do_not_specialize=["T", "L", "pieces", "segments"])
def chain_kernel(sums, joined, cu_seqlens, T, C, L, pieces, segments, BP: tl.constexpr, BC: tl.constexpr,
                 REVERSE: tl.constexpr):
    """The sums of all segments of a row before each, or of all after it."""
    i_n, i_c = tl.program_id(0) // tl.cdiv(C, BC), tl.program_id(0) % tl.cdiv(C, BC)
    slot, n = row_slots(i_n, T, L, pieces, cu_seqlens)
    o_p = tl.arange(0, BP)[:, None]
    o_c = (i_c * BC + tl.arange(0, BC))[None, :]
    m_c = o_c < C
    plane = tl.cast(segments, tl.int64) * C
    c_m = tl.zeros([1, BC], tl.float32) + EMPTY
    c_n = tl.zeros([1, BC], tl.float32)
    c_d = tl.zeros([1, BC], tl.float32)
    for i in range(0, n, BP):
        place = i + o_p  # in the order of joining; the last one's sums are nobody's
        at = (slot + place) * C + o_c
        if REVERSE:
            at = (slot + n - 1 - place) * C + o_c
        s_m = tl.load(sums + at, mask=(place < n - 1) & m_c, other=EMPTY)
        s_n = tl.load(sums + plane + at, mask=(place < n - 1) & m_c, other=0)
        s_d = tl.load(sums + 2 * plane + at, mask=(place < n - 1) & m_c, other=0)
        nil = tl.zeros_like(s_n)
        found = tl.associative_scan((s_m, s_n, s_d, nil + EMPTY, nil, nil), 0, join_keys_before)
        b_m, b_n, b_d = join_keys(c_m, c_n, c_d, found[3], found[4], found[5])
        mask = (place < n) & m_c
        tl.store(joined + at, b_m, mask=mask)
        tl.store(joined + plane + at, b_n, mask=mask)
        tl.store(joined + 2 * plane + at, b_d, mask=mask)
        s_m, s_n, s_d = tl.reduce((s_m, s_n, s_d), 0, join_keys)
        c_m, c_n, c_d = join_keys(c_m, c_n, c_d, s_m[None, :], s_n[None, :], s_d[None, :])


def chain(sums: Tensor, length: int, planned: Plan, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    joined, channels, width = torch.empty_like(sums), sums.shape[2], 16 if INTERPRETED else 32
    chain_kernel[(planned.rows * triton.cdiv(channels, width),)](
        sums, joined, cu_seqlens, length, channels, planned.L, planned.pieces, planned.segments, BP=PIECES, BC=width,
        REVERSE=reverse, num_warps=4)
    return joined


def plan(v: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> Plan:
    batch, length, heads, width = v.shape
    each = sizes(v, bias)
    across = heads * triton.cdiv(width, each.BV)
    return cut_rows(batch, length, across, each.BT, PROGRAMS, v.device, cu_seqlens)


def make_table(bias: Tensor, size: int, keys_down: bool) -> Tensor:
    table = bias.new_empty((len(bias), 2, size, size), dtype=torch.float32)
    table_kernel[(2 * len(bias),)](bias, table, bias.shape[1], bias.stride(0), BT=size, KEYS_DOWN=keys_down,
                                   num_warps=4)
    return table


def starts_of(k: Tensor, v: Tensor, planned: Plan, each: Sizes, cu_seqlens: Tensor | None) -> Tensor | None:
    """Sums before every segment, None where no row has several."""
    _, length, heads, width = v.shape
    if cu_seqlens is None and length <= planned.L:  # for documents always, as in AFT-simple
        return None
    sums = v.new_empty((3, planned.segments, heads * width), dtype=torch.float32)
    summary_kernel[(planned.segments * heads * triton.cdiv(width, each.BV),)](
        k, v, sums, cu_seqlens, length, heads, width, planned.L, planned.pieces, planned.rows, planned.segments,
        k.stride(1), *v.stride()[1:3], BT=each.BT, BV=each.BV, STAGES=2, num_warps=4)
    return chain(sums, length, planned, cu_seqlens, False)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """q, v [B, T, H, K], k [B, T, H], bias [H, W] -> y [B, T, H, K], lse [2, B, T, H]."""
    q, k, v, bias = in_rows(q), in_rows(k), in_rows(v), bias.contiguous()
    planned, each = plan(v, bias, cu_seqlens), sizes(v, bias)
    y, lse = q.new_empty(q.shape), k.new_empty((2, *k.shape), dtype=torch.float32)
    if v.numel():
        walk(q, k, v, make_table(bias, each.BT, False), planned, each, cu_seqlens, y=y, lse=lse)
    return y, lse


def walk(q: Tensor, k: Tensor, v: Tensor, table: Tensor, planned: Plan, each: Sizes, cu_seqlens: Tensor | None, *,
         y: Tensor | None = None, lse: Tensor | None = None, dy: Tensor | None = None, dq: Tensor | None = None,
         g: Tensor | None = None, delta: Tensor | None = None) -> None:
    """`forward_kernel` into y and lse, or from dy into dq, g and delta."""
    _, length, heads, width = v.shape
    grid = (planned.segments * heads * triton.cdiv(width, each.BV),)
    forward_kernel[grid](
        q, k, v, table, y, lse, dy, dq, g, delta, starts_of(k, v, planned, each, cu_seqlens), cu_seqlens, length, heads,
        width, planned.L, planned.pieces, planned.rows, planned.segments, k.numel(), *q.stride()[1:3], k.stride(1),
        *v.stride()[1:3], *(dy if dy is not None else q).stride()[1:3], BT=each.BT, BV=each.BV, STAGES=each.forward[1],
        PRECISION="ieee", GRADIENTS=dy is not None, SPLIT=dy is not None and v.element_size() == 2,
        num_warps=each.forward[0])
