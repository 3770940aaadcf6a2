"""Backward of AFT-simple; names, chunks, warps and segments as in zoo/kernels/aft_simple.py.

With g_t = dy_t sigmoid(q_t), a_t = g_t / den_t and b_t = a_t mean_t,

    dq_t = g_t mean_t (1 - sigmoid(q_t)),   dv_s = exp(k_s) sum_{t>=s} a_t,   dk_s = v_s dv_s - exp(k_s) sum_{t>=s} b_t.

A program walks back from the last chunk. It finds num and den of a chunk again from the sums kept at its start, then
sums a and b from its end: multiples of 2^-e, the e of that chunk, which is no more than that of the chunk after it.
Chunks from where the forward pass was careful are treated with the running maximum in the place of e.

In float32 b is what it is for values less c, the mean at a chunk's end: the gradient of a key that outweighs all others
is a difference of sums over all later tokens, which their rounding would show; less c there is nothing to subtract.
At a border c is that of the sums kept there, and moving on from c to c' adds (c - c') sum a.

Where rows are cut, a first walk gives the sums of a and b over each segment, `chain_back` those of all later ones. What
comes out at a row's first token is the gradient of a state given by the caller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, LOG2E
from zoo.kernels.aft_simple import PIECES, alike, config, cut, plan
from zoo.kernels.aft_sums import (
    LOG2E_32,
    add,
    before,
    careful,
    exp2,
    inverse,
    join,
    join_token,
    joined_before,
    place,
    row_slots,
    rows,
    weight,
)

LAST = tl.constexpr(1e30)  # e of what comes after the last token: nothing


@triton.jit
def fall(m1, a1, b1, m2, a2, b2):
    """Sums a1, b1 of later rows and a2, b2 of earlier ones, multiples of 2^-m, as multiples of 2^-m2; m2 <= m1."""
    f = exp2(m2 - m1)
    return m2, a2 + a1 * f, b2 + b1 * f


@triton.jit
def fall_to(m1, a1, b1, c1, m2, a2, b2, c2):
    """The same, where b is for values less c."""
    m, a, b = fall(m1, a1, b1 + (c1 - c2) * a1, m2, a2, b2)
    return m, a, b, c2


@triton.jit
def mean_of(n, d):
    """Of sums before a chunk, 0 where nothing is before it.

    Rounded before anything else is done with it: of c - n share the compiler would make one multiply-add, and the sums
    would be moved by another number than the c that is kept.
    """
    share = inverse(tl.where(d > 0, d, 1.0))
    if INTERPRETED:  # which has no multiply-add
        return n * share
    else:
        return tl.fma(n, share, 0.0)


@triton.jit
def less(n, d, c):
    """n - c d, rounded once."""
    if INTERPRETED:  # which has no multiply-add
        return (n - c.to(tl.float64) * d).to(tl.float32)
    else:
        return tl.fma(c * -1.0, d, n)


@triton.jit
def mean_less(n, d, share, c, CENTRED: tl.constexpr):
    """n / d - c, share = 1 / d."""
    return (less(n, d, c) if CENTRED else n) * share


@triton.jit
def key_gradient(p, v, a, b, c, CENTRED: tl.constexpr):
    """p ((v - c) a - b), from p v as it went into num, so that a key that outweighs all others has next to nothing."""
    return less(p * v, p, c) * a - p * b if CENTRED else p * (v * a - b)


@triton.jit
def fall_after(m1, a1, b1, after_m1, after_a1, after_b1, m2, a2, b2, after_m2, after_a2, after_b2):
    m, a, b = fall(m1, a1, b1, m2, a2, b2)
    after_m, after_a, after_b = fall(m1, a1, b1, after_m2, after_a2, after_b2)
    return m, a, b, after_m, after_a, after_b


@triton.jit
def fallen_after(m, a, b, last):
    """Sums of the rows of [W, BC] after each, as multiples of 2^-last; its own sums are multiples of 2^-m."""
    nil = tl.zeros_like(a)
    found = tl.associative_scan((m, a, b, last, nil, nil), 0, fall_after, reverse=True)
    return found[4], found[5]


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents", "chunks", "segments"])
def backward_kernel(q, k, v, dy, dq, dk, dv, states, steep, ends, sums, cu_seqlens, T, C, L, pieces, documents, chunks,
                    segments, x_t, R: tl.constexpr, W: tl.constexpr,
                    BC: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr, SUMMARY: tl.constexpr):
    """Gradients of a segment, or with SUMMARY the sums of a and b of one that another precedes. `sums`: where those
    go, by segment; without SUMMARY those at the first token of every row of the batch, or None."""
    BT: tl.constexpr = R * W
    CENTRED: tl.constexpr = k.dtype.element_ty == tl.float32
    i_s, i_c = tl.program_id(0) // tl.cdiv(C, BC), tl.program_id(0) % tl.cdiv(C, BC)
    i_b, first, length, chunk, piece, rest = place(i_s, T, L, pieces, cu_seqlens, documents, BT)
    nothing = length <= 0
    if SUMMARY:
        nothing = nothing | (piece == 0)
    if nothing:
        return
    o_t = tl.arange(0, W)[:, None] * R
    o_c = tl.max_contiguous(i_c * BC + tl.arange(0, BC), VEC)[None, :]
    m_c = o_c < C
    every = o_t * 0 + o_c
    n = tl.cdiv(length, BT)
    plane = tl.cast(chunks, tl.int64) * C
    slots = tl.cast(segments, tl.int64) * C
    if ends is None:
        c_e = tl.zeros([W, BC], tl.float32) + LAST
        c_a = tl.zeros([W, BC], tl.float32)
        c_b = tl.zeros([W, BC], tl.float32)
    else:
        m_e = m_c & (rest > L)
        c_e = tl.load(ends + tl.cast(i_s, tl.int64) * C + every, mask=m_e, other=LAST)
        c_a = tl.load(ends + slots + tl.cast(i_s, tl.int64) * C + every, mask=m_e, other=0)
        c_b = tl.load(ends + 2 * slots + tl.cast(i_s, tl.int64) * C + every, mask=m_e, other=0)
    smooth = tl.minimum(tl.load(steep + tl.program_id(0)), n)
    o_x, o_y, step = o_t * x_t + o_c, o_t * C + o_c, tl.cast(x_t, tl.int64) * BT
    o_0 = first + (n - 1) * BT
    here, own = (i_b * T + o_0) * x_t, (i_b * T + o_0) * C
    p_q, p_k, p_v, p_dy = q + here, k + here, v + here, dy + own
    p_dq, p_dk, p_dv = dq + own, dk + own, dv + own
    p_s = states + (chunk + n - 1) * C + every
    c = c_a * 0.0
    if CENTRED:
        p_c = p_s + tl.where(rest > L, plane + C, plane)  # of a row's last chunk its start: nothing comes after it
        c = mean_of(tl.load(p_c, mask=m_c, other=0), tl.load(p_c + plane, mask=m_c, other=0))
    for i in range(0, n - smooth):
        row = (n - 1 - i) * BT + o_t
        b_k = rows(p_k, o_x, x_t, row, length, m_c, float("-inf"), R)
        b_v = rows(p_v, o_x, x_t, row, length, m_c, 0.0, R)
        b_q = rows(p_q, o_x, x_t, row, length, m_c, 0.0, R)
        b_dy = rows(p_dy, o_y, C, row, length, m_c, 0.0, R)
        s_m = tl.load(p_s, mask=m_c, other=0)
        s_n = tl.load(p_s + plane, mask=m_c, other=0)
        s_d = tl.load(p_s + 2 * plane, mask=m_c, other=1)
        b_m, b_n, b_d = careful(b_k, b_v, R)
        b_m, b_n, b_d = joined_before(b_m, b_n, b_d)
        b_m, b_n, b_d = join(s_m, s_n, s_d, b_m, b_n, b_d)
        t_m, t_a, t_b = tl.tuple(()), tl.tuple(()), tl.tuple(())
        for r in tl.static_range(R):
            b_m, b_n, b_d = join_token(b_m, b_n, b_d, b_k[r], b_v[r])
            share = inverse(b_d)
            mean, gate = b_n * share, inverse(1 + exp2(b_q[r].to(tl.float32) * -LOG2E))
            g = tl.where(row + r < length, b_dy[r].to(tl.float32) * gate, 0.0)
            if not SUMMARY:
                tl.store(p_dq + (o_y + C * r), (g * mean * (1 - gate)).to(dq.dtype.element_ty),
                         mask=(row + r < length) & m_c)
            a = g * share
            t_m += (b_m,)
            t_a += (a,)
            t_b += (tl.where(row + r < length, a * mean_less(b_n, b_d, share, c, CENTRED), 0.0),)
        w_m, w_a, w_b = t_m[R - 1], t_a[R - 1], t_b[R - 1]
        for r in tl.static_range(1, R):
            w_m, w_a, w_b = fall(w_m, w_a, w_b, t_m[R - 1 - r], t_a[R - 1 - r], t_b[R - 1 - r])
        if not SUMMARY:
            b_a, b_b = fallen_after(w_m, w_a, w_b, t_m[R - 1])
            last, b_a, b_b = fall(c_e, c_a, c_b, t_m[R - 1], b_a, b_b)
            for r in tl.static_range(R):
                last, b_a, b_b = fall(last, b_a, b_b, t_m[R - 1 - r], t_a[R - 1 - r], t_b[R - 1 - r])
                p = weight(b_k[R - 1 - r], last)
                mask = (row + R - 1 - r < length) & m_c
                tl.store(p_dv + (o_y + C * (R - 1 - r)), (p * b_a).to(dv.dtype.element_ty), mask=mask)
                b_dk = key_gradient(p, b_v[R - 1 - r].to(tl.float32), b_a, b_b, c, CENTRED)
                tl.store(p_dk + (o_y + C * (R - 1 - r)), b_dk.to(dk.dtype.element_ty), mask=mask)
        _, w_a, w_b = fall(w_m, w_a, w_b, s_m, 0.0, 0.0)
        w_a, w_b = tl.reduce((w_a, w_b), 0, add)
        c_e, c_a, c_b = fall(c_e, c_a, c_b, s_m, w_a[None, :], w_b[None, :])
        if CENTRED:
            before_c = mean_of(s_n, s_d)
            c_b += (c - before_c) * c_a
            c = before_c
        p_q, p_k, p_v, p_s = p_q - step, p_k - step, p_v - step, p_s - C
        p_dy, p_dq, p_dk, p_dv = p_dy - BT * C, p_dq - BT * C, p_dk - BT * C, p_dv - BT * C
    o_0 = first + (smooth - 1) * BT
    here, own = (i_b * T + o_0) * x_t, (i_b * T + o_0) * C
    p_q, p_k, p_v, p_dy = q + here, k + here, v + here, dy + own
    p_dq, p_dk, p_dv = dq + own, dk + own, dv + own
    p_s = states + (chunk + smooth - 1) * C + every
    for i in tl.range(n - smooth, n, num_stages=STAGES):
        row = (n - 1 - i) * BT + o_t
        b_k = rows(p_k, o_x, x_t, row, length, m_c, float("-inf"), R)
        b_v = rows(p_v, o_x, x_t, row, length, m_c, 0.0, R)
        b_q = rows(p_q, o_x, x_t, row, length, m_c, 0.0, R)
        b_dy = rows(p_dy, o_y, C, row, length, m_c, 0.0, R)
        s_e = tl.load(p_s, mask=m_c, other=0)
        c_n = tl.load(p_s + plane, mask=m_c, other=0)
        c_d = tl.load(p_s + 2 * plane, mask=m_c, other=1)
        s_n = tl.zeros([W, BC], tl.float32)
        s_d = tl.zeros([W, BC], tl.float32)
        b_p, b_n, b_d = tl.tuple(()), tl.tuple(()), tl.tuple(())
        for r in tl.static_range(R):
            p = weight(b_k[r], s_e)
            s_n += p * b_v[r].to(tl.float32)
            s_d += p
            b_p += (p,)
            b_n += (s_n,)
            b_d += (s_d,)
        w_n, w_d = before(s_n, s_d, False)
        w_n, w_d = w_n + c_n, w_d + c_d
        s_a = tl.zeros([W, BC], tl.float32)
        s_b = tl.zeros([W, BC], tl.float32)
        t_a, t_b = tl.tuple(()), tl.tuple(())
        for r in tl.static_range(R):
            share = inverse(w_d + b_d[r])
            mean = (w_n + b_n[r]) * share
            gate = inverse(1 + exp2(b_q[r].to(tl.float32) * -LOG2E))
            g = b_dy[r].to(tl.float32) * gate
            if not SUMMARY:
                tl.store(p_dq + (o_y + C * r), (g * mean * (1 - gate)).to(dq.dtype.element_ty),
                         mask=(row + r < length) & m_c)
            a = g * share
            b = a * mean_less(w_n + b_n[r], w_d + b_d[r], share, c, CENTRED)
            s_a += a
            s_b += b
            t_a += (a,)
            t_b += (b,)
        c_e, c_a, c_b = fall(c_e, c_a, c_b, s_e, 0.0, 0.0)
        if not SUMMARY:
            b_a, b_b = before(s_a, s_b, True)
            b_a += c_a
            b_b += c_b
            for r in tl.static_range(R):
                b_a += t_a[R - 1 - r]
                b_b += t_b[R - 1 - r]
                p = b_p[R - 1 - r]
                mask = (row + R - 1 - r < length) & m_c
                tl.store(p_dv + (o_y + C * (R - 1 - r)), (p * b_a).to(dv.dtype.element_ty), mask=mask)
                b_dk = key_gradient(p, b_v[R - 1 - r].to(tl.float32), b_a, b_b, c, CENTRED)
                tl.store(p_dk + (o_y + C * (R - 1 - r)), b_dk.to(dk.dtype.element_ty), mask=mask)
        s_a, s_b = tl.reduce((s_a, s_b), 0, add)
        c_a += s_a[None, :]
        c_b += s_b[None, :]
        if CENTRED:
            before_c = mean_of(c_n, c_d)
            c_b += (c - before_c) * c_a
            c = before_c
        p_q, p_k, p_v, p_s = p_q - step, p_k - step, p_v - step, p_s - C
        p_dy, p_dq, p_dk, p_dv = p_dy - BT * C, p_dq - BT * C, p_dk - BT * C, p_dv - BT * C
    if sums is not None:
        m_s = (o_t == 0) & m_c
        if SUMMARY:
            tl.store(sums + tl.cast(i_s, tl.int64) * C + every, c_a, mask=m_s)
            tl.store(sums + slots + tl.cast(i_s, tl.int64) * C + every, c_b, mask=m_s)
        else:
            if piece == 0:
                if CENTRED:
                    c_b += c * c_a
                tl.store(sums + i_b * C + every, c_a, mask=m_s)
                tl.store(sums + (segments // pieces + i_b) * C + every, c_b, mask=m_s)


@triton.jit(do_not_specialize=["T", "L", "pieces", "chunks", "segments"])
def chain_back_kernel(sums, ends, states, cu_seqlens, T, C, L, pieces, chunks, segments, BP: tl.constexpr,
                      BC: tl.constexpr, BT: tl.constexpr, CENTRED: tl.constexpr):
    """e, a, b after every segment of a row but its last, from the sums of segments; e, c: those at the next's start."""
    i_n, i_c = tl.program_id(0) // tl.cdiv(C, BC), tl.program_id(0) % tl.cdiv(C, BC)
    slot, n = row_slots(i_n, T, L, pieces, cu_seqlens)
    if cu_seqlens is not None:
        chunk = tl.load(cu_seqlens + i_n).to(tl.int64) // BT + i_n
    else:
        chunk = tl.cast(i_n, tl.int64) * tl.cdiv(T, BT)
    o_p = tl.arange(0, BP)[:, None]
    o_c = (i_c * BC + tl.arange(0, BC))[None, :]
    m_c = o_c < C
    slots, plane = tl.cast(segments, tl.int64) * C, tl.cast(chunks, tl.int64) * C
    c_e = tl.zeros([1, BC], tl.float32) + LAST
    c_a = tl.zeros([1, BC], tl.float32)
    c_b = tl.zeros([1, BC], tl.float32)
    c = tl.zeros([1, BC], tl.float32)
    for i in range(0, n, BP):
        o_n = (tl.cdiv(n, BP) * BP - BP - i) + o_p  # segments, and what stands after each: that of the next
        mask = (o_n < n - 1) & m_c
        p_s = states + (chunk + (o_n + 1) * (L // BT)) * C + o_c
        e = tl.load(p_s, mask=mask, other=LAST)
        a = tl.load(sums + (slot + o_n + 1) * C + o_c, mask=mask, other=0)
        b = tl.load(sums + slots + (slot + o_n + 1) * C + o_c, mask=mask, other=0)
        b_c = tl.zeros_like(a)
        if CENTRED:
            b_c = mean_of(tl.load(p_s + plane, mask=mask, other=0), tl.load(p_s + 2 * plane, mask=mask, other=0))
        e, a, b, b_c = tl.associative_scan((e, a, b, b_c), 0, fall_to, reverse=True)
        e, a, b, b_c = fall_to(c_e, c_a, c_b, c, e, a, b, b_c)
        tl.store(ends + (slot + o_n) * C + o_c, e, mask=mask)
        tl.store(ends + slots + (slot + o_n) * C + o_c, a, mask=mask)
        tl.store(ends + 2 * slots + (slot + o_n) * C + o_c, b, mask=mask)
        is_first = (o_p == 0) & m_c
        c_e = tl.sum(tl.where(is_first, e, 0.0), 0)[None, :]
        c_a = tl.sum(tl.where(is_first, a, 0.0), 0)[None, :]
        c_b = tl.sum(tl.where(is_first, b, 0.0), 0)[None, :]
        c = tl.sum(tl.where(is_first, b_c, 0.0), 0)[None, :]


def backward(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, states: Tensor, steep: Tensor, top: Tensor | None,
             num: Tensor | None, den: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """-> dq, dk, dv [B, T, C], each as its input, and where top, num, den [B, C] are given their gradients."""
    q, k, v = alike(q, k, v)
    dy = dy.contiguous()
    planned, each = plan(k, cu_seqlens), config("backward", k)
    batch, _, channels = k.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not k.numel():
        return dq, dk, dv, *(torch.zeros_like(x) for x in (top, num, den) if x is not None)
    shape = k.shape[1], channels, planned.L, planned.pieces
    grid = (planned.segments * triton.cdiv(channels, each.BC),)
    kept = each.launch()
    ends = None
    if cut(planned, k, cu_seqlens):
        sums = states.new_empty((2, planned.segments, channels))
        ends = states.new_empty((3, planned.segments, channels))
        backward_kernel[grid](q, k, v, dy, dq, dk, dv, states, steep, None, sums, cu_seqlens, *shape, planned.rows,
                              states.shape[1], planned.segments, k.stride(1), SUMMARY=True, **kept)
        width = 16 if INTERPRETED else 32
        chain_back_kernel[(planned.rows * triton.cdiv(channels, width),)](
            sums, ends, states, cu_seqlens, *shape, states.shape[1], planned.segments, BP=PIECES, BC=width,
            BT=each.R * each.W, CENTRED=k.dtype == torch.float32, num_warps=4)
    at_start = None if top is None else states.new_empty((2, batch, channels))
    backward_kernel[grid](q, k, v, dy, dq, dk, dv, states, steep, ends, at_start, cu_seqlens, *shape, planned.rows,
                          states.shape[1], planned.segments, k.stride(1), SUMMARY=False, **kept)
    if at_start is None or top is None or num is None or den is None:
        return dq, dk, dv
    e = states[0].view(batch, -1, channels)[:, 0]
    share = (top.double() * LOG2E_32.value - e).exp2()  # in float64, as differences of near numbers follow
    a, b = at_start * share
    return dq, dk, dv, (num * a - den * b).float(), a.float(), -b.float()
