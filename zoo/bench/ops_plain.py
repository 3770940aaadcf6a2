"""What `zoo bench ops` gives to PyTorch, eager and compiled, beside AFT (`ops_aft`): ops as their formulas say.

Sums and norms in float32, results in the inputs' dtype, as under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.bench.ops_cases import EPS
from zoo.ops.rotary import turn


def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def rotary_attention(qkv: Tensor, table: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, dim=2)
    q, k, v = (x.transpose(1, 2) for x in (turn(q, table), turn(k, table), v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    s = x + y
    return s, F.layer_norm(s, s.shape[-1:], weight, bias).to(y.dtype)


def norm_gate(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normed = F.layer_norm(y.float(), y.shape[-1:], eps=EPS).flatten(-2)
    return ((normed * weight + bias) * F.silu(gate.float())).to(y.dtype)


def _from_last(x: Tensor) -> Tensor:
    """The token before each, less the token."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1].float() - x.float()


def token_mix(x: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
    delta = _from_last(x)
    return tuple((x + delta * each).to(x.dtype) for each in mix.unbind(0))


def ddlerp(x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    delta = _from_last(x)
    low = torch.tanh((x + delta * base).to(x.dtype) @ down.to(x.dtype)).view(-1, *up.shape[:2])
    weights = torch.bmm(low.transpose(0, 1), up.to(x.dtype)).view(-1, *x.shape)
    return tuple((x + delta * (m + each)).to(x.dtype) for m, each in zip(mix, weights.unbind(0), strict=True))


def squared_relu(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    return F.linear(F.linear(x, inner.to(x.dtype)).relu().square(), outer.to(x.dtype))


def linears(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
            w3: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, w.to(x.dtype)) for x, w in ((x0, w0), (x1, w1), (x2, w2), (x3, w3)))
