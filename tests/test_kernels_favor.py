"""The kernels of FAVOR+ against float64: in the interpreter on short sequences, on a GPU on all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_cases import (
    DTYPES,
    HEAD_SIZES,
    LENGTHS,
    SHORT_LENGTHS,
    check_against_float64,
    eager_and_compiled,
    interpreted,
    outputs_and_gradients,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.ops import favor_triton as registered
from zoo.ops.backend import use_backend
from zoo.ops.favor import favor_attention, orthogonal_projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 2.0


def inputs(T: int, K: int = 16, V: int = 24, m: int = 32, B: int = 2, H: int = 2,
           rows: int | None = None) -> dict[str, Tensor]:
    """Queries and keys of norm 1, as many keys' features in the state as three tokens would leave."""
    generator = torch.Generator().manual_seed(T)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    q, k = (torch.nn.functional.normalize(draw(B, T, H, K), dim=-1) for _ in range(2))
    w = orthogonal_projection(m, K, generator).double().to(DEVICE)
    state = 3 * torch.exp(-(w.norm(dim=-1) - 1).square() / 2)[:, None] * draw(rows or B, H, m, V + 1)
    state[..., -1] = state[..., -1].abs()
    decay = torch.tensor([0.125, 0.02], dtype=torch.float64, device=DEVICE)[:H]
    return {"q": q, "k": k, "v": draw(B, T, H, V), "initial_state": state, "projection": w, "decay": decay}


def attend(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, projection: Tensor, decay: Tensor,
           cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return favor_attention(q, k, v, projection.detach(), initial_state, BOUND, cu_seqlens, decay.detach())


def plain(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, projection: Tensor, decay: Tensor,
          cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As one writes it in PyTorch; exponents in float32, or nothing is left of them."""
    if cu_seqlens is not None:
        parts = [plain(q[:, a:b], k[:, a:b], v[:, a:b], initial_state[n : n + 1], projection, decay)
                 for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))]
        return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])
    w = projection.detach().float()
    length = w.norm(dim=-1)
    reach = length.clamp(max=BOUND)
    largest = length * reach - reach.square() / 2
    dtype = torch.bfloat16 if v.dtype == torch.float16 else v.dtype  # features have bf16's range
    phi_q = (q.float() @ w.T + largest).softmax(-1).to(dtype)
    phi_k = (k.float() @ w.T - k.float().square().sum(-1, keepdim=True) / 2 - largest).exp().to(dtype)
    values = torch.nn.functional.pad(v, (0, 1), value=1.0).to(dtype)
    t, rate = torch.arange(q.shape[1], device=q.device), decay.detach().float()[:, None]
    left = torch.exp2(-rate * (t + 1))  # [H, T]: of the first state
    scores = torch.einsum("bthm,bshm->bhts", phi_q, phi_k)
    scores = (scores * torch.exp2(-rate[..., None] * (t[:, None] - t).clamp(min=0)).to(dtype)).tril()
    y = torch.einsum("bhts,bshv->bthv", scores, values) + torch.einsum("bthm,bhmv,ht->bthv", phi_q,
                                                                       initial_state.to(dtype), left.to(dtype))
    last = initial_state * torch.exp2(-rate * len(t))[..., None] + torch.einsum(
        "bthm,bthv,ht->bhmv", phi_k, values, torch.exp2(-rate * t.flip(0)).to(dtype))
    return (y[..., :-1] / (y[..., -1:] + 1e-30)).to(v.dtype), last


def check(given: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    check_against_float64(attend, attend, plain, given, dtype, keep=["initial_state"])


def cut_into_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.kernels import favor as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 10**6)  # as many as there are chunks


@interpreted
@pytest.mark.parametrize("T", SHORT_LENGTHS)
def test_values_and_gradients(T: int) -> None:
    check(inputs(T, B=1, H=2 if T < 60 else 1))


@interpreted
def test_rows_cut_into_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into_segments(monkeypatch)
    check(inputs(130, B=1, H=1))


@interpreted
@pytest.mark.parametrize(("K", "V", "m"), [(24, 5, 40), (16, 40, 70), (5, 16, 20), (130, 16, 140), (16, 130, 20)])
def test_sizes(K: int, V: int, m: int) -> None:
    """Not powers of two; several blocks of features, of values, of channels in a product."""
    check(inputs(17, K, V, m, B=1, H=1))


@interpreted
def test_bfloat16_and_what_autocast_leaves() -> None:
    check(inputs(35, B=1, H=1), torch.bfloat16)
    given = {name: x.float() for name, x in inputs(35, B=1, H=1).items()}
    given["v"] = given["v"].bfloat16()
    with use_backend("triton"):
        y, state = attend(**given)
    exact, exact_state = attend(*(x.double() for x in given.values()))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (y - exact).norm() < 1e-2 * exact.norm()
    assert (state - exact_state).norm() < 1e-2 * exact_state.norm()


@interpreted
@pytest.mark.parametrize("cut", [False, True])
def test_documents(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut:
        cut_into_segments(monkeypatch)
    borders = [0, 0, 5, 69, 69, 70]
    given = inputs(70, B=1, H=1, rows=len(borders) - 1)
    check(given | {"cu_seqlens": torch.tensor(borders, dtype=torch.int32, device=DEVICE)})


def test_strided_inputs_and_expanded_gradients() -> None:
    fused = (torch.randn(2, 20, 2 * 3 * 16 + 5, device=DEVICE) / 3)[..., 5:].requires_grad_()
    w = orthogonal_projection(32, 16, torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            q, k, v = (x.unflatten(-1, (2, 16)) for x in fused.chunk(3, dim=-1))
            results.append(torch.autograd.grad(favor_attention(q, k, v, w)[0].sum(), fused)[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@interpreted
def test_no_tokens_pass_the_state_on() -> None:
    given = {name: x.float().requires_grad_() for name, x in inputs(0).items()}
    with use_backend("triton"):
        y, state = attend(**given)
        state.sum().backward()
    assert y.shape == given["v"].shape
    assert torch.equal(state, given["initial_state"])  # no time has gone by
    assert (given["initial_state"].grad == 1).all()


def test_keys_that_underflow_and_outliers_stay_finite() -> None:
    given = {name: x.float() for name, x in inputs(40, B=1, H=1).items()}
    given["initial_state"] *= 0
    for name, start in (("k", 0), ("q", 10), ("v", 30)):
        given[name][:, start : start + 20] *= 100
    with use_backend("triton"):
        found = outputs_and_gradients(lambda **x: favor_attention(x["q"], x["k"], x["v"], x["projection"].detach(),
                                                                  x["initial_state"]), given)
    assert all(x.isfinite().all() for x in found.values())
    assert (found["0"][:, :20] == 0).all()  # nothing yet to attend to


def past_moves(t: int, dtype: torch.dtype, T: int = 67) -> float:
    q, k, v, state, w, decay = (x.to(dtype) for x in inputs(T, H=1).values())
    with use_backend("triton"):
        before = attend(q, k, v, state, w, decay)[0][0, : t + 1]
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[0, t + 1 :] = 100 * torch.randn_like(x[0, t + 1 :])
            x[1] = 100
        changed[1] /= 30  # a key at 100 has no weight at all
        changed[1][0, : t + 1] = k[0, : t + 1]
        after = attend(*changed, state, w, decay)[0][0, : t + 1]
    return float((after - before).abs().max())


@interpreted
@pytest.mark.parametrize("t", [0, 31, 63, 64])
def test_the_future_and_other_rows_move_nothing(t: int) -> None:
    assert past_moves(t, torch.float32) == 0


def test_results_are_the_same_every_time() -> None:
    given = {name: x.float() for name, x in inputs(35, B=1).items()}
    with use_backend("triton"):
        a, b = (outputs_and_gradients(attend, given) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@interpreted
def test_the_operator_is_registered_as_it_should_be() -> None:
    q, k, v, state, w, decay = (x.float() for x in inputs(17, B=1, H=1).values())
    for x in (q, k, v, state):
        x.requires_grad_()
    torch.library.opcheck(registered.favor_attention.overload, (q, k, v, w, decay, state, BOUND, None))
    torch.library.opcheck(registered.favor_attention.overload, (q, k, v, w, None, None, None, torch.tensor([0, 4, 17])))


def test_compiled_equals_eager() -> None:
    given = {name: x.float() for name, x in inputs(17, B=1).items()}
    eager, compiled = eager_and_compiled(attend, given)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name])


def test_flops_are_counted() -> None:
    given = {name: x.float().requires_grad_() for name, x in inputs(17, B=1).items()}
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        y, state = attend(**given)
        assert counter.get_total_flops() == 4 * 17 * 2 * 32 * (16 + 25)
        (y.sum() + state.sum()).backward()
    assert counter.get_total_flops() == 17 * 2 * 32 * (12 * 16 + 14 * 25)


def test_wrong_shapes_are_refused() -> None:
    q, k, v, state, w, _ = (x.float() for x in inputs(8).values())
    with use_backend("triton"):
        with pytest.raises(ZooError, match="two of \\[B, T, H, K\\]"):
            favor_attention(q, k, v, w[:, :8])
        with pytest.raises(ZooError, match="initial_state"):
            favor_attention(q, k, v, w, state[:1])


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "dtype"), [(T, DTYPES[i % 3]) for i, T in enumerate(LENGTHS)])
def test_lengths_on_a_gpu(T: int, dtype: torch.dtype) -> None:
    check(inputs(T, 64, 64, 256), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "dtype"), [(K, DTYPES[(i + 1) % 3]) for i, K in enumerate(HEAD_SIZES[::2])])
def test_sizes_on_a_gpu(K: int, dtype: torch.dtype) -> None:
    check(inputs(129, K, 80 if K == 64 else K, 2 * K + 8), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_and_documents_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    borders = torch.tensor([0, 0, 5, 400, 400, 401, 1000, 1000], device=DEVICE)
    given = inputs(1000, 64, 64, 256, B=1, rows=7) | {"cu_seqlens": borders}
    check(given, dtype)
    cut_into_segments(monkeypatch)
    check(given, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [0, 31, 63, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causality_on_a_gpu(t: int, dtype: torch.dtype) -> None:
    assert past_moves(t, dtype) == 0


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    q, k, v = (torch.randn(8, 4096, 16, 64, device=DEVICE, dtype=torch.bfloat16) / 8 for _ in range(3))
    w = orthogonal_projection(256, 64, torch.Generator().manual_seed(0)).to(DEVICE)
    for x in (q, k, v):
        x.requires_grad_()
    with use_backend("triton"):
        for _ in range(2):
            q.grad = k.grad = v.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y, _ = favor_attention(q, k, v, w)
            y.backward(q.detach())
    assert torch.cuda.max_memory_allocated() - before < 37e9 / 20  # performer-pytorch: 37 GB


def builds() -> None:
    """The shapes of the benchmark, for `kernel_builds.py`."""
    from zoo.kernels import favor, favor_backward

    for dtype, K, m in ((torch.bfloat16, 64, 256), (torch.bfloat16, 128, 512), (torch.float32, 64, 256)):
        for w_dtype in {dtype, torch.float32}:
            x, w = torch.empty(256, 64, 1, K, dtype=dtype), torch.empty(m, K, dtype=w_dtype)
            y, _, log = favor.forward(x, x, x, w, None, None, None, None)
            favor_backward.backward(x, None, x, x, x, w, None, None, y, log, None, None)
