"""Causal linear attention, in chunks: masked scores inside a chunk, a running state between chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.documents import document_slices
from zoo.ops.linear_attention_triton import kernel, on_triton, product_type

CHUNK = 64  # tokens: inside a chunk the work per token grows with its size, the states' falls


def linear_attention(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None,
                     cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = q_t S_t with S_t = S_{t-1} + k_t^T v_t, that is y_t = sum_{s<=t} (q_t . k_s) v_s + q_t S_0; not normalised.

    q, k [B, T, H, K], v [B, T, H, V], initial_state S_0 [B, H, K, V] (zeros if None) -> (y [B, T, H, V] in v's dtype,
    S_T [B, H, K, V] float32). A column of ones in v adds up the weights (2006.16236 eq. 9-12).
    float64 inputs are computed in float64. With cu_seqlens [N + 1] (int32 or int64, on the device), N documents stand
    one after the other in a row, B = 1, and states are [N, H, K, V], one a document; an empty document passes its on.

    K and V to 256 have Triton kernels. Their products take the inputs' 16-bit type if one of them has one (as autocast
    would), and sums are float32; the eager path computes in float32 throughout. Scores of fp16 inputs are fp16 there.
    """
    if kernel.chosen(product_type(q, k, v), q.shape[-1], v.shape[-1]):
        return on_triton(q, k, v, initial_state, cu_seqlens)
    return eager(q, k, v, initial_state, cu_seqlens)


def eager(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None,
          cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """linear_attention in PyTorch."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    if initial_state is None:
        rows = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = q.new_zeros(rows, *q.shape[2:], v.shape[-1], dtype=dtype)
    state = initial_state.to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens is None:
            return _chunked(q, k, v, state)
        documents = [_chunked(q[:, i], k[:, i], v[:, i], state[n : n + 1])
                     for n, i in enumerate(document_slices(q, cu_seqlens))]
    y, states = zip(*documents, strict=True)
    return torch.cat(y, dim=1), torch.cat(states)


def _chunked(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """linear_attention of a batch, in the state's type."""
    T = q.shape[1]
    if T == 0:
        return torch.empty_like(v), state.clone()
    q, k, values = (_chunks(x.to(state.dtype), min(CHUNK, T)) for x in (q, k, v))
    added = k.mT @ values  # [B, H, N, K, V]
    states = torch.cat([state.unsqueeze(2), added], dim=2).cumsum(dim=2)  # before each chunk, and after the last
    y = (q @ k.mT).tril() @ values + q @ states[:, :, :-1]
    return y.flatten(2, 3)[:, :, :T].transpose(1, 2).to(v.dtype), states[:, :, -1]


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, H, K] -> [B, H, N, size, K]; zeros after the end, which add nothing to a state."""
    x = x.transpose(1, 2)
    if missing := -x.shape[2] % size:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, size)).contiguous()
