"""The kernels of WKV-6 against float64: in the interpreter on short sequences, on a GPU on all of them."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DTYPES,
    HEAD_SIZES,
    LENGTHS,
    SHORT_LENGTHS,
    compilations,
    eager_and_compiled,
    interpreted,
    outputs_and_gradients,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from wkv6_cases import KEEP, check, check_decays, inputs

from zoo.errors import ZooError
from zoo.ops import wkv6_triton as registered
from zoo.ops.backend import use_backend
from zoo.ops.wkv6 import wkv6, wkv6_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cut_into_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.kernels import wkv6_parts as parts

    monkeypatch.setattr(parts, "PROGRAMS", 10**6)
    monkeypatch.setattr(parts, "SEGMENT", 32)


def chunks_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of another size than the configuration's."""
    from zoo.kernels import wkv6_parts as parts

    monkeypatch.setitem(parts.CONFIGS, (64, 2), (size, parts.CONFIGS[64, 2][1]))


@interpreted
@pytest.mark.parametrize("T", SHORT_LENGTHS)
def test_values_and_gradients(T: int) -> None:
    check(inputs(T))


@interpreted
def test_rows_cut_into_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into_segments(monkeypatch)
    check(inputs(100, B=1))


@interpreted
@pytest.mark.parametrize(("K", "V"), [(40, 80), (5, 1), (256, 16)])
def test_widths(K: int, V: int) -> None:
    check(inputs(17, K, V, B=1, H=1))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(inputs(50, B=1, H=1), dtype)


@interpreted
def test_chunks_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(16, monkeypatch)
    check(inputs(70, B=1, H=1), torch.bfloat16)
    check(extreme("all at random", 40), torch.bfloat16)


@interpreted
@pytest.mark.parametrize("borders", [[0, 0, 5, 69, 69, 70, 100, 100], [0, 1, 2, 3, 100]])
def test_documents(borders: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(100, B=1, H=1, rows=len(borders) - 1)
    check(given | {"cu_seqlens": torch.tensor(borders, dtype=torch.int32, device=DEVICE)})
    cut_into_segments(monkeypatch)
    check(given | {"cu_seqlens": torch.tensor(borders, device=DEVICE)})


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decays_of_their_logarithms_logarithm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_decays(inputs(70, B=1), dtype)
    cut_into_segments(monkeypatch)
    borders = torch.tensor([0, 0, 5, 70, 100, 100], device=DEVICE)
    check_decays(inputs(100, 24, 40, B=1, H=1, rows=5) | {"cu_seqlens": borders}, dtype)


def extreme(kind: str, T: int = 70, K: int = 16) -> dict[str, Tensor]:
    given = inputs(T, K, B=1, H=1)
    log_decay = given["log_decay"]
    steps = torch.tensor([-1e-6, -20.0, -80.0, -3.0], dtype=torch.float64, device=DEVICE)
    match kind:
        case "forgets nothing":
            log_decay.fill_(-1e-6)
        case "forgets fast":
            log_decay.fill_(-20)
        case "forgets at once":
            log_decay.fill_(-80)
        case "just not too steep for factors":
            log_decay.fill_(-3.5)
        case "all at random":
            log_decay.copy_(steps[torch.randint(4, log_decay.shape)])
        case "steep, then flat":
            log_decay.copy_(torch.where(torch.arange(T, device=DEVICE) % 32 < 10, -80, -0.1)[None, :, None, None])
        case "large keys":
            given["k"].copy_(90 * given["k"].sign())
            log_decay.copy_(steps[torch.randint(4, log_decay.shape)])
        case "one token":
            for name in "rkv":
                given[name][:, 33] *= 1000
    return given


EXTREMES = ["forgets nothing", "forgets fast", "forgets at once", "just not too steep for factors", "all at random",
            "steep, then flat", "large keys", "one token"]


@interpreted
@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes(kind: str) -> None:
    check(extreme(kind, 40))


@interpreted
@pytest.mark.parametrize("kind", ["all at random", "just not too steep for factors"])
def test_extremes_in_bfloat16(kind: str) -> None:
    check(extreme(kind, 40), torch.bfloat16)


@pytest.mark.parametrize(("dtype", "of_decay"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_infinite_decay_forgets_all(dtype: torch.dtype, of_decay: torch.dtype) -> None:
    given = {name: x.float() if name in KEEP else x.to(dtype) for name, x in inputs(36, B=1, H=1).items()}
    given["log_decay"] = given["log_decay"].to(of_decay)
    given["log_decay"][:, [3, 20]] = -torch.inf
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            results.append(outputs_and_gradients(wkv6, given))
    assert (results[0]["dlog_decay"][:, [3, 20]] == 0).all()
    for name in results[1]:
        assert (results[0][name] - results[1][name]).norm() <= 3e-2 * results[1][name].norm(), name


def test_a_decay_that_is_no_number_shows() -> None:
    given = [x.bfloat16() for x in inputs(40, B=1, H=1).values()]
    given[3][0, 10, 0, 5] = torch.nan
    with use_backend("triton"):
        y, state = wkv6_of(*given[:4], torch.zeros(1, 16, device=DEVICE), given[4].float(), given[5].float())
    assert y[0, 32:].isnan().any(dim=-1).all()
    assert state[0, 0, 5].isnan().all()
    assert not state[0, 0, :5].isnan().any()


def test_strided_inputs_and_expanded_gradients() -> None:
    """Splits of one projection at an offset; RWKV-5: one decay for all tokens."""
    fused = torch.randn(2, 20, 2 * 3 * 16 + 5, device=DEVICE)[..., 5:].requires_grad_()
    static = torch.rand(2, 16, device=DEVICE).requires_grad_()
    u = torch.randn(2, 16, device=DEVICE)
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            r, k, v = (x.unflatten(-1, (2, 16)) for x in fused.chunk(3, dim=-1))
            y, _ = wkv6(r, k, v, -static, u)
            results.append(torch.autograd.grad(y.sum(), (fused, static)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@interpreted
def test_no_tokens_pass_the_state_on() -> None:
    given = {name: x.float().requires_grad_() for name, x in inputs(0).items()}
    with use_backend("triton"):
        y, state = wkv6(**given)
        state.sum().backward()
    assert y.shape == given["v"].shape
    assert torch.equal(state, given["initial_state"])
    assert (given["initial_state"].grad == 1).all()


def past_moves(t: int, dtype: torch.dtype, T: int = 65) -> float:
    """How far what comes after t moves y up to t: not a bit for r, k, v, by rounding for the decays of t's block."""
    given = {name: x.float() if name in KEEP else x.to(dtype) for name, x in inputs(T).items()}
    with use_backend("triton"):
        before = wkv6(**given)[0][0, : t + 1]
        for outlier in (100.0, float("nan")):
            changed = {name: x.clone() for name, x in given.items()}
            for name in "rkv":
                changed[name][0, t + 1 :] = outlier * torch.randn_like(changed[name][0, t + 1 :])
                changed[name][1] = outlier
            after = wkv6(**changed)[0][0, : t + 1]
            # a masked weight of 0 is multiplied with NaN values of its chunk: only later chunks may be anything
            known = slice(0, t + 1 if outlier == 100 else (t + 1) // 32 * 32)
            if not torch.equal(after[known], before[known]):
                return float("inf")
        changed["log_decay"][0, t + 1 :] *= 1000
        changed["r"], changed["k"], changed["v"] = given["r"], given["k"], given["v"]
        after = wkv6(**changed)[0][0, : t + 1]
    known = slice(0, (t + 1) // 32 * 32)
    return float((after - before).norm() / before.norm()) if torch.equal(after[known], before[known]) else float("inf")


@interpreted
@pytest.mark.parametrize("t", [15, 40])
def test_the_future_and_other_rows_move_nothing(t: int) -> None:
    assert past_moves(t, torch.float32) < 1e-6


def test_results_are_the_same_every_time() -> None:
    given = {name: x.float() for name, x in inputs(40, B=1).items()}
    with use_backend("triton"):
        a, b = (outputs_and_gradients(wkv6, given) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@interpreted
def test_the_operator_is_registered_as_it_should_be() -> None:
    given = [x.float().requires_grad_() for x in inputs(17, B=1).values()]
    torch.library.opcheck(registered._forward, (*given, None, True))
    torch.library.opcheck(registered._forward, (*given[:5], None, torch.tensor([0, 4, 17]), True))
    torch.library.opcheck(registered._forward, (*given, None, True, torch.zeros(2, 16, requires_grad=True)))


def test_compiled_equals_eager() -> None:
    given = {name: x.float() for name, x in inputs(17, B=1).items()}
    given["v"] = given["v"].bfloat16()
    eager, compiled = eager_and_compiled(wkv6, given)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name])


def test_flops_are_counted() -> None:
    given = {name: x.float().requires_grad_() for name, x in inputs(17, B=1).items()}
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        y, state = wkv6(**given)
        assert counter.get_total_flops() == 4 * 17 * 2 * 16 * 24
        (y.sum() + state.sum()).backward()
    assert counter.get_total_flops() == 12 * 17 * 2 * 16 * 24


def test_no_gradient_wanted_keeps_no_states() -> None:
    given = [x.float() for x in inputs(17, B=1).values()]
    assert registered._forward(*given, None, False)[2].numel() == 0


def test_wrong_shapes_are_refused() -> None:
    r, k, v, log_decay, u, state = (x.float() for x in inputs(8).values())
    with use_backend("triton"):
        with pytest.raises(ZooError, match="k is"):
            wkv6(r, k[..., :8], v, log_decay, u)
        with pytest.raises(ZooError, match="initial_state is"):
            wkv6(r, k, v, log_decay, u, state[:1])
        wide = torch.ones(1, 4, 1, 300, device=DEVICE)
        with pytest.raises(ZooError, match="kernels take 1 to 256"):
            wkv6(wide, wide, wide, -wide, wide[0, 0])


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "dtype"), [(T, DTYPES[i % 3]) for i, T in enumerate(LENGTHS)])
def test_lengths_on_a_gpu(T: int, dtype: torch.dtype) -> None:
    check(inputs(T, 64, 64), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "V", "dtype"), [
    *((K, V, DTYPES[i % 3]) for i, (K, V) in enumerate(zip(HEAD_SIZES, HEAD_SIZES[::-1], strict=True))),
    (64, 64, torch.float16), (128, 128, torch.bfloat16), (256, 64, torch.bfloat16), (5, 1, torch.float32)])
def test_widths_on_a_gpu(K: int, V: int, dtype: torch.dtype) -> None:
    check(inputs(129, K, V), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_decays_of_their_logarithms_logarithm_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    check_decays(inputs(333, 64, 64), dtype)
    check_decays(inputs(65, 128, 80), dtype)
    cut_into_segments(monkeypatch)
    borders = torch.tensor([0, 0, 5, 200, 200, 201, 500, 500], device=DEVICE)
    check_decays(inputs(500, 64, 64, B=1, rows=7) | {"cu_seqlens": borders}, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_and_documents_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    borders = torch.tensor([0, 0, 5, 200, 200, 201, 500, 500], device=DEVICE)
    check(inputs(500, 64, 64, B=1, rows=7) | {"cu_seqlens": borders}, dtype)
    cut_into_segments(monkeypatch)
    check(inputs(500, 64, 64, B=1, rows=7) | {"cu_seqlens": borders}, dtype)
    check(inputs(500, 64, 64, B=1), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes_on_a_gpu(kind: str) -> None:
    check(extreme(kind, K=64), torch.float32)
    check(extreme(kind, K=64), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [0, 15, 31, 40])
def test_causality_on_a_gpu(t: int) -> None:
    assert past_moves(t, torch.bfloat16) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_test_passes(dtype: torch.dtype) -> None:
    assert registered._self_test(torch.device(DEVICE), dtype, (64, 64)) < 1
    assert registered._self_test_of(torch.device(DEVICE), dtype, (64, 64)) < 1


@pytest.mark.gpu
def test_chunks_of_one_block_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(16, monkeypatch)
    check(inputs(129, 64, 64), torch.bfloat16)


@pytest.mark.gpu
def test_rows_segments_and_documents_share_their_builds() -> None:
    """Once a row was long enough to be cut, nothing is specialised anew for other lengths, batches and documents.

    The table of documents is no part of the op: every op's is made by one small kernel, built here beforehand.
    """
    from zoo.kernels._common import document_chunks

    def step(B: int, T: int, borders: list[int] | None = None) -> None:
        given = {name: x.float() if name in KEEP else x.bfloat16() for name, x in inputs(T, 64, 64, B).items()}
        del given["initial_state"]
        if borders:
            given["cu_seqlens"] = torch.tensor(borders, device=DEVICE)
        outputs_and_gradients(lambda **x: wkv6(**x)[0], given)

    document_chunks(torch.tensor([0, 20, 50], device=DEVICE), 50, 16)
    with use_backend("triton"):
        step(1, 1000)
        with compilations() as seen:
            for case in ((1, 1), (2, 40), (1, 256), (1, 3000), (1, 100, [0, 3, 3, 100]), (1, 2000, [0, 1500, 2000])):
                step(*case)
    assert not seen, seen


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    """In bf16: y, four gradients; for 32 tokens a state and their pairs; states at segments' borders in float32."""
    given = [torch.randn(8, 1024, 8, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    given[3] = -given[3].abs()
    leaves = [x.requires_grad_() for x in (*given, torch.randn(8, 64, device=DEVICE))]
    with use_backend("triton"):
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y, _ = wkv6(*leaves)
            torch.autograd.grad(y, leaves, given[0].detach())
    size, states, borders = 2 * y.numel(), 2 * 8 * 32 * 8 * (64 * 64 + 32 * 32), 4 * 8 * 4 * 8 * 64 * 64
    assert torch.cuda.max_memory_allocated() - before <= 5 * size + states + borders + 2**22


def builds() -> None:
    """The shapes of the benchmark, for `kernel_builds.py`."""
    for dtype, K in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 64)):
        x, u = (torch.empty(shape, dtype=dtype).requires_grad_() for shape in ((1, 32, 1, K), (1, K)))
        y, _ = registered.wkv6_triton(x, x, x, x, u, None, None)
        torch.autograd.grad(y, (x, u), y)
    x = torch.empty(1, 32, 1, 64, dtype=torch.bfloat16).requires_grad_()
    y, _ = registered.wkv6_triton(x, x, x, x, torch.empty(1, 64), None, None, torch.empty(1, 64))
    torch.autograd.grad(y, x, y)
    x = torch.empty(1, 256, 1, 64).requires_grad_()
    y, _ = registered.wkv6_triton(x, x, x, x, u[:, :64], None, torch.tensor([0, 3, 256]))
    torch.autograd.grad(y, x, y)
