"""A norm over each head's channels, gain and bias, and a gate, forward and backward, each in one read of its inputs.

    n = (y - mean) / sqrt(var + eps),    z = (n w + b) silu(g),    silu(g) = g sigmoid(g)

Nothing is kept but the inputs: mean and variance are a row's of the tile that is there anyway. Backward, with
da = dz silu(g) and dn = da w,

    dg = dz (n w + b) (sigmoid(g) + silu(g) (1 - sigmoid(g))),    dw = sum da n,    db = sum da
    dy = (dn - mean(dn) - n mean(dn n)) / sqrt(var + eps)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, power_of_two


@triton.jit
def normed(b_y, m_k, K, eps):
    """Rows of a tile without their mean, over their deviation; and one over that."""
    b_y = tl.where(m_k, b_y - (tl.sum(b_y, 1) / K)[:, None], 0.0)
    b_scale = 1.0 / tl.sqrt(tl.sum(b_y * b_y, 1) / K + eps)
    return b_y * b_scale[:, None], b_scale


@triton.jit
def sigmoid(x):
    """By an exponential of what is not above 0."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit(do_not_specialize=["N"])
def forward_kernel(p_y, p_g, p_w, p_b, p_z, N, H, K, eps, BT: tl.constexpr, BK: tl.constexpr):
    """A tile of tokens of one head."""
    i_h = tl.program_id(0) % H
    o_n, o_k = tl.program_id(0) // H * BT + tl.arange(0, BT), tl.arange(0, BK)
    m_k = (o_k < K)[None, :]
    m = (o_n < N)[:, None] & m_k
    o = (o_n.to(tl.int64)[:, None] * H + i_h) * K + o_k[None, :]
    b_n, _ = normed(tl.load(p_y + o, mask=m, other=0.0).to(tl.float32), m_k, K, eps)
    b_g = tl.load(p_g + o, mask=m, other=0.0).to(tl.float32)
    b_w = tl.load(p_w + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    b_b = tl.load(p_b + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    tl.store(p_z + o, ((b_n * b_w + b_b) * (b_g * sigmoid(b_g))).to(p_z.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N", "length"])
def backward_kernel(p_y, p_g, p_w, p_b, p_dz, p_dy, p_dg, p_dw, p_db, N, H, K, length, eps, BT: tl.constexpr,
                    BK: tl.constexpr):
    """`length` tokens of one head: dy, dg, and their part of dw and db [segments, H, K]."""
    i_h, i_s = tl.program_id(0) % H, tl.program_id(0) // H
    o_k = tl.arange(0, BK)
    m_k = (o_k < K)[None, :]
    b_w = tl.load(p_w + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    b_b = tl.load(p_b + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([BT, BK], tl.float32)
    b_db = tl.zeros([BT, BK], tl.float32)
    for i in range(i_s * length, tl.minimum((i_s + 1) * length, N), BT):
        o_n = i + tl.arange(0, BT)
        m = (o_n < N)[:, None] & m_k
        o = (o_n.to(tl.int64)[:, None] * H + i_h) * K + o_k[None, :]
        b_y = tl.load(p_y + o, mask=m, other=0.0).to(tl.float32)
        b_g = tl.load(p_g + o, mask=m, other=0.0).to(tl.float32)
        b_dz = tl.load(p_dz + o, mask=m, other=0.0).to(tl.float32)
        b_n, b_scale = normed(b_y, m_k, K, eps)
        b_s = sigmoid(b_g)
        b_da = b_dz * b_g * b_s
        b_dg = b_dz * (b_n * b_w + b_b) * b_s * (1.0 + b_g * (1.0 - b_s))
        tl.store(p_dg + o, b_dg.to(p_dg.dtype.element_ty), mask=m)
        b_dw += b_da * b_n
        b_db += b_da
        b_dn = b_da * b_w
        b_dy = b_dn - (tl.sum(b_dn, 1) / K)[:, None] - b_n * (tl.sum(b_dn * b_n, 1) / K)[:, None]
        tl.store(p_dy + o, (b_dy * b_scale[:, None]).to(p_dy.dtype.element_ty), mask=m)
    to = (i_s * H + i_h) * K + o_k
    tl.store(p_dw + to, tl.sum(b_dw, 0), mask=o_k < K)
    tl.store(p_db + to, tl.sum(b_db, 0), mask=o_k < K)


TILE = 2048  # tokens times channels of a program's tile
SEGMENT = 512  # tokens whose part of the parameters' gradients one program adds up


def tile(K: int) -> dict:
    """The compile-time numbers and options of a launch. No tile is longer than a segment, as its end masks nothing."""
    BK = power_of_two(K)
    return {"BT": max(1, min(SEGMENT, TILE // BK)), "BK": BK, "num_warps": 4}


def forward(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y [B, T, H, K], gate [B, T, H K], weight, bias [H K], all without gaps -> [B, T, H K]."""
    B, T, H, K = y.shape
    z, launch = torch.empty_like(gate), tile(K)
    if y.numel():
        with torch.cuda.device_of(y):
            forward_kernel[(cdiv(B * T, launch["BT"]) * H,)](y, gate, weight, bias, z, B * T, H, K, eps, **launch)
    return z


def backward(dz: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor,
             eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dy, dgate, dweight, dbias."""
    B, T, H, K = y.shape
    dy, dgate = torch.empty_like(y), torch.empty_like(gate)
    segments, launch = cdiv(B * T, SEGMENT), tile(K)
    parts = torch.empty(2, segments, H * K, dtype=torch.float32, device=y.device)
    if y.numel():
        with torch.cuda.device_of(y):
            backward_kernel[(segments * H,)](y, gate, weight, bias, dz, dy, dgate, *parts, B * T, H, K, SEGMENT,
                                             eps, **launch)
    dweight, dbias = parts.sum(1)
    return dy, dgate, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)
