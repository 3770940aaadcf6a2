"""The AFT mixer: the paper's equations, parameters and initialisation; its states at different positions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.errors import ZooError
from zoo.mixers.aft import AFT, Conv, Full, Local
from zoo.sizing import SIZES, TOLERANCE, model_config

VARIANTS = ("local", "full", "simple", "conv")
DIM, HEADS, LENGTH = 24, 3, 48


def mixer(variant: str, window: int = 8, seq_len: int = LENGTH) -> AFT:
    """One whose biases matter."""
    torch.manual_seed(0)
    made = AFT(DIM, HEADS, seq_len, variant=variant, window=window, rank=4)  # type: ignore[arg-type]
    made.reset_parameters(0, 2)
    with torch.no_grad():
        for p in made.variant.parameters():
            p.copy_(torch.randn_like(p))
    return made


def paper_bias(made: AFT, length: int) -> Tensor:
    """w [T, T, D] by the paper's section 3.2, entry by entry."""
    variant = made.variant
    w = torch.zeros(length, length, DIM, dtype=torch.float64)
    for t in range(length):
        for s in range(t + 1):
            if isinstance(variant, Full) or (isinstance(variant, Local) and t - s < variant.window):
                w[t, s] = variant.row[t].double() @ variant.column[s].double()
            elif isinstance(variant, Conv) and t - s < variant.window:
                raw = variant.weight.double()
                scaled = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True, correction=0)
                per_head = variant.gain.double() * scaled + variant.offset.double()
                w[t, s] = per_head[:, t - s].repeat_interleave(DIM // HEADS)
    return w


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_is_the_papers(variant: str) -> None:
    made, x = mixer(variant), torch.randn(2, LENGTH, DIM)
    with torch.no_grad():
        q, k, v = F.linear(x, made.qkv.weight).double().split([DIM, made.variant.key_dim, DIM], -1)
        k = k.repeat_interleave(DIM // made.variant.key_dim, -1)
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).unsqueeze(-1)
        p = (k.unsqueeze(1) + paper_bias(made, LENGTH)).masked_fill(future, -torch.inf).softmax(2)
        y = F.linear(q.sigmoid() * (p * v.unsqueeze(1)).sum(2), made.out.weight.double())
        torch.testing.assert_close(made(x).double(), y, atol=1e-5, rtol=1e-5)


def test_local_with_the_widest_window_is_full() -> None:
    local, full = mixer("local", window=1000), mixer("full")
    full.load_state_dict(local.state_dict())
    x = torch.randn(2, LENGTH, DIM)
    torch.testing.assert_close(local(x), full(x))


@pytest.mark.parametrize("window", [1, 2, 7, 32])
@pytest.mark.parametrize("length", [1, 6, 33, 48])
def test_band_is_the_product_of_its_factors(window: int, length: int) -> None:
    local = mixer("local", window).variant
    assert isinstance(local, Local)
    band, w = local.band(length), local.row @ local.column.T
    rows = local.band_at(torch.arange(length).unsqueeze(0))[0]
    for t in range(length):
        for j in range(window):
            expected = w[t, t - j] if j <= t else torch.tensor(0.0)
            torch.testing.assert_close(band[t, j], expected)
            if j <= t:
                torch.testing.assert_close(rows[t, j], expected)


@pytest.mark.parametrize("variant", ["local", "full"])
def test_autocast_does_not_round_the_biases(variant: str) -> None:
    made = mixer(variant)
    q, k, v = torch.randn(3, 2, LENGTH, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        under = made.variant(q, k, v)
    assert torch.equal(under, made.variant(q, k, v))


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialisation(variant: str) -> None:
    torch.manual_seed(0)
    made = AFT(256, 4, 512, variant=variant)  # type: ignore[arg-type]
    made.reset_parameters(layer_idx=1, num_layers=8)
    small = math.sqrt(2 / (5 * 256))
    assert made.qkv.weight.std().item() == pytest.approx(small, rel=0.02)
    assert made.out.weight.std().item() == pytest.approx(small / 4, rel=0.02)
    variant_parameters = dict(made.variant.named_parameters())
    if variant in ("local", "full"):
        for factor in variant_parameters.values():  # N(0, 10^-2), section 5.1
            assert factor.std().item() == pytest.approx(0.1, rel=0.02)
            assert abs(factor.mean().item()) < 0.002
    if variant == "conv":
        assert not variant_parameters["gain"].any()
        assert not variant_parameters["offset"].any()
        assert variant_parameters["weight"].std() > 0
        simple = AFT(256, 4, 512, variant="simple")
        with torch.no_grad():  # a bias of 0 at first, so AFT-simple with the heads' keys
            q, k, v = made.qkv.weight.split([256, 4, 256])
            simple.qkv.weight.copy_(torch.cat([q, k.repeat_interleave(64, 0), v]))
            simple.out.weight.copy_(made.out.weight)
        x = torch.randn(1, 70, 256)
        torch.testing.assert_close(made(x), simple(x), atol=1e-6, rtol=1e-4)
    assert made.no_weight_decay() == {f"variant.{name}" for name in variant_parameters}
    assert made.no_weight_decay() <= {name for name, _ in made.named_parameters()}


@pytest.mark.parametrize("variant", ["local", "full", "conv"])
def test_every_bias_trains(variant: str) -> None:
    torch.manual_seed(0)
    model = zoo.create_model("aft", "nano", seq_len=64, variant=variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    biases = {n: p for n, p in model.named_parameters() if ".variant." in n}
    before = {n: p.detach().clone() for n, p in biases.items()}
    tokens = torch.randint(256, (4, 65))
    for _ in range(3):  # the gain of conv starts at 0, and passes a gradient to the weight from the second step on
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    assert len(biases) == 4 * (3 if variant == "conv" else 2)
    for name, p in biases.items():
        rows = p.grad.abs().sum(-1)
        assert (rows[name.endswith(".row") :] > 0).all(), name  # the first row sees itself alone, whatever its bias
        assert (p - before[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_at_different_positions(variant: str) -> None:
    made, x = mixer(variant), torch.randn(3, LENGTH, DIM)
    with torch.no_grad():
        whole, starts = made(x), [2, 21, 9]
        states = [made.extend(x[b : b + 1, :n], made.init_state(1, LENGTH))[1] for b, n in enumerate(starts)]
        state = {name: torch.cat([s[name] for s in states]) for name in states[0]}
        for length in (1, 3, 1, 20):
            y, state = made.extend(torch.stack([x[b, n : n + length] for b, n in enumerate(starts)]), state)
            for b, n in enumerate(starts):
                torch.testing.assert_close(y[b], whole[b, n : n + length], atol=1e-5, rtol=1e-5)
            starts = [n + length for n in starts]


def test_the_cache_of_full_grows() -> None:
    made, x = mixer("full"), torch.randn(2, LENGTH, DIM)
    state = made.init_state(2, max_len=3)
    with torch.no_grad():
        pieces = []
        for piece in x.split([2, 1, 1, 20, 24], 1):
            y, state = made.extend(piece, state)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), made(x), atol=1e-5, rtol=1e-5)
    assert state["keys"].shape[1] >= LENGTH


@pytest.mark.parametrize("variant", ["local", "simple", "conv"])
def test_the_state_does_not_grow(variant: str) -> None:
    made = mixer(variant)
    state = made.init_state(2, max_len=4)
    _, later = made.extend(torch.randn(2, 40, DIM), state)
    assert {n: (x.shape, x.dtype) for n, x in later.items()} == {n: (x.shape, x.dtype) for n, x in state.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_state(variant: str) -> None:
    made, x = mixer(variant), torch.randn(2, 30, DIM)
    for dtype in (torch.bfloat16, torch.float16):
        state = made.init_state(2, 30, dtype=dtype)
        with torch.no_grad():
            first, state = made.extend(x[:, :20], state)
            second, state = made.extend(x[:, 20:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), made(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("size", "seq_len"), [("nano", 256), *((size, 1024) for size in SIZES)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_meets_the_budget(variant: str, size: str, seq_len: int) -> None:
    config = model_config("aft", size, 256, seq_len, variant=variant)
    with torch.device("meta"):
        count = zoo.model.LanguageModel(config).num_parameters()
    assert abs(count / SIZES[size].budget(256) - 1) <= TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_of_the_products(variant: str) -> None:
    made = AFT(64, 4, 256, variant=variant)  # type: ignore[arg-type]
    made.reset_parameters(0, 2)
    projections = 2 * 256 * (made.qkv.weight.numel() + made.out.weight.numel())
    assert made.flops(256) - projections == 4 * made.variant.pairs(256) * 64
    with FlopCounterMode(display=False) as counter:
        made(torch.randn(1, 256, 64))
    mixing = counter.get_total_flops() - projections
    if variant == "simple":
        assert mixing == 0  # sums, no products
    else:  # whole tiles, and the factors' own product, are above the count of pairs
        assert 0.5 * (made.flops(256) - projections) < mixing < 4 * (made.flops(256) - projections)


@pytest.mark.parametrize(("dim", "seq_len", "rank"),
                         [(128, 256, 128), (128, 1024, 32), (768, 1024, 128), (16, 4096, 1)])
def test_the_default_rank_leaves_room(dim: int, seq_len: int, rank: int) -> None:
    with torch.device("meta"):
        made = AFT(dim, 1, seq_len)
    assert made.state_dict()["variant.row"].shape == (seq_len, rank)


def test_limits_and_refusals() -> None:
    assert [AFT(24, 3, 48, variant=v).max_len for v in VARIANTS] == [48, 48, None, None]  # type: ignore[arg-type]
    for wrong in ({"variant": "banded"}, {"window": 0}, {"rank": 1.5}, {"window": True}):
        with pytest.raises(ZooError, match=r"unknown aft variant|is not a positive whole number"):
            AFT(24, 3, 48, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ZooError, match="does not divide"):
        AFT(24, 5, 48, variant="conv")
