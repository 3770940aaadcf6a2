"""Exact causal softmax attention: over all tokens, over a cache, and over blocks with summaries of the blocks before.

y_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s (1706.03762 eq. 1), three times; they differ in the keys s that t sees.
Layout [B, T, H, K]. The T x T weights are never in memory at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.errors import ZooError
from zoo.ops.attention_triton import (
    block_kernel,
    block_on_triton,
    causal_kernel,
    causal_on_triton,
    rotary_kernel,
    rotary_on_triton,
    same_dtype,
)
from zoo.ops.autocast import autocast
from zoo.ops.documents import document_slices
from zoo.ops.rotary import turn
from zoo.ops.untraced import untraced

QUERIES = 256  # queries to a cache at a time: the mask of a long prompt is [B, 256, L] at most


def causal_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Each token to itself and all before it. q [B, T, H, K], k, v [B, T, G, K] -> [B, T, H, K].

    G divides H: query head h reads key head h // (H / G) (grouped queries, 2305.13245). With cu_seqlens [N + 1],
    tensors are [1, T, ...] and a token sees its own document.

    Computed in one dtype, that of autocast where it is on. Head sizes to 256 have Triton kernels; elsewhere PyTorch's
    kernel is the eager path. On a CPU it is FlashAttention (2205.14135) in float32, bf16 and float64: O(T)
    memory, float32 sums. The chunked algorithm of 2112.05682 in matrix products came out 1.1 (T=256) to 1.3 (T=1024)
    times slower, forward and backward on two cores.
    """
    q, k, v = same_dtype(*(autocast(x) for x in (q, k, v)))
    if causal_kernel.chosen(q, q.shape[-1]):
        return causal_on_triton(q, k, v, cu_seqlens)
    if cu_seqlens is not None:
        return torch.cat([causal_attention(q[:, i], k[:, i], v[:, i]) for i in document_slices(q, cu_seqlens)], dim=1)
    grouped = k.shape[2] != q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def rotary_attention(qkv: Tensor, table: Tensor, heads: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """`causal_attention` of H = `heads` queries and G keys turned to their positions, with G values -> [B, T, H, K].

    qkv [B, T, H + 2 G, K]: the three side by side, as a projection gives them. table [T, 2, K // 2]: the phases of the
    tokens' positions (`zoo.ops.rotary.phases`), with cu_seqlens those in each document.

    The kernels turn queries and keys in one pass that reads and writes them once, and write the gradients, turned back,
    to where they stand in that of qkv: nothing is put together afterwards.
    """
    keys = qkv.shape[2] - heads
    if heads < 1 or keys < 2 or keys % 2 or heads % (keys // 2):
        raise ZooError(f"qkv {list(qkv.shape)} with heads={heads}; allowed: [B, T, heads + 2 G, K], G divides heads")
    if table.shape != (qkv.shape[1], 2, qkv.shape[3] // 2):
        raise ZooError(f"phases {list(table.shape)}; allowed: {[qkv.shape[1], 2, qkv.shape[3] // 2]}")
    qkv = autocast(qkv)
    if rotary_kernel.chosen(qkv, qkv.shape[-1]):
        return rotary_on_triton(qkv, table, heads, cu_seqlens)
    q, k, v = qkv.split([heads, keys // 2, keys // 2], dim=2)
    return causal_attention(turn(q, table), turn(k, table), v, cu_seqlens)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """t queries to the keys that `visible` [B, t, L] (bool) shows them, at least one each.

    q [B, t, H, K], k, v [B, L, G, K] -> [B, t, H, K] in q's dtype, computed in that of k.
    """
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q.to(k.dtype).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            attn_mask=visible.unsqueeze(1), enable_gqa=k.shape[2] != q.shape[2])
    return y.transpose(1, 2).to(q.dtype)


def attend_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """t tokens to a cache that already holds them: each sees the entries 0 .. its own position.

    q [B, t, H, K], k_cache, v_cache [B, L, G, K], positions [B, t] int64, ascending in a row -> [B, t, H, K].
    """
    parts = []
    for a in range(0, q.shape[1], QUERIES):
        at = positions[:, a : a + QUERIES]
        seen = k_cache.shape[1] if q.shape[1] <= QUERIES else int(at[:, -1].max()) + 1
        visible = torch.arange(seen, device=q.device) <= at.unsqueeze(-1)
        parts.append(masked_attention(q[:, a : a + QUERIES], k_cache[:, :seen], v_cache[:, :seen], visible))
    return torch.cat(parts, dim=1)


def block_attention(q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, block: int,
                    cu_seqlens: Tensor | None = None) -> Tensor:
    """Each token to its block of C = `block` up to itself, and to R summaries of every block before, in one softmax.

    q, k, v [B, T, H, K]; k_summary, v_summary [B, M, R, H, K], entry m seen from token (m + 1) C on, so that
    M = ceil(T / C) - 1 -> [B, T, H, K].

    With cu_seqlens [N + 1], B = 1 and blocks start anew with every document. The summaries of all documents stand in a
    row: M = T // C + N, a document of L tokens has ceil(L / C) entries, the last of which nobody sees, and the next
    document's follow at once. Entries after the last document's are not read. (A document's first entry is the sum of
    ceil(L / C) over those before it, and M is a bound that does not depend on where they end: no wait for the device.)

    Computed in the widest dtype given; autocast has no say. Head sizes to 256 have Triton kernels. PyTorch's kernel
    would want a mask and a copy of the summaries for each block. So the eager path is the chunked exact attention of
    2112.05682: one block of queries at a time against all it sees, and again in the backward pass from the saved
    log-sum-exp. O(T) memory, float32 inside (float64 stays).
    """
    tensors = same_dtype(q, k, v, k_summary, v_summary)
    if block_kernel.chosen(tensors[0], q.shape[-1]):
        return block_on_triton(tensors, block, cu_seqlens).to(q.dtype)
    if cu_seqlens is not None:
        documents, entry = [], 0
        for i in document_slices(q, cu_seqlens):
            entries = -(-(i.stop - i.start) // block)
            past = slice(entry, entry + max(entries - 1, 0))
            documents.append(block_attention(q[:, i], k[:, i], v[:, i], k_summary[:, past], v_summary[:, past], block))
            entry += entries
        return torch.cat(documents, dim=1)
    wide = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = (x.to(wide).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    k_past, v_past = (x.to(wide).flatten(1, 2).transpose(1, 2).flatten(0, 1) for x in (k_summary, v_summary))
    y = _block_attention(q_, k_, v_, k_past, v_past, block, k_summary.shape[2])
    return y.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2).to(q.dtype)


class _BlockAttention(torch.autograd.Function):
    """q, k, v [BH, T, K], the summaries in a row k_past, v_past [BH, M R, K] -> [BH, T, K]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, k_past: Tensor, v_past: Tensor,
                block: int, rank: int) -> Tensor:
        y, lse = torch.empty_like(q), torch.empty_like(q[..., :1])
        with torch.autocast(q.device.type, enabled=False):
            for a in range(0, q.shape[1], block):
                i, past = slice(a, a + block), slice(0, a // block * rank)
                own, earlier = _scores(q[:, i], k[:, i], k_past[:, past])
                lse[:, i] = own.logsumexp(-1, keepdim=True).logaddexp(earlier.logsumexp(-1, keepdim=True))
                p_own, p_past = (s.sub_(lse[:, i]).exp_() for s in (own, earlier))
                y[:, i] = torch.baddbmm(torch.bmm(p_own, v[:, i]), p_past, v_past[:, past])
        ctx.save_for_backward(q, k, v, k_past, v_past, y, lse)
        ctx.block, ctx.rank = block, rank
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, k_past, v_past, y, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dk_past, dv_past = torch.zeros_like(k_past), torch.zeros_like(v_past)
        scale = q.shape[-1] ** -0.5
        with torch.autocast(q.device.type, enabled=False):
            dy = dy.contiguous()
            delta = (dy * y).sum(-1, keepdim=True)
            for a in range(0, q.shape[1], ctx.block):
                i, past = slice(a, a + ctx.block), slice(0, a // ctx.block * ctx.rank)
                p_own, p_past = (s.sub_(lse[:, i]).exp_() for s in _scores(q[:, i], k[:, i], k_past[:, past]))
                dv[:, i] = torch.bmm(p_own.mT, dy[:, i])
                dv_past[:, past].baddbmm_(p_past.mT, dy[:, i])
                # dL/dscore = p (dL/dp - sum_s p_s dL/dp_s), and the sum is dy . y
                ds_own = p_own.mul_(torch.bmm(dy[:, i], v[:, i].mT).sub_(delta[:, i])).mul_(scale)
                ds_past = p_past.mul_(torch.bmm(dy[:, i], v_past[:, past].mT).sub_(delta[:, i])).mul_(scale)
                dq[:, i] = torch.baddbmm(torch.bmm(ds_own, k[:, i]), ds_past, k_past[:, past])
                dk[:, i] = torch.bmm(ds_own.mT, q[:, i])
                dk_past[:, past].baddbmm_(ds_past.mT, q[:, i])
        return dq, dk, dv, dk_past, dv_past, None, None


def _scores(q: Tensor, k: Tensor, k_past: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled scores of a block's queries with its own keys, the future at -inf, and with the summaries before it."""
    q = q * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu_(1)
    return torch.bmm(q, k.mT).masked_fill_(future, float("-inf")), torch.bmm(q, k_past.mT)


_block_attention = untraced(_BlockAttention.apply)
