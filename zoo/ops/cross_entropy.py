"""Linear head and cross-entropy: L = sum_i (logsumexp(W x_i) - (W x_i)[y_i]), without all logits in memory at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ZooError, choose
from zoo.ops.backend import Kernel
from zoo.ops.cross_entropy_triton import losses_of_each, self_test, small_loss, total_loss
from zoo.ops.untraced import untraced

MAX_LOGITS = 1 << 24  # that the eager path holds at a time: 64 MiB in float32; a byte vocabulary's batch fits whole
FEW_LOGITS = 1 << 18  # up to which a loss is a matter of launches, and PyTorch's own calls are the fewest

_kernel = Kernel("cross_entropy", self_test)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100,
                         reduction: str = "mean", z_loss: float = 0.0) -> Tensor:
    """Cross-entropy in nats of `targets` under softmax(W x), float32 whatever the dtype of x (float64 for float64).

    x [..., D], weight [V, D], targets [...] int64. Reduction "mean" over the targets that are not `ignore_index` (0 if
    there are none), "sum", or "none" [...]. `z_loss` times logsumexp^2 is added to each counted token's loss (PaLM,
    2204.02311, section 5). Logits are products in x's dtype, or autocast's; where there are many, they are computed
    piece by piece, and the head's gradient adds up in float32 and has the weight's dtype.

    On kernels: the gradients of a mean or sum are those of three products; beside x, the weight and their gradients
    there are the head's gradient in float32, x's a second time, and logits of 2048 tokens or of x's size, at least
    16 MiB (no more classes than x is wide: all logits, and no second gradients). For "none", or one gradient alone, the
    logits are computed twice, and held beside are x's gradient a second time and logits of x's size, at least 16 MiB
    and 128 rows or columns. Another dtype's weight is cast. Up to FEW_LOGITS logits take PyTorch's own calls, which
    torch.compile fuses. float32 products: PyTorch's matmul precision.
    Raises ZooError for another reduction, and where the shapes do not fit.
    """
    choose("reduction", reduction, ("mean", "sum", "none"))
    if x.shape[:-1] != targets.shape or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ZooError(f"x {list(x.shape)}, weight {list(weight.shape)} and targets {list(targets.shape)} do not fit; "
                       "allowed: [..., D], [V, D] and [...]")
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if len(rows) and _kernel.chosen(rows.to(dtype)):
        rows = rows.to(dtype)
        if len(rows) * len(weight) <= FEW_LOGITS:
            losses = _losses(rows, weight, flat, ignore_index, z_loss)
        elif reduction != "none" and len(weight) <= weight.shape[1]:
            return small_loss(rows, weight, flat, ignore_index, z_loss, reduction == "mean")
        elif reduction != "none" and torch.is_grad_enabled() and rows.requires_grad and weight.requires_grad:
            return total_loss(rows, weight, flat, ignore_index, z_loss, reduction == "mean")
        else:
            losses = losses_of_each(rows, weight, flat, ignore_index, z_loss)
    else:
        size = max(1, MAX_LOGITS // weight.shape[0])
        if len(rows) <= size:
            losses = _losses(rows, weight, flat, ignore_index, z_loss)
        else:
            losses = _chunked_losses(rows, weight, flat, ignore_index, z_loss, size, dtype)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (flat != ignore_index).sum().clamp(min=1)


def _losses(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float) -> Tensor:
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    if not z_loss:
        return losses
    return losses + z_loss * logits.logsumexp(-1).square() * (targets != ignore_index)


class _ChunkedLosses(torch.autograd.Function):
    """x [N, D], weight [V, D], targets [N] -> losses [N], `size` rows at a time.

    Not `checkpoint` over the chunks: autocast casts the weight once for all of them, so that autograd would add up
    their gradients in bf16, and lose the small ones.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, size: int,
                dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        ctx.ignore_index, ctx.z_loss, ctx.size, ctx.dtype = ignore_index, z_loss, size, dtype
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)
            parts = zip(x.split(size), targets.split(size), strict=True)
            return torch.cat([_losses(a.to(dtype), w, b, ignore_index, z_loss) for a, b in parts])

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
                logits = F.linear(x_, w).to(wide)
                p = logits.softmax(dim=-1)
                if ctx.z_loss:
                    p = p * (1 + 2 * ctx.z_loss * logits.logsumexp(-1, keepdim=True))
                target = targets[rows].where(kept, 0).unsqueeze(-1)
                p.scatter_add_(-1, target, p.new_full((), -1.0).expand_as(target))  # dL/dlogits = p - onehot(target)
                p = p.mul_((dloss[rows] * kept).unsqueeze(-1)).to(ctx.dtype)
                dx[rows] = (p @ w).to(x.dtype)
                dweight += p.mT @ x_
        return dx, dweight.to(weight.dtype), None, None, None, None, None


_chunked_losses = untraced(_ChunkedLosses.apply)
