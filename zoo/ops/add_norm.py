"""The residual stream's sum and the LayerNorm (1607.06450) that reads it: s = x + y, n = norm(s)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.ops.add_norm_triton import KERNEL
from zoo.ops.add_norm_triton import add_norm as add_norm_triton


def add_norm(x: Tensor, y: Tensor | None, norm: nn.LayerNorm, narrow: bool) -> tuple[Tensor, Tensor]:
    """x, y [..., D] -> x + y, norm(x + y); y None: nothing to add.

    narrow: n is only projected, so that under autocast it may come in autocast's dtype. Then there are kernels; they
    read x and y once, keep n without gain and bias, in n's dtype, and give y's gradient in y's dtype beside x's.
    """
    if y is None:
        return x, norm(x)
    if narrow and torch.promote_types(x.dtype, y.dtype) == x.dtype in KERNEL.dtypes and KERNEL.chosen(y, y.shape[-1]):
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        s, n, *_ = add_norm_triton(x.contiguous(), y.contiguous(), norm.weight, norm.bias, norm.eps, dtype)
        return s, n
    s = x + y
    return s, norm(s)
