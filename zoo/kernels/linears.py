"""What four linear layers of one shape do beside their products, all at once: y_i = x_i W_i^T.

    dW_i = dy_i^T x_i

A weight is small and the tokens are many: programs share them out by segments, whose sums are added up after. One
launch rounds all weights for the products, one has all gradients, one adds their parts up, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, dot

Z = tl.constexpr(4)  # layers


@triton.jit
def one_of(a, b, c, d, i):
    """Of four, number i, which is known when the kernel runs."""
    found = a
    if i == 1:
        found = b
    elif i == 2:
        found = c
    elif i == 3:
        found = d
    return found


@triton.jit
def round_kernel(w0, w1, w2, w3, p_to, SIZE, BLOCK: tl.constexpr):
    """Weights [SIZE] one after the other [4, SIZE], in its dtype."""
    i_z = tl.program_id(1)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_w = tl.load(one_of(w0, w1, w2, w3, i_z) + o, mask=o < SIZE)
    tl.store(p_to + i_z * SIZE + o, b_w.to(p_to.dtype.element_ty), mask=o < SIZE)


@triton.jit(do_not_specialize=["N", "length"])
def gradient_kernel(dy0, dy1, dy2, dy3, x0, x1, x2, x3, p_dw, N, F, D, length, BT: tl.constexpr,
                    BF: tl.constexpr, BD: tl.constexpr):
    """Of a segment of tokens and one layer, a tile of its part of dW [segments, 4, F, D]."""
    blocks = tl.cdiv(D, BD)
    i_z, i_s = tl.program_id(1), tl.program_id(2)
    o_f = tl.program_id(0) // blocks * BF + tl.arange(0, BF)
    o_d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    m_f, m_d = (o_f < F)[None, :], (o_d < D)[None, :]
    p_dy, p_x = one_of(dy0, dy1, dy2, dy3, i_z), one_of(x0, x1, x2, x3, i_z)
    b_dw = tl.zeros([BF, BD], tl.float32)
    end = tl.minimum((i_s + 1) * length, N)
    for i in range(i_s * length, end, BT):
        o_n = (i + tl.arange(0, BT))[:, None]
        b_dy = tl.load(p_dy + o_n.to(tl.int64) * F + o_f[None, :], mask=(o_n < end) & m_f, other=0.0)
        b_x = tl.load(p_x + o_n.to(tl.int64) * D + o_d[None, :], mask=(o_n < end) & m_d, other=0.0)
        b_dw = dot(tl.trans(b_dy), b_x, b_dw, "tf32")
    to = p_dw + ((i_z + i_s * Z).to(tl.int64) * F + o_f[:, None]) * D + o_d[None, :]
    tl.store(to, b_dw, mask=(o_f < F)[:, None] & m_d)


@triton.jit(do_not_specialize=["segments"])
def sum_kernel(p_parts, w0, w1, w2, w3, SIZE, segments, BLOCK: tl.constexpr):
    """Parts [segments, 4, SIZE] added up, each layer's to its own place."""
    i_z = tl.program_id(1)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(segments):
        b_sum += tl.load(p_parts + (i_z + i * Z).to(tl.int64) * SIZE + o, mask=o < SIZE, other=0.0)
    p_dw = one_of(w0, w1, w2, w3, i_z)
    tl.store(p_dw + o, b_sum.to(p_dw.dtype.element_ty), mask=o < SIZE)


TILE = (64, 128, 256, 8, 3)  # tokens of a step, outputs, inputs, warps, stages; a multiprocessor has room for one


def rounded(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights [F, D] of one dtype without gaps -> [4, F, D]."""
    w = torch.empty(4, *weights[0].shape, dtype=dtype, device=weights[0].device)
    with torch.cuda.device_of(w):
        round_kernel[cdiv(w[0].numel(), 1024), 4](*weights, w, w[0].numel(), BLOCK=1024)
    return w


def gradients(dy: list[Tensor], x: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """dy [N, F], x [N, D] of each layer, without gaps -> dW [F, D] of each."""
    (N, F), D = dy[0].shape, x[0].shape[1]
    dw = [torch.empty(F, D, dtype=dtype, device=each.device) for each in x]
    BT, BF, BD, warps, stages = TILE
    tiles = cdiv(F, BF) * cdiv(D, BD)
    processors = torch.cuda.get_device_properties(dy[0].device).multi_processor_count if dy[0].is_cuda else 8
    length = BT * max(1, cdiv(N, BT * max(1, processors // (4 * tiles))))
    parts = torch.empty(cdiv(N, length), 4, F, D, dtype=torch.float32, device=dy[0].device)
    with torch.cuda.device_of(parts):
        if N:
            gradient_kernel[tiles, 4, len(parts)](*dy, *x, parts, N, F, D, length, BT=BT, BF=BF, BD=BD,
                                                  num_warps=warps, num_stages=stages)
        sum_kernel[cdiv(F * D, 256), 4](parts, *dw, F * D, len(parts), BLOCK=256, num_warps=2)
    return dw
