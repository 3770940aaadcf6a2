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
from triton.tools.tensor_descriptor import TensorDescriptor

from zoo.kernels._common import cdiv, dot


@triton.jit
def product_kernel(d_a, d_b, d_h, d_y, D, F, BACK: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
                   BD: tl.constexpr):
    """y [N, F] = relu(a b^T)^2 of a [N, D], b [F, D]; BACK: a b 2 sqrt(h), b [D, F]. TMA reads zeros beyond an end."""
    blocks = tl.cdiv(F, BF)
    i_n, i_f = tl.program_id(0) // blocks * BT, tl.program_id(0) % blocks * BF
    b_y = tl.zeros([BT, BF], tl.float32)
    for i in range(0, D, BD):
        b_a = d_a.load([i_n, i])
        b_b = d_b.load([i, i_f]) if BACK else tl.trans(d_b.load([i_f, i]))
        b_y = dot(b_a, b_b, b_y, "tf32")
    if BACK:
        b_y *= 2.0 * tl.sqrt(d_h.load([i_n, i_f]).to(tl.float32))
    else:
        b_y = tl.maximum(b_y, 0.0)
        b_y *= b_y
    d_y.store([i_n, i_f], b_y.to(d_y.dtype))


TILE = (128, 128, 64, 8, 3)  # tokens, columns, channels of a step, warps, stages


def product(a: Tensor, b: Tensor, h: Tensor | None) -> Tensor:
    """relu(a b^T)^2 of a [N, D], b [F, D]; with h [N, F] a b 2 sqrt(h), b [D, F]. Without gaps; D and F divide by 8."""
    (N, D), F = a.shape, b.shape[h is not None]
    BT, BF, BD, warps, stages = TILE
    y = a.new_empty(N, F)
    if y.numel():
        d_y = described(y, BT, BF)
        with torch.cuda.device_of(a):
            product_kernel[(cdiv(N, BT) * cdiv(F, BF),)](
                described(a, BT, BD), described(b, BF, BD) if h is None else described(b, BD, BF),
                d_y if h is None else described(h, BT, BF), d_y, D, F, BACK=h is not None, BT=BT, BF=BF, BD=BD,
                num_warps=warps, num_stages=stages)
    return y


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x for TMA in tiles; it wants addresses that divide by 16."""
    return TensorDescriptor.from_tensor(x if x.data_ptr() % 16 == 0 else x.clone(), [rows, columns])
