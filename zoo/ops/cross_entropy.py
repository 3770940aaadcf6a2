"""Linear head and cross-entropy: L = sum_i (logsumexp(W x_i) - (W x_i)[y_i]), without all logits in memory at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import choose
from zoo.ops.untraced import untraced

MAX_LOGITS = 1 << 24  # logits held at a time: 64 MiB in float32; a byte vocabulary's batch fits whole


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100,
                         reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of `targets` under softmax(W x), float32 whatever the dtype of x (float64 for float64).

    x [..., D], weight [V, D], targets [...] int64. Reduction "mean" over the targets that are not `ignore_index` (0 if
    there are none), "sum", or "none" [...]. Logits are products in x's dtype, or autocast's; where there are many, they
    are computed chunk by chunk, again in the backward pass, and the head's gradient adds up in float32.
    """
    choose("reduction", reduction, ("mean", "sum", "none"))
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    size = max(1, MAX_LOGITS // weight.shape[0])
    if len(rows) <= size:
        losses = _losses(rows, weight, flat, ignore_index)
    else:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        losses = _chunked_losses(rows, weight, flat, ignore_index, size, dtype)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (flat != ignore_index).sum().clamp(min=1)


def _losses(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    logits = F.linear(x, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, ignore_index=ignore_index, reduction="none")


class _ChunkedLosses(torch.autograd.Function):
    """x [N, D], weight [V, D], targets [N] -> losses [N], `size` rows at a time.

    Not `checkpoint` over the chunks: autocast casts the weight once for all of them, so that autograd would add up
    their gradients in bf16, and lose the small ones.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, size: int,
                dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        ctx.ignore_index, ctx.size, ctx.dtype = ignore_index, size, dtype
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            parts = zip(x.split(size), targets.split(size), strict=True)
            return torch.cat([_losses(a.to(dtype), w, b, ignore_index) for a, b in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets = ctx.saved_tensors
        wide = torch.promote_types(ctx.dtype, torch.float32)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide)
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(ctx.dtype)
            for a in range(0, len(x), ctx.size):
                rows = slice(a, a + ctx.size)
                x_, kept = x[rows].to(ctx.dtype), targets[rows] != ctx.ignore_index
                p = F.linear(x_, w).to(wide).softmax(dim=-1)
                target = targets[rows].where(kept, 0).unsqueeze(-1)
                p.scatter_add_(-1, target, p.new_full((), -1.0).expand_as(target))  # dL/dlogits = p - onehot(target)
                p = p.mul_((dloss[rows] * kept).unsqueeze(-1)).to(ctx.dtype)
                dx[rows] = (p @ w).to(x.dtype)
                dweight += p.mT @ x_
        return dx, dweight.to(weight.dtype), None, None, None, None


_chunked_losses = untraced(_ChunkedLosses.apply)
