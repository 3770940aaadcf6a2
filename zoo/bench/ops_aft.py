"""AFT as `zoo bench ops` compares with it: the plain formulas, and forms in PyTorch that are as safe as the zoo's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEARNT = 2.3  # median over channels of a learnt key's standard deviation: 3.3 in units of log2
SPREAD = 0.3  # standard deviation over a layer's channels of its logarithm
BLOCK = 16  # tokens whose pairs are summed one by one; larger squares are matrix products
FLOOR = -60.0  # how far below the largest of its row a bias can count, as in the zoo's op


def learnt(k: Tensor) -> Tensor:
    """Keys [B, T, C] spread as a trained model's are, from standard normal ones.

    As counted from `aft.novels-6m` over 16 windows of text, in units of log2: within a channel they are normal (a
    kurtosis of 3.0 to 3.3 in seven layers of eight); standard deviations of channels are 1 to 12 with a median of 3.4,
    and the largest key of a layer is 25 to 69, at most 71 above the first of its row.
    """
    generator = torch.Generator().manual_seed(0)
    by_channel = torch.randn(k.shape[-1], generator=generator).mul(SPREAD).exp()
    return k * (LEARNT * by_channel).to(k)


def full(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Equation 2 of 2105.14103 as it is written, without a maximum: right only while exp(k) and exp(w) are in range."""
    future = torch.ones(bias.shape, dtype=torch.bool, device=bias.device).triu(1)
    weights, p = bias.masked_fill(future, -torch.inf).exp().to(v.dtype), k.exp()
    return q.sigmoid() * ((weights @ (p * v)) / (weights @ p))


def simple(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """w = 0, without a maximum: right only while exp(k) and its sum over the sequence are in range."""
    p = k.float().exp()
    return (q.float().sigmoid() * (p * v).cumsum(1) / p.cumsum(1)).to(q.dtype)


def safe_full(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Equation 2 for keys of any size, sums as multiples of exp of each token's own running maximum m.

    Pairs inside BLOCK tokens one by one; then, at h = BLOCK, 2 BLOCK, ..., the second h rows of every 2h with the first
    h keys, exp(k_s - m_t) = exp(k_s - e) exp(e - m_t), e = m at the last of these keys: one product for num and den.
    """
    T = k.shape[1]
    size = max(BLOCK, 1 << (T - 1).bit_length())
    k, v = (F.pad(x, (0, 0, 0, size - T)) for x in (k, v))
    w = F.pad(bias.float(), (0, size - T, 0, size - T))
    m = k.detach().float().cummax(1).values
    past = torch.ones(size, size, dtype=torch.bool, device=w.device).tril()
    w = (w - w.detach().masked_fill(~past, -torch.inf).amax(1, keepdim=True)).clamp(min=FLOOR)

    def blocks(x: Tensor, h: int) -> Tensor:
        return x.unflatten(1, (-1, h))

    def squares(h: int) -> Tensor:
        """w on the diagonal, [size / h, h, h]."""
        return w.view(size // h, h, size // h, h).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    keys, values, tops = (blocks(x.float(), BLOCK) for x in (k, v, m))
    own = squares(BLOCK).unsqueeze(-1)  # [n, t, s, 1]
    seen = past[:BLOCK, :BLOCK].unsqueeze(-1)
    p = (own + (keys.unsqueeze(2) - tops.unsqueeze(3)).masked_fill(~seen, -torch.inf)).exp()  # [B, n, t, s, C]
    num, den = (p * values.unsqueeze(2)).sum(3).flatten(1, 2), p.sum(3).flatten(1, 2)
    h = BLOCK
    while h < size:
        first, second = slice(0, size, 2), slice(1, size, 2)
        a = squares(2 * h)[:, h:, :h].exp().to(v.dtype)  # [n, t, s]
        end = blocks(m, h)[:, first, -1:]
        p = (blocks(k, h)[:, first] - end).exp()
        sums = a @ torch.cat([p * blocks(v, h)[:, first], p], -1).to(v.dtype)
        sums = sums * torch.cat([(end - blocks(m, h)[:, second]).exp()] * 2, -1)
        add_num, add_den = (F.pad(x.unsqueeze(2), (0, 0, 0, 0, 1, 0)).flatten(1, 3) for x in sums.chunk(2, -1))
        num, den, h = num + add_num, den + add_den, 2 * h
    return (q.float().sigmoid() * (num / den)[:, :T]).to(q.dtype)
