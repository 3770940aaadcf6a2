"""WKV-6 (2404.05892, section 4), forward and backward: states at the borders of chunks, then all chunks in parallel.

With c_t the sum of the log decays from the chunk's start to t, S the state before the chunk, S' after it:

    y_t = (r_t e^c_{t-1}) S + sum_{s<t} A_ts v_s + (r_t . u k_t) v_t,    A_ts = sum_c r_tc k_sc e^(c_{t-1} - c_s)
    S'  = e^c_end S + sum_s (k_s e^(c_end - c_s))^T v_s

`_walk` goes over the chunks with the state alone (backward: with its gradient, from the end) and leaves it at every
border. `_outputs` and `_gradients` have a program a chunk, and find there all that other chunks have to do with it.

A chunk is one or two blocks of 16 tokens. Between two blocks the border is the reference: r is decayed from it, k to
it, no exponent above 0. Inside a block A is a product of tiles around half of the block's sum, exponents within +-LIMIT
/ 2; where a block decays by more than e^-LIMIT in some channel, it is halved again and again, and every border between
two halves is the reference in its turn, as in the eager path. Each exponent is a sum of the log decays that belong to
it.

The gradient of a log decay is a sum over pairs s < t around it. Those from before to after the chunk are S dS'; those
with one end outside, or in the other half, running sums of r dr or k dk (of the parts that these pairs gave); those
inside a block that was not halved, the difference of two such sums, from which neighbours (s = t - 1, no decay between)
are left out: what does not belong to the result would drown a small one.

Sums over tokens are products with masks of 0 and 1, which tensor cores do with fewer barriers than a scan has.

Tokens after t change y_t by no bit, but for their decays: those of its chunk choose the reference, hence the rounding.

A state is held as [V, K], and dA is computed both ways round, as the transpose of a product's result is no safe operand
on Hopper. That of factors whose exponents are one is taken, in tiles of 16 or 32 rows, too few for wgmma.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import dot
from zoo.kernels.wkv6_parts import (
    NOTHING,
    Pieces,
    ask_for,
    chunk_size,
    chunk_slots,
    exp,
    log_decays,
    numbers,
    operands,
    place,
    rows,
    sums,
    walk,
)


@triton.jit
def exponents(own, BT: tl.constexpr, BK: tl.constexpr, OP: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr):
    """Sums of log decays [BT, BK]: of the block before a token; after it; of all of it; of the chunk's other block."""
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BT)[None, :]
    block = i // 16 == j // 16
    none = tl.zeros([BT, BK], tl.float32)
    before = sums(tl.where(block & (j < i), 1.0, 0.0), own, none, OP, EXACT, SPLIT)
    after = sums(tl.where(block & (j > i), 1.0, 0.0), own, none, OP, EXACT, SPLIT)
    other = none
    if BT > 16:
        other = sums(tl.where(block, 0.0, 1.0), own, none, OP, EXACT, SPLIT)
    return before, after, before + own + after, other


@triton.jit
def between(own, level, BT: tl.constexpr, BK: tl.constexpr, OP: tl.constexpr, EXACT: tl.constexpr,
            SPLIT: tl.constexpr):
    """Decay [BT, BK] between a token and the middle of its block of 2^(level + 1) tokens."""
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BT)[None, :]
    same = (i >> level) == (j >> level)
    later = (i >> level) % 2 == 1
    return exp(sums(tl.where(same & tl.where(later, j < i, j > i), 1.0, 0.0), own, tl.zeros([BT, BK], tl.float32), OP,
                    EXACT, SPLIT))


@triton.jit
def halves(x, border, level, BT: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr):
    """A of the pairs with s in the earlier and t in the later half of a block of 2^(level + 1) tokens.

    x: r of the later halves, k of the earlier ones; border: the decay between a token and the middle.
    """
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BT)[None, :]
    x = (x * border).to(OP)
    found = dot(x, tl.trans(x), tl.zeros([BT, BT], tl.float32), PRECISION)
    return tl.where(((i >> level) % 2 == 1) & ((i >> level) == (j >> level) + 1), found, 0.0)


@triton.jit
def halves_backward(x, border, da, da_t, level, BT: tl.constexpr, BK: tl.constexpr, OP: tl.constexpr,
                    PRECISION: tl.constexpr):
    """The same pairs' gradient of x."""
    i = tl.arange(0, BT)[:, None]
    j = tl.arange(0, BT)[None, :]
    pairs = ((i >> level) % 2 == 1) & ((i >> level) == (j >> level) + 1)
    pairs_t = ((j >> level) % 2 == 1) & ((i >> level) + 1 == (j >> level))
    across = tl.where(pairs, da, tl.where(pairs_t, da_t, 0.0)).to(OP)
    return dot(across, (x * border).to(OP), tl.zeros([BT, BK], tl.float32), PRECISION) * border


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents"])
def _outputs(r, k, v, w, base, u, states, y, pairs, cu_seqlens, table, T, L, pieces, documents, H, K, V,
             r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h,
             BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
             EXACT: tl.constexpr, LIMIT: tl.constexpr, KEEP: tl.constexpr):
    """y of one chunk, head and block of values; KEEP: A, which the backward pass wants, too."""
    i_h = tl.program_id(0) % H
    i_n, i_b, bos, length, i_c, slot, _ = place(
        tl.program_id(0) // H, T, L, pieces, documents, cu_seqlens, table, BT)
    if i_n < 0:
        return
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    first = bos + i_c * BT
    left = tl.minimum(length - i_c * BT, BT).to(tl.int32)
    m_tk = (o_t < left)[:, None] & m_k[None, :]
    m_tv = (o_t < left)[:, None] & m_v[None, :]
    i = o_t[:, None]
    j = o_t[None, :]
    block = i // 16 == j // 16
    second = i >= 16
    r += i_b * r_b + first * r_t + i_h * r_h
    k += i_b * k_b + first * k_t + i_h * k_h
    v += i_b * v_b + first * v_t + i_h * v_h
    w += i_b * w_b + first * w_t + i_h * w_h
    if base is not None:
        base += i_h * K
    SPLIT: tl.constexpr = base is None and w.dtype.element_ty != OP
    # of sums over K: a tensor core rounds each of its steps towards 0, which 200 of them show in float32
    LONG: tl.constexpr = "ieee" if EXACT and BK > 128 else PRECISION
    states += ((slot + i_c) * H + i_h) * K * V
    ask_for(r, r_t, o_t, left, K, BK)
    ask_for(states, K, o_v, V, K, BK)
    ask_for(k, k_t, o_t, left, K, BK)
    ask_for(v + tl.program_id(1) * BV, v_t, o_t, left, V - tl.program_id(1) * BV, BV)
    own = log_decays(w, base, w_t, o_t, o_k, m_tk, m_k, OP)
    before, after, all_, other = exponents(own, BT, BK, OP, EXACT, SPLIT)
    b_r = rows(r, r_t, o_t, o_k, m_tk).to(tl.float32)
    b_state = rows(states, K, o_v, o_k, m_v[:, None] & m_k[None, :])
    from_start = exp(before + tl.where(second, other, 0.0))
    b_y = dot((b_r * from_start).to(OP), tl.trans(b_state), tl.zeros([BT, BV], tl.float32), LONG)

    # pairs: a token with itself, with those of the block before, with those of its own
    b_k = rows(k, k_t, o_t, o_k, m_tk).to(tl.float32)
    b_u = tl.load(u + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    bonus = tl.sum(b_r * b_u[None, :] * b_k, 1)
    scores = tl.where(i == j, bonus[:, None], 0.0)
    if BT > 16:
        scores += halves(tl.where(second, b_r, b_k), exp(tl.where(second, before, after)), 4, BT, OP, LONG)
    if tl.max(-all_) < LIMIT:
        found = dot((b_r * exp(before - all_ * 0.5)).to(OP), tl.trans((b_k * exp(after - all_ * 0.5)).to(OP)),
                    tl.zeros([BT, BT], tl.float32), LONG)
        scores += tl.where(block & (i > j), found, 0.0)
    else:
        for level in range(0, tl.minimum(left, 4)):
            x = tl.where((i >> level) % 2 == 1, rows(r, r_t, o_t, o_k, m_tk).to(tl.float32),
                         rows(k, k_t, o_t, o_k, m_tk).to(tl.float32))
            own = log_decays(w, base, w_t, o_t, o_k, m_tk, m_k, OP)
            scores += halves(x, between(own, level, BT, BK, OP, EXACT, SPLIT), level, BT, OP, LONG)
    if KEEP and tl.program_id(1) == 0:
        tl.store(pairs + ((slot + i_c) * H + i_h) * BT * BT + i * BT + j, scores.to(OP))
    b_v = rows(v, v_t, o_t, o_v, m_tv).to(OP)
    b_y = dot(scores.to(OP), b_v, b_y, PRECISION)
    y += ((i_b * T + first) * H + i_h) * V
    tl.store(y + o_t[:, None] * H * V + o_v[None, :], b_y.to(y.dtype.element_ty), mask=m_tv)


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents"])
def _gradients(r, k, v, w, base, u, dy, states, pairs, dstates, dr, dk, dv, dw, du, dbase, cu_seqlens, table,
               T, L, pieces, documents, H, K, V,
               r_b, r_t, r_h, k_b, k_t, k_h, v_b, v_t, v_h, w_b, w_t, w_h, dy_b, dy_t, dy_h,
               BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
               EXACT: tl.constexpr, LIMIT: tl.constexpr):
    """All gradients of one chunk and head, those of r, k, w, u as one block of values has them."""
    i_h = tl.program_id(0) % H
    i_v = tl.program_id(1)
    i_n, i_b, bos, length, i_c, slot, _ = place(
        tl.program_id(0) // H, T, L, pieces, documents, cu_seqlens, table, BT)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    blocks = tl.num_programs(1)
    o_sum = (tl.program_id(0).to(tl.int64) * blocks + i_v) * K + o_k
    if i_n < 0:
        tl.store(du + o_sum, tl.zeros([BK], tl.float32), mask=m_k)
        if base is not None:
            tl.store(dbase + o_sum, tl.zeros([BK], tl.float32), mask=m_k)
        return
    first = bos + i_c * BT
    left = tl.minimum(length - i_c * BT, BT).to(tl.int32)
    m_tk = (o_t < left)[:, None] & m_k[None, :]
    m_tv = (o_t < left)[:, None] & m_v[None, :]
    i = o_t[:, None]
    j = o_t[None, :]
    block = i // 16 == j // 16
    second = i >= 16
    r += i_b * r_b + first * r_t + i_h * r_h
    k += i_b * k_b + first * k_t + i_h * k_h
    v += i_b * v_b + first * v_t + i_h * v_h
    w += i_b * w_b + first * w_t + i_h * w_h
    dy += i_b * dy_b + first * dy_t + i_h * dy_h
    if base is not None:
        base += i_h * K
    SPLIT: tl.constexpr = base is None and w.dtype.element_ty != OP
    # of sums over K: a tensor core rounds each of its steps towards 0, which 200 of them show in float32
    LONG: tl.constexpr = "ieee" if EXACT and BK > 128 else PRECISION
    none = tl.zeros([BT, BK], tl.float32)
    square = tl.zeros([BT, BT], tl.float32)
    o_slot = (slot + i_c) * H + i_h
    states += o_slot * K * V
    dstates += o_slot * K * V
    m_state = m_v[:, None] & m_k[None, :]
    ask_for(v + i_v * BV, v_t, o_t, left, V - i_v * BV, BV)
    ask_for(states, K, o_v, V, K, BK)
    ask_for(dstates, K, o_v, V, K, BK)
    ask_for(w, w_t, o_t, left, K, BK)
    ask_for(k, k_t, o_t, left, K, BK)
    ask_for(pairs + o_slot * BT * BT, BT, o_t, BT, BT, BT)
    ask_for(r, r_t, o_t, left, K, BK)
    start = (i_b * T + first) * H + i_h
    dr += (start * blocks + i_v) * K
    dk += (start * blocks + i_v) * K
    dw += (start * blocks + i_v) * K
    dv += start * V
    o_out = o_t[:, None] * H * blocks * K + o_k[None, :]

    # values with each other, wanted both ways round; with the states on both sides
    b_dy = rows(dy, dy_t, o_t, o_v, m_tv).to(OP)
    b_v = rows(v, v_t, o_t, o_v, m_tv).to(OP)
    da = dot(b_dy, tl.trans(b_v), square, PRECISION)
    da_t = dot(b_v, tl.trans(b_dy), square, PRECISION)
    b_state = rows(states, K, o_v, o_k, m_state)
    b_dr = dot(b_dy, b_state, none, PRECISION)
    b_dstate = rows(dstates, K, o_v, o_k, m_state)
    b_dk = dot(b_v, b_dstate, none, PRECISION)
    through = tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 0)

    # gradients of values: from the pairs, and to the chunk's end
    own = log_decays(w, base, w_t, o_t, o_k, m_tk, m_k, OP)
    before, after, all_, other = exponents(own, BT, BK, OP, EXACT, SPLIT)
    b_k = rows(k, k_t, o_t, o_k, m_tk).to(tl.float32)
    to_end = exp(after + tl.where(second, 0.0, other))
    b_dv = dot((b_k * to_end).to(OP), tl.trans(b_dstate), tl.zeros([BT, BV], tl.float32), LONG)
    b_dv = dot(tl.load(pairs + o_slot * BT * BT + j * BT + i), b_dy, b_dv, PRECISION)
    tl.store(dv + o_t[:, None] * H * V + o_v[None, :], b_dv.to(dv.dtype.element_ty), mask=m_tv)
    b_dk *= to_end
    b_dr *= exp(before + tl.where(second, other, 0.0))
    b_dw = -through[None, :] * exp(all_ + other)  # less than nothing until it is stored: masks of its own, short-lived
    b_r = rows(r, r_t, o_t, o_k, m_tk).to(tl.float32)
    later_sum = b_r * b_dr  # for the decays before a token
    earlier_sum = b_k * b_dk  # for those after it

    # between the blocks, where a token's part is that of r, or of k
    if BT > 16:
        b_dw = sums(tl.where(block, 0.0, -1.0), tl.where(second, later_sum, earlier_sum), b_dw, OP, EXACT, False)
        x = tl.where(second, b_r, b_k)
        dx = halves_backward(x, exp(tl.where(second, before, after)), da, da_t, 4, BT, BK, OP, PRECISION)
        b_dr += tl.where(second, dx, 0.0)
        b_dk += tl.where(second, 0.0, dx)
        dx *= x
        later_sum += tl.where(second, dx, 0.0)
        earlier_sum += tl.where(second, 0.0, dx)
    b_dw = sums(tl.where(block & (j < i), -1.0, 0.0), earlier_sum, b_dw, OP, EXACT, False)

    # inside blocks
    if tl.max(-all_) < LIMIT:
        to_middle = exp(after - all_ * 0.5)
        earlier = (b_k * to_middle).to(OP)
        from_middle = exp(before - all_ * 0.5)
        inside_r = dot(tl.where(block & (i > j + 1), da, 0.0).to(OP), earlier, none, PRECISION) * from_middle
        b_dr = dot(tl.where(block & (i == j + 1), da, 0.0).to(OP), b_k.to(OP), b_dr + inside_r, PRECISION)
        later_sum += b_r * inside_r
        later = (b_r * from_middle).to(OP)
        inside_k = dot(tl.where(block & (i + 1 < j), da_t, 0.0).to(OP), later, none, PRECISION) * to_middle
        b_dk = dot(tl.where(block & (i + 1 == j), da_t, 0.0).to(OP), b_r.to(OP), b_dk + inside_k, PRECISION)
        inside_k *= b_k
        later_sum -= inside_k
        b_dw += inside_k
    else:
        for level in range(0, tl.minimum(left, 4)):
            later_half = (i >> level) % 2 == 1
            x = tl.where(later_half, rows(r, r_t, o_t, o_k, m_tk).to(tl.float32),
                         rows(k, k_t, o_t, o_k, m_tk).to(tl.float32))
            own = log_decays(w, base, w_t, o_t, o_k, m_tk, m_k, OP)
            border = between(own, level, BT, BK, OP, EXACT, SPLIT)
            dx = halves_backward(x, border, da, da_t, level, BT, BK, OP, PRECISION)
            b_dr += tl.where(later_half, dx, 0.0)
            b_dk += tl.where(later_half, 0.0, dx)
            beyond = (i >> level == j >> level) & tl.where(later_half, j > i, j < i)
            b_dw = sums(tl.where(beyond, -1.0, 0.0), x * dx, b_dw, OP, EXACT, False)
    b_dw = sums(tl.where(block & (j > i), -1.0, 0.0), later_sum, b_dw, OP, EXACT, True)
    own = log_decays(w, base, w_t, o_t, o_k, m_tk, m_k, OP)
    b_dw = tl.where(own <= NOTHING, 0.0, -b_dw)
    if base is not None:
        b_dw *= own
        tl.store(dbase + o_sum, tl.sum(b_dw, 0), mask=m_k)
    tl.store(dw + o_out, b_dw.to(dw.dtype.element_ty), mask=m_tk)

    # a token with itself
    itself = tl.sum(tl.where(i == j, da, 0.0), 1)[:, None]
    b_r = rows(r, r_t, o_t, o_k, m_tk).to(tl.float32)
    b_k = rows(k, k_t, o_t, o_k, m_tk).to(tl.float32)
    b_u = tl.load(u + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
    tl.store(dr + o_out, (b_dr + itself * b_u * b_k).to(dr.dtype.element_ty), mask=m_tk)
    tl.store(dk + o_out, (b_dk + itself * b_u * b_r).to(dk.dtype.element_ty), mask=m_tk)
    tl.store(du + o_sum, tl.sum(itself * b_r * b_k, 0), mask=m_k)


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
    slots, BT = chunk_slots(r, op, cu_seqlens), chunk_size(r, op)
    new = torch.empty if cu_seqlens is None else torch.zeros  # some slots may stay unused, an output has no garbage
    pairs = new(slots if keep else 0, H, BT, BT, dtype=op, device=r.device)
    if not y.numel():
        return y, final, torch.zeros(len(pairs), H, V, K, dtype=op, device=r.device), pairs
    states = walk(k, v, w, base, initial, final, slots, cu_seqlens, op, how, False)
    launch = numbers("outputs", r, v, op)
    chunks = Pieces(r, cu_seqlens, BT)
    _outputs[chunks.rows * H, triton.cdiv(V, launch["BV"])](
        r, k, v, w, base, u, states, y, pairs, *chunks.numbers, H, K, V,
        *r.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride()[:3], **launch, **how, KEEP=keep)
    return y, final, states if keep else states.new_empty(0, H, V, K), pairs


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
    dstates = walk(r, dy, w, base, dfinal, dinitial, len(states), cu_seqlens, op, how, True)
    chunks = Pieces(r, cu_seqlens, launch["BT"])
    # several blocks of values: each has its part of what they share
    dr, dk, dw = (torch.empty(B, T, H, blocks, K, dtype=x.dtype if blocks == 1 else torch.float32, device=r.device)
                  for x in (r, k, w))
    dv = torch.empty(B, T, H, V, dtype=v.dtype, device=v.device)
    sums_ = torch.empty(1 if base is None else 2, chunks.rows, H, blocks, K, dtype=torch.float32, device=r.device)
    _gradients[chunks.rows * H, blocks](
        r, k, v, w, base, u, dy, states, pairs, dstates, dr, dk, dv, dw, sums_[0], sums_[-1], *chunks.numbers, H, K, V,
        *r.stride()[:3], *k.stride()[:3], *v.stride()[:3], *w.stride()[:3], *dy.stride()[:3], **launch, **how)
    if blocks > 1:
        dr, dk, dw = (x.sum(3).to(like.dtype) for x, like in zip((dr, dk, dw), (r, k, w), strict=True))
    else:
        dr, dk, dw = (x.squeeze(3) for x in (dr, dk, dw))
    du, *rest = sums_.sum((1, 3))
    dbase = u.new_empty(0) if base is None else rest[0].to(base.dtype, copy=True)
    return dr, dk, dv, dw, du.to(u.dtype, copy=base is not None), dinitial, dbase
