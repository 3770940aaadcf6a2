"""The linear head with cross-entropy, whole and in chunks, against PyTorch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.errors import ZooError
from zoo.ops import cross_entropy
from zoo.ops.cross_entropy import linear_cross_entropy

WHOLE, CHUNKED = 1 << 24, 7 * 50  # at 50 classes, seven tokens at a time


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = torch.randn(3, 20, 16, dtype=dtype), torch.randn(50, 16, dtype=dtype)
    targets = torch.randint(50, (3, 20))
    targets[0, 3:9], targets[2] = -100, -100
    return x.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("limit", [WHOLE, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_are_those_of_torch(limit: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", limit)
    x, weight, targets = inputs()
    a, b = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
    expected = F.cross_entropy((a @ b.mT).flatten(0, 1), targets.flatten(), reduction=reduction)
    assert loss.dtype == torch.float32
    assert loss.shape == (targets.shape if reduction == "none" else ())
    torch.testing.assert_close(loss.double(), expected.view(loss.shape), rtol=1e-5, atol=1e-5)
    dy = torch.randn(loss.shape)
    got = torch.autograd.grad(loss, (x, weight), dy)
    want = torch.autograd.grad(expected, (a, b), dy.double().view(expected.shape))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def test_chunks_pass_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 3 * 5)
    x, weight = (torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True) for shape in ((2, 4), (5,)))
    targets = torch.tensor([[0, 4, -1, 2], [1, -1, 3, 3]])
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, targets, ignore_index=-1), (x, weight))


@pytest.mark.parametrize("limit", [WHOLE, CHUNKED], ids=["whole", "chunked"])
def test_nothing_to_predict_is_a_loss_of_zero(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not 0 / 0: a batch of padding must not make the weights NaN."""
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", limit)
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert weight.grad is not None
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("limit", [WHOLE, CHUNKED], ids=["whole", "chunked"])
def test_bf16_sums_in_float32(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", limit)
    x, weight, targets = inputs(torch.bfloat16)
    loss = linear_cross_entropy(x, weight, targets)
    logits = (x.double() @ weight.double().mT).flatten(0, 1)
    assert loss.dtype == torch.float32
    assert (loss - F.cross_entropy(logits, targets.flatten())).abs() < 0.01  # of 6 nats: the rounding of single logits


def checkpointed(x: Tensor, weight: Tensor, targets: Tensor, size: int) -> Tensor:
    """The usual way to chunk, whose head gradient autograd adds up in the dtype that autocast gave the weight."""
    def part(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(a, weight).float(), b, reduction="sum")
    chunks = zip(x.split(size), targets.split(size), strict=True)
    return torch.stack([checkpoint(part, a, b, use_reentrant=False) for a, b in chunks]).sum()


def test_head_gradient_of_many_chunks_adds_up_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", 2 * 32)
    x, weight = torch.randn(1024, 16) + 1, torch.randn(32, 16).requires_grad_()
    targets = torch.randint(32, (1024,))
    exact = weight.detach().bfloat16().double().requires_grad_()
    F.cross_entropy(x.bfloat16().double() @ exact.mT, targets, reduction="sum").backward()

    def error(loss: Tensor) -> float:
        (grad,) = torch.autograd.grad(loss, weight)
        assert grad.dtype == torch.float32
        return (grad - exact.grad).norm().item()

    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, targets, reduction="sum")
        mutant = checkpointed(x, weight, targets, size=2)
    assert error(ours) < 0.2 * error(mutant)


def test_chunks_keep_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", CHUNKED)
    x, weight, targets = inputs()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(x, weight, targets).backward()
    assert max(kept) <= max(x.numel(), weight.numel())


def test_unknown_reduction_says_what_is_allowed() -> None:
    with pytest.raises(ZooError, match="mean, none, sum"):
        linear_cross_entropy(*inputs(), reduction="total")


@pytest.mark.parametrize("limit", [WHOLE, CHUNKED], ids=["whole", "chunked"])
def test_z_loss_is_added_to_counted_tokens(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MAX_LOGITS", limit)
    x, weight, targets = inputs(torch.float64)
    loss = linear_cross_entropy(x, weight, targets, reduction="sum", z_loss=0.1)
    lse = (x @ weight.mT).logsumexp(-1)
    expected = linear_cross_entropy(x, weight, targets, reduction="sum") + 0.1 * lse[targets != -100].square().sum()
    torch.testing.assert_close(loss, expected)
    got, want = (torch.autograd.grad(each, (x, weight)) for each in (loss, expected))
    torch.testing.assert_close(got, want)
