"""Four linear layers of one shape, each with an input of its own: y_i = x_i W_i^T."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.linears_triton import KERNEL, linears_triton


def linears(xs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """xs [..., D], weights [F, D] -> [..., F] of each, as F.linear and autocast have it.

    Four layers in bf16, and under autocast of it, have kernels: gradients of weights are summed in float32, and come in
    the weights' dtype without a rounding to bf16 between.
    """
    device, alike = xs[0].device.type, len({w.dtype for w in weights}) == 1
    if torch.is_autocast_enabled(device) and xs[0].dtype != torch.float64:
        xs = [x.to(torch.get_autocast_dtype(device)) for x in xs]
    else:
        alike = alike and weights[0].dtype == xs[0].dtype
    fits = alike and len(xs) == 4 and all(x.dtype == torch.bfloat16 for x in xs)
    if fits and KERNEL.chosen(xs[0], *weights[0].shape):
        return linears_triton(*xs, *weights)
    return tuple(F.linear(x, w) for x, w in zip(xs, weights, strict=True))
