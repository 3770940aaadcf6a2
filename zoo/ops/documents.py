"""Documents packed one after the other in a row of tokens: what every op asks of them, and their plain treatment."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from zoo.errors import ZooError


def check_documents(x: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ZooError unless x is one row [1, T, ...] and cu_seqlens [N + 1] are whole numbers on its device.

    That they ascend from 0 to T cannot be seen without waiting for the device, and is the caller's promise.
    """
    if len(x) != 1:
        raise ZooError(f"documents are packed in one row, and these tensors have {len(x)}; allowed: [1, T, ...]")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ZooError(f"cu_seqlens is {list(cu_seqlens.shape)} {cu_seqlens.dtype}; allowed: [N + 1] int32 or int64")
    if cu_seqlens.device != x.device:
        raise ZooError(f"cu_seqlens is on {cu_seqlens.device}, the tokens on {x.device}; allowed: the same device")


def document_slices(x: Tensor, cu_seqlens: Tensor) -> list[slice]:
    """The place of every document in the row x [1, T, ...], for eager code; waits for the device. Some may be empty."""
    check_documents(x, cu_seqlens)
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != x.shape[1] or borders != sorted(borders):
        raise ZooError(f"cu_seqlens {borders[:8]}{'...' if len(borders) > 8 else ''} does not ascend from 0 to "
                       f"T={x.shape[1]}")
    return [slice(a, b) for a, b in itertools.pairwise(borders)]
