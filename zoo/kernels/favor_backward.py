"""FAVOR+, backward: see `favor`, whose notation this continues.

With r_t = 1 / (phi(q_t) z_t + EPS), the numerator's gradient is dn_t = r_t dy_t and the denominator's dd_t =
-r_t dy_t . y_t, which `delta_kernel` finds first. Then, with P_ts = dn_t . v_s + dd_t for s <= t, else 0,

    dphi(q_t) = dn_t S_t^T + dd_t z_t,              that is  sum_s P_ts phi(k_s), in chunks and forwards: `dq_kernel`
    dphi(k_s) = v_s dS_s^T + dz_s,                  that is  sum_t P_ts phi(q_t), in chunks and backwards: `dkdv_kernel`
    dv_s = phi(k_s) dS_s,   dS_s = sum_{t>=s} phi(q_t)^T dn_t,   dz_s = sum_{t>=s} phi(q_t) dd_t

    dq = de_q W,   de_q = phi(q) (dphi(q) - phi(q) . dphi(q)),   where phi(q_t) . dphi(q_t) = -EPS dd_t
    dk = de_k W - k sum_j de_kj,   de_k = phi(k) dphi(k)

All of it is a sum over blocks of features and over columns of values, dd_t counted with the first columns: programs
write their parts, in float32 where there are several, and they are added up afterwards, in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import dot, power_of_two
from zoo.kernels.favor import EPS, Shapes, key_features, query_features, rows_of, weights
from zoo.kernels.linear_attention import VARYING, last_contiguous, place


@triton.jit(do_not_specialize=["T"])
def delta_kernel(p_y, p_dy, p_scale, p_dd, T, y_b, y_t, y_h, dy_b, dy_t, dy_h, H: tl.constexpr, V: tl.constexpr,
                 BT: tl.constexpr, BV: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    chunks = (T + BT - 1) // BT
    i_h, first, i_b = i % H, i // H % chunks * BT, i // (H * chunks)
    o_t, o_v = tl.arange(0, BT), tl.arange(0, BV)
    b_y = rows_of(p_y + i_b * y_b + i_h * y_h, first, T, o_t, o_v, y_t, V).to(tl.float32)
    b_dy = rows_of(p_dy + i_b * dy_b + i_h * dy_h, first, T, o_t, o_v, dy_t, V).to(tl.float32)
    o, m = (i_b * H + i_h) * T + first + o_t, first + o_t < T
    tl.store(p_dd + o, -tl.sum(b_y * b_dy, 1) * tl.load(p_scale + o, mask=m, other=0.0), mask=m)


@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    p_q, p_k, p_v, p_dy, p_high, p_low, p_largest, p_lse, p_scale, p_dd, p_dq, p_before, p_rows, p_borders,
    T, SEGMENT, SEGMENTS, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, dq_b, dq_t, dq_h, dq_part,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, DOCUMENTS: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, OPERAND: tl.constexpr, Q_LOW: tl.constexpr,
    K_LOW: tl.constexpr, W_LOW: tl.constexpr, PRECISION: tl.constexpr,
):
    """A part of dq, in a forward walk with the transposed state [BV, BM]."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NM: tl.constexpr = (M + BM - 1) // BM
    i = tl.program_id(0).to(tl.int64)
    i_row, i_h, i_m, i_v = i // (H * NM * NV), i // (NM * NV) % H, i // NV % NM, i % NV
    i_b, start, length = place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, BK)
    o_v, o_m = i_v * BV + tl.arange(0, BV), i_m * BM + tl.arange(0, BM)
    p_q += i_b * q_b + start * q_t + i_h * q_h
    p_k += i_b * k_b + start * k_t + i_h * k_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    p_dy += i_b * dy_b + start * dy_t + i_h * dy_h
    p_dq += (i_m * NV + i_v) * dq_part + i_b * dq_b + start * dq_t + i_h * dq_h
    o_row = (i_b * H + i_h) * T + start
    b_high, b_low, b_largest = weights(p_high, p_low, p_largest, o_m, o_k, M, K, W_LOW)
    o_z = (i_row * H + i_h) * (M * (V + 1)) + o_m * (V + 1)
    m_m = o_m < M
    b_state, b_z = tl.zeros([BV, BM], tl.float32), tl.zeros([BM], tl.float32)
    if p_before is not None:
        b_state += tl.load(p_before + o_z[None, :] + o_v[:, None], mask=(o_v < V)[:, None] & m_m[None, :],
                           other=0.0).to(tl.float32)
        b_z += tl.load(p_before + o_z + V, mask=m_m, other=0.0).to(tl.float32)
    for first in range(0, length, BT):
        m_t = first + o_t < length
        b_dy = rows_of(p_dy, first, length, o_t, o_v, dy_t, V).to(tl.float32)
        b_scale = tl.load(p_scale + o_row + first + o_t, mask=m_t, other=0.0)
        b_dn = (b_dy * b_scale[:, None]).to(OPERAND)
        b_dd = tl.load(p_dd + o_row + first + o_t, mask=m_t & (i_v == 0), other=0.0)
        b_v = rows_of(p_v, first, length, o_t, o_v, v_t, V).to(OPERAND)
        b_p = dot(b_dn, tl.trans(b_v), tl.zeros([BT, BT], tl.float32), PRECISION) + b_dd[:, None]
        b_p = tl.where(o_t[:, None] >= o_t[None, :], b_p, 0.0).to(OPERAND)
        b_k = rows_of(p_k, first, length, o_t, o_k, k_t, K)
        b_fk = key_features(b_k, b_high, b_low, b_largest, m_t, m_m, OPERAND, K_LOW, W_LOW, False,
                            PRECISION).to(OPERAND)
        b_df = dot(b_dn, b_state.to(OPERAND), tl.zeros([BT, BM], tl.float32), PRECISION)
        b_df = dot(b_p, b_fk, b_df, PRECISION)
        b_df += b_dd[:, None] * (b_z[None, :] + EPS)
        b_state = dot(tl.trans(b_v), b_fk, b_state, PRECISION)
        b_z += tl.sum(b_fk.to(tl.float32), 0)
        b_q = rows_of(p_q, first, length, o_t, o_k, q_t, K)
        b_lse = tl.load(p_lse + o_row + first + o_t, mask=m_t, other=float("inf"))
        b_fq = query_features(b_q, b_high, b_low, b_largest, b_lse, m_m, OPERAND, Q_LOW, W_LOW, False, PRECISION)
        b_dq = dot((b_fq * b_df).to(OPERAND), b_high, tl.zeros([BT, BK], tl.float32), PRECISION)
        p_to = p_dq + first * dq_t + o_t[:, None] * dq_t + o_k[None, :]
        tl.store(p_to, b_dq.to(p_dq.dtype.element_ty), mask=m_t[:, None] & (o_k < K)[None, :])


@triton.jit(do_not_specialize=VARYING)
def dkdv_kernel(
    p_q, p_k, p_v, p_dy, p_high, p_low, p_largest, p_lse, p_scale, p_dd, p_dk, p_dv, p_behind, p_after, p_rows,
    p_borders, T, SEGMENT, SEGMENTS, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, dk_b, dk_t, dk_h,
    dk_part, dv_b, dv_t, dv_h, dv_part,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, DOCUMENTS: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, OPERAND: tl.constexpr, Q_LOW: tl.constexpr,
    K_LOW: tl.constexpr, W_LOW: tl.constexpr, PRECISION: tl.constexpr,
):
    """Parts of dk and dv, in a walk from the end with dS [BM, BV]; the state's gradient before the first token."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NM: tl.constexpr = (M + BM - 1) // BM
    i = tl.program_id(0).to(tl.int64)
    i_row, i_h, i_m, i_v = i // (H * NM * NV), i // (NM * NV) % H, i // NV % NM, i % NV
    i_b, start, length = place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, BK)
    o_v, o_m = i_v * BV + tl.arange(0, BV), i_m * BM + tl.arange(0, BM)
    p_q += i_b * q_b + start * q_t + i_h * q_h
    p_k += i_b * k_b + start * k_t + i_h * k_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    p_dy += i_b * dy_b + start * dy_t + i_h * dy_h
    p_dk += (i_m * NV + i_v) * dk_part + i_b * dk_b + start * dk_t + i_h * dk_h
    p_dv += i_m * dv_part + i_b * dv_b + start * dv_t + i_h * dv_h
    o_row = (i_b * H + i_h) * T + start
    b_high, b_low, b_largest = weights(p_high, p_low, p_largest, o_m, o_k, M, K, W_LOW)
    o_z = (i_row * H + i_h) * (M * (V + 1)) + o_m * (V + 1)
    m_m, m_state = o_m < M, (o_m < M)[:, None] & (o_v < V)[None, :]
    b_state, b_z = tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32)
    if p_behind is not None:
        b_state += tl.load(p_behind + o_z[:, None] + o_v[None, :], mask=m_state, other=0.0).to(tl.float32)
        b_z += tl.load(p_behind + o_z + V, mask=m_m & (i_v == 0), other=0.0).to(tl.float32)
    chunks = (length + BT - 1) // BT
    for i_c in range(chunks):
        first = (chunks - 1 - i_c) * BT
        m_t = first + o_t < length
        b_dy = rows_of(p_dy, first, length, o_t, o_v, dy_t, V).to(tl.float32)
        b_scale = tl.load(p_scale + o_row + first + o_t, mask=m_t, other=0.0)
        b_dn = (b_dy * b_scale[:, None]).to(OPERAND)
        b_dd = tl.load(p_dd + o_row + first + o_t, mask=m_t & (i_v == 0), other=0.0)
        b_v = rows_of(p_v, first, length, o_t, o_v, v_t, V).to(OPERAND)
        b_q = rows_of(p_q, first, length, o_t, o_k, q_t, K)
        b_lse = tl.load(p_lse + o_row + first + o_t, mask=m_t, other=float("inf"))
        b_fq = query_features(b_q, b_high, b_low, b_largest, b_lse, m_m, OPERAND, Q_LOW, W_LOW, True,
                              PRECISION).to(OPERAND)
        b_k = rows_of(p_k, first, length, o_t, o_k, k_t, K)
        b_fk = key_features(b_k, b_high, b_low, b_largest, m_t, m_m, OPERAND, K_LOW, W_LOW, False,
                            PRECISION).to(OPERAND)
        b_state_ = b_state.to(OPERAND)
        b_scores = dot(b_fk, b_fq, tl.zeros([BT, BT], tl.float32), PRECISION)  # s, t
        b_scores = tl.where(o_t[:, None] <= o_t[None, :], b_scores, 0.0).to(OPERAND)
        b_dv = dot(b_fk, b_state_, tl.zeros([BT, BV], tl.float32), PRECISION)
        b_dv = dot(b_scores, b_dn, b_dv, PRECISION)
        p_to = p_dv + first * dv_t + o_t[:, None] * dv_t + o_v[None, :]
        tl.store(p_to, b_dv.to(p_dv.dtype.element_ty), mask=m_t[:, None] & (o_v < V)[None, :])

        b_p = dot(b_dn, tl.trans(b_v), tl.zeros([BT, BT], tl.float32), PRECISION) + b_dd[:, None]  # t, s
        b_p = tl.where(o_t[:, None] >= o_t[None, :], b_p, 0.0).to(OPERAND)
        b_df = dot(b_state_, tl.trans(b_v), tl.zeros([BM, BT], tl.float32), PRECISION)
        b_df = dot(b_fq, b_p, b_df, PRECISION) + b_z[:, None]
        b_de = b_df * key_features(b_k, b_high, b_low, b_largest, m_t, m_m, OPERAND, K_LOW, W_LOW, True, PRECISION)
        b_dk = dot(tl.trans(b_high), b_de.to(OPERAND), tl.zeros([BK, BT], tl.float32), PRECISION)
        b_dk = tl.trans(b_dk) - b_k.to(tl.float32) * tl.sum(b_de, 0)[:, None]
        p_to = p_dk + first * dk_t + o_t[:, None] * dk_t + o_k[None, :]
        tl.store(p_to, b_dk.to(p_dk.dtype.element_ty), mask=m_t[:, None] & (o_k < K)[None, :])
        b_state = dot(b_fq, b_dn, b_state, PRECISION)
        b_z += tl.sum(b_fq.to(tl.float32) * b_dd[None, :], 1)
    if p_after is not None:
        tl.store(p_after + o_z[:, None] + o_v[None, :], b_state, mask=m_state)
        if i_v == 0:
            tl.store(p_after + o_z + V, b_z, mask=m_m)


def backward(dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, projection: Tensor,
             initial_state: Tensor | None, y: Tensor, lse: Tensor, scale: Tensor, bound: float | None,
             cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv in their inputs' types and the gradient of the initial state in float32."""
    dy, q, k, v = (last_contiguous(x) for x in (dy, q, k, v))
    shapes = Shapes(q, k, v, projection, bound, cu_seqlens)
    H, T = shapes.H, shapes.T
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dd = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        if dd.numel():
            delta_kernel[(shapes.B * H * triton.cdiv(T, 64),)](
                y, dy, scale, dd, T, *y.stride()[:3], *dy.stride()[:3], H=H, V=shapes.V, BT=64,
                BV=power_of_two(shapes.V))
        before, _ = shapes.states(k, v, initial_state)
        behind, dfirst = shapes.states(q, dy, dlast, lse, scale, dd)
        after = None
        if dfirst is None:
            dfirst = after = shapes.new_state()
        if not shapes.rows.count * H:
            return dq, dk, dv, dfirst
        inputs = (q, k, v, dy, *shapes.w, lse, scale, dd)
        strides = [stride for x in (q, k, v, dy) for stride in x.stride()[:3]]
        low = {"Q_LOW": shapes.q_low, "K_LOW": shapes.k_low}
        columns = triton.cdiv(shapes.V, shapes.columns("dq"))
        dq_ = parts(dq, shapes.blocks("dq") * columns)
        dq_kernel[shapes.grid("dq")](
            *inputs, dq_, before, *shapes.place, *strides, *dq_.stride()[1:4], dq_.stride(0), **low,
            **shapes.options("dq"))
        dq = whole(dq_, dq)
        columns = triton.cdiv(shapes.V, shapes.columns("dkdv"))
        dk_, dv_ = parts(dk, shapes.blocks("dkdv") * columns), parts(dv, shapes.blocks("dkdv"))
        dkdv_kernel[shapes.grid("dkdv")](
            *inputs, dk_, dv_, behind, after, *shapes.place, *strides, *dk_.stride()[1:4], dk_.stride(0),
            *dv_.stride()[1:4], dv_.stride(0), **low, **shapes.options("dkdv"))
    return dq, whole(dk_, dk), whole(dv_, dv), dfirst


def parts(x: Tensor, n: int) -> Tensor:
    """Room for n parts of x in float32; x itself if it has just one."""
    return x.unsqueeze(0) if n == 1 else torch.empty(n, *x.shape, dtype=torch.float32, device=x.device)


def whole(x_parts: Tensor, x: Tensor) -> Tensor:
    return x if len(x_parts) == 1 else x_parts.sum(0).to(x.dtype)
