"""The gradients of linear attention: all three in one walk from the end, or each a walk of its own.

With the gradient of the state G_t = sum_{s>=t} q_s^T dy_s + dS_T (see `linear_attention` for the rest), for each token

    dq = S dy,   dk = G v,   dv = k G

`back` has G in registers and finds S, as `walk` left it, in memory before each chunk. It reads q, k, v, dy and the
states and writes dq, dk and dv once: 8 tensors where three walks take 12.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, dot, precision
from zoo.kernels.linear_attention import (
    KEEP,
    NAMES,
    VARYING,
    Rows,
    ending,
    kept,
    last_contiguous,
    nothing,
    operand,
    padded,
    place,
    put,
    states,
    tile,
    walk,
)


@triton.jit(do_not_specialize=VARYING)
def back_kernel(
    p_q, p_k, p_v, p_dy, p_dq, p_dk, p_dv, p_behind, p_dfirst, p_kept, p_rows, p_borders, T, SEGMENT, SEGMENTS,
    DOCUMENTS, BEFORE, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq, dk and dv of a segment from the states that `walk` kept, and the state's gradient behind it; that before it.

    The gradient is summed twice, once transposed: a product's result must not be transposed into another product.
    """
    i = tl.program_id(0).to(tl.int64)
    i_row, i_h = i // H, i % H
    i_b, start, length = place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    p_q += i_b * q_b + start * q_t + i_h * q_h
    p_k += i_b * k_b + start * k_t + i_h * k_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    p_dy += i_b * dy_b + start * dy_t + i_h * dy_h
    o_to = (i_b * T + start) * H + i_h
    p_dq += o_to * K
    p_dk += o_to * K
    p_dv += o_to * V
    o_state = o_k[:, None] * V + o_v[None, :]
    m_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_turned = o_k[None, :] * V + o_v[:, None]
    m_turned = (o_k < K)[None, :] & (o_v < V)[:, None]
    p_behind += (i_row * H + i_h) * (K * V)
    b_d = tl.load(p_behind + o_state, mask=m_state & (BEFORE != 0), other=0.0)
    b_d_turned = tl.load(p_behind + o_turned, mask=m_turned & (BEFORE != 0), other=0.0)
    p_kept += (kept(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS, BT) * H + i_h) * (K * V)
    seen = o_t[:, None] >= o_t[None, :]
    chunks = (length + BT - 1) // BT
    for i_c in range(chunks):
        first = (chunks - 1 - i_c) * BT
        b_q = tile(p_q, first, length, o_t, o_k, q_t, K, OPERAND)
        b_k = tile(p_k, first, length, o_t, o_k, k_t, K, OPERAND)
        b_v = tile(p_v, first, length, o_t, o_v, v_t, V, OPERAND)
        b_dy = tile(p_dy, first, length, o_t, o_v, dy_t, V, OPERAND)
        b_state = tl.load(p_kept + first // BT * (H * K * V) + o_state, mask=m_state, other=0.0)
        b_dscores = tl.where(seen, dot(b_dy, tl.trans(b_v), tl.zeros([BT, BT], tl.float32), PRECISION), 0.0)
        b_dq = dot(b_dy, tl.trans(b_state), tl.zeros([BT, BK], tl.float32), PRECISION)
        b_dq = dot(b_dscores.to(OPERAND), b_k, b_dq, PRECISION)
        put(p_dq, b_dq, first, length, o_t, o_k, H * K, K)
        behind = tl.trans(seen)
        b_dscores = tl.where(behind, dot(b_v, tl.trans(b_dy), tl.zeros([BT, BT], tl.float32), PRECISION), 0.0)
        b_dk = dot(b_v, b_d_turned.to(OPERAND), tl.zeros([BT, BK], tl.float32), PRECISION)
        b_dk = dot(b_dscores.to(OPERAND), b_q, b_dk, PRECISION)
        put(p_dk, b_dk, first, length, o_t, o_k, H * K, K)
        b_scores = tl.where(behind, dot(b_k, tl.trans(b_q), tl.zeros([BT, BT], tl.float32), PRECISION), 0.0)
        b_dv = dot(b_k, b_d.to(OPERAND), tl.zeros([BT, BV], tl.float32), PRECISION)
        b_dv = dot(b_scores.to(OPERAND), b_dy, b_dv, PRECISION)
        put(p_dv, b_dv, first, length, o_t, o_v, H * V, V)
        b_d = dot(tl.trans(b_q), b_dy, b_d, PRECISION)
        b_d_turned = dot(tl.trans(b_dy), b_q, b_d_turned, PRECISION)
    i_n, ends = ending(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS, True)
    p_dfirst += (i_n * H + i_h) * (K * V)
    tl.store(p_dfirst + o_state, b_d, mask=m_state & ends)


BACK = (4, 3)  # warps, stages


def backward(dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None,
             cu_seqlens: Tensor | None, states_kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv in their inputs' types and the gradient of the initial state in float32."""
    dtype = operand(q, k, v)
    dy, q, k, v = last_contiguous(dy), last_contiguous(q), last_contiguous(k), last_contiguous(v)
    B, T, H, K = q.shape
    V = v.shape[3]
    rows = Rows(B, T, H * cdiv(V, 64), cu_seqlens)
    first, behind = (None if x is None else x.float().contiguous() for x in (initial_state, dlast))
    with torch.cuda.device_of(q):
        behind, dfirst = states(q, dy, behind, rows, True, dtype)
        if not rows.count * H:
            return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dfirst
        if states_kept is None:
            before, _ = states(k, v, first, rows, False, dtype)
            dq = walk(dy, v, k, q.dtype, before, None, rows, dtype, transposed=True)
            dv = walk(k, q, dy, v.dtype, behind, dfirst, rows, dtype, reverse=True)
            dk = walk(v, dy, q, k.dtype, behind, None, rows, dtype, reverse=True, transposed=True)
            return dq, dk, dv, dfirst
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        warps, stages = BACK
        behind = nothing(q.device, torch.float32) if behind is None else behind
        back_kernel[(rows.count * H,)](
            q, k, v, dy, dq, dk, dv, behind, dfirst, states_kept, *rows.place(q.device), int(behind.numel() > 0),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dy.stride()[:3], H=H, K=K, V=V, BT=KEEP,
            BK=padded(K, dtype), BV=padded(V, dtype), OPERAND=NAMES[dtype], PRECISION=precision(dtype), num_warps=warps,
            num_stages=stages)
    return dq, dk, dv, dfirst
