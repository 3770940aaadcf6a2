"""RWKV's channel MLP (2305.13048, eq. 17 and 18; the activation is Primer's, 2109.08668): y = V relu(W x)^2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.squared_relu_triton import KERNEL, squared_relu_triton


def squared_relu(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """x [..., D], inner [F, D], outer [D, F] -> [..., D]: two products as autocast has them, the square between them.

    bf16, and under autocast of it everything, has kernels: they keep h = relu(W x)^2 and not W x, and end the products
    forward and back with the activation.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x, inner, outer = (each.to(torch.get_autocast_dtype(device)) for each in (x, inner, outer))
    if x.dtype == inner.dtype == outer.dtype == torch.bfloat16 and KERNEL.chosen(x, *inner.shape):
        return squared_relu_triton(x, inner, outer)
    return F.linear(F.linear(x, inner).relu().square(), outer)
