"""Attention to the own block and to learned projections of every finished one: `block_attention` from a projection."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.ops.attention import block_attention
from zoo.ops.rotary import turn
from zoo.ops.summary_attention_triton import summary_attention as summary_on_triton
from zoo.ops.summary_attention_triton import summary_kernel


def summaries(k: Tensor, v: Tensor, E: Tensor, F: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks k, v [B, M, C, H, K] -> E k, turned, and F v, [B, M, R, H, K]; E, F [H, R, C] (2006.04768 eq. 7).

    table [M R, 2, K // 2] or [B, M R, 2, K // 2]: the phases of the summaries' positions.
    """
    k_summary, v_summary = (torch.einsum("hrc,bmchk->bmrhk", P.to(x.dtype), x) for P, x in ((E, k), (F, v)))
    return turn(k_summary.flatten(1, 2), table).view_as(k_summary), v_summary


def summary_attention(qkv: Tensor, E: Tensor, F: Tensor, table: Tensor, past_table: Tensor) -> Tensor:
    """`block_attention` of turned queries and keys, over the turned E k and the F v of every block -> [B, T, H, K].

    qkv [B, T, 3 H, K]: queries, keys and values side by side. E, F [H, R, C] project a block of C tokens. table
    [T, 2, K // 2], past_table [M R, 2, K // 2]: phases of the tokens and of the summaries of M = ceil(T / C) - 1 blocks
    (the last one, even where it is full, has nobody after it).

    The kernels read what they project and turn once, and write all gradients to where they stand in that of qkv. They
    take heads of a power of two from 16 on, R to 64, and tiles [C, K] to 32 KB; others are put together here.
    """
    (H, R, C), (_, T, _, K) = E.shape, qkv.shape
    M = max(-(-T // C) - 1, 0)
    tables = (T, 2, K // 2), (M * R, 2, K // 2)
    if qkv.shape[2] != 3 * H or F.shape != E.shape or (table.shape, past_table.shape) != tables:
        raise ZooError(f"qkv {list(qkv.shape)}, E {list(E.shape)}, F {list(F.shape)}, phases {list(table.shape)} and "
                       f"{list(past_table.shape)}; allowed: [B, T, 3 H, K], two of [H, R, C], "
                       f"{' and '.join(str(list(shape)) for shape in tables)}")
    if takes(qkv, R, C) and summary_kernel.chosen(qkv, qkv.shape[3], R, C):
        qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
        return summary_on_triton(qkv, E.contiguous(), F.contiguous(), table, past_table)[0]
    q, k, v = qkv.chunk(3, dim=2)
    k_blocks, v_blocks = (x[:, : M * C].unflatten(1, (M, C)) for x in (k, v))
    past = summaries(k_blocks, v_blocks, E, F, past_table)
    return block_attention(turn(q, table), turn(k, table), v, *past, C)


def takes(qkv: Tensor, R: int, C: int) -> bool:
    """Whether the kernels take these sizes."""
    K, rows = qkv.shape[3], 1 << max(4, (C - 1).bit_length())
    return K >= 16 and not K & (K - 1) and R <= 64 and rows * K * qkv.element_size() <= 2**15
