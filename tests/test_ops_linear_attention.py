"""Chunked linear attention against its definition in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.ops.linear_attention import CHUNK, linear_attention

LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 1000]


def definition(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    scores = scores * torch.ones(scores.shape[-2:], dtype=q.dtype).tril()
    y = torch.einsum("bhts,bshv->bthv", scores, v) + torch.einsum("bthk,bhkv->bthv", q, state)
    return y, state + torch.einsum("bthk,bthv->bhkv", k, v)


def inputs(T: int, B: int = 2, H: int = 3, K: int = 16, V: int = 24,
           dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(T)
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V), (B, H, K, V)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("T", LENGTHS)
def test_values_and_all_gradients_equal_the_definition(T):
    args = inputs(T)
    wanted, got = definition(*args), linear_attention(*args)
    cotangents = [torch.randn_like(x) for x in wanted]
    gradients = torch.autograd.grad(got, args, cotangents)
    for a, b in zip(gradients, torch.autograd.grad(wanted, args, cotangents), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 1, 16, 16), (1, 1, 256, 33), (2, 1, 40, 80), (1, 3, 100, 1)])
def test_any_head_size(B, H, K, V):
    args = inputs(CHUNK + 5, B, H, K, V)
    for a, b in zip(linear_attention(*args), definition(*args), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulates_in_float32_and_returns_the_input_type(dtype):
    args = inputs(1000, dtype=dtype)
    wanted = definition(*(x.detach().double() for x in args))
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            y, state = linear_attention(*args)
        assert (y.dtype, state.dtype) == (dtype, torch.float32)
        assert relative(y, wanted[0]) < (1e-6 if dtype is torch.float32 else 3e-3)  # bf16: its rounding alone
        assert relative(state, wanted[1]) < 1e-6


@pytest.mark.parametrize("cut", [1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
def test_state_carries_a_sequence_over_any_cut(cut):
    q, k, v, state = (x.detach() for x in inputs(2 * CHUNK + 2, dtype=torch.float32))
    whole, last = linear_attention(q, k, v, state)
    first, middle = linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], state)
    second, end = linear_attention(q[:, cut:], k[:, cut:], v[:, cut:], middle)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(end, last, rtol=1e-5, atol=1e-4)


def test_without_a_state_it_starts_from_zeros():
    q, k, v, state = inputs(70)
    for a, b in zip(linear_attention(q, k, v), linear_attention(q, k, v, torch.zeros_like(state)), strict=True):
        assert torch.equal(a, b)


def test_slices_of_a_fused_projection_and_expanded_gradients():
    fused = torch.randn(2, 70, 2 * 3 * 8 + 5, dtype=torch.float64)[..., 5:].requires_grad_()
    split = [x.unflatten(-1, (2, 8)) for x in fused.chunk(3, dim=-1)]
    zeros = torch.zeros(2, 2, 8, 8, dtype=torch.float64)
    (got,) = torch.autograd.grad(linear_attention(*split)[0].sum(), fused)
    (wanted,) = torch.autograd.grad(definition(*(x.clone() for x in split), zeros)[0].sum(), fused)
    torch.testing.assert_close(got, wanted)


def past_moves(attention, t: int, T: int = 2 * CHUNK + 3) -> float:
    """How far outputs up to t move when everything after t, and the other row of the batch, become outliers."""
    q, k, v, state = (x.detach() for x in inputs(T, dtype=torch.float32))
    before = attention(q, k, v, state)[0][0, : t + 1]
    changed = []
    for x in (q, k, v):
        x = x.clone()
        x[0, t + 1 :] = 100 * torch.randn_like(x[0, t + 1 :])
        x[1] = 100 * torch.randn_like(x[1])
        changed.append(x)
    return (attention(*changed, state)[0][0, : t + 1] - before).abs().max().item()


BORDERS = [0, 1, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK]


@pytest.mark.parametrize("t", BORDERS)
def test_the_future_and_other_rows_move_nothing(t):
    assert past_moves(linear_attention, t) == 0


def test_a_missing_mask_is_caught(monkeypatch):
    monkeypatch.setattr(Tensor, "tril", lambda scores, diagonal=0: scores)
    assert past_moves(linear_attention, 0) > 1
    assert past_moves(linear_attention, CHUNK + 1) > 1


def test_documents_in_a_row_are_as_if_alone():
    """Values, final states and all gradients; empty documents pass their state and its gradient through."""
    borders = torch.tensor([0, 0, 5, 70, 70, 71, 140, 140])
    args = inputs(140, B=1)
    args[3] = torch.randn(len(borders) - 1, *args[3].shape[1:], dtype=torch.float64, requires_grad=True)
    q, k, v, state = args
    parts = [definition(*(x[:, a:b] for x in (q, k, v)), state[n : n + 1])
             for n, (a, b) in enumerate(pairwise(borders.tolist()))]
    wanted = torch.cat([y for y, _ in parts], 1), torch.cat([last for _, last in parts])
    got = linear_attention(*args, cu_seqlens=borders.int())
    cotangents = [torch.randn_like(x) for x in wanted]
    gradients = torch.autograd.grad(got, args, cotangents)
    for a, b in zip((*got, *gradients), (*wanted, *torch.autograd.grad(wanted, args, cotangents)), strict=True):
        torch.testing.assert_close(a, b)
    fresh = linear_attention(q, k, v, cu_seqlens=borders)
    assert torch.equal(fresh[0], linear_attention(q, k, v, torch.zeros_like(state), borders)[0])
    assert fresh[1].shape == state.shape


def test_documents_are_checked():
    with pytest.raises(ZooError, match="allowed: \\[1, T"):
        linear_attention(*inputs(8)[:3], cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ZooError, match="ascend from 0 to T=8"):
        linear_attention(*inputs(8, B=1)[:3], cu_seqlens=torch.tensor([0, 9]))


def test_no_tokens_pass_the_state_on():
    q, k, v, state = inputs(0)
    y, last = linear_attention(q, k, v, state)
    assert y.shape == v.shape
    assert torch.equal(last, state)
    assert last.data_ptr() != state.data_ptr()
