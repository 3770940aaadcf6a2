"""Drawing a token of a small vocabulary in one launch: `zoo.ops.sample`, a program a row.

Nothing is sorted: a token's place in the order, and the probability before it, are sums over all others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import power_of_two

BJ = 32  # of the others at a time


@triton.jit
def before(b_l, o_i, b_lj, o_j):
    """Whether token j comes before token i, [BV, BJ]: a larger logit, or the same one and a smaller id."""
    larger = b_lj[None, :] > b_l[:, None]
    return larger | ((b_lj[None, :] == b_l[:, None]) & (o_j[None, :] < o_i[:, None]))


@triton.jit(do_not_specialize=["top_k"])
def sample_kernel(p_logits, p_draws, p_ids, temperature, top_k, top_p, min_p, V: tl.constexpr, BV: tl.constexpr,
                  BJ: tl.constexpr):
    i_b, o_i = tl.program_id(0), tl.arange(0, BV)
    p_logits += i_b.to(tl.int64) * V
    m_i = o_i < V
    b_l = tl.load(p_logits + o_i, mask=m_i, other=-float("inf"))
    b_top = tl.max(b_l, 0)
    b_rank = tl.zeros([BV], tl.int32)
    for j in range(0, V, BJ):
        o_j = j + tl.arange(0, BJ)
        b_lj = tl.load(p_logits + o_j, mask=o_j < V, other=-float("inf"))
        b_rank += tl.sum((before(b_l, o_i, b_lj, o_j) & (o_j < V)[None, :]).to(tl.int32), 1)
    b_e = tl.where(m_i & (b_rank < top_k), tl.exp((b_l - b_top) / temperature), 0.0)
    b_sum = tl.sum(b_e, 0)
    b_p = b_e / b_sum
    b_earlier = tl.zeros([BV], tl.float32)  # probability of the tokens before
    for j in range(0, V, BJ):
        o_j = j + tl.arange(0, BJ)
        b_lj = tl.load(p_logits + o_j, mask=o_j < V, other=-float("inf"))
        b_pj = tl.exp((b_lj - b_top) / temperature) / b_sum
        b_earlier += tl.sum(tl.where(before(b_l, o_i, b_lj, o_j) & (o_j < V)[None, :], b_pj[None, :], 0.0), 1)
    m_kept = m_i & (b_rank < top_k) & ((b_rank == 0) | ((b_earlier < top_p) & (b_e >= min_p)))
    b_total = b_earlier + b_p
    at = tl.load(p_draws + i_b) * tl.max(tl.where(m_kept, b_total, 0.0), 0)
    passed = tl.sum((m_kept & (b_total <= at)).to(tl.int32), 0)
    chosen = tl.minimum(passed, tl.sum(m_kept.to(tl.int32), 0) - 1)
    tl.store(p_ids + i_b, tl.sum(tl.where(m_i & (b_rank == chosen), o_i, 0), 0).to(tl.int64))


def sample(logits: Tensor, draws: Tensor, temperature: float, top_k: int | None, top_p: float, min_p: float) -> Tensor:
    """logits [B, V] float32, draws [B] float32 -> ids [B] int64."""
    B, V = logits.shape
    ids = torch.empty(B, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):
        sample_kernel[(B,)](logits.contiguous(), draws.contiguous(), ids, float(temperature),
                            V if top_k is None else top_k, float(top_p), float(min_p), V=V,
                            BV=max(BJ, power_of_two(V)), BJ=BJ, num_warps=8)
    return ids
