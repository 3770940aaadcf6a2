"""AFT with position biases (2105.14103, equation 2), causal, with its gate; AFT-full and AFT-local: the launches.

    y_t = sigmoid(q_t) * num_t / den_t,   num_t, den_t = sum_{s<=t} exp(k_s + w_ts) (v_s, 1)

Per channel the exponentials factor, so that the sums are products of matrices: exp(w_ts - r_t), r_t the largest bias of
the row, is one table for all channels, exp(k_s - level) an operand for all rows. What levels are, and how the sums stay
in range, is told in aft_parts.py; the products are in aft_full.py and aft_local.py.

Operands are rounded to bf16 for bf16 values, and else float32 (fp16 has no room for exponentials).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels import aft_full, aft_local
from zoo.kernels.aft_parts import Problem
from zoo.kernels.aft_passes import bias_gradient, factors, make_table, prepare

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, local: bool,
            cu_seqlens: Tensor | None) -> Results:
    """q, k, v [B, T, C], bias [T, T] or, local, [T, W], last axes contiguous -> y [B, T, C] as q, and for `backward`
    inv [B, T, C], table, largest, pairs, planes, flags (aft_parts.py)."""
    if not q.numel():
        return results(q, v, bias, local, cu_seqlens)
    p = Problem(v, bias, local, cu_seqlens)
    blocks = p.blocks()
    table, largest = make_table(bias, p)
    pairs, planes, flags = prepare(k, v, p, blocks)
    if local:
        y, inv = aft_local.forward(q, k, v, table, largest[1], planes, flags, p, blocks)
    else:
        y, inv = aft_full.forward(q, k, v, table, pairs, planes, flags, p, blocks)
    return y, inv, table, largest, pairs, planes, flags


def backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dy: Tensor, y: Tensor, kept: Sequence[Tensor], local: bool,
             cu_seqlens: Tensor | None, row: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv [B, T, C], dbias, each as its input; local: the first three side by side in `row` [B, T, 3 C], if
    given, which has no gaps."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v)) if row is None else row.chunk(3, dim=-1)
    if not q.numel():
        return dq, dk, dv, bias.new_zeros(bias.shape)
    inv, table, largest, pairs, planes, flags = kept
    p = Problem(v, bias, local, cu_seqlens)
    blocks = p.blocks()
    ab, seen = factors(dq, q, k, dy, y, inv, planes, flags, largest, p, blocks)
    if local:
        sums = aft_local.backward(dk, dv, q, k, v, dy, y, inv, ab, seen, table, planes, flags, p)
    else:
        dk, dv, sums = aft_full.backward(q, k, v, dy, y, inv, ab, table, pairs, planes, flags, p, blocks)
    return dq, dk, dv, bias_gradient(bias, sums, largest, p)


def results(q: Tensor, v: Tensor, bias: Tensor, local: bool, cu_seqlens: Tensor | None) -> Results:
    """What `forward` returns, empty."""
    p = Problem(v, bias, local, cu_seqlens)
    Cp, n = p.Cp, p.chunks
    flags = n * (Cp // p.flag)
    shapes = ((q.shape, q.dtype), (q.shape, p.kind), (p.table_shape, p.kind), ((2, p.table_shape[0]), torch.float32),
              ((0,) if local else p.operand_shape, p.kind), ((6 if local else 4, n, Cp), torch.float32),
              ((flags,), torch.int32))
    return tuple(q.new_empty(shape, dtype=dtype) for shape, dtype in shapes)  # type: ignore[return-value]
