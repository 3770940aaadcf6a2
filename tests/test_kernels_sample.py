"""Drawing tokens in one launch, against sorting in PyTorch."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import interpreted, nan_memory

from zoo.kernels.sample import sample
from zoo.ops import sample as op
from zoo.ops.backend import decisions, forget_decisions, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = [(1.0, None, 1.0, 0.0), (0.8, None, 0.95, 0.0), (1.5, 4, 0.9, 0.02), (0.3, 1, 1.0, 0.0), (1e-30, None, 1.0, 0.0),
        (1.0, None, 1e-9, 0.0), (2.0, None, 1.0, 0.3)]


@pytest.mark.parametrize("vocabulary", [5, 64, pytest.param(257, marks=pytest.mark.gpu),
                                        pytest.param(512, marks=pytest.mark.gpu)])
def test_it_is_the_token_that_sorting_finds(vocabulary: int) -> None:
    """Equal logits, tokens without weight, one token that is all there is; a row's token is its own."""
    rows = 300 if DEVICE == "cuda" else 20
    logits = torch.randn(rows, vocabulary).mul(3).round(decimals=1).to(DEVICE)
    logits[0, :3], logits[1, 1:] = -torch.inf, -torch.inf
    draws = torch.rand(rows, device=DEVICE)
    draws[2], draws[3] = 0.0, 1 - 2**-24
    for how in WAYS:
        with nan_memory():
            ours = sample(logits, draws, *how)
            alone = sample(logits[7:8], draws[7:8], *how)
        with use_backend("eager"):
            exact = op.pick(logits.double(), draws.double(), *how)
        assert int((ours != exact).sum()) <= rows // 200, how  # sums in another order may step over a border
        assert alone[0] == ours[7]
        assert ours[1] == 0


@interpreted
def test_the_op_takes_it_for_small_vocabularies() -> None:
    forget_decisions()
    with use_backend("triton"):
        small = op.pick(torch.randn(2, 16), torch.rand(2), 1.0)
        large = op.pick(torch.randn(2, 513), torch.rand(2), 1.0)
    assert small.shape == large.shape == (2,)
    assert decisions() == ["sample cpu float32 16: triton"]


def builds() -> None:
    """Bytes, for `kernel_builds.py`."""
    sample(torch.empty(1, 256), torch.empty(1), 1.0, None, 0.95, 0.0)
