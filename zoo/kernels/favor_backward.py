"""FAVOR+, backward: see `favor`, whose notation and kernels this continues.

Let psi(q_t) = phi(q_t) / n_t and dd_t = -dy_t . y_t, which `delta_kernel` finds first. With P_ts = dy_t . v_s + dd_t
for s <= t, else 0, and dy_t in the place of v_s,

    dphi(q_t) = (dy_t S_t^T + dd_t z_t) / n_t,      that is  sum_s 2^{-r(t-s)} P_ts phi(k_s) / n_t
    dphi(k_s) = v_s dS_s^T + dz_s,                  that is  sum_t 2^{-r(t-s)} P_ts psi(q_t)
    dv_s = phi(k_s) dS_s,   dS_s = sum_{t>=s} 2^{-r(t-s)} psi(q_t)^T dy_t,   dz_s = sum_{t>=s} 2^{-r(t-s)} psi(q_t) dd_t

    dq = de_q W,   de_q = phi(q) (dphi(q) - phi(q) . dphi(q)),   where phi(q_t) . dphi(q_t) = -EPS dd_t / n_t
    dk = de_k W - k sum_j de_kj,   de_k = phi(k) dphi(k)

S is found once more by a walk over the keys, dS by one over the queries from the end. Then every chunk is a program of
its own again: dv by `read_kernel` with queries and keys in each other's places, dq and dk both by `gradient_kernel`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import dot, power_of_two
from zoo.kernels.favor import EPS, VARYING, Call, last_contiguous, read_kernel
from zoo.kernels.favor_parts import across, exponents, place, power, side, tile


@triton.jit(do_not_specialize=["T"])
def delta_kernel(p_y, p_dy, p_dd, T, y_b, y_t, y_h, dy_b, dy_t, dy_h, H: tl.constexpr, V: tl.constexpr,
                 BT: tl.constexpr, BV: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    chunks = (T + BT - 1) // BT
    i_h, first, i_b = i % H, i // H % chunks * BT, i // (H * chunks)
    o_t, o_v = tl.arange(0, BT), tl.arange(0, BV)
    here = tl.minimum(T - first, BT).to(tl.int32)
    b_y = tile(p_y + i_b * y_b + first * y_t + i_h * y_h, here, o_t, o_v, y_t, V).to(tl.float32)
    b_dy = tile(p_dy + i_b * dy_b + first * dy_t + i_h * dy_h, here, o_t, o_v, dy_t, V).to(tl.float32)
    tl.store(p_dd + (i_b * H + i_h) * T + first + o_t, -tl.sum(b_y * b_dy, 1), mask=o_t < here)


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    p_a, p_b, p_u, p_v, p_w, p_w_gradient, p_decay, p_shift, p_log, p_dd, p_states, p_z, p_da, p_table, p_borders,
    T, SIZE, PARTS, DOCUMENTS, a_b, a_t, a_h, b_b, b_t, b_h, u_b, u_t, u_h, v_b, v_t, v_h, da_b, da_t, da_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MP: tl.constexpr, VP: tl.constexpr, KEYS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, OPERAND: tl.constexpr,
    EXPONENT: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq of a chunk: a are queries and u = dy, b keys and v values, states those before the chunk.

    KEYS: dk of a chunk; a are keys and u values, b queries and v = dy, states those behind the chunk.
    """
    i = tl.program_id(0).to(tl.int64)
    i_c, i_h = i // H, i % H
    _, _, i_b, start, rest = place(i_c, p_table, p_borders, T, SIZE, PARTS, DOCUMENTS)
    EXACT: tl.constexpr = "ieee" if PRECISION == "tf32x3" else PRECISION  # dy . v and dd may all but cancel
    o_t, o_k, o_w, o_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, KB), tl.arange(0, BV)
    here, o_row = tl.minimum(rest, BT).to(tl.int32), (i_b * H + i_h) * T + start
    p_a += i_b * a_b + start * a_t + i_h * a_h
    p_b += i_b * b_b + start * b_t + i_h * b_h
    p_u += i_b * u_b + start * u_t + i_h * u_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    p_states += (i_c * H + i_h) * (MP * VP)
    p_z += (i_c * H + i_h) * MP
    b_dd = tl.load(p_dd + o_row + o_t, mask=o_t < here, other=0.0)
    b_u, b_v = tile(p_u, here, o_t, o_v, u_t, V).to(OPERAND), tile(p_v, here, o_t, o_v, v_t, V).to(OPERAND)
    b_p = dot(b_u, tl.trans(b_v), tl.zeros([BT, BT], tl.float32), EXACT)
    if VP > BV:
        for i_v in range(BV, VP, BV):
            b_v = tile(p_v, here, o_t, i_v + o_v, v_t, V).to(OPERAND)
            b_p = dot(tile(p_u, here, o_t, i_v + o_v, u_t, V).to(OPERAND), tl.trans(b_v), b_p, EXACT)
    rate = tl.load(p_decay + i_h)
    lacking = across(rate, here)
    if KEYS:
        b_p = tl.where(o_t[:, None] <= o_t[None, :], (b_p + b_dd[None, :]) * lacking, 0.0).to(OPERAND)
    else:
        b_p = tl.where(o_t[:, None] >= o_t[None, :], (b_p + b_dd[:, None]) * lacking, 0.0).to(OPERAND)
        b_eps = b_dd * (EPS * tl.exp2(rate * (o_t + 1)))  # EPS is not seen from before the chunk, as psi is
    b_a, b_ac, b_al = side(p_a, a_t, p_log + o_row, here, o_t, rate, K, BK, KB, EXPONENT, not KEYS, True)
    b_b, b_bc, b_bl = side(p_b, b_t, p_log + o_row, here, o_t, rate, K, BK, KB, EXPONENT, KEYS, True)
    b_da, b_rows = tl.zeros([BT, BK], tl.float32), tl.zeros([BT], tl.float32)
    for i_m in range(0, MP, BM):
        o_m = i_m + tl.arange(0, BM)
        b_w = tl.load(p_w + o_m[:, None] * BK + o_w[None, :])
        b_fb = power(exponents(b_b, b_bc, b_w, tl.load(p_shift + (0 if KEYS else MP) + o_m), p_b, b_t, p_w, here, o_t,
                               o_m, K, BK, False, PRECISION), b_bl, EXPONENT, False).to(OPERAND)
        b_fa = power(exponents(b_a, b_ac, b_w, tl.load(p_shift + (MP if KEYS else 0) + o_m), p_a, a_t, p_w, here, o_t,
                               o_m, K, BK, False, PRECISION), b_al, EXPONENT, False)
        b_state, b_z = tl.load(p_states + o_m[:, None] * VP + o_v[None, :]), tl.load(p_z + o_m)
        b_df = tl.broadcast_to(b_z[None, :], [BT, BM])
        if not KEYS:
            b_df = b_dd[:, None] * b_df + b_eps[:, None]
        b_df = dot(b_u, tl.trans(b_state), b_df, PRECISION)
        if VP > BV:
            for i_v in range(BV, VP, BV):
                b_state = tl.load(p_states + o_m[:, None] * VP + i_v + o_v[None, :])
                b_df = dot(tile(p_u, here, o_t, i_v + o_v, u_t, V).to(OPERAND), tl.trans(b_state), b_df, PRECISION)
        b_de = b_fa * dot(b_p, b_fb, b_df, PRECISION)
        if KEYS:
            b_rows += tl.sum(b_de, 1)
        b_w_gradient = tl.load(p_w_gradient + o_m[:, None] * BK + o_k[None, :])
        b_da = dot(b_de.to(OPERAND), b_w_gradient, b_da, PRECISION)
    if KEYS:
        b_da -= tile(p_a, here, o_t, o_k, a_t, K).to(tl.float32) * b_rows[:, None]
    p_da += i_b * da_b + start * da_t + i_h * da_h
    tl.store(p_da + o_t[:, None] * da_t + o_k[None, :], b_da.to(p_da.dtype.element_ty),
             mask=(o_t < here)[:, None] & (o_k < K)[None, :])


def backward(dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, projection: Tensor,
             decay: Tensor | None, initial_state: Tensor | None, y: Tensor, log: Tensor, bound: float | None,
             cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv in their inputs' types and the gradient of the initial state in float32."""
    dy, q, k, v = (last_contiguous(x) for x in (dy, q, k, v))
    B, T, H, _ = q.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dd = torch.empty(log.shape, dtype=torch.float32, device=log.device)
    with torch.cuda.device_of(q):
        call = Call(q, k, v, projection, decay, bound, cu_seqlens)
        if not dv.numel():
            return dq, dk, dv, call.last(dlast, q.device)
        delta_kernel[(B * H * triton.cdiv(T, 64),)](
            y, dy, dd, T, *y.stride()[:3], *dy.stride()[:3], H=H, V=call.V, BT=64, BV=power_of_two(call.V))

        def gradient(da: Tensor, a: Tensor, b: Tensor, u: Tensor, v: Tensor, states: Tensor, z: Tensor,
                     keys: bool) -> None:
            gradient_kernel[(call.chunk_count * H,)](
                a, b, u, v, call.w, call.w_gradient, call.decay, call.shift, log, dd, states, z, da, *call.place(),
                *(stride for x in (a, b, u, v, da) for stride in x.stride()[:3]), KEYS=keys, **call.options("gradient"))

        states, z, _ = call.states(k, v, initial_state)
        gradient(dq, q, k, dy, v, states, z, False)
        del states, z  # before the others are made
        states, z, dfirst = call.states(q, dy, dlast, log, dd)
        gradient(dk, k, q, v, dy, states, z, True)
        read_kernel[(call.chunk_count * H * call.programs("read"),)](
            k, q, dy, call.w, call.decay, call.shift, log, states, z, dv, *call.place(), *k.stride()[:3],
            *q.stride()[:3], *dy.stride()[:3], *dv.stride()[:3], BACKWARD=True, **call.options("read"))
    return dq, dk, dv, dfirst
