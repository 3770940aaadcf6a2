"""A residual sum and the LayerNorm after it (1607.06450), forward and backward, each in one pass over its rows.

    s = x + y,   h = (s - mean) / sqrt(var + eps),   n = h w + b
    g = dn w,    dx = dy = ds + (g - mean(g) - h mean(h g)) / sqrt(var + eps),   dw = sum dn h,   db = sum dn

Kept for the backward pass: h in n's type and 1 / sqrt(var + eps), not s, which in training is twice as wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, power_of_two

# on an H100, torch 2.11, triton 3.6, 2026-11-25, at widths of 256, 512 and 768: the fastest of three tiles forward, and
# of ten tiles, stages and programs backward
TILE = 1024  # numbers of a tile, forward: 8 to each of 128 threads
TILES = {256: (2048, 3), 4096: (4096, 1)}  # backward, to a padded width: numbers of a tile, tiles under way
PROGRAMS = 528  # backward, each with its own sums of dw and db: four to a multiprocessor
COLUMNS = 32  # of those sums, that a program adds up


@triton.jit(do_not_specialize=["N"])
def forward_kernel(p_x, p_y, p_w, p_b, p_s, p_n, p_h, p_scale, N, eps, D: tl.constexpr, BT: tl.constexpr,
                   BD: tl.constexpr):
    o_n, o_d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_d = o_d < D
    m = (o_n < N)[:, None] & m_d[None, :]
    o = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    b_s = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32) + tl.load(p_y + o, mask=m, other=0.0).to(tl.float32)
    b_s = b_s.to(p_s.dtype.element_ty)
    tl.store(p_s + o, b_s, mask=m)
    b_s = b_s.to(tl.float32)
    b_s = tl.where(m_d[None, :], b_s - (tl.sum(b_s, 1) / D)[:, None], 0.0)
    b_scale = 1.0 / tl.sqrt(tl.sum(b_s * b_s, 1) / D + eps)
    tl.store(p_scale + o_n, b_scale, mask=o_n < N)
    b_h = b_s * b_scale[:, None]
    tl.store(p_h + o, b_h.to(p_h.dtype.element_ty), mask=m)
    b_w = tl.load(p_w + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_n + o, (b_h * b_w[None, :] + b_b[None, :]).to(p_n.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N", "STEPS", "summed"])
def backward_kernel(p_dn, p_ds, p_h, p_scale, p_w, p_dx, p_dy, p_dw, p_db, N, STEPS, summed, D: tl.constexpr,
                    BT: tl.constexpr, BD: tl.constexpr, TWO: tl.constexpr, STAGES: tl.constexpr):
    """STEPS tiles of rows. ds is read if `summed`; dy, dx in another type, is written if TWO."""
    i, o_d = tl.program_id(0), tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(p_w + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([BT, BD], tl.float32)
    b_db = tl.zeros([BT, BD], tl.float32)
    for j in tl.range(0, STEPS, num_stages=STAGES):
        o_n = (i * STEPS + j) * BT + tl.arange(0, BT)
        m = (o_n < N)[:, None] & m_d[None, :]
        o = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
        b_dn = tl.load(p_dn + o, mask=m, other=0.0).to(tl.float32)
        b_h = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32)
        b_ds = tl.load(p_ds + o, mask=m & (summed != 0), other=0.0).to(tl.float32)
        b_scale = tl.load(p_scale + o_n, mask=o_n < N, other=0.0)
        b_dw += b_dn * b_h
        b_db += b_dn
        b_g = b_dn * b_w
        b_dx = b_g - (tl.sum(b_g, 1) / D)[:, None] - b_h * (tl.sum(b_g * b_h, 1) / D)[:, None]
        b_dx = b_dx * b_scale[:, None] + b_ds
        tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
        if TWO:
            tl.store(p_dy + o, b_dx.to(p_dy.dtype.element_ty), mask=m)
    to = i.to(tl.int64) * D + o_d
    tl.store(p_dw + to, tl.sum(b_dw, 0), mask=m_d)
    tl.store(p_db + to, tl.sum(b_db, 0), mask=m_d)


@triton.jit(do_not_specialize=["P"])
def sum_kernel(p_parts, p_dw, p_db, P, D, BP: tl.constexpr, BD: tl.constexpr):
    """The two sums of parts [2, P, D]; a program has BD columns of one."""
    i, o_p = tl.program_id(1), tl.arange(0, BP)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    p_parts += i.to(tl.int64) * P * D + o_d[None, :]
    b_sum = tl.zeros([BP, BD], tl.float32)
    for j in range(0, P, BP):
        there = (j + o_p < P)[:, None] & (o_d < D)[None, :]
        b_sum += tl.load(p_parts + (j + o_p)[:, None] * D, mask=there, other=0.0)
    b_sum = tl.sum(b_sum, 0)
    tl.store(p_dw + o_d, b_sum, mask=(o_d < D) & (i == 0))
    tl.store(p_db + o_d, b_sum, mask=(o_d < D) & (i == 1))


def tile(D: int, size: int) -> dict[str, int]:
    BD = power_of_two(D)
    return {"D": D, "BT": max(1, size // BD), "BD": BD, "num_warps": 4 if BD <= 2048 else 8}


def forward(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float,
            dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y [..., D] without gaps, weight, bias [D] -> s in x's type, n and h in `dtype`, 1 / deviation in float32."""
    N, launch = x.numel() // x.shape[-1], tile(x.shape[-1], TILE)
    s, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    n, h = (x.new_empty(x.shape, dtype=dtype) for _ in range(2))
    if N:
        with torch.cuda.device_of(x):
            forward_kernel[(cdiv(N, launch["BT"]),)](x, y, weight, bias, s, n, h, scale, N, eps, **launch)
    return s, n, h, scale


def backward(dn: Tensor, ds: Tensor | None, h: Tensor, scale: Tensor, weight: Tensor, x_dtype: torch.dtype,
             y_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dn, ds, h without gaps -> dx; dy, empty where it is dx; dw, db in float32."""
    D, N = h.shape[-1], scale.numel()
    size, stages = next(kind for width, kind in TILES.items() if width >= D)
    launch = tile(D, size)
    dx, two = dn.new_empty(h.shape, dtype=x_dtype), x_dtype != y_dtype
    dy = dn.new_empty(h.shape if two else (0,), dtype=y_dtype)
    tiles = cdiv(N, launch["BT"])
    steps = max(1, cdiv(tiles, PROGRAMS))
    programs = cdiv(tiles, steps)
    parts = weight.new_empty(2, programs, D, dtype=torch.float32)
    dw, db = weight.new_empty(D, dtype=torch.float32), weight.new_empty(D, dtype=torch.float32)
    with torch.cuda.device_of(h):
        if N:
            backward_kernel[(programs,)](dn, dn if ds is None else ds, h, scale, weight, dx, dy, parts[0], parts[1], N,
                                         steps, int(ds is not None), TWO=two, STAGES=stages, **launch)
        sum_kernel[(cdiv(D, COLUMNS), 2)](parts, dw, db, programs, D, BP=256, BD=COLUMNS, num_warps=4)
    return dx, dy, dw, db
