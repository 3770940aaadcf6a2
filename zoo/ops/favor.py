"""FAVOR+: softmax attention in linear time by positive orthogonal random features (Performer, 2009.14794)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.favor_triton import kernel, on_triton
from zoo.ops.linear_attention import eager
from zoo.ops.linear_attention_triton import product_type

EPS = 1e-30  # far below the normaliser of keys that attention can see, and 1 / EPS leaves gradients room in float32


def orthogonal_projection(features: int, dim: int, generator: torch.Generator) -> Tensor:
    """W [features, dim] float32: each row N(0, I), the rows of every block of `dim` exactly orthogonal (section 2.4).

    Directions are rows of Haar-distributed orthogonal matrices; lengths are drawn apart from them, from chi(dim).
    """
    blocks = -(-features // dim)
    q, r = torch.linalg.qr(torch.randn(blocks, dim, dim, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # the one Q whose R has a positive diagonal is Haar
    lengths = torch.randn(features, dim, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return (q.mT.flatten(0, 1)[:features] * lengths).float()


def favor_features(q: Tensor, k: Tensor, projection: Tensor,
                   max_key_norm: float | None = None) -> tuple[Tensor, Tensor]:
    """Positive features whose dot products estimate exp(q . k) (2009.14794 eq. 5), up to a factor of each query's own.

    phi(x)_j = exp(w_j . x - |x|^2 / 2), and E_w[phi(q)_j phi(k)_j] = exp(q . k). To exponentiate nothing above 0, with
    no look at any other token, key features are divided by the largest value that a key can give them. Over all keys
    that is exp(|w_j|^2 / 2), which completes the square to phi(k)_j = exp(-|w_j - k|^2 / 2); over keys no longer than R
    it is the value at k = R w_j / |w_j|, which keeps wide heads clear of underflow. The query's features are multiplied
    by it, and divided by their sum over j, which attention's normaliser cancels: they are a softmax over the features.

    q, k [..., K], projection W [m, K], max_key_norm R (a longer key is still right, its exponent above 0)
    -> phi_q, phi_k [..., m] float32.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, w = q.to(dtype), k.to(dtype), projection.to(dtype)
        length = w.norm(dim=-1)
        reach = length if max_key_norm is None else length.clamp(max=max_key_norm)
        largest = length * reach - reach.square() / 2  # of w_j . k - |k|^2 / 2
        phi_q = F.linear(q, w, largest).softmax(dim=-1)
        phi_k = (F.linear(k, w, -largest) - k.square().sum(-1, keepdim=True) / 2).exp()
    return phi_q, phi_k


def favor_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, initial_state: Tensor | None = None,
                    max_key_norm: float | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = sum_{s<=t} A_ts v_s / sum_{s<=t} A_ts with A_ts = phi(q_t) . phi(k_s), about exp(q_t . k_s) (section 2.3).

    q, k [B, T, H, K] with whatever scale attention has already in them (K^(-1/4) each), v [B, T, H, V], projection
    [m, K], max_key_norm: see `favor_features`. The state [B, H, m, V+1] float32 is sum_s phi(k_s)^T [v_s, 1], zeros if
    None. -> (y [B, T, H, V] in v's dtype, final state).

    Keys so long, or so far from every row of W, that all their features underflow have no weight; where that is so of
    every key up to t, y_t = 0.

    With cu_seqlens [N + 1] (int32 or int64, on the device), N documents stand one after the other in a row, B = 1, and
    states are [N, H, m, V+1], one a document; an empty document passes its on.

    Triton kernels take sizes to 1024 each, and projections that are not trained. Products take bf16 if q, k or v has
    it, TF32 for fp16, which could not hold the features, else float32; exponents of 16-bit inputs are products of fp16
    numbers of 11 bits (of elements to 65504, beyond which they count as that); sums are float32. The eager path
    computes in float32 throughout.
    """
    trained = projection.requires_grad and torch.is_grad_enabled()
    sizes = q.shape[-1], v.shape[-1], len(projection)
    if not trained and kernel.chosen(product_type(q, k, v), *sizes):
        return on_triton(q, k, v, projection, initial_state, max_key_norm, cu_seqlens)
    phi_q, phi_k = favor_features(q.transpose(1, 2), k.transpose(1, 2), projection, max_key_norm)
    values = F.pad(v.to(phi_k.dtype), (0, 1), value=1.0)
    y, state = eager(phi_q.transpose(1, 2), phi_k.transpose(1, 2), values, initial_state, cu_seqlens)
    return (y[..., :-1] / (y[..., -1:] + EPS)).to(v.dtype), state
