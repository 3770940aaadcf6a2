"""Products of one token's vectors with a weight, together with what stands before and after them: for decoding.

At a batch of one a weight is read once and used once, so the time is that of its bytes and of the launches: a norm, a
token shift, an activation or the merging of an attention's parts costs less inside the product than a launch of its
own, though every program does it anew. Rows are single tokens, [B, D]; activations are float32, weights any float.

On Hopper and later a kernel begins while the one before is still at work (programmatic dependent launch) and has its
weights under way when that one's results are there: `ready` waits for them. Before it a kernel reads nothing that is
written in a step but what the last step wrote.

A single row, and every row beside float32 weights, is multiplied and added up by itself, BM = 1; with 16-bit weights
16 or 32 make a tile of `dot`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from zoo.kernels._common import cdiv, dot, power_of_two

TILE = 8192  # weights a program has in flight: 64 to each of 128 threads
PROGRAMS = 128  # that a product is cut into, about one to a multiprocessor


@triton.jit
def ready(EARLY: tl.constexpr):
    """Wait until the kernels before are done; the next may begin from here on."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def weight_tile(p_w, o_n, N, o_k, K, stride_n, stride_k, DOT: tl.constexpr):
    """W [BN, BK]; for `dot` [BK, BN]."""
    if DOT:
        o_n, o_k = o_n[None, :], o_k[:, None]
    else:
        o_n, o_k = o_n[:, None], o_k[None, :]
    return tl.load(p_w + o_n.to(tl.int64) * stride_n + o_k * stride_k, mask=(o_n < N) & (o_k < K), other=0.0)


@triton.jit
def product(b_x, b_w, DOT: tl.constexpr):
    """x [BM, BK], a `weight_tile` -> x W^T [BM, BN], BM = 1 without DOT."""
    if DOT:
        zero = tl.zeros([b_x.shape[0], b_w.shape[1]], tl.float32)
        return dot(b_x.to(b_w.dtype), b_w, zero, "tf32x3")
    else:
        return tl.sum(b_x * b_w.to(tl.float32), 1)[None, :]


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def embed_kernel(p_ids, p_table, p_gain, p_bias, p_position, p_out, eps, D: tl.constexpr, BD: tl.constexpr,
                 EARLY: tl.constexpr):
    """The norm of a token's embedding; its row's position advances by one."""
    i_b, o_d = tl.program_id(0), tl.arange(0, BD)
    m = o_d < D
    ready(EARLY)
    b_x = tl.load(p_table + tl.load(p_ids + i_b) * D + o_d, mask=m, other=0.0).to(tl.float32)
    b_x = tl.where(m, b_x - tl.sum(b_x, 0) / D, 0.0)
    b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps) * tl.load(p_gain + o_d, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + i_b * D + o_d, b_x + tl.load(p_bias + o_d, mask=m, other=0.0).to(tl.float32), mask=m)
    tl.store(p_position + i_b, tl.load(p_position + i_b) + 1)


@triton.jit
def summed_norm(p_x, p_y, p_gain, p_bias, p_sum, o_b, B, eps, first, D: tl.constexpr, BD: tl.constexpr,
                ADDS: tl.constexpr):
    """norm(x + y) of rows [BM, BD]; the sum is written where `first`."""
    o_d = tl.arange(0, BD)
    m = (o_b < B)[:, None] & (o_d < D)[None, :]
    o = o_b[:, None] * D + o_d[None, :]
    b_x = tl.load(p_x + o, mask=m, other=0.0)
    if ADDS:
        b_x += tl.load(p_y + o, mask=m, other=0.0)
        tl.store(p_sum + o, b_x, mask=m & first)
    b_x = tl.where(m, b_x - (tl.sum(b_x, 1) / D)[:, None], 0.0)
    b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
    b_gain = tl.load(p_gain + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    return b_x * b_gain[None, :] + b_bias[None, :]


@triton.jit(do_not_specialize=["B"])
def norm_linear_kernel(p_x, p_y, p_gain, p_bias, p_w, p_sum, p_out, B, N, stride_n, stride_k, eps, D: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ADDS: tl.constexpr, GLU: tl.constexpr,
                       DOT: tl.constexpr, EARLY: tl.constexpr):
    """out = W norm(x + y); GLU: of W's 2 N rows the first N make the gate, silu(gate) up."""
    i_n, o_d = tl.program_id(0), tl.arange(0, BD)
    o_b, o_n = tl.program_id(1) * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    b_w = weight_tile(p_w, o_n, N, o_d, D, stride_n, stride_k, DOT)
    if GLU:
        b_up = weight_tile(p_w + N.to(tl.int64) * stride_n, o_n, N, o_d, D, stride_n, stride_k, DOT)
    ready(EARLY)
    b_x = summed_norm(p_x, p_y, p_gain, p_bias, p_sum, o_b, B, eps, i_n == 0, D, BD, ADDS)
    b_out = product(b_x, b_w, DOT)
    if GLU:
        b_out = b_out * tl.sigmoid(b_out) * product(b_x, b_up, DOT)
    m = (o_b < B)[:, None] & (o_n < N)[None, :]
    tl.store(p_out + o_b[:, None] * N + o_n[None, :], b_out, mask=m)


@triton.jit(do_not_specialize=["B"])
def linear_kernel(p_x, p_w, p_gate, p_out, p_from, p_to, p_position, B, N, K, stride_b, stride_n, stride_gate,
                  BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, MOVES: tl.constexpr,
                  ADVANCES: tl.constexpr, ONCE: tl.constexpr, DOT: tl.constexpr, EARLY: tl.constexpr):
    """out = gate * (W x). MOVES: `from` [B, N] goes `to` its place; ADVANCES: every row's position by one."""
    i_n = tl.program_id(0)
    o_b, o_n = tl.program_id(1) * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
    m_b = o_b < B
    m = m_b[:, None] & (o_n < N)[None, :]
    if ONCE:  # BK is no less than K
        o_k = tl.arange(0, BK)
        b_w = weight_tile(p_w, o_n, N, o_k, K, stride_n, 1, DOT)
        ready(EARLY)
        b_x = tl.load(p_x + o_b[:, None] * stride_b + o_k[None, :], mask=m_b[:, None] & (o_k < K)[None, :], other=0.0)
        b_out = product(b_x, b_w, DOT)
    else:
        ready(EARLY)
        b_out = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            o_ki = k + tl.arange(0, BK)
            b_wi = weight_tile(p_w, o_n, N, o_ki, K, stride_n, 1, DOT)
            b_xi = tl.load(p_x + o_b[:, None] * stride_b + o_ki[None, :], mask=m_b[:, None] & (o_ki < K)[None, :],
                           other=0.0)
            b_out += product(b_xi, b_wi, DOT)
    if GATED:
        b_out *= tl.load(p_gate + o_b[:, None] * stride_gate + o_n[None, :], mask=m, other=0.0)
    if MOVES:
        o = o_b[:, None] * N + o_n[None, :]
        tl.store(p_to + o, tl.load(p_from + o, mask=m, other=0.0).to(p_to.dtype.element_ty), mask=m)
    if ADVANCES:
        m_b = m_b & (i_n == 0)
        tl.store(p_position + o_b, tl.load(p_position + o_b, mask=m_b, other=0) + 1, mask=m_b)
    tl.store(p_out + o_b[:, None] * N + o_n[None, :], b_out, mask=m)


@triton.jit
def leave(p_o, p_m, p_l, part, b_o, b_m, b_l, o_k, m_k, K: tl.constexpr, WHOLE: tl.constexpr):
    """A part of an attention for `merge_linear`: sum o, maximum m, normaliser l; the mean itself where it is WHOLE."""
    if WHOLE:
        b_o = b_o / b_l
    else:
        tl.store(p_m + part, b_m)
        tl.store(p_l + part, b_l)
    tl.store(p_o + part * K + o_k, b_o, mask=m_k)


@triton.jit(do_not_specialize=["S"])
def merge_linear_kernel(p_o, p_m, p_l, p_w, p_out, p_position, N, S, stride_n, H: tl.constexpr, K: tl.constexpr,
                        BN: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
                        EARLY: tl.constexpr):
    """out = W y, y_h = sum_s 2^m_s o_s / sum_s 2^m_s l_s of a head's parts o [B, S, H, K], m, l [B, S, H]; a row each.

    Every row's position advances by one.
    """
    i_n, i_b = tl.program_id(0), tl.program_id(1)
    o_n, o_s, o_h, o_k = i_n * BN + tl.arange(0, BN), tl.arange(0, BS), tl.arange(0, BH), tl.arange(0, BK)
    m_hk = (o_h < H)[:, None] & (o_k < K)[None, :]
    o_hk = o_h[:, None] * K + o_k[None, :]
    b_w = tl.load(p_w + o_n.to(tl.int64)[:, None, None] * stride_n + o_hk[None, :, :],
                  mask=(o_n < N)[:, None, None] & m_hk[None, :, :], other=0.0)
    ready(EARLY)
    m_sh = (o_s < S)[:, None] & (o_h < H)[None, :]
    o_sh = (i_b * S + o_s)[:, None] * H + o_h[None, :]
    b_m = tl.load(p_m + o_sh, mask=m_sh, other=-float("inf"))
    b_m = tl.where((o_h < H)[None, :], b_m, 0.0)
    b_l = tl.load(p_l + o_sh, mask=m_sh, other=0.0)
    b_o = tl.load(p_o + o_sh[:, :, None] * K + o_k[None, None, :],
                  mask=m_sh[:, :, None] & (o_k < K)[None, None, :], other=0.0)
    b_e = tl.exp2(b_m - tl.max(b_m, 0)[None, :])
    b_l = tl.where(o_h < H, tl.sum(b_e * b_l, 0), 1.0)
    b_y = tl.sum(b_e[:, :, None] * b_o, 0) / b_l[:, None]
    b_out = tl.sum(tl.sum(b_w.to(tl.float32) * b_y[None, :, :], 2), 1)
    tl.store(p_out + i_b * N + o_n, b_out, mask=o_n < N)
    if i_n == 0:
        tl.store(p_position + i_b, tl.load(p_position + i_b) + 1)


def early(x: Tensor) -> dict[str, bool]:
    """Options of a launch that begins before the kernel before it has ended, where the GPU can."""
    if x.is_cuda and _hopper(x.device):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@cache
def _hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def tiles(B: int, N: int, width: int, dtype: torch.dtype) -> tuple[bool, int, int]:
    """DOT, BM, BN of a product with N outputs and `width` padded inputs in flight: enough programs to fill the GPU."""
    if B > 1 and dtype != torch.float32:
        BM = 16 if B <= 16 else 32
        return True, BM, next((BN for BN in (64, 32) if cdiv(N, BN) * cdiv(B, BM) >= PROGRAMS), 16)
    return False, 1, max(1, min(1 << (cdiv(N, PROGRAMS).bit_length() - 1), TILE // width))


def warps(DOT: bool, BM: int, BN: int) -> int:
    return 8 if DOT and BM * BN > 1024 else 4


def embed(ids: Tensor, table: Tensor, gain: Tensor, bias: Tensor, eps: float, position: Tensor) -> Tensor:
    """ids [B] int64, table [V, D] -> the norm of their rows [B, D] float32; position [B] int64 advances by one."""
    B, D = len(ids), table.shape[1]
    out = gain.new_empty(B, D, dtype=torch.float32)
    with torch.cuda.device_of(ids):
        embed_kernel[(B,)](ids, table, gain, bias, position, out, eps, D=D, BD=power_of_two(D), num_warps=4,
                           **early(ids))
    return out


def norm_linear(x: Tensor, y: Tensor | None, gain: Tensor, bias: Tensor, eps: float, weight: Tensor,
                glu: bool) -> tuple[Tensor, Tensor]:
    """x, y [B, D] float32 without gaps, W [N, D] -> x + y, W norm(x + y) [B, N] float32; glu: W [2 N, D]."""
    B, D = x.shape
    N = weight.shape[0] // (2 if glu else 1)
    BD = max(16, power_of_two(D))
    DOT, BM, BN = tiles(B, N, BD, weight.dtype)
    summed, out = x if y is None else torch.empty_like(x), x.new_empty(B, N)
    with torch.cuda.device_of(x):
        norm_linear_kernel[cdiv(N, BN), cdiv(B, BM)](
            x, x if y is None else y, gain, bias, weight, summed, out, B, N, *weight.stride(), eps, D=D, BM=BM, BN=BN,
            BD=BD, ADDS=y is not None, GLU=glu, DOT=DOT, num_warps=warps(DOT, BM, BN), **early(x))
    return summed, out


def linear(x: Tensor, weight: Tensor, gate: Tensor | None = None, moves: tuple[Tensor, Tensor] | None = None,
           position: Tensor | None = None) -> Tensor:
    """x [B, K] of rows without gaps, W [N, K] -> gate * (W x) [B, N] float32.

    moves (from, to): `from` [B, N] is copied `to` another. position [B] int64 advances by one.
    """
    (B, K), N = x.shape, weight.shape[0]
    DOT, BM, BN = tiles(B, N, min(power_of_two(K), 2048), weight.dtype)
    BK = min(max(16, power_of_two(K)), 256 if DOT else 2048)
    out = x.new_empty(B, N)
    source, to = (out, out) if moves is None else moves
    with torch.cuda.device_of(x):
        linear_kernel[cdiv(N, BN), cdiv(B, BM)](
            x, weight, x if gate is None else gate, out, source, to, x if position is None else position, B, N, K,
            x.stride(0), weight.stride(0), 0 if gate is None else gate.stride(0), BM=BM, BN=BN, BK=BK,
            GATED=gate is not None, MOVES=moves is not None, ADVANCES=position is not None, ONCE=K <= BK, DOT=DOT,
            num_warps=warps(DOT, BM, BN), **early(x))
    return out


def merge_linear(o: Tensor, m: Tensor, length: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """Parts o [B, S, H, K], m (in powers of two) and l [B, S, H], W [N, H K] -> W y [B, N] float32, y their mean."""
    (B, S, H, K), N = o.shape, weight.shape[0]
    BH, BK = power_of_two(H), power_of_two(K)
    BN = max(1, min(1 << (cdiv(N, PROGRAMS).bit_length() - 1), TILE // (BH * BK)))
    out = o.new_empty(B, N)
    with torch.cuda.device_of(o):
        merge_linear_kernel[cdiv(N, BN), B](o, m, length, weight, out, position, N, S, weight.stride(0), H=H, K=K,
                                            BN=BN, BS=power_of_two(S), BH=BH, BK=BK, num_warps=4, **early(o))
    return out
