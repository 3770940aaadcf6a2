"""AFT-simple (2105.14103, equation 5), causal, with its gate: a running softmax over the keys of every channel.

    y_t = sigmoid(q_t) * mean_t,   mean_t = num_t / den_t,   num_t, den_t = sum_{s<=t} exp(k_s) (v_s, 1)

Sums are held as multiples of exp(m_t), m_t = max_{s<=t} k_s: the triples (m, num, den) join associatively, and every
exponent in a join is <= 0. A program walks one row of the batch, or one document, over a few channels: a scan within
chunks of BT tokens, a triple carried between them. What a row gets depends on no later token, to the bit.

Backward, with g = dy sigmoid(q):  dv_s = exp(k_s) sum_{t>=s} a_t,  dk_s = v_s dv_s - exp(k_s) sum_{t>=s} a_t mean_t,
a_t = g_t exp(-m_t) / den_t. The program walks back. It finds m, num and den again from the triple that the forward pass
left at the chunk's start, and holds the two sums as multiples of exp(-m_s): m never falls, so exponents are <= 0 again.

Memory: each input once, each output once, and 12 / BT bytes a token and channel for the triples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED

EMPTY = tl.constexpr(-1e30)  # the key of a token that is not there

# (direction, bytes of an element): channels of a program, warps, stages of the loop's loads
CONFIGS = {("forward", 2): (32, 4, 3), ("forward", 4): (32, 4, 2),
           ("backward", 2): (32, 4, 3), ("backward", 4): (32, 4, 2)}
BT = 16 if INTERPRETED else 64  # tokens of a chunk, the same in both directions; the interpreter gets several


def config(direction: str, k: Tensor) -> tuple[int, int, int]:
    return (16, 4, 1) if INTERPRETED else CONFIGS[direction, k.element_size()]


@triton.jit
def join(m1, n1, d1, m2, n2, d2):
    """Two stretches of tokens as one, in either order."""
    fall = tl.exp(-tl.abs(m1 - m2))
    first = m1 >= m2
    f1, f2 = tl.where(first, 1.0, fall), tl.where(first, fall, 1.0)
    return tl.maximum(m1, m2), n1 * f1 + n2 * f2, d1 * f1 + d2 * f2


@triton.jit
def join_back(m1, a1, b1, m2, a2, b2):
    """Two stretches of rows as one, in either order: the earlier one has the lower m."""
    fall = tl.exp(-tl.abs(m1 - m2))
    first = m1 <= m2
    f1, f2 = tl.where(first, 1.0, fall), tl.where(first, fall, 1.0)
    return tl.minimum(m1, m2), a1 * f1 + a2 * f2, b1 * f1 + b2 * f2


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
                   BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr, DOCUMENTS: tl.constexpr):
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
    c_m = tl.full([BC], EMPTY, tl.float32)
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
        b_m, b_n, b_d = tl.associative_scan((tl.where(mask, b_k, EMPTY), b_v, tl.where(mask, 1.0, 0.0)), 0, join)
        b_m, b_n, b_d = join(b_m, b_n, b_d, c_m[None, :], c_n[None, :], c_d[None, :])
        last = (o_t == BT - 1)[:, None]
        c_m = tl.max(b_m, 0)
        c_n = tl.sum(tl.where(last, b_n, 0.0), 0)
        c_d = tl.sum(tl.where(last, b_d, 0.0), 0)
        b_y = tl.sigmoid(b_q) * b_n / b_d
        tl.store(p_y + row * C, b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "chunks"])
def backward_kernel(q, k, v, dy, dq, dk, dv, states, cu_seqlens, T, C, chunks, q_b, q_t, k_b, k_t, v_b, v_t, dy_b, dy_t,
                    BT: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr, DOCUMENTS: tl.constexpr):
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
        b_m, b_n, b_d = tl.associative_scan((tl.where(mask, b_k, EMPTY), b_v, tl.where(mask, 1.0, 0.0)), 0, join)
        b_m, b_n, b_d = join(b_m, b_n, b_d, s_m[None, :], s_n[None, :], s_d[None, :])
        mean = b_n / b_d
        gate = tl.sigmoid(b_q)
        tl.store(dq + own + row * C, (b_dy * mean * gate * (1 - gate)).to(dq.dtype.element_ty), mask=mask)
        b_a = b_dy * gate / b_d
        _, b_a, b_b = tl.associative_scan((b_m, b_a, b_a * mean), 0, join_back, reverse=True)
        fall = tl.exp(tl.minimum(b_m - c_m[None, :], 0.0))
        b_a += c_a[None, :] * fall
        b_b += c_b[None, :] * fall
        first = (o_t == 0)[:, None]
        c_m = tl.min(b_m, 0)
        c_a = tl.sum(tl.where(first, b_a, 0.0), 0)
        c_b = tl.sum(tl.where(first, b_b, 0.0), 0)
        p = tl.exp(tl.minimum(b_k - b_m, 0.0))
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
        BT=BT, BC=BC, STAGES=stages, DOCUMENTS=cu_seqlens is not None, num_warps=warps)
