"""Mixtures of a token with the one before it, forward and backward: all of them from one read of x.

    y_z = x + (x' - x) m_z,    x' the token before, 0 before the first of a row or document; m_z a vector of channels

Backward, a token has dx_t = sum_z dy_zt (1 - m_z) + dy_z,t+1 m_z, and dm_z is the sum of dy_z (x' - x) over tokens. The
rows of a tile are read twice, a row apart, the second time from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, power_of_two

MOST = 5  # mixtures


@triton.jit
def pick(a, b, c, d, e, Z: tl.constexpr):
    """Of five, number Z."""
    if Z == 0:
        found = a
    elif Z == 1:
        found = b
    elif Z == 2:
        found = c
    elif Z == 3:
        found = d
    else:
        found = e
    return found


@triton.jit
def begins(p_first, o_n, N, T, documents):
    """Which tokens [BT] are the first of a row or document."""
    first = o_n % T == 0
    if documents > 0:
        first |= tl.load(p_first + o_n, mask=o_n < N, other=0) != 0
    return first


@triton.jit
def pair(p_x, p_first, o_n, o_d, N, T, D, documents):
    """x and x' - x [BT, BD] in float32, and which tokens [BT] are the first of a row or document."""
    first = begins(p_first, o_n, N, T, documents)
    p_x += o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    m_d = (o_d < D)[None, :]
    b_x = tl.load(p_x, mask=(o_n < N)[:, None] & m_d, other=0.0).to(tl.float32)
    b_before = tl.load(p_x - D, mask=((o_n < N) & (first == 0))[:, None] & m_d, other=0.0).to(tl.float32)
    return b_x, b_before - b_x, first


@triton.jit(do_not_specialize=["N", "T", "documents"])
def forward_kernel(p_x, p_mix, p_first, y0, y1, y2, y3, y4, N, T, D, documents, Z: tl.constexpr, BT: tl.constexpr,
                   BD: tl.constexpr):
    """All mixtures of a tile of tokens and channels."""
    o_n = tl.program_id(0) * BT + tl.arange(0, BT)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    b_x, b_delta, _ = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
    o_y = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    m_y = (o_n < N)[:, None] & (o_d < D)[None, :]
    for z in tl.static_range(Z):
        p_y = pick(y0, y1, y2, y3, y4, z)
        b_m = tl.load(p_mix + z * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(p_y + o_y, (b_x + b_delta * b_m).to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["N", "T", "documents"])
def backward_kernel(p_x, p_mix, p_first, dy0, dy1, dy2, dy3, dy4, p_dx, p_dmix, N, T, D, documents, Z: tl.constexpr,
                    BT: tl.constexpr, BD: tl.constexpr):
    """dx of a tile of tokens and channels, and the tokens' part of dmix [programs, Z, D]."""
    i_n = tl.program_id(0)
    o_n = i_n * BT + tl.arange(0, BT)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    o_y = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    m_d = (o_d < D)[None, :]
    m_y = (o_n < N)[:, None] & m_d
    after = (o_n + 1 < N) & (begins(p_first, o_n + 1, N, T, documents) == 0)
    m_after = after[:, None] & m_d
    _, b_delta, _ = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
    b_dx = tl.zeros([BT, BD], tl.float32)
    for z in tl.static_range(Z):
        p_dy = pick(dy0, dy1, dy2, dy3, dy4, z) + o_y
        b_dy = tl.load(p_dy, mask=m_y, other=0.0).to(tl.float32)
        b_after = tl.load(p_dy + D, mask=m_after, other=0.0).to(tl.float32)
        b_m = tl.load(p_mix + z * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
        b_dx += b_dy + (b_after - b_dy) * b_m
        tl.store(p_dmix + (i_n * Z + z) * D + o_d, tl.sum(b_dy * b_delta, 0), mask=o_d < D)
    tl.store(p_dx + o_y, b_dx.to(p_dx.dtype.element_ty), mask=m_y)


TILES = {"forward": (16, 128, 4), "backward": (32, 64, 2)}
"""Of each kernel: tokens, most channels of a program's tile, warps."""


def tile(kernel: str, D: int) -> dict:
    """The compile-time numbers and options of a launch."""
    BT, BD, warps = TILES[kernel]
    return {"BT": BT, "BD": max(16, min(BD, power_of_two(D))), "num_warps": warps}


def firsts(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """uint8 [T + 1], 1 where a document begins (and past the end), and how many documents; nothing and 0 without."""
    if cu_seqlens is None:
        return torch.empty(0, dtype=torch.uint8, device=x.device), 0
    first = torch.zeros(x.shape[1] + 1, dtype=torch.uint8, device=x.device)
    return first.scatter_(0, cu_seqlens.long(), 1), len(cu_seqlens) - 1


def forward(x: Tensor, mix: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """x [B, T, D], mix [Z, D] -> Z tensors [B, T, D]. All without gaps."""
    (B, T, D), Z = x.shape, len(mix)
    y = [torch.empty_like(x) for _ in range(Z)]
    if x.numel():
        first, documents = firsts(x, cu_seqlens)
        launch = tile("forward", D)
        with torch.cuda.device_of(x):
            forward_kernel[cdiv(B * T, launch["BT"]), cdiv(D, launch["BD"])](
                x, mix, first, *y, *y[:1] * (MOST - Z), B * T, T, D, documents, Z=Z, **launch)
    return y


def backward(dy: list[Tensor], x: Tensor, mix: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> dx, dmix."""
    (B, T, D), Z = x.shape, len(mix)
    dx, launch = torch.empty_like(x), tile("backward", D)
    programs = cdiv(B * T, launch["BT"])
    dmix = torch.empty(programs, Z, D, dtype=torch.float32, device=x.device)
    if x.numel():
        first, documents = firsts(x, cu_seqlens)
        with torch.cuda.device_of(x):
            backward_kernel[programs, cdiv(D, launch["BD"])](
                x, mix, first, *dy, *dy[:1] * (MOST - Z), dx, dmix, B * T, T, D, documents, Z=Z, **launch)
    return dx, dmix.sum(0).to(mix.dtype)
