"""Rotary positions, the token shift, growing caches, the MLP and the initialisation that mixers share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.layers import SwiGLU, enlarged, head_dim, rotary, small_init_, token_positions
from zoo.ops.token_mix import token_shift


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE by its definition in float64: (x_i + j x_{i + K/2}) e^{j p 10000^(-2i/K)}."""
    half = x.shape[-1] // 2
    phase = positions.double()[..., None, None] * 10_000.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(*x.double().split(half, dim=-1)) * torch.polar(torch.ones_like(phase), phase)
    return torch.cat([z.real, z.imag], dim=-1)


@pytest.mark.parametrize("K", [2, 16, 24, 256])
def test_rotary_is_its_definition(K: int) -> None:
    x, positions = torch.randn(2, 9, 3, K), torch.randint(3000, (2, 9))
    assert (rotary(x, positions) - turned(x, positions)).abs().max() < 2e-3  # phases to 3000 in float32
    assert (rotary(x, positions[0]) - turned(x, positions[0])).abs().max() < 2e-3
    assert (rotary(x.double(), positions) - turned(x, positions)).abs().max() < 1e-9
    assert torch.equal(rotary(x, torch.zeros(9)), x)


def test_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 2, 32).double(), torch.randn(1, 1, 2, 32).double()
    scores = [(rotary(q, torch.tensor([a])) * rotary(k, torch.tensor([b]))).sum(-1) for a, b in ((7, 3), (1004, 1000))]
    torch.testing.assert_close(*scores)
    assert (scores[0] - (q * k).sum(-1)).abs().max() > 1e-3


def test_phases_are_float32_for_bf16() -> None:
    """In bf16 position 1001 is 1000."""
    x, positions = torch.randn(1, 2, 1, 32).bfloat16(), torch.tensor([1000, 1001])
    with torch.autocast("cpu", torch.bfloat16):
        y = rotary(x, positions)
    assert y.dtype == torch.bfloat16
    assert (y - turned(x, positions)).abs().max() < 0.02
    assert (turned(x, positions.bfloat16()) - turned(x, positions)).abs().max() > 0.5


def test_an_odd_channel_is_left_alone() -> None:
    x = torch.randn(2, 5, 2, 7)
    y = rotary(x, torch.arange(5))
    assert torch.equal(y[..., 6], x[..., 6])
    assert torch.equal(y[..., :6], rotary(x[..., :6], torch.arange(5)))


def test_rotary_gradient() -> None:
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotary(x, torch.arange(3)), x)


def test_token_shift_puts_the_previous_token_in_front() -> None:
    x, previous = torch.randn(2, 4, 8), torch.randn(2, 8)
    assert torch.equal(token_shift(x, previous), torch.cat([previous[:, None], x[:, :3]], dim=1))
    assert torch.equal(token_shift(x), token_shift(x, torch.zeros(2, 8)))
    whole = token_shift(x, previous)
    assert torch.equal(torch.cat([token_shift(x[:, :1], previous), token_shift(x[:, 1:], x[:, 0])], dim=1), whole)
    assert token_shift(x.bfloat16(), previous).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_and_the_token_shift_begin_anew_with_every_document(dtype: torch.dtype) -> None:
    lengths = (0, 3, 1, 0, 0, 4, 0)
    x, cu_seqlens = torch.randn(1, 8, 5), torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    assert token_positions(x).tolist() == list(range(8))
    assert token_positions(x, cu_seqlens).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    alone = [token_shift(piece) for piece in x.split(lengths, dim=1) if piece.numel()]
    assert torch.equal(token_shift(x, cu_seqlens=cu_seqlens), torch.cat(alone, dim=1))


def test_a_cache_grows_by_doubling_and_keeps_what_it_holds() -> None:
    cache = torch.randn(2, 4, 3)
    assert enlarged(cache, 4) is cache
    for length, room in ((5, 8), (8, 8), (9, 9)):
        larger = enlarged(cache, length)
        assert larger.shape == (2, room, 3)
        assert torch.equal(larger[:, :4], cache)
        assert not larger[:, 4:].any()
    assert enlarged(torch.zeros(2, 0, 3), 1).shape == (2, 1, 3)


def test_swiglu_is_its_equation_and_counts_its_flops() -> None:
    mlp = SwiGLU(8, 12)
    x = torch.randn(2, 5, 8)
    gate, up = mlp.gate_up.weight.split(12)
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.mT) * (x @ up.mT)) @ mlp.down.weight.mT)
    with FlopCounterMode(display=False) as counter:
        mlp(x[:1])
    assert counter.get_total_flops() == mlp.flops(5)


def test_small_init_scale() -> None:
    weight = torch.empty(400, 250)
    small_init_(weight, gain=0.5)
    assert weight.std().item() == pytest.approx(0.5 * (2 / (5 * 250)) ** 0.5, rel=0.02)
    assert abs(weight.mean().item()) < 1e-3


def test_heads_must_divide() -> None:
    assert head_dim(12, 4) == 3
    with pytest.raises(ZooError, match="allowed: 1, 2, 3, 4, 6, 12"):
        head_dim(12, 5)
