"""Mixtures of a token with the one before it: RWKV's token shift, with weights that are learned (2305.13048, section
3.1), or learned and drawn from the data (2404.05892, section 4, eq. 4 and 5).

    token_mix:  y_z = x + (x' - x) mix_z
    ddlerp:     y_z = x + (x' - x) (mix_z + low_z up_z),    low = tanh((x + (x' - x) base) down)

x' is the token before. All mixtures read the same x, and products of rank 16 or 32 give their weights: this is memory
traffic and little else, hence one op for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.autocast import autocast
from zoo.ops.ddlerp_triton import KERNEL as DDLERP
from zoo.ops.ddlerp_triton import ddlerp_triton
from zoo.ops.token_mix_triton import KERNEL, token_mix_triton


def token_shift(x: Tensor, previous: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """x [B, T, D] moved one token later; `previous` [B, D] (zeros if None) stands before the first.

    With cu_seqlens [N + 1] (see `SequenceMixer.forward`) zeros stand before the first token of every document.
    """
    first = torch.zeros_like(x[:, :1]) if previous is None else previous.unsqueeze(1).to(x.dtype)
    shifted = torch.cat([first, x[:, :-1]], dim=1)
    if cu_seqlens is None:
        return shifted
    begins = torch.zeros(x.shape[1] + 1, dtype=torch.bool, device=x.device).index_fill(0, cu_seqlens.long(), True)
    return shifted.masked_fill(begins[:-1].unsqueeze(-1), 0)


def token_mix(x: Tensor, mix: Tensor, *, previous: Tensor | None = None,
              cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
    """x [B, T, D], mix [Z, D] -> Z mixtures [B, T, D]; previous and cu_seqlens as of `token_shift`.

    x is read in autocast's dtype where that is on. Kernels take Z to 5 and no `previous` (others, under any backend,
    are eager); they compute in float32.
    """
    x = autocast(x)
    if previous is None and len(mix) <= 5 and KERNEL.chosen(x, x.shape[-1]):
        return token_mix_triton(x, mix, cu_seqlens)
    delta = token_shift(x, previous, cu_seqlens) - x
    return tuple(torch.addcmul(x, delta, each) for each in mix.unbind(0))


def ddlerp(x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor, *, previous: Tensor | None = None,
           cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
    """x [B, T, D], base [D], down [D, Z R], mix [Z, D], up [Z, R, D] -> Z mixtures [B, T, D], the rest as `token_mix`.

    Kernels take Z = 5, R to 64 and no `previous`: others, under any backend, are eager.
    """
    x = autocast(x)
    fits = previous is None and len(mix) == 5 and up.shape[1] <= 64
    if fits and DDLERP.chosen(x, x.shape[-1], up.shape[1]):
        return ddlerp_triton(x, base, down, mix, up, cu_seqlens)
    delta = token_shift(x, previous, cu_seqlens) - x
    low = torch.tanh(torch.addcmul(x, delta, base) @ down).view(-1, *up.shape[:2])
    weights = torch.baddbmm(mix.unsqueeze(1), low.transpose(0, 1), up).view(-1, *x.shape)
    return tuple(torch.addcmul(x, delta, each) for each in weights.unbind(0))
