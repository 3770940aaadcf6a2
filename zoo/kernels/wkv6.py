"""WKV-6 (2404.05892, section 4), forward and backward: programs walk chunks of tokens with the state in registers.

With c_t the sum of the log decays from the chunk's start to t, S the state before the chunk, S' after it:

    y_t = (r_t e^c_{t-1}) S + sum_{s<t} A_ts v_s + (r_t . u k_t) v_t,    A_ts = sum_c r_tc k_sc e^(c_{t-1} - c_s)
    S'  = e^c_end S + sum_s (k_s e^(c_end - c_s))^T v_s

A chunk is one or two blocks of 16 tokens. Between two blocks the border is the reference: r is decayed from it, k to
it, no exponent above 0. Inside a block A is a product of tiles around half of the block's sum, exponents within +-LIMIT
/ 2, and where the block decays by more than e^-LIMIT in some channel, a loop over its tokens with exponents <= 0.

The backward walk goes the other way with the state's gradient, and reads the states before the chunks, which the
forward walk left. The gradient of a log decay is a sum over pairs s < t around it. Those from before to after the
chunk are S dS'; those with one end outside, running sums of r dr and k dk (of the parts that the states gave); those
inside a block, the difference of two such sums, from which neighbours (s = t - 1, no decay between) are left out: what
does not belong to the result would drown a small one.

Tokens after t change y_t by no bit, but for their decays: those of its block choose the reference, hence the rounding.

S is held as [K, V] forward and as [V, K] backward: so the transpose of a product's result is never an operand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import dot
from zoo.kernels.wkv6_parts import (
    NOTHING,
    Cut,
    chunk_slots,
    decays,
    numbers,
    operands,
    place,
    references,
    rows,
    steep_products,
    steep_scores,
)


@triton.jit(do_not_specialize=["T", "L", "n_segments"])
def _forward(r, k, v, w, u, initial, borders, y, final, states, cu_seqlens, segments, T, L, n_segments, H, K, V,
             r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h,
             BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
             EXACT: tl.constexpr, LIMIT: tl.constexpr, KEEP: tl.constexpr, CUT: tl.constexpr, VARLEN: tl.constexpr):
    """y of one segment, head and block of values; KEEP: the states before its chunks, too."""
    i_h = tl.program_id(0) % H
    i_n, i_b, bos, length, i_s, slot, first_segment = place(
        tl.program_id(0) // H, T, L, n_segments, cu_seqlens, segments, BT, VARLEN)
    if i_n < 0:
        return
    first = i_s * L
    last = tl.minimum(first + L, length)
    o_r = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_state = m_k[:, None] & m_v[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    r += i_b * r_b + bos * r_t + i_h * r_h
    k += i_b * k_b + bos * k_t + i_h * k_h
    v += i_b * v_b + bos * v_t + i_h * v_h
    w += i_b * w_b + bos * w_t + i_h * w_h
    y += ((i_b * T + bos) * H + i_h) * V
    b_u = tl.load(u + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)

    if CUT:  # [V, K]
        b_state = tl.load(borders + ((first_segment + i_s) * H + i_h) * K * V + o_v[None, :] * K + o_k[:, None],
                          mask=m_state, other=0.0)
    elif initial is not None:
        b_state = tl.load(initial + (i_n * H + i_h) * K * V + o_state, mask=m_state, other=0.0).to(tl.float32)
    else:
        b_state = tl.zeros([BK, BV], tl.float32)
    for i_c in range(first // BT, tl.cdiv(last, BT)):
        o_t = i_c * BT + o_r
        m_tk = (o_t < last)[:, None] & m_k[None, :]
        m_tv = (o_t < last)[:, None] & m_v[None, :]
        b_r = rows(r, r_t, o_t, o_k, m_tk).to(tl.float32)
        b_k = rows(k, k_t, o_t, o_k, m_tk).to(tl.float32)
        b_v = rows(v, v_t, o_t, o_v, m_tv).to(OP)
        own, before, upto, after, total = decays(w, w_t, o_t, o_k, last, K, BT, EXACT)
        if KEEP:
            p_states = states + ((slot + i_c) * H + i_h) * K * V + o_state
            tl.store(p_states, b_state.to(states.dtype.element_ty), mask=m_state)

        middle, border, worst = references(own, before, upto, total, BT)
        if LIMIT > 1000 or worst < LIMIT:
            scores = dot((b_r * tl.exp(before - middle)).to(OP), tl.trans((b_k * tl.exp(middle - upto)).to(OP)),
                         tl.zeros([BT, BT], tl.float32), PRECISION)
            scores = tl.where((o_r[:, None] // 16 == o_r[None, :] // 16) & (o_r[:, None] > o_r[None, :]), scores, 0.0)
        else:
            scores = steep_scores(b_r, k, w, k_t, w_t, o_t, o_k, last, K, BT)
        if BT > 16:
            second = (o_r >= 16)[:, None]
            scores = dot(tl.where(second, b_r * border, 0.0).to(OP),
                         tl.trans(tl.where(second, 0.0, b_k * border).to(OP)), scores, PRECISION)
        bonus = tl.sum(b_r * b_u[None, :] * b_k, 1)
        scores += tl.where(o_r[:, None] == o_r[None, :], bonus[:, None], 0.0)

        b_y = dot((b_r * tl.exp(before)).to(OP), b_state.to(OP), tl.zeros([BT, BV], tl.float32), PRECISION)
        b_y = dot(scores.to(OP), b_v, b_y, PRECISION)
        tl.store(y + o_t[:, None] * H * V + o_v[None, :], b_y.to(y.dtype.element_ty), mask=m_tv)
        b_state = dot(tl.trans((b_k * tl.exp(after)).to(OP)), b_v, b_state * tl.exp(total)[:, None], PRECISION)
    if last == length:
        tl.store(final + (i_n * H + i_h) * K * V + o_state, b_state, mask=m_state)


@triton.jit(do_not_specialize=["T", "L", "n_segments"])
def _backward(r, k, v, w, u, dy, dfinal, borders, states, dr, dk, dv, dw, du, dinitial, cu_seqlens, segments,
              T, L, n_segments, H, K, V, part, part_u,
              r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h, dy_b, dy_t, dy_h,
              BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
              EXACT: tl.constexpr, LIMIT: tl.constexpr, CUT: tl.constexpr, VARLEN: tl.constexpr):
    """All gradients of one segment and head, those of r, k, w, u as one block of values has them."""
    i_h = tl.program_id(0) % H
    i_v = tl.program_id(1).to(tl.int64)
    i_n, i_b, bos, length, i_s, slot, first_segment = place(
        tl.program_id(0) // H, T, L, n_segments, cu_seqlens, segments, BT, VARLEN)
    o_r = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    p_du = du + i_v * part_u + tl.program_id(0).to(tl.int64) * K + o_k
    if i_n < 0:
        tl.store(p_du, tl.zeros([BK], tl.float32), mask=m_k)
        return
    first = i_s * L
    last = tl.minimum(first + L, length)
    m_state = m_v[:, None] & m_k[None, :]
    o_state = o_k[None, :] * V + o_v[:, None]
    r += i_b * r_b + bos * r_t + i_h * r_h
    k += i_b * k_b + bos * k_t + i_h * k_h
    v += i_b * v_b + bos * v_t + i_h * v_h
    w += i_b * w_b + bos * w_t + i_h * w_h
    dy += i_b * dy_b + bos * dy_t + i_h * dy_h
    start = (i_b * T + bos) * H + i_h
    dr += i_v * part + start * K
    dk += i_v * part + start * K
    dw += i_v * part + start * K
    dv += start * V
    b_u = tl.load(u + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_du = tl.zeros([BK], tl.float32)
    block = o_r[:, None] // 16 == o_r[None, :] // 16
    second = (o_r >= 16)[:, None]

    if CUT:
        b_dstate = tl.load(borders + ((first_segment + i_s) * H + i_h) * K * V + o_v[:, None] * K + o_k[None, :],
                           mask=m_state, other=0.0)
    elif dfinal is not None:
        b_dstate = tl.load(dfinal + (i_n * H + i_h) * K * V + o_state, mask=m_state, other=0.0).to(tl.float32)
    else:
        b_dstate = tl.zeros([BV, BK], tl.float32)
    chunks = tl.cdiv(last - first, BT)
    for n in range(0, chunks):
        i_c = first // BT + chunks - 1 - n
        o_t = i_c * BT + o_r
        m_tk = (o_t < last)[:, None] & m_k[None, :]
        m_tv = (o_t < last)[:, None] & m_v[None, :]
        b_r = rows(r, r_t, o_t, o_k, m_tk).to(tl.float32)
        b_k = rows(k, k_t, o_t, o_k, m_tk).to(tl.float32)
        b_v = rows(v, v_t, o_t, o_v, m_tv).to(OP)
        b_dy = rows(dy, dy_t, o_t, o_v, m_tv).to(OP)
        b_state = tl.load(states + ((slot + i_c) * H + i_h) * K * V + o_state, mask=m_state, other=0.0)
        own, before, upto, after, total = decays(w, w_t, o_t, o_k, last, K, BT, EXACT)
        middle, border, worst = references(own, before, upto, total, BT)

        # both ways round: the transpose of a product's result would be one operand too many
        da = dot(b_dy, tl.trans(b_v), tl.zeros([BT, BT], tl.float32), PRECISION)
        da_t = dot(b_v, tl.trans(b_dy), tl.zeros([BT, BT], tl.float32), PRECISION)
        apart = tl.where(block & (o_r[:, None] > o_r[None, :] + 1), da, 0.0)
        apart_t = tl.where(block & (o_r[:, None] + 1 < o_r[None, :]), da_t, 0.0)
        if LIMIT > 1000 or worst < LIMIT:
            from_middle = tl.exp(before - middle)
            to_middle = tl.exp(middle - upto)
            later = (b_r * from_middle).to(OP)
            earlier = (b_k * to_middle).to(OP)
            scores = dot(later, tl.trans(earlier), tl.zeros([BT, BT], tl.float32), PRECISION)
            scores = tl.where(block & (o_r[:, None] > o_r[None, :]), scores, 0.0)
            b_dr = dot(apart.to(OP), earlier, tl.zeros([BT, BK], tl.float32), PRECISION) * from_middle
            b_dk = dot(apart_t.to(OP), later, tl.zeros([BT, BK], tl.float32), PRECISION) * to_middle
        else:
            scores = steep_scores(b_r, k, w, k_t, w_t, o_t, o_k, last, K, BT)
            b_dr = steep_products(apart, k, w, k_t, w_t, o_t, o_k, last, K, BT, BK, True)
            b_dk = steep_products(apart_t, r, w, r_t, w_t, o_t, o_k, last, K, BT, BK, False)
        later_sum = b_r * b_dr  # to be added up over the tokens after a decay
        inside = b_k * b_dk
        earlier_sum = tl.zeros([BT, BK], tl.float32)  # over the tokens before it
        if BT > 16:
            from_border = tl.where(second, b_r * border, 0.0).to(OP)
            to_border = tl.where(second, 0.0, b_k * border).to(OP)
            scores = dot(from_border, tl.trans(to_border), scores, PRECISION)
            across = dot(da.to(OP), to_border, tl.zeros([BT, BK], tl.float32), PRECISION)
            across_t = dot(da_t.to(OP), from_border, tl.zeros([BT, BK], tl.float32), PRECISION)
            across = tl.where(second, across, across_t) * border
            b_dr += tl.where(second, across, 0.0)
            b_dk += tl.where(second, 0.0, across)
            across_later = tl.where((o_r > 16)[:, None], b_r * across, 0.0)
            across_earlier = tl.where((o_r < 15)[:, None], b_k * across, 0.0)
            later_sum += across_later
            earlier_sum += across_earlier

        from_start = tl.exp(before)
        to_end = tl.exp(after)
        b_k_end = (b_k * to_end).to(OP)
        b_dv = dot(b_dstate.to(OP), tl.trans(b_k_end), tl.zeros([BV, BT], tl.float32), PRECISION)
        bonus = tl.sum(b_r * b_u[None, :] * b_k, 1)
        scores += tl.where(o_r[:, None] == o_r[None, :], bonus[:, None], 0.0)
        b_dv = dot(tl.trans(b_dy), scores.to(OP), b_dv, PRECISION)
        tl.store(dv + o_t[None, :] * H * V + o_v[:, None], b_dv.to(dv.dtype.element_ty),
                 mask=(o_t < last)[None, :] & m_v[:, None])

        by_state = dot(b_dy, b_state.to(OP), tl.zeros([BT, BK], tl.float32), PRECISION) * from_start
        b_dr += by_state
        later_sum += tl.where((o_r > 0)[:, None], b_r * by_state, 0.0)
        to_state = dot(b_v, b_dstate.to(OP), tl.zeros([BT, BK], tl.float32), PRECISION) * to_end
        b_dk += to_state
        earlier_sum += tl.where(((o_r < BT - 1) & (o_t + 1 < last))[:, None], b_k * to_state, 0.0)
        through = tl.sum(b_state.to(tl.float32) * b_dstate, 0) * tl.exp(total)
        b_dw = through[None, :] + tl.cumsum(later_sum - inside, 0, reverse=True) - later_sum
        b_dw += tl.cumsum(earlier_sum, 0) - earlier_sum
        if BT > 16:
            b_dw -= tl.where(second, tl.sum(across_earlier, 0)[None, :], tl.sum(across_later, 0)[None, :])
        o_out = o_t[:, None] * H * K + o_k[None, :]
        tl.store(dw + o_out, tl.where(own <= NOTHING, 0.0, b_dw).to(dw.dtype.element_ty), mask=m_tk)

        itself = tl.sum(tl.where(o_r[:, None] == o_r[None, :], da, 0.0), 1)[:, None]
        neighbour = tl.where(block & (o_r[:, None] == o_r[None, :] + 1), da, 0.0)
        neighbour_t = tl.where(block & (o_r[:, None] + 1 == o_r[None, :]), da_t, 0.0)
        b_dr = dot(neighbour.to(OP), b_k.to(OP), b_dr, PRECISION) + itself * b_u[None, :] * b_k
        b_dk = dot(neighbour_t.to(OP), b_r.to(OP), b_dk, PRECISION) + itself * b_u[None, :] * b_r
        tl.store(dr + o_out, b_dr.to(dr.dtype.element_ty), mask=m_tk)
        tl.store(dk + o_out, b_dk.to(dk.dtype.element_ty), mask=m_tk)
        b_du += tl.sum(itself * b_r * b_k, 0)
        b_dstate = dot(tl.trans(b_dy), (b_r * from_start).to(OP), b_dstate * tl.exp(total)[None, :], PRECISION)
    tl.store(p_du, b_du, mask=m_k)
    if first == 0:
        tl.store(dinitial + (i_n * H + i_h) * K * V + o_state, b_dstate, mask=m_state)


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
            keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """r, k, w [B, T, H, K], v [B, T, H, V], u [H, K], initial [N, H, K, V] -> y, final state, chunks' states if `keep`.

    Columns of inputs must be adjacent, u, initial and cu_seqlens contiguous.
    """
    B, T, H, K = r.shape
    V = v.shape[-1]
    op, how = operands(r, k, v)
    launch = numbers("forward", r, v, op)
    blocks = triton.cdiv(V, launch["BV"])
    cut = Cut(r, blocks, cu_seqlens)
    shape = cut.documents, H, K, V
    y = r.new_empty(B, T, H, V)
    final = torch.empty(shape, dtype=torch.float32, device=r.device)
    if cu_seqlens is not None or T == 0:  # documents without a token are nobody's
        final = final.zero_() if initial is None else final.copy_(initial)
    new = torch.empty if cu_seqlens is None else torch.zeros  # some slots may stay unused, an output has no garbage
    states = new(chunk_slots(r, v, op, cu_seqlens) if keep else 0, H, K, V, dtype=op, device=r.device)
    if y.numel():
        borders = cut.borders(k, v, w, r, v, initial, cu_seqlens, op, how, False) if cut.several else None
        _forward[cut.rows * H, blocks](
            r, k, v, w, u, initial, borders, y, final, states, cu_seqlens, cut.table,
            T, cut.length, cut.per_row, H, K, V, *r.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride()[:3],
            **launch, **how, KEEP=keep, CUT=cut.several, VARLEN=cut.table is not None)
    return y, final, states


def backward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, states: Tensor, dy: Tensor, dfinal: Tensor | None,
             cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of r, k, v, w, u and the initial state (float32), from the chunks' states of `forward`."""
    B, T, H, K = r.shape
    V = v.shape[-1]
    op, how = operands(r, k, v)
    launch = numbers("backward", r, v, op)
    blocks = triton.cdiv(V, launch["BV"])
    cut = Cut(r, blocks, cu_seqlens)
    dinitial = torch.empty(cut.documents, H, K, V, dtype=torch.float32, device=r.device)
    if cu_seqlens is not None or T == 0:
        dinitial = dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
    if not dy.numel():
        zeros = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (r, k, v, w, u)]
        return zeros[0], zeros[1], zeros[2], zeros[3], zeros[4], dinitial
    # several blocks of values: each has its part of what they share
    dr, dk, dw = (torch.empty(blocks, B, T, H, K, dtype=x.dtype if blocks == 1 else torch.float32, device=r.device)
                  for x in (r, k, w))
    dv = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    du = torch.empty(blocks, cut.rows, H, K, dtype=torch.float32, device=r.device)
    borders = cut.borders(r, dy, w, r, v, dfinal, cu_seqlens, op, how, True) if cut.several else None
    _backward[cut.rows * H, blocks](
        r, k, v, w, u, dy, dfinal, borders, states, dr, dk, dv, dw, du, dinitial, cu_seqlens, cut.table,
        T, cut.length, cut.per_row, H, K, V, B * T * H * K, cut.rows * H * K,
        *r.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride()[:3], *dy.stride()[:3], **launch, **how,
        CUT=cut.several, VARLEN=cut.table is not None)
    if blocks > 1:
        dr, dk, dw = (x.sum(0).to(like.dtype) for x, like in zip((dr, dk, dw), (r, k, w), strict=True))
    else:
        dr, dk, dw = dr[0], dk[0], dw[0]
    return dr, dk, dv, dw, du.sum((0, 1)).to(u.dtype), dinitial
