"""WKV-6 against its definition in float64: values, every gradient, extreme decays, causality, layouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.ops.wkv6 import wkv6

NAMES = ("y", "state", "dr", "dk", "dv", "dlog_decay", "du", "dinitial")


def by_definition(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor,
                  state: Tensor) -> tuple[Tensor, Tensor]:
    ys = []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        ys.append((r[:, t, :, :, None] * (state + u[:, :, None] * kv)).sum(-2))
        state = log_decay[:, t].exp()[..., None] * state + kv
    return torch.stack(ys, dim=1), state


def draw(T: int, B: int = 2, H: int = 2, K: int = 16, V: int = 16, decay: float = -1.0) -> list[Tensor]:
    """r, k, v, log_decay around -exp(decay), u, initial state."""
    log_decay = -torch.exp(torch.randn(B, T, H, K) + decay)
    return [torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V), log_decay, torch.randn(H, K),
            torch.randn(B, H, K, V)]


def values_and_gradients(op: Callable, inputs: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and the gradients of a fixed random projection of them."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y, state = op(*leaves)
    generator = torch.Generator().manual_seed(5)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (y, state))
    return dict(zip(NAMES, (y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)), strict=True))


def worst_error(op: Callable, inputs: list[Tensor]) -> tuple[float, str]:
    """The largest error of a float32 result, in units of the largest entry of the float64 definition's."""
    got = values_and_gradients(op, inputs, torch.float32)
    exact = values_and_gradients(by_definition, inputs, torch.float64)
    errors = {name: ((got[name] - exact[name]).abs().max() / exact[name].abs().max().clamp_min(1e-30)).item()
              for name in NAMES}
    assert all(x.isfinite().all() for x in got.values()), errors
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


@pytest.mark.parametrize("T", [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129])
def test_values_and_gradients_at_any_length(T: int) -> None:
    error, name = worst_error(wkv6, draw(T))
    assert error < 2e-6, name


def test_a_long_sequence() -> None:
    error, name = worst_error(wkv6, draw(1000, B=1, decay=-5.0))
    assert error < 5e-6, name


@pytest.mark.parametrize(("B", "H", "K", "V"), [(1, 1, 16, 16), (3, 1, 20, 7), (1, 3, 48, 48), (1, 2, 64, 128),
                                                (2, 1, 256, 32), (1, 1, 7, 256)])
def test_any_shape(B: int, H: int, K: int, V: int) -> None:
    error, name = worst_error(wkv6, draw(37, B, H, K, V))
    assert error < 2e-6, name


def extreme(kind: str) -> list[Tensor]:
    inputs = draw(70)
    r, k, v, log_decay = inputs[:4]
    steps = torch.tensor([-1e-6, -20.0, -80.0, -1e4])
    match kind:
        case "forgets nothing":
            log_decay.fill_(-1e-6)
        case "forgets fast":
            log_decay.fill_(-20)
        case "forgets at once":
            log_decay.fill_(-80)
        case "infinitely fast":
            log_decay[torch.rand_like(log_decay) < 0.3] = -torch.inf
        case "all at random":
            log_decay.copy_(steps[torch.randint(4, log_decay.shape)])
        case "steep, then flat":  # in a sum of -1e5 the steps of -0.1 that follow are lost
            log_decay.copy_(torch.where(torch.arange(70) % 32 < 10, -1e4, -0.1)[None, :, None, None])
        case "large keys":
            k.copy_(90 * k.sign())
            log_decay.copy_(steps[torch.randint(4, log_decay.shape)])
        case "one token":
            for x in (r, k, v):
                x[:, 33] *= 1000
    return inputs


@pytest.mark.parametrize("kind", ["forgets nothing", "forgets fast", "forgets at once", "infinitely fast",
                                  "all at random", "steep, then flat", "large keys", "one token"])
def test_extreme_inputs(kind: str) -> None:
    error, name = worst_error(wkv6, extreme(kind))
    assert error < 2e-6, name


def by_differences(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor,
                   state: Tensor) -> tuple[Tensor, Tensor]:
    """A mutant: decays as exp of differences of one cumulative sum, as often seen."""
    c = log_decay.cumsum(1)
    before = c - log_decay
    past = torch.ones(c.shape[1], c.shape[1]).tril(-1).bool()[..., None, None]
    exponent = (before[:, :, None] - c[:, None]).masked_fill(~past, -torch.inf)
    A = torch.einsum("bthk,bshk,btshk->bhts", r, k, exponent.exp()) + torch.diag_embed((r * u * k).sum(-1).mT)
    y = torch.einsum("bhts,bshv->bthv", A, v) + torch.einsum("bthk,bhkv->bthv", r * before.exp(), state)
    end = c[:, -1:]
    return y, torch.einsum("bshk,bshv->bhkv", k * (end - c).exp(), v) + end[:, 0].exp()[..., None] * state


def test_a_cumulative_sum_of_the_logs_is_caught() -> None:
    assert worst_error(by_differences, draw(70))[0] < 1e-5  # it is right, but for the extremes
    assert worst_error(by_differences, extreme("steep, then flat"))[0] > 1e-4


def leak(op: Callable, scale: float) -> float:
    """How far replacing all inputs after t moves outputs up to t, for t around chunk borders."""
    inputs, worst = draw(80), 0.0
    y = op(*inputs)[0]
    for t in (0, 1, 2, 7, 14, 15, 16, 30, 31, 32, 47, 62, 63, 64, 78):
        other = [x.clone() for x in inputs]
        for x in other[:3]:
            x[:, t + 1 :] = scale * torch.randn_like(x[:, t + 1 :])
        other[3][:, t + 1 :] = -scale * torch.rand_like(other[3][:, t + 1 :])
        worst = max(worst, (op(*other)[0] - y)[:, : t + 1].abs().max().item())
    return worst


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e6])
def test_the_future_moves_not_a_bit(scale: float) -> None:
    assert leak(wkv6, scale) == 0


def test_planted_leaks_are_caught() -> None:
    def key_maximum(r: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return wkv6(r, k / (k.abs().amax(1, keepdim=True) + 1e-4), *rest)

    def decay_too_early(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return wkv6(r, k, v, log_decay.roll(-2, 1), *rest)

    assert leak(key_maximum, 3.0) > 0.01
    assert leak(decay_too_early, 1.0) > 0.01


def test_nan_stays_in_its_chunk_and_row() -> None:
    inputs = draw(96)
    y = wkv6(*inputs)[0]
    for x in inputs[:4]:
        x[1, 64:] = torch.nan
    other = wkv6(*inputs)[0]
    assert torch.equal(other[0], y[0])
    assert torch.equal(other[1, :64], y[1, :64])


@pytest.mark.parametrize("sizes", [(1,) * 50, (16, 34), (17, 1, 32), (49, 1), (2, 3, 45)],
                         ids=lambda sizes: "-".join(map(str, sizes[:4])))
def test_any_split_equals_the_whole(sizes: tuple[int, ...]) -> None:
    """The state carries over; padding of the last chunk does not decay it, though every step here decays."""
    *sequences, u, state = draw(50, decay=0.0)
    whole, last = wkv6(*sequences, u, state)
    pieces = []
    for piece in zip(*(x.split(sizes, dim=1) for x in sequences), strict=True):
        y, state = wkv6(*piece, u, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 40])
def test_one_decay_for_all_tokens_is_rwkv_5s(T: int) -> None:
    """[H, K]: by the definition with that decay at every token, its gradient the sum over all of them."""
    r, k, v, log_decay, u, state = draw(T)

    def repeated(r: Tensor, k: Tensor, v: Tensor, static: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return by_definition(r, k, v, static.expand(r.shape), u, state)

    given = [r, k, v, log_decay[0, 0], u, state]
    got = values_and_gradients(wkv6, given, torch.float32)
    exact = values_and_gradients(repeated, given, torch.float64)
    assert got["dlog_decay"].shape == (2, 16)
    for name in NAMES:
        assert (got[name] - exact[name]).abs().max() < 2e-6 * exact[name].abs().max().clamp_min(1e-30), name


def test_no_state_is_a_zero_state() -> None:
    *inputs, state = draw(20)
    for a, b in zip(wkv6(*inputs), wkv6(*inputs, torch.zeros_like(state)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("B", [1, 2])
def test_views_and_expanded_gradients(B: int) -> None:
    """Inputs that are splits of one projection and start at an offset, and the stride-0 gradient of a plain sum."""
    fused = torch.randn(B + 1, 16, 2, 4 * 16)[1:].requires_grad_()
    u = torch.randn(2, 16)
    r, k, v, w = fused.split(16, dim=-1)
    wkv6(r, k, v, -w.exp(), u)[0].sum().backward()
    expected = fused.detach().clone().double().requires_grad_()
    r, k, v, w = expected.split(16, dim=-1)
    by_definition(r, k, v, -w.exp(), u.double(), torch.zeros(B, 2, 16, 16).double())[0].sum().backward()
    torch.testing.assert_close(fused.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [1, 16, 40])
def test_inputs_are_left_alone_and_nothing_is_held(T: int) -> None:
    inputs = draw(T, B=1, H=1)
    before = [x.clone() for x in inputs]
    _, state = wkv6(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert state.untyped_storage().nbytes() == state.numel() * 4, "the final state keeps a larger buffer alive"


@pytest.mark.parametrize("T", [1, 40])
def test_dtypes(T: int) -> None:
    """bf16 in, bf16 out, computed in float32: the error is that of rounding y. Autocast or not; float64 stays."""
    inputs = draw(T)
    half = [x.bfloat16() for x in inputs[:3]] + inputs[3:]
    exact, state = wkv6(*(x.float() for x in half))
    y, rough_state = wkv6(*half)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(rough_state, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wkv6(*(x.float() for x in half))[0], exact)
    y, state = wkv6(*(x.double() for x in inputs))
    assert y.dtype == state.dtype == torch.float64


def test_autocast_does_not_reach_the_backward_pass() -> None:
    inputs = draw(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = values_and_gradients(wkv6, inputs, torch.float32)
    for name, value in values_and_gradients(wkv6, inputs, torch.float32).items():
        assert torch.equal(value, under_autocast[name]), name


def test_documents_in_a_row_are_as_if_alone() -> None:
    """Values, final states and all gradients; empty documents pass their state and its gradient through."""
    borders = torch.tensor([0, 0, 5, 37, 37, 38, 70, 70])
    inputs = draw(70, B=1)
    inputs[5] = torch.randn(len(borders) - 1, 2, 16, 16)

    def one_by_one(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        found = []
        for n, (a, b) in enumerate(itertools.pairwise(borders.tolist())):
            if a == b:
                found.append((v[:, a:b], state[n : n + 1]))
            else:
                found.append(by_definition(*(x[:, a:b] for x in (r, k, v, log_decay)), u, state[n : n + 1]))
        return torch.cat([y for y, _ in found], 1), torch.cat([last for _, last in found])

    got = values_and_gradients(lambda *x: wkv6(*x, cu_seqlens=borders), inputs, torch.float64)
    exact = values_and_gradients(one_by_one, inputs, torch.float64)
    for name in NAMES:
        torch.testing.assert_close(got[name], exact[name], msg=name)
    y, state = wkv6(*inputs[:5], cu_seqlens=borders.int())
    assert torch.equal(y, wkv6(*inputs[:5], torch.zeros_like(inputs[5]), borders)[0])
    assert state.shape == inputs[5].shape


def test_documents_are_checked() -> None:
    with pytest.raises(ZooError, match="allowed: \\[1, T"):
        wkv6(*draw(8, B=2)[:5], cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ZooError, match="ascend from 0 to T=8"):
        wkv6(*draw(8, B=1)[:5], cu_seqlens=torch.tensor([0, 9]))


def test_no_tokens_pass_the_state_on() -> None:
    inputs = draw(0)
    y, state = wkv6(*inputs)
    assert y.shape == (2, 0, 2, 16)
    assert torch.equal(state, inputs[5])
    assert state.data_ptr() != inputs[5].data_ptr()
