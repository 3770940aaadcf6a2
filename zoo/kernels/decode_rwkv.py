"""One token of RWKV-6: token shifts and their mixtures inside the products that read them, and the WKV. For decoding.

Equations: `zoo.ops.token_mix`, `zoo.ops.wkv6`, `zoo.ops.norm_gate`. The token before is in the state until the last
kernel that reads it is done; `normed` is what it becomes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, dot, power_of_two
from zoo.kernels.decode import early, product, ready, summed_norm, tanh, tiles, warps, weight_tile

MIXED_WARPS = 4  # of one row: 228 us a step at base, 238 with 8 and over 370 with 16 (H100, 2026-11-25)


@triton.jit(do_not_specialize=["B"])
def shift_kernel(p_x, p_y, p_gain, p_bias, p_before, p_mix, p_first, p_second, p_sum, p_normed, p_out, B, N1, N2,
                 stride_n, stride_k, eps, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
                 ADDS: tl.constexpr, CHANNELS: tl.constexpr, DOT: tl.constexpr, EARLY: tl.constexpr):
    """n = norm(x + y), mixed with the token before, into the product that reads it, out [B, N1 + N2].

    CHANNELS: relu(W_first n_0)^2 and sigmoid(W_second n_1); else tanh(W_first n_0), W_first [N1, D] as its strides say.
    """
    i_n, o_d = tl.program_id(0), tl.arange(0, BD)
    o_b = tl.program_id(1) * BM + tl.arange(0, BM)
    blocks = tl.cdiv(N1, BN)
    first = i_n < blocks
    o_n = tl.where(first, i_n, i_n - blocks) * BN + tl.arange(0, BN)
    if first:
        b_w = weight_tile(p_first, o_n, N1, o_d, D, stride_n, stride_k, DOT)
    else:
        b_w = weight_tile(p_second, o_n, N2, o_d, D, stride_n, stride_k, DOT)
    ready(EARLY)
    b_x = summed_norm(p_x, p_y, p_gain, p_bias, p_sum, o_b, B, eps, i_n == 0, D, BD, ADDS)
    m = (o_b < B)[:, None] & (o_d < D)[None, :]
    o = o_b[:, None] * D + o_d[None, :]
    tl.store(p_normed + o, b_x, mask=m & (i_n == 0))
    b_before = tl.load(p_before + o, mask=m, other=0.0).to(tl.float32)
    b_mix = tl.load(p_mix + tl.where(first, 0, D) + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_out = product(b_x + (b_before - b_x) * b_mix[None, :], b_w, DOT)
    if CHANNELS:
        b_relu = tl.maximum(b_out, 0.0)
        b_out = tl.where(first, b_relu * b_relu, tl.sigmoid(b_out))
    else:
        b_out = tanh(b_out)
    m = (o_b < B)[:, None] & (o_n < tl.where(first, N1, N2))[None, :]
    tl.store(p_out + o_b[:, None] * (N1 + N2) + tl.where(first, 0, N1) + o_n[None, :], b_out, mask=m)


@triton.jit(do_not_specialize=["B"])
def mixed_kernel(p_normed, p_before, p_low, p_mix, p_up, p_decay, p_k, p_v, p_r, p_g, p_out, B, RANK, D: tl.constexpr,
                 R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
                 DOT: tl.constexpr, EARLY: tl.constexpr):
    """k, v, r, g of their mixtures and tanh of the decay's product with its own: out [B, 4 D + RANK], in that order."""
    i_n, o_d, o_r = tl.program_id(0), tl.arange(0, BD), tl.arange(0, BR)
    o_b = tl.program_id(1) * BM + tl.arange(0, BM)
    blocks = tl.cdiv(D, BN)
    i_z = tl.minimum(i_n // blocks, 4)
    o_n = (i_n - i_z * blocks) * BN + tl.arange(0, BN)
    if i_z == 0:
        b_w = weight_tile(p_k, o_n, D, o_d, D, D, 1, DOT)
    elif i_z == 1:
        b_w = weight_tile(p_v, o_n, D, o_d, D, D, 1, DOT)
    elif i_z == 2:
        b_w = weight_tile(p_r, o_n, D, o_d, D, D, 1, DOT)
    elif i_z == 3:
        b_w = weight_tile(p_g, o_n, D, o_d, D, D, 1, DOT)
    else:
        b_w = weight_tile(p_decay, o_n, RANK, o_d, D, 1, RANK, DOT).to(p_k.dtype.element_ty)
    z = tl.where(i_z == 4, 0, i_z + 1)  # `mix` and `up` begin with the decay's
    b_up = tl.load(p_up + z * R * D + o_r[:, None] * D + o_d[None, :], mask=(o_r < R)[:, None] & (o_d < D)[None, :],
                   other=0.0)
    ready(EARLY)
    m = (o_b < B)[:, None] & (o_d < D)[None, :]
    o = o_b[:, None] * D + o_d[None, :]
    b_x = tl.load(p_normed + o, mask=m, other=0.0)
    b_before = tl.load(p_before + o, mask=m, other=0.0).to(tl.float32)
    b_mix = tl.load(p_mix + z * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    o_low = o_b[:, None] * (5 * R) + z * R + o_r[None, :]
    b_low = tl.load(p_low + o_low, mask=(o_b < B)[:, None] & (o_r < R)[None, :], other=0.0)
    if DOT:
        b_mix += dot(b_low.to(b_up.dtype), b_up, tl.zeros([BM, BD], tl.float32), "tf32x3")
    else:
        b_mix += tl.sum(tl.trans(b_low) * b_up.to(tl.float32), 0)[None, :]
    b_out = product(b_x + (b_before - b_x) * b_mix, b_w, DOT)
    b_out = tl.where(i_z == 4, tanh(b_out), b_out)
    m = (o_b < B)[:, None] & (o_n < tl.where(i_z == 4, RANK, D))[None, :]
    tl.store(p_out + o_b[:, None] * (4 * D + RANK) + i_z * D + o_n[None, :], b_out, mask=m)


@triton.jit
def wkv_kernel(p_kvrg, p_up, p_base, p_bonus, p_gain, p_bias, p_state, p_normed, p_before, p_out, RANK, eps,
               H: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr):
    """A head: y = r (S + u k^T v), S = w S + k^T v, w = exp(-exp(base + low up)); its norm, the gate."""
    i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    D: tl.constexpr = H * K
    o_k, o_r = tl.arange(0, BK), tl.arange(0, BR)
    m_k, o_c = o_k < K, i_h * K + o_k
    o_state = ((i_b * H + i_h) * K + o_k)[:, None] * K + o_k[None, :]
    m_state = m_k[:, None] & m_k[None, :]
    b_s = tl.load(p_state + o_state, mask=m_state, other=0.0)
    p_row = p_kvrg + i_b * (4 * D + RANK)
    b_up = tl.load(p_up + o_r[:, None] * D + o_c[None, :], mask=(o_r < RANK)[:, None] & m_k[None, :], other=0.0)
    ready(EARLY)
    b_low = tl.load(p_row + 4 * D + o_r, mask=o_r < RANK, other=0.0)
    b_d = tl.sum(b_low[:, None] * b_up.to(tl.float32), 0) + tl.load(p_base + o_c, mask=m_k, other=0.0).to(tl.float32)
    b_w = tl.exp(-tl.exp(b_d))
    b_k = tl.load(p_row + o_c, mask=m_k, other=0.0)
    b_v = tl.load(p_row + D + o_c, mask=m_k, other=0.0)
    b_r = tl.load(p_row + 2 * D + o_c, mask=m_k, other=0.0)
    b_g = tl.load(p_row + 3 * D + o_c, mask=m_k, other=0.0)
    b_u = tl.load(p_bonus + o_c, mask=m_k, other=0.0).to(tl.float32)
    b_y = tl.sum(b_r[:, None] * b_s, 0) + tl.sum(b_r * b_u * b_k, 0) * b_v
    tl.store(p_state + o_state, b_w[:, None] * b_s + b_k[:, None] * b_v[None, :], mask=m_state)
    b_y = tl.where(m_k, b_y - tl.sum(b_y, 0) / K, 0.0)
    b_y = b_y * tl.rsqrt(tl.sum(b_y * b_y, 0) / K + eps)
    b_y = b_y * tl.load(p_gain + o_c, mask=m_k, other=0.0).to(tl.float32)
    b_y += tl.load(p_bias + o_c, mask=m_k, other=0.0).to(tl.float32)
    tl.store(p_out + i_b * D + o_c, b_y * b_g * tl.sigmoid(b_g), mask=m_k)
    b_n = tl.load(p_normed + i_b * D + o_c, mask=m_k, other=0.0)
    tl.store(p_before + i_b * D + o_c, b_n.to(p_before.dtype.element_ty), mask=m_k)


def shift(x: Tensor, y: Tensor | None, gain: Tensor, bias: Tensor, eps: float, before: Tensor, mix: Tensor,
          first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, before [B, D] -> x + y, n = norm(x + y), and products of n mixed with `before`, float32.

    second None: tanh(n first), first [D, N], mix [D]. Else first [F, D], second [N, D], mix [2, D]: relu(W n)^2 and
    sigmoid(W n), [B, F + N].
    """
    B, D = x.shape
    N1, N2 = (first.shape[1], 0) if second is None else (first.shape[0], second.shape[0])
    strides = first.stride()[::-1] if second is None else first.stride()
    BD = max(16, power_of_two(D))
    DOT, BM, BN = tiles(B, N1 + N2, BD, first.dtype)
    summed = x if y is None else torch.empty_like(x)
    normed, out = torch.empty_like(x), x.new_empty(B, N1 + N2)
    with torch.cuda.device_of(x):
        shift_kernel[cdiv(N1, BN) + cdiv(N2, BN), cdiv(B, BM)](
            x, x if y is None else y, gain, bias, before, mix, first, first if second is None else second, summed,
            normed, out, B, N1, N2, *strides, eps, D=D, BM=BM, BN=BN, BD=BD, ADDS=y is not None,
            CHANNELS=second is not None, DOT=DOT, num_warps=warps(DOT, BM, BN), **early(x))
    return summed, normed, out


def mixed(normed: Tensor, before: Tensor, low: Tensor, mix: Tensor, up: Tensor, decay: Tensor,
          weights: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """normed, before [B, D], low [B, 5 R], mix [5, D], up [5, R, D], decay [D, rank], weights [D, D]
    -> [B, 4 D + rank]: products of k, v, r, g with their mixtures, then tanh of that with `decay`; float32.
    """
    (B, D), R, rank = normed.shape, up.shape[1], decay.shape[1]
    BD = max(16, power_of_two(D))
    DOT, BM, BN = tiles(B, 4 * D, BD, weights[0].dtype)
    BN = max(BN, 32) if DOT else BN
    out = normed.new_empty(B, 4 * D + rank)
    with torch.cuda.device_of(normed):
        mixed_kernel[4 * cdiv(D, BN) + cdiv(rank, BN), cdiv(B, BM)](
            normed, before, low, mix, up, decay, *weights, out, B, rank, D=D, R=R, BM=BM, BN=BN, BD=BD,
            BR=max(16, power_of_two(R)), DOT=DOT, num_warps=8 if DOT else MIXED_WARPS, **early(normed))
    return out


def wkv(kvrg: Tensor, up: Tensor, base: Tensor, bonus: Tensor, gain: Tensor, bias: Tensor, eps: float, state: Tensor,
        normed: Tensor, before: Tensor) -> Tensor:
    """What `mixed` gives -> the gated output [B, D] float32; `state` [B, H, K, K] after the token, in place.

    `normed` [B, D] is copied to `before`.
    """
    B, H, K, _ = state.shape
    rank = up.shape[0]
    out = kvrg.new_empty(B, H * K)
    with torch.cuda.device_of(kvrg):
        wkv_kernel[H, B](kvrg, up, base, bonus, gain, bias, state, normed, before, out, rank, eps, H=H, K=K,
                         BR=power_of_two(rank), BK=power_of_two(K), num_warps=4, **early(kvrg))
    return out
