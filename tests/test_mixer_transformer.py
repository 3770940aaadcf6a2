"""Exact attention: grouped heads, its cache, its initialisation and its FLOP count."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.mixers.transformer import Attention
from zoo.ops import attention
from zoo.sizing import model_config


def mixer(kv_heads: int | None = None) -> Attention:
    built = Attention(32, 4, 64, kv_heads=kv_heads)
    built.reset_parameters(0, 1)
    return built.requires_grad_(False)


def test_grouped_heads_are_full_heads_with_repeated_weights() -> None:
    grouped, full = mixer(kv_heads=2), mixer()
    q, k, v = grouped.qkv.weight.unflatten(0, (-1, 8)).split([4, 2, 2])
    full.qkv.weight.copy_(torch.cat([q, *(x.repeat_interleave(2, dim=0) for x in (k, v))]).flatten(0, 1))
    full.out.weight.copy_(grouped.out.weight)
    x = torch.randn(2, 33, 32)
    torch.testing.assert_close(grouped(x), full(x))
    assert grouped.init_state(1, 10)["k"].numel() * 2 == full.init_state(1, 10)["k"].numel()


def test_what_fewer_key_heads_save_goes_to_the_mlp() -> None:
    assert model_config("transformer", "nano", kv_heads=1).channel_dim > model_config("transformer", "nano").channel_dim


@pytest.mark.parametrize("kv_heads", [0, 3, 8, -1, 1.5])
def test_kv_heads_must_divide_heads(kv_heads: int) -> None:
    with pytest.raises(ZooError, match="allowed: 1, 2, 4"):
        mixer(kv_heads)


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_a_cache_too_small_grows(kv_heads: int | None) -> None:
    attend = mixer(kv_heads)
    x = torch.randn(2, 90, 32)
    state, parts = attend.init_state(2, 4), []
    for piece in x.split([1, 3, 1, 35, 50], dim=1):
        y, state = attend.extend(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), attend(x), rtol=1e-4, atol=1e-6)
    assert state["k"].shape[1] == 90


def test_rows_at_different_positions_are_as_one_by_one() -> None:
    attend, starts = mixer(), (0, 7, 31)
    x = torch.randn(3, 40, 32)
    whole = attend(x)
    states = [attend.init_state(1, 40) for _ in starts]
    for row, start in enumerate(starts):
        if start:
            states[row] = attend.extend(x[row : row + 1, :start], states[row])[1]
    state = {name: torch.cat([s[name] for s in states]) for name in states[0]}
    for t in (1, 6, 2):
        at = state["position"][:, None] + torch.arange(t)
        rows = torch.arange(3)[:, None]
        y, state = attend.extend(x[rows, at], state)
        torch.testing.assert_close(y, whole[rows, at], rtol=1e-4, atol=1e-6)


def test_bf16_cache_under_autocast() -> None:
    attend, x = mixer(), torch.randn(2, 30, 32)
    state, parts = attend.init_state(2, 30, dtype=torch.bfloat16), []
    with torch.autocast("cpu", torch.bfloat16):
        for piece in x.split([7, 1, 22], dim=1):
            y, state = attend.extend(piece, state)
            parts.append(y)
    assert state["k"].dtype == torch.bfloat16
    assert (torch.cat(parts, dim=1) - attend(x)).abs().max() < 0.03 * attend(x).abs().max()


def test_long_prompt_into_a_large_cache_makes_no_large_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    spied = attention.masked_attention
    monkeypatch.setattr(attention, "masked_attention",
                        lambda q, k, v, visible: shapes.append(visible.shape) or spied(q, k, v, visible))
    attend, T = mixer(), 3 * attention.QUERIES + 5
    x = torch.randn(1, T + 3, 32)
    first, state = attend.extend(x[:, :3], attend.init_state(1, 8 * T))
    assert not shapes  # a beginning needs no mask at all
    y, _ = attend.extend(x[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, y], dim=1), attend(x), rtol=1e-4, atol=1e-6)
    assert shapes == [(1, min(attention.QUERIES, T - a), min(a + attention.QUERIES, T) + 3) for a in range(0, T, 256)]


def test_initial_scales_are_those_of_small_init() -> None:
    attend = Attention(256, 4, 64)
    attend.reset_parameters(3, 8)
    assert attend.qkv.weight.std().item() == pytest.approx((2 / (5 * 256)) ** 0.5, rel=0.02)
    assert attend.out.weight.std().item() == pytest.approx((2 / (5 * 256)) ** 0.5 / 4, rel=0.02)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_flops_count_what_the_mask_leaves(kv_heads: int | None) -> None:
    """PyTorch's plain path multiplies the whole square of T x T: T (T - 1) / 2 pairs more than are counted."""
    attend, T = mixer(kv_heads), 48
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        attend(torch.randn(1, T, 32))
    assert counter.get_total_flops() - attend.flops(T) == 4 * 32 * T * (T - 1) // 2
