"""WKV-6 (2404.05892, section 4), forward and backward: a program walks over the chunks of a head with the state.

With c_t the sum of the log decays from the chunk's start to t, S the state before the chunk, S' after it:

    y_t = (r_t e^c_{t-1}) S + sum_{s<t} A_ts v_s + (r_t . u k_t) v_t,    A_ts = sum_c r_tc k_sc e^(c_{t-1} - c_s)
    S'  = e^c_end S + sum_s (k_s e^(c_end - c_s))^T v_s

The forward pass keeps S and A of every chunk; the backward pass goes from the end, with the gradient of S'.

Pairs are computed by halves, as in the eager path: where s is in the earlier and t in the later half of the same block
of 2, 4, ..., BT tokens, the border between the halves is the reference: r is decayed from it, k to it. No exponent is
above 0, and each is a sum of the log decays that belong to it, so that decays may be as steep as they like, and cost
what flat ones cost. r of the later halves and k of the earlier ones are one tile x, whose product with itself holds the
pairs of both.

The gradient of a log decay is a sum over pairs s < t around it. Those from before to after the chunk are S dS'; all
others have one end beyond a border (the chunk's, or one between halves): running sums, from a token to the border, of r
dr or k dk, the parts that these pairs gave. Sums of one sign, where the usual sum of r dr - k dk over all that follows
cancels. Sums over tokens are products with masks of 0 and 1.

Tokens after t change y_t by no bit.

dA is computed both ways round: the transpose of a product's result is no safe operand on Hopper. That of x is taken in
products of 16 or 32 rows, too few for wgmma.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, LOG2E, dot
from zoo.kernels.wkv6_parts import (
    LN2,
    LOG2LOG2E,
    chunk_size,
    chunk_slots,
    columns,
    cut,
    decay,
    log_decays,
    numbers,
    operands,
    place,
    sums,
)

__all__ = ["backward", "chunk_size", "chunk_slots", "forward", "operands"]


@triton.jit
def to_middle(level: tl.constexpr, BT: tl.constexpr, OP: tl.constexpr):
    """1 where token j lies between token i and the middle of their block of 2^(level + 1) tokens: [BT (j), BT (i)]."""
    i = tl.arange(0, BT)[None, :]
    j = tl.arange(0, BT)[:, None]
    same = (i >> level) == (j >> level)
    return tl.where(same & tl.where((i >> level) % 2 == 1, j < i, j > i), 1.0, 0.0).to(OP)


@triton.jit
def times(a, b):
    """a b, which no later sum can take for its own: until then both factors would be kept in registers."""
    if INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise("mul.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True,
                                         pack=1)


@triton.jit
def halves(b_r, b_k, own, level: tl.constexpr, none, BT: tl.constexpr, OP: tl.constexpr, EXACT: tl.constexpr,
           SPLIT: tl.constexpr, LOGS2: tl.constexpr):
    """x [BK, BT]: r of later, k of earlier halves of blocks of 2^(level + 1) tokens, decayed from or to the middle."""
    x = tl.where((tl.arange(0, BT)[None, :] >> level) % 2 == 1, b_r, b_k)
    if level > 0:  # neighbours have no decay between them
        x *= decay(sums(own, to_middle(level, BT, OP), none, OP, EXACT, SPLIT), LOGS2)
    return x.to(OP)


@triton.jit
def with_halves(scores, x, level: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):
    """`scores` with A of the pairs of those halves."""
    i = tl.arange(0, BT)[:, None] >> level
    j = tl.arange(0, BT)[None, :] >> level
    return tl.where((i % 2 == 1) & (i == j + 1), dot(tl.trans(x), x, tl.zeros([BT, BT], tl.float32), PRECISION), scores)


@triton.jit
def across(da, level: tl.constexpr, BT: tl.constexpr, OP: tl.constexpr):
    """Of dA, symmetric [BT, BT], the pairs of those halves."""
    i = tl.arange(0, BT)[:, None] >> level
    j = tl.arange(0, BT)[None, :] >> level
    return tl.where(i ^ j == 1, da, 0.0).to(OP)


@triton.jit
def halves_backward(b_dr, b_dk, b_dw, b_r, b_k, own, b_across, level: tl.constexpr, none, BT: tl.constexpr,
                    OP: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr,
                    LOGS2: tl.constexpr):
    """Gradients of r, k and log decays, with those that the pairs of these halves give."""
    later = (tl.arange(0, BT)[None, :] >> level) % 2 == 1
    x = tl.where(later, b_r, b_k)
    if level > 0:
        inside = to_middle(level, BT, OP)
        from_middle = decay(sums(own, inside, none, OP, EXACT, SPLIT), LOGS2)
        dx = dot((x * from_middle).to(OP), b_across, none, PRECISION) * from_middle
        b_dw = sums(x * dx, tl.trans(inside), b_dw, OP, EXACT, False)
    else:
        dx = dot(x.to(OP), b_across, none, PRECISION)
    return b_dr + tl.where(later, dx, 0.0), b_dk + tl.where(later, 0.0, dx), b_dw


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents"])
def _outputs(r, k, v, w, base, u, initial, borders, final, states, pairs, y, cu_seqlens, table, T, L, pieces, documents,
             H, K, V, r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h,
             BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
             EXACT: tl.constexpr, KEEP: tl.constexpr):
    """y of a segment, a head and a block of values; KEEP: and of each chunk the state before it, and A."""
    i_h = tl.program_id(0) % H
    i_n, i_b, bos, length, i_s, slot, first_piece = place(
        tl.program_id(0) // H, T, L, pieces, documents, cu_seqlens, table, BT)
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
    i = o_r[:, None]
    j = o_r[None, :]
    r += i_b * r_b + bos * r_t + i_h * r_h
    k += i_b * k_b + bos * k_t + i_h * k_h
    v += i_b * v_b + bos * v_t + i_h * v_h
    w += i_b * w_b + bos * w_t + i_h * w_h
    y += ((i_b * T + bos) * H + i_h) * V
    states += (slot * H + i_h) * K * V
    pairs += (slot * H + i_h) * BT * BT
    b_base = None
    if base is not None:
        b_base = tl.load(base + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32) * LOG2E + LOG2LOG2E
    LOGS2: tl.constexpr = base is not None
    SPLIT: tl.constexpr = base is None and w.dtype.element_ty != OP
    # of sums over K: a tensor core rounds each of its steps towards 0, which 200 of them show in float32
    LONG: tl.constexpr = "ieee" if EXACT and BK > 128 else PRECISION
    b_u = tl.load(u + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)[:, None]
    none = tl.zeros([BK, BT], tl.float32)

    b_state = tl.zeros([BK, BV], tl.float32)
    if pieces > 1:
        b_state = tl.load(borders + ((first_piece + i_s) * H + i_h) * K * V + o_state, mask=m_state, other=0.0)
    elif initial is not None:
        b_state = tl.load(initial + (i_n * H + i_h) * K * V + o_state, mask=m_state, other=0.0).to(tl.float32)
    chunks = tl.cdiv(last - first, BT).to(tl.int32)
    # What does not change from chunk to chunk is computed anew, and addresses are not stepped: registers are dearer. A
    # compiler cannot know that n >> 24 is 0.
    for n in tl.range(0, chunks, disable_licm=True):
        o_n = o_r + (n >> 24)
        i_c = first // BT + n + (n >> 24)
        o_c = i_c * BT
        left = tl.minimum(last - o_c, BT).to(tl.int32)
        m_tk = m_k[:, None] & (o_r < left)[None, :]
        m_tv = (o_r < left)[:, None] & m_v[None, :]
        b_r = columns(r + o_c * r_t, o_n[None, :] * r_t + o_k[:, None], m_tk, BT, OP)
        b_k = columns(k + o_c * k_t, o_n[None, :] * k_t + o_k[:, None], m_tk, BT, OP)
        b_v = tl.load(v + o_c * v_t + o_n[:, None] * v_t + o_v[None, :], mask=m_tv, other=0.0).to(OP)
        own = log_decays(w + o_c * w_t, b_base, o_n[None, :] * w_t + o_k[:, None], m_tk, BT, OP)
        if KEEP:
            tl.store(states + i_c * H * K * V + (o_k + (n >> 24))[:, None] * V + o_v[None, :], b_state.to(OP),
                     mask=m_state)

        # all factors first, then all products: they wait for each other once
        from_start = (b_r * decay(sums(own, tl.where(i < j, 1.0, 0.0), none, OP, EXACT, SPLIT), LOGS2)).to(OP)
        to_end = (b_k * decay(sums(own, tl.where(i > j, 1.0, 0.0), none, OP, EXACT, SPLIT), LOGS2)).to(OP)
        bonus = (b_r * b_u).to(OP)
        x0 = halves(b_r, b_k, own, 0, none, BT, OP, EXACT, SPLIT, LOGS2)
        x1 = halves(b_r, b_k, own, 1, none, BT, OP, EXACT, SPLIT, LOGS2)
        x2 = halves(b_r, b_k, own, 2, none, BT, OP, EXACT, SPLIT, LOGS2)
        x3 = halves(b_r, b_k, own, 3, none, BT, OP, EXACT, SPLIT, LOGS2)
        if BT > 16:
            x4 = halves(b_r, b_k, own, 4, none, BT, OP, EXACT, SPLIT, LOGS2)
        b_y = dot(tl.trans(from_start), b_state.to(OP), tl.zeros([BT, BV], tl.float32), LONG)
        scores = dot(tl.trans(bonus), b_k.to(OP), tl.zeros([BT, BT], tl.float32), LONG)
        scores = with_halves(tl.where(i == j, scores, 0.0), x0, 0, BT, LONG)
        scores = with_halves(scores, x1, 1, BT, LONG)
        scores = with_halves(scores, x2, 2, BT, LONG)
        scores = with_halves(scores, x3, 3, BT, LONG)
        if BT > 16:
            scores = with_halves(scores, x4, 4, BT, LONG)
        if KEEP and tl.program_id(1) == 0:
            tl.store(pairs + i_c * H * BT * BT + i * BT + j, scores.to(OP))
        b_y = dot(scores.to(OP), b_v, b_y, PRECISION)
        tl.store(y + o_c * H * V + o_n[:, None] * (H * V) + o_v[None, :], b_y.to(y.dtype.element_ty), mask=m_tv)
        b_state = dot(to_end, b_v, b_state * decay(tl.sum(own.to(tl.float32), 1), LOGS2)[:, None], PRECISION)
    if last == length:
        tl.store(final + (i_n * H + i_h) * K * V + o_state, b_state, mask=m_state)


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents"])
def _gradients(r, k, v, w, base, u, dy, states, pairs, dfinal, borders, dinitial, dr, dk, dv, dw, du, dbase,
               cu_seqlens, table, T, L, pieces, documents, H, K, V,
               r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h, dy_b, dy_t, dy_h,
               BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
               EXACT: tl.constexpr):
    """All gradients of a segment and a head, those of r, k, w, u, base as one block of values has them."""
    i_h = tl.program_id(0) % H
    i_v = tl.program_id(1)
    blocks = tl.num_programs(1)
    i_n, i_b, bos, length, i_s, slot, first_piece = place(
        tl.program_id(0) // H, T, L, pieces, documents, cu_seqlens, table, BT)
    o_r = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    o_sum = (tl.program_id(0).to(tl.int64) * blocks + i_v) * K + o_k
    if i_n < 0:
        tl.store(du + o_sum, tl.zeros([BK], tl.float32), mask=m_k)
        if base is not None:
            tl.store(dbase + o_sum, tl.zeros([BK], tl.float32), mask=m_k)
        return
    first = i_s * L
    last = tl.minimum(first + L, length)
    m_state = m_k[:, None] & m_v[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    i = o_r[:, None]
    j = o_r[None, :]
    bos += first
    slot += first // BT
    start = (i_b * T + bos) * H + i_h
    r += i_b * r_b + bos * r_t + i_h * r_h
    k += i_b * k_b + bos * k_t + i_h * k_h
    v += i_b * v_b + bos * v_t + i_h * v_h
    w += i_b * w_b + bos * w_t + i_h * w_h
    dy += i_b * dy_b + bos * dy_t + i_h * dy_h
    dr += (start * blocks + i_v) * K
    dk += (start * blocks + i_v) * K
    dw += (start * blocks + i_v) * K
    dv += start * V
    states += (slot * H + i_h) * K * V
    pairs += (slot * H + i_h) * BT * BT
    b_base = None
    if base is not None:
        b_base = tl.load(base + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32) * LOG2E + LOG2LOG2E
    LOGS2: tl.constexpr = base is not None
    SPLIT: tl.constexpr = base is None and w.dtype.element_ty != OP
    LONG: tl.constexpr = "ieee" if EXACT and BK > 128 else PRECISION
    b_u = tl.load(u + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)[:, None]
    none = tl.zeros([BK, BT], tl.float32)
    square = tl.zeros([BT, BT], tl.float32)
    after = tl.where(i > j, 1.0, 0.0).to(OP)

    b_dstate = tl.zeros([BK, BV], tl.float32)
    if pieces > 1:
        b_dstate = tl.load(borders + ((first_piece + i_s) * H + i_h) * K * V + o_state, mask=m_state, other=0.0)
    elif dfinal is not None:
        b_dstate = tl.load(dfinal + (i_n * H + i_h) * K * V + o_state, mask=m_state, other=0.0).to(tl.float32)
    b_du = tl.zeros([BK], tl.float32)
    b_dbase = tl.zeros([BK], tl.float32)
    tokens = (last - first).to(tl.int32)
    for n in tl.range(0, tl.cdiv(tokens, BT), disable_licm=True):  # as in _outputs
        o_n = o_r + (n >> 24)
        i_c = tl.cdiv(tokens, BT) - 1 - n + (n >> 24)
        left = tl.minimum(tokens - i_c * BT, BT)
        i_c = i_c.to(tl.int64)
        o_c = i_c * BT
        m_tk = m_k[:, None] & (o_r < left)[None, :]
        m_tv = (o_r < left)[:, None] & m_v[None, :]
        b_dy = tl.load(dy + o_c * dy_t + o_n[:, None] * dy_t + o_v[None, :], mask=m_tv, other=0.0).to(OP)
        b_v = tl.load(v + o_c * v_t + o_n[:, None] * v_t + o_v[None, :], mask=m_tv, other=0.0).to(OP)
        b_r = columns(r + o_c * r_t, o_n[None, :] * r_t + o_k[:, None], m_tk, BT, OP)
        b_k = columns(k + o_c * k_t, o_n[None, :] * k_t + o_k[:, None], m_tk, BT, OP)
        own = log_decays(w + o_c * w_t, b_base, o_n[None, :] * w_t + o_k[:, None], m_tk, BT, OP)
        b_state = tl.load(states + i_c * H * K * V + (o_k + (n >> 24))[:, None] * V + o_v[None, :], mask=m_state,
                          other=0.0)
        b_pairs = tl.load(pairs + i_c * H * BT * BT + j * BT + i)
        o_out = o_n[None, :] * (H * blocks * K) + o_k[:, None]
        o_c *= H

        da = dot(b_dy, tl.trans(b_v), square, PRECISION)
        da = tl.where(i >= j, da, dot(b_v, tl.trans(b_dy), square, PRECISION)).to(OP)
        itself = tl.where(i == j, da, 0.0).to(OP)
        across0 = across(da, 0, BT, OP)
        across1 = across(da, 1, BT, OP)
        across2 = across(da, 2, BT, OP)
        across3 = across(da, 3, BT, OP)

        # of values; then of all pairs with one end beyond the chunk, or both
        b_ds = b_dstate.to(OP)
        to_end = decay(sums(own, after, none, OP, EXACT, SPLIT), LOGS2)
        b_dv = dot(tl.trans((b_k * to_end).to(OP)), b_ds, tl.zeros([BT, BV], tl.float32), LONG)
        b_dv = dot(b_pairs, b_dy, b_dv, PRECISION)
        tl.store(dv + o_c * V + o_n[:, None] * (H * V) + o_v[None, :], b_dv.to(dv.dtype.element_ty), mask=m_tv)
        b_dk = times(dot(b_ds, tl.trans(b_v), none, PRECISION), to_end)
        total = decay(tl.sum(own.to(tl.float32), 1), LOGS2)
        b_dw = none + (tl.sum(b_state.to(tl.float32) * b_dstate, 1) * total)[:, None]
        b_dw = sums(b_k * b_dk, tl.trans(after), b_dw, OP, EXACT, False)
        from_start = decay(sums(own, tl.trans(after), none, OP, EXACT, SPLIT), LOGS2)
        b_dr = times(dot(b_state, tl.trans(b_dy), none, PRECISION), from_start)
        b_dw = sums(b_r * b_dr, after, b_dw, OP, EXACT, False)
        b_dstate = dot((b_r * from_start).to(OP), b_dy, b_dstate * total[:, None], PRECISION)

        # of pairs inside, by halves; of a token with itself
        b_dr, b_dk, b_dw = halves_backward(b_dr, b_dk, b_dw, b_r, b_k, own, across1, 1, none, BT, OP, PRECISION,
                                           EXACT, SPLIT, LOGS2)
        b_dr, b_dk, b_dw = halves_backward(b_dr, b_dk, b_dw, b_r, b_k, own, across2, 2, none, BT, OP, PRECISION,
                                           EXACT, SPLIT, LOGS2)
        b_dr, b_dk, b_dw = halves_backward(b_dr, b_dk, b_dw, b_r, b_k, own, across3, 3, none, BT, OP, PRECISION,
                                           EXACT, SPLIT, LOGS2)
        if BT > 16:
            b_dr, b_dk, b_dw = halves_backward(b_dr, b_dk, b_dw, b_r, b_k, own, across(da, 4, BT, OP), 4, none, BT, OP,
                                               PRECISION, EXACT, SPLIT, LOGS2)
        if base is not None:
            b_dw *= own.to(tl.float32) * LN2
            b_dbase += tl.sum(b_dw, 1)
        tl.store(dw + o_c * (blocks * K) + o_out, b_dw.to(dw.dtype.element_ty), mask=m_tk)
        b_dr, b_dk, b_dw = halves_backward(b_dr, b_dk, b_dw, b_r, b_k, own, across0, 0, none, BT, OP, PRECISION,
                                           EXACT, SPLIT, LOGS2)
        x = dot(b_k.to(OP), itself, none, PRECISION)
        b_du += tl.sum(b_r * x, 1)
        tl.store(dr + o_c * (blocks * K) + o_out, (b_dr + x * b_u).to(dr.dtype.element_ty), mask=m_tk)
        x = dot(b_r.to(OP), itself, none, PRECISION)
        tl.store(dk + o_c * (blocks * K) + o_out, (b_dk + x * b_u).to(dk.dtype.element_ty), mask=m_tk)
    if first == 0:
        tl.store(dinitial + (i_n * H + i_h) * K * V + o_state, b_dstate, mask=m_state)
    tl.store(du + o_sum, b_du, mask=m_k)
    if base is not None:
        tl.store(dbase + o_sum, b_dbase, mask=m_k)


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None,
            keep: bool, base: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, k, w [B, T, H, K], v [B, T, H, V], u [H, K], initial [N, H, K, V] -> y, final state, chunks' states and A.

    The latter two, for the backward pass, have no elements if not `keep`.

    Columns of inputs must be adjacent, u, initial and cu_seqlens contiguous.
    """
    B, T, H, K = r.shape
    V = v.shape[-1]
    op, how = operands(r, k, v)
    y = r.new_empty(B, T, H, V)
    final = torch.empty(B if cu_seqlens is None else len(cu_seqlens) - 1, H, K, V, dtype=torch.float32,
                        device=r.device)
    if cu_seqlens is not None or T == 0:  # documents without a token are nobody's
        final = final.zero_() if initial is None else final.copy_(initial)
    slots, BT = chunk_slots(r, op, cu_seqlens) if keep else 0, chunk_size(r, op)
    new = torch.empty if cu_seqlens is None else torch.zeros  # some slots may stay unused, an output has no garbage
    states, pairs = (new(slots, H, *size, dtype=op, device=r.device) for size in ((K, V), (BT, BT)))
    if not y.numel():
        return y, final, states.zero_(), pairs
    launch = numbers("outputs", r, v, op)
    blocks = triton.cdiv(V, launch["BV"])
    pieces, borders = cut(k, v, w, base, initial, final, cu_seqlens, op, how, blocks, False)
    _outputs[pieces.rows * H, blocks](
        r, k, v, w, base, u, initial, borders, final, states, pairs, y, *pieces.numbers, H, K, V,
        *r.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride()[:3], **launch, **how, KEEP=keep)
    return y, final, states, pairs


def backward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, states: Tensor, pairs: Tensor, dy: Tensor,
             dfinal: Tensor | None, cu_seqlens: Tensor | None, base: Tensor | None
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of r, k, v, w, u, the initial state (float32) and base, from what `forward` kept."""
    B, T, H, K = r.shape
    V = v.shape[-1]
    op, how = operands(r, k, v)
    launch = numbers("gradients", r, v, op)
    blocks = triton.cdiv(V, launch["BV"])
    dinitial = torch.empty(B if cu_seqlens is None else len(cu_seqlens) - 1, H, K, V, dtype=torch.float32,
                           device=r.device)
    if cu_seqlens is not None or T == 0:
        dinitial = dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
    if not dy.numel():
        zeros = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (r, k, v, w, u)]
        dbase = u.new_empty(0) if base is None else torch.zeros_like(base)
        return zeros[0], zeros[1], zeros[2], zeros[3], zeros[4], dinitial, dbase
    pieces, borders = cut(r, dy, w, base, dfinal, dinitial, cu_seqlens, op, how, blocks, True)
    # several blocks of values: each has its part of what they share
    dr, dk, dw = (torch.empty(B, T, H, blocks, K, dtype=x.dtype if blocks == 1 else torch.float32, device=r.device)
                  for x in (r, k, w))
    dv = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    sums_ = torch.empty(1 if base is None else 2, pieces.rows, H, blocks, K, dtype=torch.float32, device=r.device)
    _gradients[pieces.rows * H, blocks](
        r, k, v, w, base, u, dy, states, pairs, dfinal, borders, dinitial, dr, dk, dv, dw, sums_[0], sums_[-1],
        *pieces.numbers, H, K, V, *r.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride()[:3],
        *dy.stride()[:3], **launch, **how)
    if blocks > 1:
        dr, dk, dw = (x.sum(3).to(like.dtype) for x, like in zip((dr, dk, dw), (r, k, w), strict=True))
    else:
        dr, dk, dw = (x.squeeze(3) for x in (dr, dk, dw))
    du, *rest = sums_.sum((1, 3))
    dbase = u.new_empty(0) if base is None else rest[0].to(base.dtype, copy=True)
    return dr, dk, dv, dw, du.to(u.dtype, copy=base is not None), dinitial, dbase
