"""Inputs of exact attention, and its definition: with blocks, summaries and packed documents."""

from __future__ import annotations

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


def seen(T: int, C: int, R: int, M: int, borders: tuple[int, ...] | None) -> Tensor:
    """[T, M R + T]: which summaries and tokens a token sees; C = 0 where there are no blocks."""
    t = torch.arange(T)
    cu = torch.tensor(borders or (0, T))
    document = torch.searchsorted(cu, t, right=True) - 1
    at = t - cu[document]
    own = (document[:, None] == document) & (t <= t[:, None])
    if not C:
        return own
    own &= at[:, None] // C == at // C
    entries = (cu.diff() + C - 1) // C
    first = (entries.cumsum(0) - entries)[document][:, None]
    slot = torch.arange(M).repeat_interleave(R)
    return torch.cat([(slot >= first) & (slot < first + at[:, None] // C), own], 1)


def plain(q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor | None = None, v_summary: Tensor | None = None,
          C: int = 0, borders: tuple[int, ...] | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with the weights in memory."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    M, R = (0, 0) if k_summary is None else k_summary.shape[1:3]
    if k_summary is not None and v_summary is not None:
        k, v = (torch.cat([a.flatten(1, 2), b], 1) for a, b in ((k_summary, k), (v_summary, v)))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    visible = seen(q.shape[1], C, R, M, borders).to(q.device)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def draw(B: int, T: int, H: int, G: int, K: int, C: int = 0, R: int = 0, N: int = 0, device: str = "cpu") -> Inputs:
    shapes = {"q": (B, T, H, K), "k": (B, T, G, K), "v": (B, T, G, K)}
    if C:
        M = T // C + N if N else max(-(-T // C) - 1, 0)
        shapes |= {"k_summary": (B, M, R, H, K), "v_summary": (B, M, R, H, K)}
    return {name: torch.randn(shape, dtype=torch.float64).to(device) for name, shape in shapes.items()}
