"""Learned projections of finished blocks (Linformer's E and F, 2006.04768 eq. 7) and their gradients.

    k'_m = turned(E k_m),  v'_m = F v_m          k_m, v_m [C, K] the tokens of block m of a head, E, F [R, C]
    dE = sum_m dk'_m k_m^T,  dF = sum_m dv'_m v_m^T,  dk_m += E^T dk'_m,  dv_m += F^T dv'_m

with dk' turned back already. Where a tile of keys of attention_backward.py is a block, that adds the last two. Forward:
a program has a block of a head. Backward: one has SPAN of a head's blocks, and its own sums of dE and dF, which are
added up after in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, dot, power_of_two, precision
from zoo.kernels.rotary import turned

SPAN = 8  # blocks to a program, backward


@triton.jit
def block(p, i_m, x_b, x_t, M, C: tl.constexpr, BC: tl.constexpr, K: tl.constexpr):
    """Pointers to the rows of block i_m, of M a sequence, and which of them there are."""
    o_c = tl.arange(0, BC)
    p += tl.cast(i_m // M, tl.int64) * x_b + tl.cast(i_m % M, tl.int64) * (C * x_t)
    return p + o_c[:, None] * x_t + tl.arange(0, K)[None, :], (o_c < C)[:, None]


@triton.jit
def matrix(p, i_h, dtype: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """A head's E or F [BR, BC], 0 beyond R and C."""
    o_r, o_c = tl.arange(0, BR), tl.arange(0, BC)
    mask = (o_r < R)[:, None] & (o_c < C)[None, :]
    return tl.load(p + i_h * (R * C) + o_r[:, None] * C + o_c[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def summary(p, i_m, i_h, H: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, K: tl.constexpr):
    """Pointers to the R rows of summary i_m of a head in [B, M R, H, K], and which of them there are."""
    o_r = tl.arange(0, BR)
    p += (tl.cast(i_m, tl.int64) * (R * H) + i_h) * K
    return p + o_r[:, None] * (H * K) + tl.arange(0, K)[None, :], (o_r < R)[:, None]


@triton.jit(do_not_specialize=["M"])
def forward_kernel(p_k, p_v, p_e, p_f, p_table, p_ks, p_vs, M, k_b, k_t, k_h, v_b, v_t, v_h, H: tl.constexpr,
                   R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
                   PRECISION: tl.constexpr):
    i_m, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    dtype: tl.constexpr = p_k.dtype.element_ty
    p, m = block(p_k + i_h * k_h, i_m, k_b, k_t, M, C, BC, K)
    b_k = tl.load(p, mask=m, other=0.0)
    p, m = block(p_v + i_h * v_h, i_m, v_b, v_t, M, C, BC, K)
    b_v = tl.load(p, mask=m, other=0.0)
    zero = tl.zeros([BR, K], tl.float32)
    b_ks = dot(matrix(p_e, i_h, dtype, R, C, BR, BC), b_k, zero, PRECISION)
    o_r = tl.arange(0, BR)
    b_ks = turned(b_ks, p_table, i_m % M * R + o_r, o_r < R, 1.0, K)
    p, m = summary(p_ks, i_m, i_h, H, R, BR, K)
    tl.store(p, b_ks.to(dtype), mask=m)
    b_vs = dot(matrix(p_f, i_h, dtype, R, C, BR, BC), b_v, zero, PRECISION)
    p, m = summary(p_vs, i_m, i_h, H, R, BR, K)
    tl.store(p, b_vs.to(dtype), mask=m)


@triton.jit
def one_side(b_de, b_e, p_x, p_dx, p_ds, i_m, i_h, x_b, x_t, dx_b, dx_t, M, H: tl.constexpr, R: tl.constexpr,
             C: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, ADD: tl.constexpr,
             PRECISION: tl.constexpr):
    """A block's share of dE (or dF) and, if ADD, of dk (or dv), which is added to what stands there."""
    p, m = summary(p_ds, i_m, i_h, H, R, BR, K)
    b_ds = tl.load(p, mask=m, other=0.0)
    p, m = block(p_x, i_m, x_b, x_t, M, C, BC, K)
    b_x = tl.load(p, mask=m, other=0.0)
    b_de = dot(b_ds, tl.trans(b_x), b_de, PRECISION)
    if ADD:
        p, m = block(p_dx, i_m, dx_b, dx_t, M, C, BC, K)
        b_dx = dot(tl.trans(b_e), b_ds, tl.load(p, mask=m, other=0.0).to(tl.float32), PRECISION)
        tl.store(p, b_dx.to(p_dx.dtype.element_ty), mask=m)
    return b_de


@triton.jit(do_not_specialize=["M", "BLOCKS"])
def backward_kernel(p_k, p_v, p_e, p_f, p_dks, p_dvs, p_dk, p_dv, p_de, p_df, M, BLOCKS, k_b, k_t, k_h, v_b, v_t, v_h,
                    dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, H: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
                    K: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, SPAN: tl.constexpr, ADD: tl.constexpr,
                    PRECISION: tl.constexpr):
    i_s, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    dtype: tl.constexpr = p_k.dtype.element_ty
    b_e, b_f = matrix(p_e, i_h, dtype, R, C, BR, BC), matrix(p_f, i_h, dtype, R, C, BR, BC)
    b_de, b_df = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
    p_k, p_v, p_dk, p_dv = p_k + i_h * k_h, p_v + i_h * v_h, p_dk + i_h * dk_h, p_dv + i_h * dv_h
    for i_m in range(i_s * SPAN, tl.minimum((i_s + 1) * SPAN, BLOCKS)):
        b_de = one_side(b_de, b_e, p_k, p_dk, p_dks, i_m, i_h, k_b, k_t, dk_b, dk_t, M, H, R, C, K, BR, BC, ADD,
                        PRECISION)
        b_df = one_side(b_df, b_f, p_v, p_dv, p_dvs, i_m, i_h, v_b, v_t, dv_b, dv_t, M, H, R, C, K, BR, BC, ADD,
                        PRECISION)
    o_r, o_c = tl.arange(0, BR), tl.arange(0, BC)
    o = tl.program_id(0).to(tl.int64) * (R * C) + o_r[:, None] * C + o_c[None, :]
    mask = (o_r < R)[:, None] & (o_c < C)[None, :]
    tl.store(p_de + o, b_de, mask=mask)
    tl.store(p_df + o, b_df, mask=mask)


def options(x: Tensor, R: int, C: int) -> dict[str, int | str]:
    BC = max(16, power_of_two(C))
    return {"H": x.shape[2], "R": R, "C": C, "K": x.shape[3], "BR": max(16, power_of_two(R)), "BC": BC,
            "PRECISION": precision(x.dtype), "num_warps": 4 if x.element_size() == 2 else 8}


def forward(k: Tensor, v: Tensor, E: Tensor, F: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """k, v [B, T, H, K] with channels side by side, E, F [H, R, C], phases of the summaries [M R, 2, K // 2] float32.

    -> turned E k and F v [B, M R, H, K] of M = ceil(T / C) - 1 blocks, in k's dtype.
    """
    (B, T, H, K), (_, R, C) = k.shape, E.shape
    M = max(cdiv(T, C) - 1, 0)
    ks, vs = (k.new_empty(B, M * R, H, K) for _ in range(2))
    if ks.numel():
        with torch.cuda.device_of(k):
            forward_kernel[(B * M * H,)](k, v, E, F, table, ks, vs, M, *k.stride()[:3], *v.stride()[:3],
                                         **options(k, R, C))
    return ks, vs


def backward(dks: Tensor, dvs: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, dk: Tensor,
             dv: Tensor, add: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the summaries, as of `forward` but turned back -> dE, dF in float32.

    If `add`, their share of dk and dv is added to what stands there.
    """
    (B, T, H, _), (_, R, C) = k.shape, E.shape
    M = max(cdiv(T, C) - 1, 0)
    programs = cdiv(B * M, SPAN)
    sums = E.new_empty(2, programs, *E.shape, dtype=torch.float32)
    if programs:
        with torch.cuda.device_of(k):
            backward_kernel[(programs * H,)](
                k, v, E, F, dks, dvs, dk, dv, sums[0], sums[1], M, B * M, *k.stride()[:3], *v.stride()[:3],
                *dk.stride()[:3], *dv.stride()[:3], SPAN=SPAN, ADD=add, **options(k, R, C))
    dE, dF = sums.sum(1)
    return dE, dF
