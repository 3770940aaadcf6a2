"""FAVOR+ against the estimator written out in float64, and the estimator against softmax attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.favor import (
    favor_attention,
    favor_features,
    orbit_frequencies,
    orbit_projection,
    orthogonal_projection,
)
from zoo.ops.linear_attention import CHUNK, linear_attention
from zoo.ops.rotary import turn

LENGTHS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 1000]
FEATURES, HEAD = 32, 16


def projection(features: int = FEATURES, dim: int = HEAD, seed: int = 0) -> Tensor:
    return orthogonal_projection(features, dim, torch.Generator().manual_seed(seed))


def phi(x: Tensor, w: Tensor) -> Tensor:
    """2009.14794 eq. 5 without the 1 / sqrt(m)."""
    return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2)


def weighted_mean(weights: Tensor, v: Tensor) -> Tensor:
    weights = weights * torch.ones(weights.shape[-2:], dtype=v.dtype).tril()
    return torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)


def definition(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return weighted_mean(torch.einsum("bthm,bshm->bhts", phi(q, w), phi(k, w)), v)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted_mean(torch.einsum("bthk,bshk->bhts", q, k).exp(), v)


def inputs(T: int, dtype: torch.dtype = torch.float64, scale: float = 0.4, B: int = 2, H: int = 3) -> list[Tensor]:
    """Queries and keys of norm about `scale` * sqrt(HEAD)."""
    torch.manual_seed(T)
    q, k, v = (torch.randn(B, T, H, n, dtype=torch.float64) for n in (HEAD, HEAD, 24))
    return [x.to(dtype).requires_grad_() for x in (scale * q, scale * k, v)]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


# the projection


@pytest.mark.parametrize(("features", "dim"), [(64, 16), (40, 16), (8, 16), (256, 64)])
def test_rows_are_orthogonal_in_blocks(features, dim):
    w = projection(features, dim)
    assert w.shape == (features, dim)
    for block in F.normalize(w, dim=-1).split(dim):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), atol=1e-6, rtol=0)


def test_rows_are_standard_normal_each_on_its_own():
    w = torch.cat([projection(64, 16, seed) for seed in range(200)])
    assert w.mean(0).abs().max() < 0.04  # 12800 rows: a standard error of 0.009
    torch.testing.assert_close(w.T @ w / len(w), torch.eye(16), atol=0.06, rtol=0)
    assert 30 < w.square().sum(-1).var() < 34  # of chi-squared with 16 degrees of freedom: 32; of a fixed length: 0


def test_a_draw_is_a_function_of_its_generator():
    assert torch.equal(projection(seed=3), projection(seed=3))
    assert not torch.equal(projection(seed=3), projection(seed=4))


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rows x [dim] of one vector at every position, rotated."""
    angle = positions.double()[:, None] * orbit_frequencies(x.shape[-1], torch.float64)
    return turn(x.expand(1, len(positions), 1, -1), torch.stack([angle.cos(), angle.sin()], dim=1))[0, :, 0]


@pytest.mark.parametrize("dim", [2, 5, 16, 64])
def test_a_rotation_moves_an_orbit_by_one_row(dim):
    even = dim - dim % 2
    w = orbit_projection(4 * even, dim, torch.Generator().manual_seed(0)).double()
    for orbit in w[:, :even].split(2 * even):
        torch.testing.assert_close(orbit[:even] @ orbit[:even].T, even * torch.eye(even).double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(orbit[even:], -orbit[:even], atol=2e-5, rtol=0)
        torch.testing.assert_close(torch.cat([turned(row, torch.ones(1)) for row in orbit]), orbit.roll(-1, 0),
                                   atol=2e-5, rtol=0)
    assert w.shape == (4 * even, dim)
    assert not torch.equal(w[: 2 * even], w[2 * even :])


def test_estimates_from_orbits_are_relative_and_others_are_not():
    torch.manual_seed(0)
    q, k = (2 * F.normalize(torch.randn(HEAD, dtype=torch.float64), dim=0) for _ in range(2))
    positions, spread = torch.arange(100), []
    for w in (orbit_projection(4 * HEAD, HEAD, torch.Generator().manual_seed(0)), projection(4 * HEAD)):
        weights = phi(turned(q, positions), w.double()) @ phi(turned(k, positions), w.double()).T
        spread.append(max((weights.diagonal(-n).std() / weights.diagonal(-n).mean()).item() for n in (0, 1, 5, 30)))
    assert spread[0] < 1e-4
    assert spread[1] > 0.1


# the estimator


def test_features_estimate_the_exponential_without_bias():
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(6, HEAD, dtype=torch.float64), dim=-1) for _ in range(2))
    total, draws = torch.zeros(6, 6, dtype=torch.float64), 1500
    for seed in range(draws):
        w = projection(seed=seed).double()
        phi_q, phi_k = favor_features(q, k, w)
        # What the query features leave out, as it cancels: exp(|q|^2 / 2) over the sum of exp(w . q + |w|^2 / 2).
        left_out = (q @ w.T + w.square().sum(-1) / 2).logsumexp(-1, keepdim=True) - q.square().sum(-1, keepdim=True) / 2
        total += phi_q @ phi_k.T * left_out.exp() / FEATURES
    assert ((total / draws) / torch.exp(q @ k.T) - 1).abs().max() < 0.03


def test_more_features_approximate_softmax_attention_better():
    q, k, v = (x.detach() for x in inputs(100, scale=0.25))  # norms about 1
    wanted = softmax_attention(q, k, v)
    errors = [sum(relative(favor_attention(q, k, v, projection(m, HEAD, s))[0], wanted) for s in range(4)) / 4
              for m in (16, 128, 1024)]
    assert all(b < 0.6 * a for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.1


def test_orthogonal_rows_estimate_better_than_independent_ones():
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(200, HEAD, dtype=torch.float64), dim=-1) for _ in range(2))
    wanted = torch.exp((q * k).sum(-1))

    def error(w: Tensor) -> float:
        return ((phi(q, w) * phi(k, w)).mean(-1) - wanted).square().mean().item()

    orthogonal = sum(error(projection(HEAD, HEAD, seed).double()) for seed in range(200))
    independent = sum(error(torch.randn(HEAD, HEAD, dtype=torch.float64)) for _ in range(200))
    assert orthogonal < 0.95 * independent


# the op


@pytest.mark.parametrize("T", LENGTHS)
def test_values_and_gradients_equal_the_definition(T):
    args, w = inputs(T), projection().double()
    got, wanted = favor_attention(*args, w)[0], definition(*args, w)
    torch.testing.assert_close(got, wanted)
    cotangent = torch.randn_like(wanted)
    gradients = torch.autograd.grad(got, args, cotangent)
    for a, b in zip(gradients, torch.autograd.grad(wanted, args, cotangent), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
def test_what_heads_hold_fades_at_their_rates(T):
    (q, k, v), w, decay = inputs(T), projection().double(), torch.tensor([0.0, 0.3, 1.0])
    age = torch.arange(T)[:, None] - torch.arange(T)
    weights = torch.einsum("bthm,bshm->bhts", phi(q, w), phi(k, w)) * torch.exp2(-decay.double()[:, None, None] * age)
    got, wanted = favor_attention(q, k, v, w, decay=decay), weighted_mean(weights, v)
    torch.testing.assert_close(got[0], wanted)
    cotangent = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(got[0], (q, k, v), cotangent, retain_graph=True),
                    torch.autograd.grad(wanted, (q, k, v), cotangent), strict=True):
        torch.testing.assert_close(a, b)
    cut = T // 3
    first, state = favor_attention(q[:, :cut], k[:, :cut], v[:, :cut], w, decay=decay)
    second, last = favor_attention(q[:, cut:], k[:, cut:], v[:, cut:], w, state, decay=decay)
    torch.testing.assert_close((torch.cat([first, second], 1), last), got)


def test_the_state_is_the_sum_of_the_features_and_gradients_pass_through_it():
    (q, k, v), w, cut = inputs(150), projection().double(), 70
    whole, last = favor_attention(q, k, v, w)
    first, state = favor_attention(q[:, :cut], k[:, :cut], v[:, :cut], w)
    second, end = favor_attention(q[:, cut:], k[:, cut:], v[:, cut:], w, state)
    phi_k = torch.exp(-(w[:, None] - k[..., None, None, :]).square().sum(-1).squeeze(-1) / 2)  # the square, completed
    torch.testing.assert_close(last[..., :-1], torch.einsum("bthm,bthv->bhmv", phi_k, v))
    torch.testing.assert_close(last[..., -1], phi_k.sum(1))
    split = (torch.cat([first, second], dim=1), end)
    for a, b in zip(split, (whole, last), strict=True):
        torch.testing.assert_close(a, b)
    cotangents = [torch.randn_like(x) for x in split]
    got = torch.autograd.grad(split, (q, k, v), cotangents)
    for a, b in zip(got, torch.autograd.grad((whole, last), (q, k, v), cotangents), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64])
def test_features_agree_with_float64(dtype, dim):
    torch.manual_seed(dim)
    q, k = ((torch.randn(500, dim) * dim**-0.25).to(dtype) for _ in range(2))
    w = projection(4 * dim, dim)
    for got, wanted in zip(favor_features(q, k, w), favor_features(q.double(), k.double(), w), strict=True):
        assert got.dtype == torch.float32
        assert relative(got, wanted) < 2e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-3)])
def test_output_agrees_with_float64_and_keeps_the_type(dtype, tolerance):
    args = [x.detach() for x in inputs(200, dtype)]
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, state = favor_attention(*args, projection())
        assert (y.dtype, state.dtype) == (dtype, torch.float32)
        assert relative(y, definition(*(x.double() for x in args), projection().double())) < tolerance


def test_a_bound_on_the_keys_changes_no_value():
    (q, k, v), w = inputs(100), projection().double()
    wanted = favor_attention(q, k, v, w)[0]
    for bound in (0.5, float(k.detach().norm(dim=-1).max()), 50.0):  # too low, exact, higher than every row of W
        torch.testing.assert_close(favor_attention(q, k, v, w, max_key_norm=bound)[0], wanted)


@pytest.mark.parametrize("dim", [16, 32, 40, 64, 128, 256])
def test_a_bound_on_the_keys_keeps_wide_heads_from_underflow(dim):
    torch.manual_seed(0)
    q, k = (3 * F.normalize(torch.randn(1, 65, 1, dim), dim=-1) for _ in range(2))
    v, w = torch.randn(1, 65, 1, dim), projection(4 * dim, dim)
    y, _ = favor_attention(q, k, v, w, max_key_norm=3.0)
    assert relative(y, definition(q.double(), k.double(), v.double(), w.double())) < 2e-5


def test_slices_of_a_fused_projection_and_expanded_gradients():
    torch.manual_seed(0)
    fused = (0.4 * torch.randn(2, 70, 3 * 2 * HEAD + 3, dtype=torch.float64))[..., 3:].requires_grad_()
    split, w = [x.unflatten(-1, (2, HEAD)) for x in fused.chunk(3, dim=-1)], projection().double()
    (got,) = torch.autograd.grad(favor_attention(*split, w)[0].sum(), fused)
    (wanted,) = torch.autograd.grad(definition(*split, w).sum(), fused)
    torch.testing.assert_close(got, wanted)


# extremes


def outputs_and_gradients(q: Tensor, k: Tensor, v: Tensor, **options) -> list[Tensor]:
    args = [x.detach().requires_grad_() for x in (q, k, v)]
    y, state = favor_attention(*args, projection(), **options)
    return [y, state, *torch.autograd.grad(y.square().sum(), args)]


@pytest.mark.parametrize("outliers", ["q", "k", "v", "qkv", "zero"])
def test_outliers_and_zeros_stay_finite(outliers):
    args = {name: x.detach() for name, x in zip("qkv", inputs(130, torch.float32), strict=True)}
    for name in args:
        if outliers == "zero":
            args[name] = torch.zeros_like(args[name])
        elif name in outliers:
            args[name] = args[name].clone()
            args[name][:, 20] *= 100
            args[name][:, 70:90] *= 100
    assert all(x.isfinite().all() for x in outputs_and_gradients(**args))


def test_keys_that_underflow_have_no_weight():
    q, k, v = (x.detach() for x in inputs(40, torch.float32))
    k = torch.cat([100 * k[:, :20], k[:, 20:]], dim=1)
    y, *rest = outputs_and_gradients(q, k, v)
    assert (y[:, :20] == 0).all()  # nothing yet to attend to
    torch.testing.assert_close(y[:, 20:], favor_attention(q[:, 20:], k[:, 20:], v[:, 20:], projection())[0])
    assert all(x.isfinite().all() for x in rest)


# causality


def stabilised_by_the_sequence(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The usual mistake: a key stabiliser that looks at the whole sequence, and an eps after it."""
    def features(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        exponent = x @ w.T
        return (exponent - x.square().sum(-1, keepdim=True) / 2 - exponent.amax(axes, keepdim=True)).exp() + 1e-4

    ones = torch.ones_like(v[..., :1])
    y, state = linear_attention(features(q, (-1,)), features(k, (1, 3)), torch.cat([v, ones], dim=-1))
    return y[..., :-1] / y[..., -1:], state


def past_moves(attention, t: int, scale: float, T: int = 2 * CHUNK + 3) -> float:
    """How far outputs up to t move when what follows, and the other row, are drawn anew `scale` times larger."""
    args, others = ([x.detach() for x in inputs(n, torch.float32)] for n in (T, T + 1))
    changed = [scale * other[:, :T] for other in others]
    for new, old in zip(changed, args, strict=True):
        new[0, : t + 1] = old[0, : t + 1]
    before, after = attention(*args, projection())[0], attention(*changed, projection())[0]
    return (after - before)[0, : t + 1].abs().max().item()


@pytest.mark.parametrize("t", [0, 1, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK])
@pytest.mark.parametrize("scale", [1.0, 3.0, 100.0])
def test_the_future_and_other_rows_move_nothing(t, scale):
    assert past_moves(favor_attention, t, scale) == 0


def test_a_maximum_over_the_sequence_is_caught():
    assert past_moves(stabilised_by_the_sequence, CHUNK, 3.0) > 0.1


# documents


def test_documents_in_a_row_are_as_if_alone():
    borders, w = torch.tensor([0, 0, 5, 70, 70, 71, 140]), projection().double()
    q, k, v = inputs(140, B=1)
    state = torch.rand(len(borders) - 1, 3, FEATURES, v.shape[-1] + 1, dtype=torch.float64, requires_grad=True)
    args = q, k, v, state
    parts = [favor_attention(*(x[:, a:b] for x in (q, k, v)), w, state[n : n + 1])
             for n, (a, b) in enumerate(pairwise(borders.tolist()))]
    wanted = torch.cat([y for y, _ in parts], 1), torch.cat([last for _, last in parts])
    got = favor_attention(q, k, v, w, state, cu_seqlens=borders)
    cotangents = [torch.randn_like(x) for x in wanted]
    gradients = torch.autograd.grad(got, args, cotangents)
    for a, b in zip((*got, *gradients), (*wanted, *torch.autograd.grad(wanted, args, cotangents)), strict=True):
        torch.testing.assert_close(a, b)
    assert favor_attention(q, k, v, w, cu_seqlens=borders.int())[1].shape == state.shape
