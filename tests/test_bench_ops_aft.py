"""What AFT is compared with in `zoo bench ops`, and on which keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from zoo.bench import ops_aft
from zoo.bench.ops_cases import Case, build
from zoo.ops import aft

CPU = torch.device("cpu")


def test_learnt_keys() -> None:
    """As wide as those of the published weights of AFT, in units of log2; all else is as for fresh keys."""
    case = Case("aft_local_learnt", 16, 1024, 1, 256, 256, torch.float32)
    learnt, fresh = build(case, CPU).inputs, build(dataclasses.replace(case, op="aft_local"), CPU).inputs
    x = learnt["k"].detach() * 1.4427
    by_channel = x.std((0, 1))
    assert 3 < x.std() < 5
    assert 35 < x.max() < 70
    assert by_channel.min() < 2 < 8 < by_channel.max()
    assert all(torch.equal(learnt[name], fresh[name]) for name in ("q", "v", "bias"))


@pytest.mark.parametrize("T", [1, 15, 17, 100])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_the_safe_form_is_right_for_keys_of_any_size(T: int, scale: float) -> None:
    """And the plain ones, their exp out of range, are not."""
    case = Case("aft_full", 2, T, 1, 24, 24, torch.float32)
    inputs = {name: x * scale if name == "k" else x for name, x in build(case, CPU).inputs.items()}
    leaves = [x.detach().double().requires_grad_() for x in inputs.values()]
    given = [x.detach().float().requires_grad_() for x in leaves]
    got, want = ops_aft.safe_full(*given), aft.aft_full(*leaves)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    pairs = zip(torch.autograd.grad(got.sum(), given), torch.autograd.grad(want.sum(), leaves), strict=True)
    for g, w in pairs:
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-3 * float(w.abs().max()))
    if scale > 1 and T > 15:
        assert not ops_aft.simple(*given[:3]).isfinite().all()
        assert not ops_aft.full(*given).isfinite().all()
