"""AFT-simple (2105.14103, equation 5), causal, with its gate: a running softmax over the keys of every channel.

    y_t = sigmoid(q_t) * mean_t,   mean_t = num_t / den_t,   num_t, den_t = sum_{s<=t} exp(k_s) (v_s, 1)

A program walks one row of the batch, or one document, over a few channels, in chunks of BT tokens, and carries
(e, num, den): e the largest key so far (at first the first key), the sums as multiples of exp(e). Within a chunk, where
no key exceeds e by more than LIMIT, sums up to each row are products with a triangle of ones, on tensor cores, whose
rounding is tf32's for 2-byte inputs and tf32x3's for float32; den >= 1 always. Other chunks, rare ones, and such with a
number that is not finite, go row by row, e following every key.

Backward, with g = dy sigmoid(q):  dv_s = exp(k_s) sum_{t>=s} a_t,  dk_s = v_s dv_s - exp(k_s) sum_{t>=s} a_t mean_t,
a_t = g_t / den_t. The program walks back. It finds num and den again from the triple that the forward pass left at the
chunk's start, and holds the two sums as multiples of exp(-e): e never falls, so exponents are <= 0 again.

Memory: each input once, each output once, and 12 / BT bytes a token and channel for the triples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, dot

EMPTY = tl.constexpr(-1e30)  # the key of a token that is not there
LIMIT = tl.constexpr(20.0)  # how far above e a key of a chunk may be for the chunk to be a product

# (direction, bytes of an element): channels of a program, warps, stages of the loop's loads; those of 2 bytes measured
# on H200, torch 2.11, Triton 3.6, 2026-11-24
CONFIGS = {("forward", 2): (64, 4, 3), ("forward", 4): (32, 4, 2),
           ("backward", 2): (64, 4, 3), ("backward", 4): (32, 4, 2)}
BT = 16 if INTERPRETED else 32  # tokens of a chunk, the same in both directions; the interpreter gets several


def config(direction: str, k: Tensor) -> tuple[int, int, int]:
    return (16, 4, 1) if INTERPRETED else CONFIGS[direction, k.element_size()]


@triton.jit
def place(cu_seqlens, i_n, T, BT: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of row or document i_n: its row in memory, its first token there, its length, its first chunk of all."""
    if DOCUMENTS:
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)
        return i_n * 0, start, length, start // BT + i_n
    else:
        return i_n, i_n * 0, T, i_n * tl.cdiv(T, BT)


@triton.jit(do_not_specialize=["T", "chunks"])
def forward_kernel(q, k, v, y, states, cu_seqlens, T, C, chunks, q_b, q_t, k_b, k_t, v_b, v_t,
                   BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
                   DOCUMENTS: tl.constexpr):
    i_n, i_c = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64), tl.program_id(0) % tl.cdiv(C, BC)
    i_b, start, length, chunk = place(cu_seqlens, i_n, T, BT, DOCUMENTS)
    o_c, o_t = i_c * BC + tl.arange(0, BC), tl.arange(0, BT)
    m_c = o_c < C
    p_q = q + i_b * q_b + start * q_t + o_c[None, :]
    p_k = k + i_b * k_b + start * k_t + o_c[None, :]
    p_v = v + i_b * v_b + start * v_t + o_c[None, :]
    p_y = y + (i_b * T + start) * C + o_c[None, :]
    p_s = states + chunk * C + o_c
    plane = tl.cast(chunks, tl.int64) * C
    lower = tl.where(o_t[:, None] >= o_t[None, :], 1.0, 0.0)
    c_m = tl.load(k + i_b * k_b + start * k_t + o_c, mask=m_c & (length > 0), other=0).to(tl.float32)
    c_n = tl.zeros([BC], tl.float32)
    c_d = tl.zeros([BC], tl.float32)
    for i_t in tl.range(0, tl.cdiv(length, BT), num_stages=STAGES):
        row = (i_t * BT + o_t)[:, None].to(tl.int64)
        mask = (row < length) & m_c[None, :]
        b_k = tl.load(p_k + row * k_t, mask=mask, other=0).to(tl.float32)
        b_v = tl.load(p_v + row * v_t, mask=mask, other=0).to(tl.float32)
        b_q = tl.load(p_q + row * q_t, mask=mask, other=0).to(tl.float32)
        tl.store(p_s, c_m, mask=m_c)
        tl.store(p_s + plane, c_n, mask=m_c)
        tl.store(p_s + 2 * plane, c_d, mask=m_c)
        p_s += C
        after = tl.maximum(c_m, tl.max(tl.where(mask, b_k, EMPTY), 0))
        p = tl.where(mask, tl.exp(tl.minimum(b_k - c_m[None, :], LIMIT)), 0.0)
        pv = p * b_v
        sums = tl.sum(pv, 0)
        if (tl.max(after - c_m, 0) <= LIMIT) & (tl.sum(sums * 0.0, 0) == 0):
            b_n = dot(lower, pv, tl.zeros([BT, BC], tl.float32), PRECISION) + c_n[None, :]
            b_d = dot(lower, p, tl.zeros([BT, BC], tl.float32), PRECISION) + c_d[None, :]
            tl.store(p_y + row * C, (tl.sigmoid(b_q) * b_n / b_d).to(y.dtype.element_ty), mask=mask)
            fall = tl.exp(c_m - after)
            c_n = (c_n + sums) * fall
            c_d = (c_d + tl.sum(p, 0)) * fall
            c_m = after
        else:
            for i in range(i_t * BT, tl.minimum(i_t * BT + BT, length)):
                at = tl.cast(i, tl.int64)
                r_k = tl.load(k + i_b * k_b + (start + at) * k_t + o_c, mask=m_c, other=0).to(tl.float32)
                r_v = tl.load(v + i_b * v_b + (start + at) * v_t + o_c, mask=m_c, other=0).to(tl.float32)
                r_q = tl.load(q + i_b * q_b + (start + at) * q_t + o_c, mask=m_c, other=0).to(tl.float32)
                after = tl.maximum(c_m, r_k)
                fall, r_p = tl.exp(c_m - after), tl.exp(r_k - after)
                c_n, c_d, c_m = c_n * fall + r_p * r_v, c_d * fall + r_p, after
                r_y = tl.sigmoid(r_q) * c_n / c_d
                tl.store(y + (i_b * T + start + at) * C + o_c, r_y.to(y.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["T", "chunks"])
def backward_kernel(q, k, v, dy, dq, dk, dv, states, cu_seqlens, T, C, chunks, q_b, q_t, k_b, k_t, v_b, v_t, dy_b, dy_t,
                    BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
                    DOCUMENTS: tl.constexpr):
    i_n, i_c = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64), tl.program_id(0) % tl.cdiv(C, BC)
    i_b, start, length, chunk = place(cu_seqlens, i_n, T, BT, DOCUMENTS)
    o_c, o_t = i_c * BC + tl.arange(0, BC), tl.arange(0, BT)
    m_c = o_c < C
    p_q = q + i_b * q_b + start * q_t + o_c[None, :]
    p_k = k + i_b * k_b + start * k_t + o_c[None, :]
    p_v = v + i_b * v_b + start * v_t + o_c[None, :]
    p_dy = dy + i_b * dy_b + start * dy_t + o_c[None, :]
    own = (i_b * T + start) * C + o_c[None, :]
    n = tl.cdiv(length, BT)
    plane = tl.cast(chunks, tl.int64) * C
    lower = tl.where(o_t[:, None] >= o_t[None, :], 1.0, 0.0)
    upper = tl.where(o_t[:, None] <= o_t[None, :], 1.0, 0.0)
    c_m = tl.full([BC], -EMPTY, tl.float32)
    c_a = tl.zeros([BC], tl.float32)
    c_b = tl.zeros([BC], tl.float32)
    for i in tl.range(0, n, num_stages=STAGES):
        i_t = n - 1 - i
        row = (i_t * BT + o_t)[:, None].to(tl.int64)
        mask = (row < length) & m_c[None, :]
        b_k = tl.load(p_k + row * k_t, mask=mask, other=0).to(tl.float32)
        b_v = tl.load(p_v + row * v_t, mask=mask, other=0).to(tl.float32)
        b_q = tl.load(p_q + row * q_t, mask=mask, other=0).to(tl.float32)
        b_dy = tl.load(p_dy + row * dy_t, mask=mask, other=0).to(tl.float32)
        p_s = states + (chunk + i_t) * C + o_c
        s_m = tl.load(p_s, mask=m_c, other=0)
        s_n = tl.load(p_s + plane, mask=m_c, other=0)
        s_d = tl.load(p_s + 2 * plane, mask=m_c, other=1)
        gate = tl.sigmoid(b_q)
        after = tl.max(tl.where(mask, b_k, EMPTY), 0)
        if tl.max(tl.where(m_c, after - s_m, 0.0), 0) <= LIMIT:
            p = tl.where(mask, tl.exp(tl.minimum(b_k - s_m[None, :], LIMIT)), 0.0)
            b_n = dot(lower, p * b_v, tl.zeros([BT, BC], tl.float32), PRECISION) + s_n[None, :]
            b_d = dot(lower, p, tl.zeros([BT, BC], tl.float32), PRECISION) + s_d[None, :]
            b_d = tl.where(mask, b_d, 1.0)
            mean = b_n / b_d
            r_a = b_dy * gate / b_d
            r_b = r_a * mean
            fall = tl.exp(tl.minimum(s_m - c_m, 0.0))
            b_a = dot(upper, r_a, tl.zeros([BT, BC], tl.float32), PRECISION) + (c_a * fall)[None, :]
            b_b = dot(upper, r_b, tl.zeros([BT, BC], tl.float32), PRECISION) + (c_b * fall)[None, :]
            c_m = s_m
            c_a = c_a * fall + tl.sum(r_a, 0)
            c_b = c_b * fall + tl.sum(r_b, 0)
        else:
            b_m = tl.zeros([BT, BC], tl.float32) + s_m[None, :]
            b_n = tl.zeros([BT, BC], tl.float32) + s_n[None, :]
            b_d = tl.zeros([BT, BC], tl.float32) + s_d[None, :]
            for j in range(0, tl.minimum(BT, length - i_t * BT)):  # keys, for all rows at once
                at = tl.cast(i_t * BT + j, tl.int64)
                r_k = tl.load(k + i_b * k_b + (start + at) * k_t + o_c, mask=m_c, other=0).to(tl.float32)
                r_v = tl.load(v + i_b * v_b + (start + at) * v_t + o_c, mask=m_c, other=0).to(tl.float32)
                sees = (o_t >= j)[:, None]
                b_next = tl.where(sees, tl.maximum(b_m, r_k[None, :]), b_m)
                fall2, p2 = tl.exp(b_m - b_next), tl.where(sees, tl.exp(tl.minimum(r_k[None, :] - b_next, 0.0)), 0.0)
                b_n, b_d, b_m = b_n * fall2 + p2 * r_v[None, :], b_d * fall2 + p2, b_next
            mean = b_n / tl.where(mask, b_d, 1.0)
            r_a = b_dy * gate / tl.where(mask, b_d, 1.0)
            r_b = r_a * mean
            falls = tl.exp(tl.minimum(b_m - c_m[None, :], 0.0))
            b_a = c_a[None, :] * falls
            b_b = c_b[None, :] * falls
            for j in range(0, tl.minimum(BT, length - i_t * BT)):  # rows, for all keys at once
                at_j = (o_t == j)[:, None]
                m_j = tl.sum(tl.where(at_j, b_m, 0.0), 0)
                falls = tl.where((o_t <= j)[:, None], tl.exp(tl.minimum(b_m - m_j[None, :], 0.0)), 0.0)
                b_a += falls * tl.sum(tl.where(at_j, r_a, 0.0), 0)[None, :]
                b_b += falls * tl.sum(tl.where(at_j, r_b, 0.0), 0)[None, :]
            first = (o_t == 0)[:, None]
            c_m = tl.sum(tl.where(first, b_m, 0.0), 0)
            c_a = tl.sum(tl.where(first, b_a, 0.0), 0)
            c_b = tl.sum(tl.where(first, b_b, 0.0), 0)
            p = tl.exp(tl.minimum(b_k - b_m, 0.0))
        tl.store(dq + own + row * C, (b_dy * mean * gate * (1 - gate)).to(dq.dtype.element_ty), mask=mask)
        tl.store(dv + own + row * C, (p * b_a).to(dv.dtype.element_ty), mask=mask)
        tl.store(dk + own + row * C, (p * (b_v * b_a - b_b)).to(dk.dtype.element_ty), mask=mask)


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """q, k, v [B, T, C], the last axis contiguous -> y [B, T, C] as q, states float32 [3, chunks, C]."""
    y = q.new_empty(q.shape)
    states = q.new_empty(states_shape(q, cu_seqlens), dtype=torch.float32)
    BC, warps, stages = config("forward", k)
    _launch(forward_kernel, (q, k, v, y), states, cu_seqlens, (q, k, v), BC, warps, stages)
    return y, states


def backward(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, states: Tensor,
             cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv [B, T, C], each as its input."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    BC, warps, stages = config("backward", k)
    _launch(backward_kernel, (q, k, v, dy, dq, dk, dv), states, cu_seqlens, (q, k, v, dy), BC, warps, stages)
    return dq, dk, dv


def states_shape(q: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Triples at the start of every chunk; with documents as many chunks as there can be."""
    batch, length, channels = q.shape
    chunks = batch * triton.cdiv(length, BT) if cu_seqlens is None else length // BT + len(cu_seqlens) - 1
    return 3, chunks, channels


def _launch(kernel, tensors: tuple[Tensor, ...], states: Tensor, cu_seqlens: Tensor | None, strided: tuple[Tensor, ...],
            BC: int, warps: int, stages: int) -> None:
    batch, length, channels = tensors[0].shape
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if not length or not batch:
        return
    strides = [stride for x in strided for stride in x.stride()[:2]]
    kernel[(rows * triton.cdiv(channels, BC),)](
        *tensors, states, cu_seqlens, length, channels, states.shape[1], *strides,
        BT=BT, BC=BC, STAGES=stages, PRECISION="tf32x3" if tensors[1].element_size() == 4 else "tf32",
        DOCUMENTS=cu_seqlens is not None, num_warps=warps)
