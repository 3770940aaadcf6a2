"""Linear head and cross-entropy on Triton kernels, as custom ops: for the sum over tokens, and for each token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("zoo::cross_entropy_total", mutates_args=())
def _total(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool) -> Four:
    """x [N, D], weight [V, D], targets [N] -> the sum or mean of the losses [], its derivative by each of them [], and
    of their sum dx [N, D] and dweight [V, D].

    dweight has the weight's dtype, or float32 for float16: before the cotangent comes, it may be past float16's range.
    """
    from zoo.kernels import cross_entropy

    with torch.autocast(x.device.type, enabled=False):
        loss, unit, dx, dweight = cross_entropy.total(_rows(x), _rows(weight), targets.contiguous(), ignore_index,
                                                      z_loss, mean)
    return loss, unit, dx, dweight.to(_kept(weight.dtype))


@_total.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool) -> Four:
    loss = x.new_empty((), dtype=torch.float32)
    return loss, loss.new_empty(()), x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=_kept(weight.dtype))


@torch.library.custom_op("zoo::cross_entropy_total_backward", mutates_args=())
def _total_backward(dloss: Tensor, unit: Tensor, dx: Tensor, dweight: Tensor,
                    dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both gradients times dloss and unit; an op of its own, so that a second derivative is an error."""
    from zoo.kernels import cross_entropy

    return cross_entropy.scaled(dx, dloss, unit, dx.dtype), cross_entropy.scaled(dweight, dloss, unit, dtype)


@_total_backward.register_fake
def _(dloss: Tensor, unit: Tensor, dx: Tensor, dweight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dx), torch.empty_like(dweight, dtype=dtype)


def _save_total(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _pull_total(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return None, None, None, None, None, None
    dx, dweight = torch.ops.zoo.cross_entropy_total_backward(dloss, *ctx.saved_tensors, ctx.dtype)
    return dx, dweight, None, None, None, None


_total.register_autograd(_pull_total, setup_context=_save_total)


@torch.library.custom_op("zoo::cross_entropy_small", mutates_args=())
def _small(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool,
           need: bool) -> Three:
    """-> the sum or mean of the losses [], its derivative by each of them [], and theirs by the logits [N, V], of no
    rows if not needed.
    """
    from zoo.kernels import cross_entropy

    with torch.autocast(x.device.type, enabled=False):
        return cross_entropy.small(_rows(x), _rows(weight), targets.contiguous(), ignore_index, z_loss, mean, need)


@_small.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool, need: bool) -> Three:
    shape, loss = (len(x) if need else 0, len(weight)), x.new_empty((), dtype=torch.float32)
    return loss, loss.new_empty(()), x.new_empty_strided(shape, ((len(weight) + 15) // 16 * 16, 1))


@torch.library.custom_op("zoo::cross_entropy_small_backward", mutates_args=())
def _small_backward(dloss: Tensor, unit: Tensor, x: Tensor, weight: Tensor, dlogits: Tensor, need_dx: bool,
                    need_dweight: bool) -> tuple[Tensor, Tensor]:
    """-> dx [N, D] and dweight [V, D], each of no rows where it is not needed."""
    from zoo.kernels import cross_entropy

    with torch.autocast(x.device.type, enabled=False):
        return cross_entropy.small_backward(dloss, unit, _rows(x), weight.contiguous(), dlogits, need_dx, need_dweight)


@_small_backward.register_fake
def _(dloss: Tensor, unit: Tensor, x: Tensor, weight: Tensor, dlogits: Tensor, need_dx: bool,
      need_dweight: bool) -> tuple[Tensor, Tensor]:
    D = x.shape[1]
    return x.new_empty(len(x) if need_dx else 0, D), weight.new_empty(len(weight) if need_dweight else 0, D)


def _save_small(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    _, unit, dlogits = output
    ctx.save_for_backward(unit, inputs[0], inputs[1], dlogits)
    ctx.mark_non_differentiable(unit, dlogits)
    ctx.set_materialize_grads(False)


def _pull_small(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    if dloss is None:
        return None, None, None, None, None, None, None
    dx, dweight = torch.ops.zoo.cross_entropy_small_backward(dloss, *ctx.saved_tensors, need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, None, None, None, None, None


_small.register_autograd(_pull_small, setup_context=_save_small)


@torch.library.custom_op("zoo::cross_entropy", mutates_args=())
def _each(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, need_dx: bool,
          need_dweight: bool) -> Three:
    """-> losses [N], lse in two summands [2, N], float32; dx [N, D] for cotangents of 1, no rows if not needed."""
    from zoo.kernels import cross_entropy

    with torch.autocast(x.device.type, enabled=False):
        return cross_entropy.forward(_rows(x), _rows(weight), targets.contiguous(), ignore_index, z_loss, need_dx,
                                     need_dweight)


@_each.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, need_dx: bool,
      need_dweight: bool) -> Three:
    losses = x.new_empty(len(x), dtype=torch.float32)
    return losses, losses.new_empty(2, len(x)), x.new_empty(len(x) if need_dx else 0, x.shape[1])


@torch.library.custom_op("zoo::cross_entropy_backward", mutates_args=())
def _each_backward(dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, dx: Tensor,
                   ignore_index: int, z_loss: float, need_dx: bool, need_dweight: bool) -> tuple[Tensor, Tensor]:
    """-> dx [N, D] and dweight [V, D], each of no rows where it is not needed."""
    from zoo.kernels import cross_entropy

    dweight = weight.new_empty(0, weight.shape[1])
    if need_dweight:
        with torch.autocast(x.device.type, enabled=False):
            dweight = cross_entropy.backward(dlosses, _rows(x), _rows(weight), targets.contiguous(), lse, ignore_index,
                                             z_loss)
    if not need_dx:
        return torch.empty_like(dx[:0]), dweight
    return torch.mul(dx, dlosses.unsqueeze(1), out=torch.empty_like(dx)), dweight  # no float32 in between


@_each_backward.register_fake
def _(dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, dx: Tensor, ignore_index: int,
      z_loss: float, need_dx: bool, need_dweight: bool) -> tuple[Tensor, Tensor]:
    D = x.shape[1]
    return x.new_empty(len(x) if need_dx else 0, D), weight.new_empty(len(weight) if need_dweight else 0, D)


def _save_each(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    x, weight, targets, ctx.ignore_index, ctx.z_loss, _, _ = inputs
    _, lse, dx = output
    ctx.save_for_backward(x, weight, targets, lse, dx)
    ctx.mark_non_differentiable(lse, dx)
    ctx.set_materialize_grads(False)


def _pull_each(ctx: Any, dlosses: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    if dlosses is None:
        return None, None, None, None, None, None, None
    dx, dweight = torch.ops.zoo.cross_entropy_backward(dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.z_loss,
                                                       need_dx, need_dweight)
    return dx if need_dx else None, dweight if need_dweight else None, None, None, None, None, None


_each.register_autograd(_pull_each, setup_context=_save_each)


@register_flop_formula(torch.ops.zoo.cross_entropy_small)
def _small_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.zoo.cross_entropy_small_backward)
def _small_backward_flops(dloss: Any, unit: Any, x: Any, weight: Any, dlogits: Any, need_dx: bool, need_dweight: bool,
                          **__: Any) -> int:
    return 2 * (need_dx + need_dweight) * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.zoo.cross_entropy_total)
def _total_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 6 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.zoo.cross_entropy)
def _each_flops(x: Any, weight: Any, targets: Any, ignore_index: Any, z_loss: Any, need_dx: bool, *_: Any,
                **__: Any) -> int:
    return (4 if need_dx else 2) * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.zoo.cross_entropy_backward)
def _each_backward_flops(dlosses: Any, x: Any, weight: Any, targets: Any, lse: Any, dx: Any, ignore_index: Any,
                         z_loss: Any, need_dx: bool, need_dweight: bool, **__: Any) -> int:
    return (4 if need_dweight else 0) * x[0] * weight[0] * weight[1]


def _rows(x: Tensor) -> Tensor:
    """x itself if the entries of a row lie side by side, as products want it; a copy if not."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _kept(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def total_loss(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool) -> Tensor:
    """x [N, D], weight [V, D] of any dtype, targets [N] -> the sum or mean of the losses, float32.

    Both gradients are computed, and held from the forward to the backward pass.
    """
    return torch.ops.zoo.cross_entropy_total(x, weight, targets, ignore_index, z_loss, mean)[0]


def small_loss(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float, mean: bool) -> Tensor:
    """The same, where the gradient of all logits is small enough to be held for the backward pass."""
    need = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return torch.ops.zoo.cross_entropy_small(x, weight, targets, ignore_index, z_loss, mean, need)[0]


def losses_of_each(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float) -> Tensor:
    """x [N, D], weight [V, D] of any dtype, targets [N] -> losses [N], float32."""
    need_dx, need_dweight = (torch.is_grad_enabled() and each.requires_grad for each in (x, weight))
    losses, _, _ = torch.ops.zoo.cross_entropy(x, weight, targets, ignore_index, z_loss, need_dx, need_dweight)
    return losses


def self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """Three and gradients of all ops beside PyTorch's in float64, where rows of logits are short and where long."""
    worst, allowed = 0.0, max(4 * torch.finfo(dtype).eps, 1e-3)  # float32 products may be TF32, as PyTorch is set
    for V in (40, 1000, 9001):
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(n, 48, generator=generator).to(device, dtype).requires_grad_() for n in (300, V))
        targets = torch.randint(V, (300,), generator=generator).to(device)
        targets[7:30] = -1
        wide = [each.detach().double().requires_grad_() for each in (x, weight)]
        logits = wide[0] @ wide[1].mT
        exact = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
        exact = (exact + 1e-3 * torch.where(targets != -1, logits.logsumexp(1), 0.0).square()).sum()
        want = [exact.detach(), *torch.autograd.grad(exact, wide)]
        each = losses_of_each(x, weight, targets, -1, 1e-3).sum()
        for loss in (each, *(one(x, weight, targets, -1, 1e-3, False) for one in (total_loss, small_loss))):
            got = [loss.detach(), *torch.autograd.grad(loss, (x, weight))]
            for g, w in zip(got, want, strict=True):
                error = float((g.double() - w).norm() / w.norm())
                worst = max(worst, error / allowed) if error == error else float("inf")
    return worst


def memory(N: int, D: int, V: int, element: int, total: bool = True) -> int:
    """A bound on the bytes held at one time beside x [N, D] and weight [V, D], both of `element` bytes an entry.

    Gradients are included. A piece of logits is as large as x, or LEAST, and no fewer than TOKENS rows for a sum over
    the tokens (`total`), ALIGNED rows or columns for reduction "none".
    """
    from zoo.kernels.cross_entropy import ALIGNED, LEAST, TOKENS

    x, weight, piece = N * D * element, V * D * element, max(LEAST, N * D * element)
    lists = 32 * N + 4096  # losses, lse and the like
    if total and V <= D:
        return N * (V + 16) * element + x + 2 * 4 * V * D + lists
    if total:
        piece = max(piece, max(ALIGNED, TOKENS) * (V + 16) * element)
        columns = min(x, (piece // (V * element) + ALIGNED) * D * element)  # of x, for dweight's product
        return max(x + 4 * V * D + max(piece + columns, weight), 2 * x + 2 * weight) + lists
    piece = max(piece, ALIGNED * max(N, V + 16) * element)
    part = 4 * D * (piece // max(1, element * N) + ALIGNED)  # dweight of a slice in float32
    return max(x + weight + piece, 2 * x + weight) + part + lists
