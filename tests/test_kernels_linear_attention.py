"""The kernels of linear attention against float64: in the interpreter on short sequences, on a GPU on all of them."""

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
from zoo.ops import linear_attention_triton as registered
from zoo.ops.backend import use_backend
from zoo.ops.linear_attention import linear_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(T: int, K: int = 16, V: int = 24, B: int = 2, H: int = 2, rows: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "initial_state": (rows or B, H, K, V)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
            for name, shape in shapes.items()}


def plain(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor,
          cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As one writes it in PyTorch."""
    if cu_seqlens is not None:
        parts = [plain(q[:, a:b], k[:, a:b], v[:, a:b], initial_state[n : n + 1])
                 for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))]
        return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    y = torch.einsum("bhts,bshv->bthv", scores, v) + torch.einsum("bthk,bhkv->bthv", q, initial_state.to(q.dtype))
    return y, initial_state + torch.einsum("bthk,bthv->bhkv", k, v)


def check(given: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    check_against_float64(linear_attention, linear_attention, plain, given, dtype, keep=["initial_state"])


def cut_into_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.kernels import linear_attention as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 10**6)  # as many as there are chunks


@interpreted
@pytest.mark.parametrize("T", SHORT_LENGTHS)
def test_values_and_gradients(T: int) -> None:
    check(inputs(T))


@interpreted
@pytest.mark.parametrize("T", [16, 65, 130])
def test_rows_cut_into_segments(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into_segments(monkeypatch)
    check(inputs(T, B=1))


@interpreted
def test_many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the scan takes at a time."""
    cut_into_segments(monkeypatch)
    check(inputs(18 * 64 - 3, B=1, H=1))


@interpreted
@pytest.mark.parametrize(("K", "V"), [(40, 80), (5, 1), (256, 16)])
def test_widths(K: int, V: int) -> None:
    check(inputs(17, K, V, B=1, H=1))


@interpreted
def test_bfloat16_and_mixed_types() -> None:
    check(inputs(70, B=1), torch.bfloat16)
    given = {name: x.float() for name, x in inputs(70, B=1).items()}
    given["v"] = given["v"].bfloat16()
    with use_backend("triton"):
        y, state = linear_attention(**given)
    exact, _ = linear_attention(*(x.double() for x in given.values()))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (y - exact).norm() < 2e-2 * exact.norm()


@interpreted
@pytest.mark.parametrize("borders", [[0, 0, 5, 69, 69, 70, 140, 140], [0, 140], [0, 1, 2, 3, 140]])
def test_documents(borders: list[int]) -> None:
    given = inputs(140, B=1, rows=len(borders) - 1)
    check(given | {"cu_seqlens": torch.tensor(borders, dtype=torch.int32, device=DEVICE)})


@interpreted
def test_documents_of_several_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into_segments(monkeypatch)
    check(inputs(200, B=1, H=1, rows=2) | {"cu_seqlens": torch.tensor([0, 150, 200], device=DEVICE)})


@interpreted
@pytest.mark.parametrize("cut", [False, True])
def test_states_kept_for_the_backward_pass(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows and of documents, in rows that are cut and that are not; none where nobody asks for gradients."""
    if cut:
        cut_into_segments(monkeypatch)
    check(inputs(150, B=1), torch.bfloat16)
    borders = torch.tensor([0, 0, 5, 134, 134, 140], device=DEVICE)
    check(inputs(140, B=1, H=1, rows=5) | {"cu_seqlens": borders}, torch.bfloat16)
    q, k, v, _ = (x.bfloat16() for x in inputs(140, B=1).values())
    assert registered.linear_attention(q, k, v, None, None, True)[2].shape == (3, 2, 16, 24)
    assert registered.linear_attention(q, k, v, None, None, False)[2].numel() == 0


def test_strided_inputs_and_expanded_gradients() -> None:
    fused = torch.randn(2, 20, 2 * 3 * 16 + 5, device=DEVICE)[..., 5:].requires_grad_()
    per_token = torch.randn(2, 16, 20, device=DEVICE).permute(2, 0, 1).expand(2, -1, -1, -1)  # as Linformer's E
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            q, _, v = (x.unflatten(-1, (2, 16)) for x in fused.chunk(3, dim=-1))
            results.append(torch.autograd.grad(linear_attention(q, per_token, v)[0].sum(), fused)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


@interpreted
def test_no_tokens_pass_the_state_on() -> None:
    given = {name: x.float().requires_grad_() for name, x in inputs(0).items()}
    with use_backend("triton"):
        y, state = linear_attention(**given)
        state.sum().backward()
    assert y.shape == given["v"].shape
    assert torch.equal(state, given["initial_state"])
    assert (given["initial_state"].grad == 1).all()


def past_moves(t: int, dtype: torch.dtype, T: int = 131) -> float:
    q, k, v, state = (x.to(dtype) for x in inputs(T).values())
    with use_backend("triton"):
        before = linear_attention(q, k, v, state)[0][0, : t + 1]
        for outlier in (100.0, float("nan")):
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[0, t + 1 :] = outlier * torch.randn_like(x[0, t + 1 :])
                x[1] = outlier
            after = linear_attention(*changed, state)[0][0, : t + 1]
            # a masked weight of 0 is multiplied with NaN values of its chunk: only later chunks may be anything
            known = slice(0, t + 1 if outlier == 100 else (t + 1) // 64 * 64)
            if not torch.equal(after[known], before[known]):
                return float("inf")
    return 0.0


@interpreted
@pytest.mark.parametrize("t", [0, 63, 64, 127])
def test_the_future_and_other_rows_move_nothing(t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert past_moves(t, torch.float32) == 0
    if t == 64:
        cut_into_segments(monkeypatch)
        assert past_moves(t, torch.float32) == 0


def test_results_are_the_same_every_time() -> None:
    given = {name: x.float() for name, x in inputs(70).items()}
    with use_backend("triton"):
        a, b = (outputs_and_gradients(linear_attention, given) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@interpreted
def test_the_operator_is_registered_as_it_should_be() -> None:
    given = [x.float().requires_grad_() for x in inputs(17, B=1).values()]
    torch.library.opcheck(registered.linear_attention.overload, (*given, None, True))
    torch.library.opcheck(registered.linear_attention.overload, (*given[:3], None, torch.tensor([0, 4, 17]), False))


def test_compiled_equals_eager() -> None:
    given = {name: x.float() for name, x in inputs(17, B=1).items()}
    eager, compiled = eager_and_compiled(linear_attention, given)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name])


def test_flops_are_counted() -> None:
    given = {name: x.float().requires_grad_() for name, x in inputs(17, B=1).items()}
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        y, state = linear_attention(**given)
        assert counter.get_total_flops() == 4 * 17 * 2 * 16 * 24
        (y.sum() + state.sum()).backward()
    assert counter.get_total_flops() == 14 * 17 * 2 * 16 * 24


def test_wrong_shapes_are_refused() -> None:
    q, k, v, state = (x.float() for x in inputs(8).values())
    with use_backend("triton"):
        with pytest.raises(ZooError, match="two of \\[B, T, H, K\\]"):
            linear_attention(q, k[..., :8], v)
        with pytest.raises(ZooError, match="initial_state"):
            linear_attention(q, k, v, state[:1])
        with pytest.raises(ZooError, match="kernels take 1 to 256"):
            linear_attention(*(torch.ones(1, 4, 1, 300, device=DEVICE),) * 3)


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "dtype"), [(T, DTYPES[i % 3]) for i, T in enumerate(LENGTHS)])
def test_lengths_on_a_gpu(T: int, dtype: torch.dtype) -> None:
    check(inputs(T, 64, 64), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V", "dtype"), [(K, HEAD_SIZES[-1 - i], DTYPES[i % 3]) for i, K in
                                               enumerate(HEAD_SIZES)])
def test_widths_on_a_gpu(K: int, V: int, dtype: torch.dtype) -> None:
    check(inputs(129, K, V), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_and_documents_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    borders = torch.tensor([0, 0, 5, 400, 400, 401, 1000, 1000], device=DEVICE)
    check(inputs(1000, 64, 64, B=1, rows=7) | {"cu_seqlens": borders}, dtype)
    cut_into_segments(monkeypatch)
    check(inputs(1000, 64, 64, B=1, rows=7) | {"cu_seqlens": borders}, dtype)
    check(inputs(2000, 64, 64, B=1), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [0, 63, 64, 127])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causality_on_a_gpu(t: int, dtype: torch.dtype) -> None:
    assert past_moves(t, dtype) == 0


@pytest.mark.gpu
def test_long_rows_on_a_gpu() -> None:
    """Offsets past 2^31: the last rows of a large tensor are as right as if they came alone."""
    q = torch.randn(1, 2**18 + 5, 8, 64, device=DEVICE, dtype=torch.bfloat16)
    wide = torch.empty(1, 2**18 + 5, 8, 1100, device=DEVICE, dtype=torch.bfloat16)[..., :64]
    wide.copy_(q)
    assert wide.stride(1) * wide.shape[1] > 2**31
    with use_backend("triton"):
        assert all(torch.equal(a, b) for a, b in zip(linear_attention(q, wide, q), linear_attention(q, q, q),
                                                     strict=True))


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    q, k, v = (torch.randn(4, 4096, 8, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with use_backend("triton"):
        for _ in range(2):
            q.grad = k.grad = v.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y, _ = linear_attention(q, k, v)
            y.backward(q.detach())
    size, segments = 2 * q.numel(), 4 * 8
    states = 4 * 8 * segments * 64 * 64
    kept = 2 * 4 * 4096 // 64 * 8 * 64 * 64
    assert torch.cuda.max_memory_allocated() - before <= 4 * size + kept + 4 * states + 2**22


def builds() -> None:
    """The shapes of the benchmark, for `kernel_builds.py`."""
    from zoo.kernels import linear_attention as kernels
    from zoo.kernels.linear_attention_backward import backward

    for dtype, K, V in ((torch.bfloat16, 64, 64), (torch.bfloat16, 256, 64), (torch.bfloat16, 128, 128),
                        (torch.float32, 64, 64), (torch.float32, 256, 256)):
        q, v, first = torch.empty(2, 64, 1, K, dtype=dtype), torch.empty(2, 64, 1, V, dtype=dtype), None
        shape = registered.kept_states(q, q, v, None)
        kept = torch.empty(shape, dtype=dtype) if len(shape) > 1 else None
        kernels.forward(q, q, v, first, None, kept)
        backward(v, None, q, q, v, first, None, kept)
    borders = torch.tensor([0, 3, 64])
    kernels.forward(q[:1], q[:1], v[:1], first, borders, None)
