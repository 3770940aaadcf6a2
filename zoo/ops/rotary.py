"""Rotary positions (RoPE, 2104.09864): a table of phases, made once for all heads, and what it turns."""

from __future__ import annotations

import torch
from torch import Tensor


def phases(positions: Tensor, width: int, base: float = 10_000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """cos and sin of positions * base^(-2i / width) (eq. 15): positions [...] -> [..., 2, width // 2].

    In float32 or float64, whatever autocast says: bf16 counts positions only up to 256.
    """
    with torch.autocast(positions.device.type, enabled=False):
        half = width // 2
        frequency = base ** (-torch.arange(half, device=positions.device, dtype=dtype) / half)
        phase = positions.to(dtype).unsqueeze(-1) * frequency
        return torch.stack([phase.cos(), phase.sin()], dim=-2)


def turn(x: Tensor, table: Tensor) -> Tensor:
    """Channel pairs (i, i + K // 2) of x [B, T, H, K] by the phases [T, 2, K // 2] or [B, T, 2, K // 2] (eq. 34).

    Computed in the table's dtype. An odd channel at the end stays as it is.
    """
    if x.shape[-1] % 2:
        return torch.cat([turn(x[..., :-1], table), x[..., -1:]], dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        cos, sin = table.unsqueeze(-3).unbind(-2)  # [T, 1, K/2] or [B, T, 1, K/2]
        wide = x.to(table.dtype)
        across = torch.cat([-sin, sin], dim=-1) * wide.roll(x.shape[-1] // 2, dims=-1)
        return torch.addcmul(across, wide, torch.cat([cos, cos], dim=-1)).to(x.dtype)
