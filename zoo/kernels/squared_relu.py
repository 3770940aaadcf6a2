"""The products of an MLP whose activation is a squared ReLU that end in it: h = relu(x W^T)^2, and backward of it.

    dk = (dy V) 2 relu(k),    relu(k) = sqrt(h)

so that k = x W^T, as wide as h, is never in memory, and h is written and read where the products end anyway. bf16 only:
a small number's square has as many digits there as itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, dot


@triton.jit(do_not_specialize=["N"])
def product_kernel(p_a, p_b, p_h, p_y, N, D, F, b_d, b_f, BACK: tl.constexpr, EVEN: tl.constexpr, BT: tl.constexpr,
                   BF: tl.constexpr, BD: tl.constexpr):
    """y [N, F] = relu(a b)^2 of a [N, D], b [D, F]; BACK: a b 2 sqrt(h). EVEN: BD divides D."""
    blocks = tl.cdiv(F, BF)
    o_n = (tl.program_id(0) // blocks).to(tl.int64) * BT + tl.arange(0, BT)
    o_f = tl.program_id(0) % blocks * BF + tl.arange(0, BF)
    m_n, m_f = (o_n < N)[:, None], (o_f < F)[None, :]
    b_y = tl.zeros([BT, BF], tl.float32)
    for i in range(0, D, BD):
        o_d = i + tl.arange(0, BD)
        m_a, m_b = m_n, m_f
        if not EVEN:
            m_a = m_a & (o_d < D)[None, :]
            m_b = m_b & (o_d < D)[:, None]
        b_a = tl.load(p_a + o_n[:, None] * D + o_d[None, :], mask=m_a, other=0.0)
        b_b = tl.load(p_b + o_d[:, None] * b_d + o_f[None, :] * b_f, mask=m_b, other=0.0)
        b_y = dot(b_a, b_b, b_y, "tf32")
    o_y = o_n[:, None] * F + o_f[None, :]
    if BACK:
        b_h = tl.load(p_h + o_y, mask=m_n & m_f, other=0.0).to(tl.float32)
        b_y *= 2.0 * tl.sqrt(b_h)
    else:
        b_y = tl.maximum(b_y, 0.0)
        b_y *= b_y
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_n & m_f)


TILE = (128, 128, 64, 8, 3)  # tokens, columns, channels of a step, warps, stages


def product(a: Tensor, b: Tensor, h: Tensor | None) -> Tensor:
    """relu(a b)^2, or with h a b 2 sqrt(h), of a [N, D] without gaps and b [D, F], rows or columns side by side."""
    (N, D), F = a.shape, b.shape[1]
    BT, BF, BD, warps, stages = TILE
    y = a.new_empty(N, F)
    if y.numel():
        with torch.cuda.device_of(a):
            product_kernel[(cdiv(N, BT) * cdiv(F, BF),)](
                a, b, a if h is None else h, y, N, D, F, *b.stride(), BACK=h is not None, EVEN=D % BD == 0, BT=BT,
                BF=BF, BD=BD, num_warps=warps, num_stages=stages)
    return y
