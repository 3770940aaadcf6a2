"""Token ids from logits and random numbers: temperature, the likeliest k, nucleus, least share of the likeliest."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.ops.backend import Kernel

LARGEST = 512  # vocabulary, of which every token is compared with every other


def pick(logits: Tensor, draws: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0,
         min_p: float = 0.0) -> Tensor:
    """logits [B, V], draws [B] in [0, 1), temperature above 0 -> [B] int64; see `zoo.sampling.Sampling`.

    The inverse of the cumulative distribution over the tokens that are kept, in order of their logits. Vocabularies to
    `LARGEST` have a kernel, which adds the probabilities up in another order.
    """
    if logits.dtype == draws.dtype == torch.float32 and logits.shape[1] <= LARGEST and KERNEL.chosen(
            logits, logits.shape[1]):
        from zoo.kernels.sample import sample

        return sample(logits, draws, temperature, top_k, top_p, min_p)
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered, ids = ordered[:, :top_k], ids[:, :top_k]
    scaled = (ordered - ordered[:, :1]) / temperature
    total = scaled.softmax(-1).cumsum(-1)
    kept = 1 + (total[:, :-1] < top_p).sum(-1, keepdim=True)
    if min_p > 0:
        kept = kept.minimum((scaled.exp() >= min_p).sum(-1, keepdim=True))
    # The last token kept is where rounding could step over the end.
    at = draws.unsqueeze(-1) * total.gather(-1, kept - 1)
    choice = torch.searchsorted(total, at, right=True).minimum(kept - 1)
    return ids.gather(-1, choice).squeeze(-1)


def _self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """The share of rows whose token is another, in hundredths: sums in another order may step over a border."""
    from zoo.kernels.sample import sample

    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(500, sizes[0], generator=draw).mul(3).round(decimals=1).to(device)  # some of them equal
    draws = torch.rand(500, generator=draw).to(device)
    found = 0.0
    for how in ((1.0, None, 1.0, 0.0), (0.8, None, 0.95, 0.0), (1.5, min(40, sizes[0]), 0.9, 0.02), (0.3, 1, 1.0, 0.0)):
        ours, exact = sample(logits, draws, *how), pick(logits.double(), draws.double(), *how)
        found = max(found, float((ours != exact).double().mean()) / 0.01)
    return found


KERNEL = Kernel("sample", _self_test, most=LARGEST, dtypes=(torch.float32,), sized="vocabularies")
