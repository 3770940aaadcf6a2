"""Inputs of WKV-6, the recurrence as one writes it, and the check of the kernels against both in float64."""

from __future__ import annotations

from itertools import pairwise

import torch
from kernel_cases import check_against_float64
from torch import Tensor

from zoo.ops.wkv6 import wkv6, wkv6_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEEP = ["log_decay", "u", "initial_state"]


def inputs(T: int, K: int = 16, V: int = 24, B: int = 2, H: int = 2, rows: int | None = None,
           decay: float = -2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = {"r": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "log_decay": (B, T, H, K), "u": (H, K),
              "initial_state": (rows or B, H, K, V)}
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    given["log_decay"] = -torch.exp(given["log_decay"] + decay)
    return {name: x.to(DEVICE) for name, x in given.items()}


def plain(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, initial_state: Tensor,
          cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence as one writes it in PyTorch, in one type throughout."""
    if cu_seqlens is not None:
        parts = [plain(r[:, a:b], k[:, a:b], v[:, a:b], log_decay[:, a:b], u, initial_state[n : n + 1])
                 for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))]
        return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])
    state, u, decay = initial_state.to(r.dtype), u.to(r.dtype), log_decay.to(r.dtype).exp()
    ys = [v[:, :0]]
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        ys.append(((r[:, t, :, None] @ (state + u[..., None] * kv)).squeeze(-2)).unsqueeze(1))
        state = decay[:, t, ..., None] * state + kv
    return torch.cat(ys, dim=1), state.to(initial_state.dtype)


def check(given: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    check_against_float64(wkv6, wkv6, plain, given, dtype, keep=KEEP, factor=2.0 if dtype != torch.float32 else 4.0)


def of_decays(r: Tensor, k: Tensor, v: Tensor, d: Tensor, base: Tensor, u: Tensor, initial_state: Tensor,
              cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In one type throughout, but for the decays, which a user of bf16 has in float32."""
    d = base + d
    log_decay = -torch.exp(d.to(torch.promote_types(d.dtype, torch.float32)))
    return plain(r, k, v, log_decay, u, initial_state, cu_seqlens)


def check_decays(given: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """d in the dtype of r, k, v, base in float32: e^-e^5 to e^-e^-9."""
    generator = torch.Generator().manual_seed(1)
    d = torch.randn(given["log_decay"].shape, generator=generator, dtype=torch.float64).to(DEVICE)
    base = torch.linspace(-8, 4, given["u"].numel(), dtype=torch.float64, device=DEVICE).view(given["u"].shape)
    given = {"r": given["r"], "k": given["k"], "v": given["v"], "d": d, "base": base} | {
        name: x for name, x in given.items() if name in ("u", "initial_state", "cu_seqlens")}
    check_against_float64(wkv6_of, wkv6_of, of_decays, given, dtype, keep=["base", "u", "initial_state"],
                          factor=2.0 if dtype != torch.float32 else 4.0)
