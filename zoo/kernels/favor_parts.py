"""FAVOR+, what its kernels share: features of either side, and which tokens a program has; see `favor`."""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels._common import LOG2E, dot


@triton.jit
def prepare_kernel(p_w, p_exponent, p_operand, p_shift, w_m, w_k, bound, M: tl.constexpr, K: tl.constexpr,
                   MP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BOUNDED: tl.constexpr):
    """W log2(e) for exponents and W for gradients, padded by zeros; log2(e) largest for queries, its negative for keys.

    Padded features have shifts that leave nothing of them.
    """
    o_m, o_k = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BK)
    m = (o_m < M)[:, None] & (o_k < K)[None, :]
    b_w = tl.load(p_w + o_m[:, None] * w_m + o_k[None, :] * w_k, mask=m, other=0.0).to(tl.float32)
    b_length = tl.sqrt(tl.sum(b_w * b_w, 1))
    b_reach = tl.minimum(b_length, bound) if BOUNDED else b_length
    b_largest = (b_length * b_reach - b_reach * b_reach / 2) * LOG2E
    tl.store(p_shift + o_m, tl.where(o_m < M, b_largest, -1e30))
    tl.store(p_shift + MP + o_m, tl.where(o_m < M, -b_largest, -1e30))
    o = o_m[:, None] * BK + o_k[None, :]
    tl.store(p_exponent + o, (b_w * LOG2E).to(p_exponent.dtype.element_ty))
    tl.store(p_operand + o, b_w.to(p_operand.dtype.element_ty))


@triton.jit
def place(i, p_table, p_borders, T, SIZE, PARTS, DOCUMENTS):
    """Part i -> its row or document (-1: none), its number in that, batch row, first token, tokens to its end."""
    i_n, i_p = i // PARTS, i % PARTS
    i_b, start, length = i_n, i * 0, i * 0 + T
    if DOCUMENTS:
        i_n = tl.load(p_table + 2 * i).to(tl.int64)
        i_p = tl.load(p_table + 2 * i + 1).to(tl.int64)
        i_b = i * 0
        start = tl.load(p_borders + tl.maximum(i_n, 0)).to(tl.int64)
        length = tl.where(i_n >= 0, tl.load(p_borders + tl.maximum(i_n, 0) + 1).to(tl.int64) - start, 0)
    return i_n, i_p, i_b, start + i_p * SIZE, length - i_p * SIZE


@triton.jit
def tile(p, left, o_t, o, stride, SIZE: tl.constexpr):
    """Rows o_t of the `left` from p on, columns o; 0 past the end."""
    return tl.load(p + o_t[:, None] * stride + o[None, :], mask=(o_t < left)[:, None] & (o < SIZE)[None, :], other=0.0)


@triton.jit
def narrow(b_x, EXPONENT: tl.constexpr):
    if EXPONENT.primitive_bitwidth == 16:
        b_x = tl.minimum(tl.maximum(b_x.to(tl.float32), -65504.0), 65504.0)
    return b_x.to(EXPONENT)


@triton.jit
def side(p_x, x_t, p_log, here, o_t, rate, K: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr, EXPONENT: tl.constexpr,
         QUERIES: tl.constexpr, FOUND: tl.constexpr):
    """Rows x -> their first KB channels in the exponents' type, c, and a factor of float32 features; none past the end.

    c is -|x|^2 / 2 of keys; of queries minus the logarithm of n where that was FOUND, for psi, else 0. What the rate
    leaves of a feature is part of c, or that factor.
    """
    o_k = tl.arange(0, KB)
    b_x = tile(p_x, here, o_t, o_k, x_t, K)
    b_c = tl.zeros(o_t.shape, tl.float32)
    b_left = b_c
    if QUERIES:
        if FOUND:
            b_log = tl.load(p_log + o_t, mask=o_t < here, other=float("inf"))
            b_c -= b_log.to(tl.float32)
            b_left = -rate * (o_t + 1)
            if EXPONENT.primitive_bitwidth == 32:
                b_left -= tl.where(o_t < here, b_log - b_log.to(tl.float32), 0.0).to(tl.float32)
    else:
        b_c += tl.sum(b_x.to(tl.float32) * b_x.to(tl.float32), 1)
        if BK > KB:
            for i_k in range(KB, BK, KB):
                b_more = tile(p_x, here, o_t, i_k + o_k, x_t, K).to(tl.float32)
                b_c += tl.sum(b_more * b_more, 1)
        b_c = tl.where(o_t < here, b_c * (-0.5 * LOG2E), float("-inf"))
        b_left = rate * (o_t - here + 1)
    if EXPONENT.primitive_bitwidth == 16:
        b_c += b_left
    return narrow(b_x, EXPONENT), b_c, tl.exp2(b_left)


@triton.jit
def power(b_e, b_left, EXPONENT: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Features, by their logarithms from `exponents`."""
    b_f = tl.exp2(b_e)
    if EXPONENT.primitive_bitwidth == 32:
        b_f *= b_left[None, :] if TRANSPOSED else b_left[:, None]
    return b_f


@triton.jit
def exponents(b_x, b_c, b_w, b_shift, p_x, x_t, p_w, here, o_t, o_m, K: tl.constexpr, BK: tl.constexpr,
              TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """log2 of phi or psi [BT, BM], or [BM, BT] if TRANSPOSED: found so, as a product's transpose must enter no other.

    b_x and b_w are x and W where all channels are in one block of KB, else just its type: they come block by block.
    """
    KB: tl.constexpr = b_x.shape[1]
    o_k = tl.arange(0, KB)
    b_e = b_c[None, :] + b_shift[:, None] if TRANSPOSED else b_c[:, None] + b_shift[None, :]
    # in which order to add is not told of a tensor core, and float32 has digits to lose
    LATE: tl.constexpr = BK > KB or b_x.dtype.primitive_bitwidth == 32
    b_sum = tl.zeros(b_e.shape, tl.float32) if LATE else b_e
    if BK > KB:
        for i_k in range(0, BK, KB):
            b_x_ = narrow(tile(p_x, here, o_t, i_k + o_k, x_t, K), b_x.dtype)
            b_w_ = tl.load(p_w + o_m[:, None] * BK + i_k + o_k[None, :])
            b_sum = dot(b_w_, tl.trans(b_x_), b_sum, PRECISION) if TRANSPOSED else dot(b_x_, tl.trans(b_w_), b_sum,
                                                                                       PRECISION)
    else:
        b_sum = dot(b_w, tl.trans(b_x), b_sum, PRECISION) if TRANSPOSED else dot(b_x, tl.trans(b_w), b_sum, PRECISION)
    return b_e + b_sum if LATE else b_sum


@triton.jit
def across(rate, here):
    """What scores of psi and features of keys in one chunk lack: they are as seen from its two ends."""
    return tl.exp2(rate * here)
