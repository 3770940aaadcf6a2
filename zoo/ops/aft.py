"""Attention Free Transformer (2105.14103, equation 2), causal: a weighted mean of values per channel, and a gate.

    y_t = sigmoid(q_t) * sum_{s<=t} exp(k_s + w_ts) v_s / sum_{s<=t} exp(k_s + w_ts)

The variants differ in w alone. All are num_t / den_t, two sums of one kind kept as multiples of exp(m_t),
m_t = max_{s<=t} k_s per channel, which no later token moves. Rows meet keys in a binary tree: at level h the second h
rows of every 2h see all of the first h keys, so that with e = m at the last of those keys

    exp(k_s - m_t) = exp(k_s - e) exp(e - m_t),    both exponents <= 0,

and what remains is a small matrix product with exp(w_ts): no mask, no [T, T, D] tensor, every tile wholly in the past
of its rows. Biases enter as exp(w_ts - r_t), r_t the row's largest, and count as no less than r_t - 60, which keeps den
above 1e-27 wherever the largest key stands.

Ops take and return the caller's dtype and compute in float32 (float64 for float64). A state is updated by a function of
its own, so that training does not pay for one. With `cu_seqlens` [N + 1] (int32 or int64, on the device, ascending from
0 to T) N documents stand one after the other in a row, B = 1, and each begins anew: positions, and so rows and columns
of a bias table, count from its own first token. Documents are not continued: no `sums`, no `cache`. For whole sequences
and one bias for the batch this is the reference of the kernels that take its place, for simple after a state, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.ops.aft_conv_triton import CONV, conv
from zoo.ops.aft_simple_triton import SIMPLE, simple
from zoo.ops.aft_tree import causal_sums, mix, running_max
from zoo.ops.aft_triton import FULL, LOCAL, biased, local_in_row
from zoo.ops.documents import document_slices

EMPTY = -1e30  # the key of a token that is not there: weightless beside a real key, yet differences of it are finite
FLOOR = -60.0  # how far below the largest of its row a bias can count
BLOCK = 32  # tokens of a block where the window does not ask for more


class Sums(NamedTuple):
    """Tokens of which only sums are left: `num` of exp(k - max) v, `den` of exp(k - max)."""

    max: Tensor  # [B, D]; AFT-conv: [B, H]
    num: Tensor  # [B, D]; AFT-conv: [B, H, K]
    den: Tensor  # as max


class Cache(NamedTuple):
    """Earlier tokens one by one, oldest first; the key of a slot without a token is EMPTY."""

    keys: Tensor  # [B, S, D]; AFT-conv: [B, S, H]
    values: Tensor  # [B, S, D]; AFT-conv: [B, S, H, K]


def aft_simple(q: Tensor, k: Tensor, v: Tensor, sums: Sums | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """w_ts = 0 (equation 5). q, k, v [B, T, D] -> y [B, T, D]. `sums`: the tokens before."""
    if (sums is None or cu_seqlens is None) and SIMPLE.chosen(k):
        return simple(q, k, v, sums, cu_seqlens)
    if cu_seqlens is not None:
        return _by_document(cu_seqlens, sums, None, q, lambda i: aft_simple(q[:, i], k[:, i], v[:, i]))
    if not q.shape[1]:
        return q * v
    return _gate(q, _from_lanes(_windowed(_lanes, 2, k, v, None, sums, None), q))


def aft_local(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sums: Sums | None = None, cache: Cache | None = None,
              cu_seqlens: Tensor | None = None) -> Tensor:
    """w_ts = bias[t, t - s] where t - s < W, 0 further back, where tokens are still seen (equation 4).

    q, k, v [B, T, D]; bias [T, W], or [B, T, W] for rows at different positions -> y [B, T, D]. To continue, `cache`
    holds the W - 1 tokens before and `sums` all that are older.
    """
    if sums is None and cache is None and bias.ndim == 2 and LOCAL.chosen(k):
        return biased(q, k, v, bias, True, cu_seqlens)
    if cu_seqlens is not None:
        return _by_document(cu_seqlens, sums, cache, q, lambda i: aft_local(
            q[:, i], k[:, i], v[:, i], bias[..., : i.stop - i.start, :]))
    if not q.shape[1]:
        return q * v
    if bias.ndim == 2:
        return _gate(q, _from_lanes(_windowed(_lanes, 2, k, v, bias.unsqueeze(0), sums, cache), q))
    return _gate(q, _windowed(_rows, 2, k, v, bias, sums, cache).squeeze(2))


def aft_local_in_row(qkv: Tensor, bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """`aft_local` of q, k, v side by side in qkv [B, T, 3 D], as a projection gives them, under bias [T, W].

    The kernels write the three gradients to where they stand in that of qkv: nothing is put together afterwards.
    """
    if LOCAL.chosen(qkv):
        return local_in_row(qkv, bias, cu_seqlens)
    q, k, v = qkv.chunk(3, dim=-1)
    return aft_local(q, k, v, bias, cu_seqlens=cu_seqlens)


def aft_conv(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sums: Sums | None = None, cache: Cache | None = None,
             cu_seqlens: Tensor | None = None) -> Tensor:
    """w_ts = bias[h, t - s] where t - s < W, 0 further back; one key a head (equation 6, without its exp(w) - 1).

    q, v [B, T, H, K], k [B, T, H], bias [H, W] -> y [B, T, H, K]. `sums` and `cache` as for `aft_local`.
    """
    if sums is None and cache is None and CONV.chosen(v, bias.shape[1]):
        return conv(q, k, v, bias, cu_seqlens)
    if cu_seqlens is not None:
        return _by_document(cu_seqlens, sums, cache, q, lambda i: aft_conv(q[:, i], k[:, i], v[:, i], bias))
    if not q.shape[1]:
        return q * v
    bias = bias.unsqueeze(1).expand(-1, k.shape[1], -1)
    return _gate(q, _windowed(_heads, 3, k, v, bias, sums, cache).permute(2, 1, 0, 3))


def aft_full(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cache: Cache | None = None,
             cu_seqlens: Tensor | None = None) -> Tensor:
    """w_ts = bias[t, s]. q, k, v [B, T, D]; bias [T, S + T], or [B, T, S + T] for rows at different positions
    -> y [B, T, D]. Columns are the S tokens in `cache` (0 without one), then the new ones.
    """
    if cache is None and bias.ndim == 2 and FULL.chosen(k):
        return biased(q, k, v, bias, False, cu_seqlens)
    if cu_seqlens is not None:
        return _by_document(cu_seqlens, None, cache, q, lambda i: aft_full(
            q[:, i], k[:, i], v[:, i], bias[..., : i.stop - i.start, : i.stop - i.start]))
    if not q.shape[1]:
        return q * v
    length, lay = k.shape[1], _lanes if bias.ndim == 2 else _rows
    bias = _at_least_float32(bias if bias.ndim == 3 else bias.unsqueeze(0))
    before = bias.shape[2] - length
    future = torch.ones(bias.shape[1:], dtype=torch.bool, device=bias.device).triu(before + 1)
    weights = _weights(bias, bias.detach().masked_fill(future, -torch.inf).amax(-1, keepdim=True))
    past = None if cache is None else _Past(*_join(lay, 2, None, cache), weights[:, :, :before])
    size = _round_up(length, min(BLOCK, _power_of_two(length)))
    own = F.pad(weights[:, :, before:], (0, size - length, 0, size - length)).unsqueeze(1)
    mean = _mean(*_tokens(lay, 2, k, v), 2, size, own, None, None, past)
    return _gate(q, _from_lanes(mean, q) if lay is _lanes else mean.squeeze(2))


def absorb(sums: Sums, k: Tensor, v: Tensor) -> Sums:
    """`sums` with T more tokens: k [B, T, D], v [B, T, D]; AFT-conv: k [B, T, H], v [B, T, H, K]."""
    k, v = _at_least_float32(k), _at_least_float32(v)
    top = torch.maximum(sums.max, k.amax(1))
    decay, p = (sums.max - top).exp(), (k - top.unsqueeze(1)).exp()
    to = (..., None) if v.ndim > k.ndim else (...,)
    return Sums(top, sums.num * decay[to] + (p[to] * v).sum(1), sums.den * decay + p.sum(1))


def slide(sums: Sums, cache: Cache, k: Tensor, v: Tensor) -> tuple[Sums, Cache]:
    """The state of a window after T more tokens: as many as come into the cache leave it for the sums."""
    keys, values, length = torch.cat([cache.keys, k], 1), torch.cat([cache.values, v], 1), k.shape[1]
    return absorb(sums, keys[:, :length], values[:, :length]), Cache(keys[:, length:], values[:, length:])


def _by_document(cu_seqlens: Tensor, sums: Sums | None, cache: Cache | None, q: Tensor,
                 op: Callable[[slice], Tensor]) -> Tensor:
    """op of every document's place in the row, one after the other."""
    if sums is not None or cache is not None:
        raise ZooError("documents packed in a row start anew; allowed with cu_seqlens: no sums and no cache")
    return torch.cat([op(i) for i in document_slices(q, cu_seqlens)], 1)


# Inside, keys are [G, T, ...] and so are `columns`, the values with a one beside them, so that one sum gives num and
# den; keys broadcast against columns. G counts the distinct biases: what shares one lies side by side, in wide rows.

Layout = Callable[[Tensor], Tensor]


class _Past(NamedTuple):
    """What stands before the first row: S tokens, or sums in the place of a token."""

    keys: Tensor  # [G, S, ...]
    columns: Tensor  # [G, S, ...]
    weights: Tensor | None  # [G, T, S]; None: 1


def _lanes(x: Tensor) -> Tensor:
    """[B, T, D] -> [1, T, 1, B D]: one bias for the batch. Columns are stacked along axis 2."""
    return x.transpose(0, 1).flatten(1)[None, :, None]


def _from_lanes(x: Tensor, like: Tensor) -> Tensor:
    return x.view(like.shape[1], len(like), -1).transpose(0, 1)


def _rows(x: Tensor) -> Tensor:
    """[B, T, D] -> [B, T, 1, D]: a bias for every row of the batch. Columns are stacked along axis 2."""
    return x.unsqueeze(2)


def _heads(x: Tensor) -> Tensor:
    """[B, T, H, K] -> [H, T, B, K], [B, T, H] -> [H, T, B, 1]: a bias for every head. Columns lie along axis 3."""
    return (x.unsqueeze(-1) if x.ndim == 3 else x).permute(2, 1, 0, 3)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _tokens(lay: Layout, axis: int, k: Tensor, v: Tensor, den: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys and columns of tokens, a weight of one each unless `den` says otherwise."""
    k, v = _at_least_float32(lay(k)), _at_least_float32(lay(v))
    return k, torch.cat([v, torch.ones_like(k) if den is None else lay(den)], axis)


def _join(lay: Layout, axis: int, sums: Sums | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
    """Keys and columns of what came before: the sums, as if they were one token, then the cache."""
    parts = [] if sums is None else [_tokens(lay, axis, *(x.unsqueeze(1) for x in sums))]
    parts += [] if cache is None else [_tokens(lay, axis, *cache)]
    keys, columns = zip(*parts, strict=True)
    return torch.cat(keys, 1), torch.cat(columns, 1)


def _weights(bias: Tensor, largest: Tensor) -> Tensor:
    return (bias - largest).clamp(FLOOR, 0).exp()  # above 0 only a future token's, which no row reads


def _band(bias: Tensor, distance: Tensor) -> Tensor:
    """bias [G, T, W] at t - s = distance [T, S] -> [G, T, S], 0 outside the window."""
    window = bias.shape[-1]
    at = distance.clamp(0, window - 1).expand(bias.shape[0], -1, -1)
    return bias.gather(2, at).masked_fill((distance < 0) | (distance >= window), 0)


def _windowed(lay: Layout, axis: int, k: Tensor, v: Tensor, bias: Tensor | None, sums: Sums | None,
              cache: Cache | None) -> Tensor:
    """The mean under a bias [G, T, W] that is 0 from distance W on; None: 0 everywhere. In linear time."""
    length = k.shape[1]
    past = None if sums is None else _join(lay, axis, sums, cache)
    if bias is None:
        size = min(BLOCK, _power_of_two(length))
        return _mean(*_tokens(lay, axis, k, v), axis, size, None, None, None, past and _Past(*past, None))
    window = bias.shape[-1]
    size = min(max(BLOCK, _power_of_two(window - 1)), _power_of_two(length))  # so a window ends in the block before
    row = torch.arange(_round_up(length, size), device=k.device).unsqueeze(1)
    column = torch.arange(-size, size, device=k.device)
    bias = F.pad(_at_least_float32(bias), (0, 0, 0, len(row) - length))
    largest = bias.detach().amax(-1, keepdim=True).clamp(min=0)
    far = _weights(torch.zeros_like(largest), largest)
    near = _weights(_band(bias, row % size - column), largest)
    prev, own = near.unflatten(1, (-1, size)).split(size, -1)
    before = None
    if past is not None:
        slots = torch.arange(1 - past[0].shape[1], 0, device=k.device)
        cached = _weights(_band(bias, row - slots), largest)
        before = _Past(*past, torch.cat([far, cached], -1)[:, :length])
    far = far.unflatten(1, (-1, size))
    return _mean(*_tokens(lay, axis, k, v), axis, size, own, prev[:, 1:], far[:, 1:], before)


def _mean(k: Tensor, columns: Tensor, axis: int, size: int, own: Tensor | None, prev: Tensor | None,
          far: Tensor | None, past: _Past | None) -> Tensor:
    """num / den of all rows, for the tiles of `CausalSums` and what came before."""
    length = k.shape[1]
    if length % size:
        pad = (0, 0, 0, 0, 0, size - length % size)
        k, columns = F.pad(k, pad, value=EMPTY), F.pad(columns, pad)
    top = running_max(k, size & -size)  # the largest power of two in `size`
    with torch.autocast(k.device.type, enabled=False):
        if past is not None:
            end = past.keys.detach().amax(1, keepdim=True)
            top = torch.maximum(top, end)
        sums = causal_sums(k, columns, top, own, prev, far, size)[:, :length]
        if past is not None:
            z = past.columns * (past.keys - end).exp()
            weights = None if past.weights is None else past.weights.unsqueeze(1)
            sums = sums + mix(weights, z.unsqueeze(1)).squeeze(1) * (end - top[:, :length]).exp()
    num, den = sums.split([sums.shape[axis] - 1, 1], axis)
    return num / den


def _gate(q: Tensor, mean: Tensor) -> Tensor:
    return (_at_least_float32(q).sigmoid() * mean).to(q.dtype)
