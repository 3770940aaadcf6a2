"""FAVOR+: softmax attention in linear time by positive orthogonal random features (Performer, 2009.14794)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.documents import document_slices
from zoo.ops.favor_triton import kernel, on_triton
from zoo.ops.linear_attention import CHUNK, eager
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


def orbit_frequencies(dim: int, dtype: torch.dtype = torch.float32,
                      device: torch.device | str | None = None) -> Tensor:
    """[dim // 2]: pi (2 i + 1) / (2 (dim // 2)), rotary frequencies of a period of 4 (dim // 2) tokens.

    A rotation by them permutes the rows of an `orbit_projection`.
    """
    half = dim // 2
    return torch.pi * (2 * torch.arange(half, dtype=dtype, device=device) + 1) / (2 * half)


def orbit_projection(features: int, dim: int, generator: torch.Generator) -> Tensor:
    """W [features, dim] float32 in orbits of a rotation: row 0 turned by t `orbit_frequencies`, t = 0, ..., 2 dim - 1.

    Row 0 has length sqrt(2) in each of its planes (i, i + dim / 2), at an angle drawn uniformly. So the first dim rows
    are exactly orthogonal, of length sqrt(dim), and the others their negatives: the regularised and the hyperbolic
    features of 2009.14794 (theorem 1, lemma 1), orthogonal as in its section 2.4.

    A sum over an orbit of f(w . R^t q) g(w . R^s k) is a function of t - s, whatever f and g are: of relative positions
    the estimate of attention is relative itself. That of independent rows is a function of t and s: what two tokens see
    of each other changes from place to place by as much as the estimate is wrong.

    An odd channel at the end, which is not turned, is normal. Fewer rows than an orbit, or a part of one, are no orbit.
    """
    half = dim // 2
    size = max(1, 4 * half)
    count = -(-features // size)
    angle = 2 * torch.pi * torch.rand(count, 1, half, generator=generator, dtype=torch.float64)
    angle = angle + torch.arange(size, dtype=torch.float64)[:, None] * orbit_frequencies(dim, torch.float64)
    last = torch.randn(count, size, dim % 2, generator=generator, dtype=torch.float64)
    return torch.cat([2**0.5 * angle.cos(), 2**0.5 * angle.sin(), last], dim=-1).flatten(0, 1)[:features].float()


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
                    max_key_norm: float | None = None, cu_seqlens: Tensor | None = None,
                    decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = sum_{s<=t} A_ts v_s / sum_{s<=t} A_ts, A_ts = 2^{-r(t-s)} phi(q_t) . phi(k_s), about 2^{-r(t-s)} e^{q . k}.

    Section 2.3 with a relative position bias b_{t-s} = -r (t - s) ln 2: 2106.12566 has any, this one leaves a running
    sum, S_t = 2^-r S_{t-1} + phi(k_t)^T [v_t, 1]. decay: the rate r >= 0 of each head [H], 1 / (tokens to one half);
    not trained; 0 if None.

    q, k [B, T, H, K] with whatever scale attention has already in them (K^(-1/4) each), v [B, T, H, V], projection
    [m, K], max_key_norm: see `favor_features`. The state [B, H, m, V+1] float32 is S after the last token, zeros before
    the first if None. -> (y [B, T, H, V] in v's dtype, final state).

    Keys so long, or so far from every row of W, that all their features underflow have no weight; where that is so of
    every key up to t, y_t = 0.

    With cu_seqlens [N + 1] (int32 or int64, on the device), N documents stand one after the other in a row, B = 1, and
    states are [N, H, m, V+1], one a document; an empty document passes its on.

    Triton kernels take sizes to 1024 each, and projections that are not trained. Products take bf16 if q, k or v has
    it, TF32 for fp16, which could not hold the features, else float32; exponents of 16-bit inputs are products of fp16
    numbers of 11 bits (of elements to 65504, beyond which they count as that); sums are float32. The eager path
    computes in float32 throughout. In the kernels rates to 1 are right.
    """
    trained = projection.requires_grad and torch.is_grad_enabled()
    sizes = q.shape[-1], v.shape[-1], len(projection)
    if not trained and kernel.chosen(product_type(q, k, v), *sizes):
        return on_triton(q, k, v, projection, decay, initial_state, max_key_norm, cu_seqlens)
    phi_q, phi_k = favor_features(q.transpose(1, 2), k.transpose(1, 2), projection, max_key_norm)
    values = F.pad(v.to(phi_k.dtype), (0, 1), value=1.0)
    phi_q, phi_k = phi_q.transpose(1, 2), phi_k.transpose(1, 2)
    if decay is None:
        y, state = eager(phi_q, phi_k, values, initial_state, cu_seqlens)
    else:
        y, state = _fading(phi_q, phi_k, values, initial_state, cu_seqlens, decay)
    return (y[..., :-1] / (y[..., -1:] + EPS)).to(v.dtype), state


def _fading(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None,
            decay: Tensor) -> tuple[Tensor, Tensor]:
    """Linear attention (see `eager`) to what is left of the past, all in v's type: exponents are never above 0."""
    if cu_seqlens is not None:
        slices = document_slices(q, cu_seqlens)
        parts = [_fading(q[:, i], k[:, i], v[:, i], None if state is None else state[n : n + 1], None, decay)
                 for n, i in enumerate(slices)]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([last for _, last in parts])
    B, _, H, m = q.shape
    with torch.autocast(q.device.type, enabled=False):
        state = q.new_zeros(B, H, m, v.shape[-1]) if state is None else state.to(v.dtype)
        rate, y = decay.to(v.dtype)[:, None, None], []
        for q_, k_, v_ in zip(*(x.transpose(1, 2).split(CHUNK, dim=2) for x in (q, k, v)), strict=True):
            t = torch.arange(q_.shape[2], device=q.device)
            scores = q_ @ k_.mT * torch.exp2(-rate * (t[:, None] - t).clamp(min=0)).tril()
            left = torch.exp2(-rate * (t[:, None] + 1))  # of what was before the chunk
            y.append(scores @ v_ + left * q_ @ state)
            state = torch.exp2(-rate * len(t)) * state + (k_ * torch.exp2(-rate * t.flip(0)[:, None])).mT @ v_
    return torch.cat(y, dim=2).transpose(1, 2), state
