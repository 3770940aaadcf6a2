"""AFT's sums over the past in plain PyTorch: rows meet keys in a binary tree, each level in one go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.ops.untraced import untraced


def _cells(size: int) -> Iterator[tuple[int, int | None]]:
    """The tree over `size` tokens: (h, None) for all pairs of a level, (h, first row) for one that may be partial."""
    h = 1
    while h < size:
        if size % (2 * h) == 0:
            yield h, None
        else:
            yield from ((h, start) for start in range(h, size, 2 * h))
        h *= 2


def _halves(x: Tensor, h: int, start: int | None) -> tuple[Tensor, Tensor]:
    """Views of a cell's keys and rows: x [G, T, ...] -> [G, pairs, h, ...] each."""
    if start is None:
        x = x.unflatten(1, (-1, 2, h))
        return x[:, :, 0], x[:, :, 1]
    return x[:, None, start - h : start], x[:, None, start : start + h]


def _tile(a: Tensor, h: int, start: int | None) -> Tensor:
    """View of a cell's weights: a [G, n, C, C] -> [G, n, pairs, rows, keys]."""
    if start is None:
        pairs = a.shape[-1] // (2 * h)
        a = a.unflatten(3, (pairs, 2 * h)).unflatten(2, (pairs, 2 * h)).diagonal(dim1=2, dim2=4)
        return a[:, :, h:, :h].movedim(-1, 2)
    return a[:, :, None, start : start + h, start - h : start]


def mix(a: Tensor | None, z: Tensor) -> Tensor:
    """sum_s a_ts z_s: a [G, n, rows, keys], z [G, n, keys, ...] -> [G, n, rows, ...]; a = None is 1: [G, n, 1, ...]."""
    if a is None:
        return z.sum(2, keepdim=True)
    return (a @ z.flatten(3)).unflatten(3, z.shape[3:])


def _blocks(x: Tensor, size: int) -> Tensor:
    return x.unflatten(1, (-1, size))


def running_max(k: Tensor, block: int) -> Tensor:
    """max_{s<=t} k_s; `block` is a power of two that divides T."""
    m = k.detach().clone(memory_format=torch.contiguous_format)
    for h, start in _cells(block):
        keys, rows = _halves(m, h, start)
        torch.maximum(rows, keys[:, :, -1:], out=rows)
    blocks = _blocks(m, block)
    if blocks.shape[1] > 1:
        torch.maximum(blocks[:, 1:], blocks[:, :-1, -1:].cummax(1).values, out=blocks[:, 1:])
    return m


def _ends(m: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every block but the last: m at its end, the decay from there to the next end, and to the next block's rows."""
    m = _blocks(m, size)
    end = m[:, :-1, -1:]
    return end, (end[:, :-1, 0] - end[:, 1:, 0]).exp_(), (end - m[:, 1:]).exp_()


class CausalSums(torch.autograd.Function):
    """sum_{s<=t} a_ts exp(k_s - m_t) v_s, m held constant: num / den does not depend on it.

    k, m [G, T, ...] and v [G, T, ...] in n blocks of `size` = C tokens. `own` [G, n, C, C] weighs the keys of a row's
    own block, `prev` [G, n - 1, C, C] those of the block before, `far` [G, n - 1, C, 1] all before that; None weighs 1.
    Nothing but the inputs is kept for the backward pass, which is as short: with p_ts = a_ts exp(k_s - m_t),
    dv_s = sum_t p_ts dsum_t, dk_s = v_s . dv_s, da_ts = exp(k_s - m_t) v_s . dsum_t.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, m: Tensor, own: Tensor | None, prev: Tensor | None,
                far: Tensor | None, size: int) -> Tensor:
        ctx.save_for_backward(k, v, m, own, prev, far)
        ctx.size = size
        sums = v * (k - m).exp_()
        if own is not None:
            sums *= own.diagonal(dim1=2, dim2=3).flatten(1)[..., None, None]
        for h, start in _cells(size):
            (keys, _), (values, _), (ends, m_rows), (_, rows) = (_halves(x, h, start) for x in (k, v, m, sums))
            end = ends[:, :, -1:]
            tile = None if own is None else _tile(own, h, start).flatten(1, 2)
            rows.addcmul_(mix(tile, values * (keys - end).exp_()), (end - m_rows).exp_())
        if k.shape[1] > size:
            end, decay, to_rows = _ends(m, size)
            z = _blocks(v, size)[:, :-1] * (_blocks(k, size)[:, :-1] - end).exp_()
            total = z.sum(2)
            carry = torch.zeros_like(total)  # all blocks before each, as a multiple of exp(its end)
            for j in range(1, total.shape[1]):
                torch.add(carry[:, j - 1], total[:, j - 1], out=carry[:, j]).mul_(decay[:, j - 1])
            seen = mix(prev, z) + mix(far, carry.unsqueeze(2))
            _blocks(sums, size)[:, 1:].addcmul_(seen, to_rows)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, v, m, own, prev, far = ctx.saved_tensors
        size, grad, grad_own, grad_prev = ctx.size, grad.contiguous(), None, None
        grad_v = grad * (k - m).exp_()
        if own is not None:
            grad_own = torch.zeros_like(own)
            grad_own.diagonal(dim1=2, dim2=3).copy_((grad_v * v).sum((2, 3)).view(own.shape[:3]))
            grad_v *= own.diagonal(dim1=2, dim2=3).flatten(1)[..., None, None]
        with torch.autocast(k.device.type, enabled=False):
            for h, start in _cells(size):
                (keys, _), (values, _), (ends, m_rows), (_, rows) = (_halves(x, h, start) for x in (k, v, m, grad))
                end = ends[:, :, -1:]
                p, rows = (keys - end).exp_(), rows * (end - m_rows).exp_()
                tile = None if own is None else _tile(own, h, start).flatten(1, 2).mT
                _halves(grad_v, h, start)[0].addcmul_(mix(tile, rows), p)
                if grad_own is not None:
                    target = _tile(grad_own, h, start)
                    target.copy_((rows.flatten(3) @ (values * p).flatten(3).mT).view(target.shape))
            if k.shape[1] > size:
                end, decay, to_rows = _ends(m, size)
                p = (_blocks(k, size)[:, :-1] - end).exp_()
                rows = _blocks(grad, size)[:, 1:] * to_rows
                carry = mix(None if far is None else far.mT, rows).squeeze(2)
                total = torch.zeros_like(carry)
                for j in range(carry.shape[1] - 1, 0, -1):
                    torch.add(carry[:, j], total[:, j], out=total[:, j - 1]).mul_(decay[:, j - 1])
                seen = mix(None if prev is None else prev.mT, rows) + total.unsqueeze(2)
                _blocks(grad_v, size)[:, :-1].addcmul_(seen, p)
                if prev is not None:
                    grad_prev = rows.flatten(3) @ (_blocks(v, size)[:, :-1] * p).flatten(3).mT
        return (grad_v * v).sum_to_size(k.shape), grad_v, None, grad_own, grad_prev, None, None


causal_sums = untraced(CausalSums.apply)
