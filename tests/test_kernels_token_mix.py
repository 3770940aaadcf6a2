"""The kernels of token_mix and ddlerp against float64: in the interpreter on short rows, on a GPU on all of them."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DTYPES,
    LENGTHS,
    SHORT_LENGTHS,
    check_against_float64,
    compilations,
    eager_and_compiled,
    interpreted,
    outputs_and_gradients,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.ops import ddlerp_triton, token_mix_triton
from zoo.ops.backend import use_backend
from zoo.ops.token_mix import ddlerp, token_mix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEEP = ["base", "down", "mix", "up"]
Given = dict[str, Tensor]


def inputs(T: int, D: int = 32, R: int = 4, Z: int = 5, B: int = 2) -> Given:
    """Of ddlerp, or with R = 0 of token_mix."""
    generator = torch.Generator().manual_seed(T)
    shapes = {"x": (B, T, D), "mix": (Z, D)}
    if R:
        shapes |= {"base": (D,), "down": (D, Z * R), "up": (Z, R, D)}
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    if R:
        given["down"], given["up"] = given["down"] / D**0.5, given["up"] / R**0.5
    return {name: x.to(DEVICE) for name, x in given.items()}


def packed(total: int, *borders: int, D: int = 32, R: int = 4, Z: int = 5) -> Given:
    cu_seqlens = torch.tensor([0, *borders, total], dtype=torch.int32 if len(borders) % 2 else torch.int64)
    return inputs(total, D, R, Z, B=1) | {"cu_seqlens": cu_seqlens.to(DEVICE)}


def op(x: Tensor, mix: Tensor, base: Tensor | None = None, down: Tensor | None = None, up: Tensor | None = None,
       cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
    if base is None or down is None or up is None:
        return token_mix(x, mix, cu_seqlens=cu_seqlens)
    return ddlerp(x, base, down, mix, up, cu_seqlens=cu_seqlens)


def plain(x: Tensor, mix: Tensor, base: Tensor | None = None, down: Tensor | None = None, up: Tensor | None = None,
          cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
    """One after the other, in x's type throughout."""
    borders = [] if cu_seqlens is None else [border for border in cu_seqlens.tolist() if border < x.shape[1]]
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    before[:, borders] = 0
    weights = list(mix.to(x.dtype))
    if base is not None and down is not None and up is not None:
        low = torch.tanh((x + (before - x) * base.to(x.dtype)) @ down.to(x.dtype)).unflatten(-1, up.shape[:2])
        weights = [weight + low[:, :, z] @ up[z].to(x.dtype) for z, weight in enumerate(weights)]
    return tuple(x + (before - x) * weight for weight in weights)


@pytest.mark.parametrize("R", [0, 4])
def test_the_eager_path_is_the_equation(R: int) -> None:
    for given in (inputs(20, R=R), packed(20, 0, 3, 3, 19, R=R)):
        with use_backend("eager"):
            theirs, ours = (outputs_and_gradients(function, given) for function in (plain, op))
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name])


def check(given: Given, dtype: torch.dtype = torch.float32) -> None:
    check_against_float64(op, op, plain, given, dtype, keep=KEEP)


@interpreted
@pytest.mark.parametrize("T", [*SHORT_LENGTHS, 300])
@pytest.mark.parametrize("R", [0, 4])
def test_values_and_gradients(T: int, R: int) -> None:
    check(inputs(T, R=R))


@interpreted
@pytest.mark.parametrize(("D", "R", "Z"), [(48, 5, 5), (300, 17, 5), (7, 1, 5), (32, 0, 2), (600, 0, 1), (8, 0, 5)])
def test_widths(D: int, R: int, Z: int) -> None:
    check(inputs(40, D, R, Z))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("R", [0, 4])
def test_half_precision(dtype: torch.dtype, R: int) -> None:
    check(inputs(70, R=R), dtype)


@interpreted
@pytest.mark.parametrize("R", [0, 4])
@pytest.mark.parametrize("borders", [(0, 5, 69, 69, 70, 300), (1, 2, 3), (15, 16, 31, 32, 63, 254, 255)])
def test_documents(borders: tuple[int, ...], R: int) -> None:
    check(packed(300, *borders, R=R))


@interpreted
def test_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.kernels import ddlerp as kernels

    monkeypatch.setattr(kernels, "LEAST", 64)
    check(inputs(300))


@pytest.mark.parametrize("size", [1e-4, 0.3, 30.0])
def test_tanh_at_every_size(size: float) -> None:
    """Where its argument is small, too, its gradients are as good as its values."""
    given = inputs(30)
    given["down"] *= size
    check(given)


def touched(t: int, dtype: torch.dtype, R: int) -> bool:
    """Whether what is not token t or the one before it, of its own row, moves y_t, or dy of others dx_t, by a bit."""
    given = {name: x.to(torch.float32 if name in KEEP else dtype) for name, x in inputs(70, R=R).items()}
    cotangents = [torch.randn_like(given["x"]) for _ in range(5)]

    def results(x: Tensor, dys: list[Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = op(**given | {"x": leaf})
        return [each[0, t] for each in (*y, *torch.autograd.grad(y, leaf, dys))]

    with use_backend("triton"):
        before = results(given["x"], cotangents)
        for outlier in (100.0, float("nan")):
            x, *dys = (torch.full_like(each, outlier) for each in (given["x"], *cotangents))
            x[0, max(t - 1, 0) : t + 2] = given["x"][0, max(t - 1, 0) : t + 2]
            for new, old in zip(dys, cotangents, strict=True):
                new[0, t : t + 2] = old[0, t : t + 2]
            known = 6 if outlier == 100 else 5  # dx: a weight of 0 is multiplied with the NaN gradients of a tile
            if not all(torch.equal(a, b) for a, b in zip(results(x, dys)[:known], before[:known], strict=True)):
                return True
    return False


@interpreted
@pytest.mark.parametrize("t", [0, 15, 40, 69])
@pytest.mark.parametrize("R", [0, 4])
def test_only_neighbours_are_seen(t: int, R: int) -> None:
    assert not touched(t, torch.float32, R)


def test_the_token_before_the_first_is_given() -> None:
    """No kernel has it; the rest of the sequence is the same."""
    given = {name: x.float() for name, x in inputs(20).items()}
    previous = torch.randn(2, 32, device=DEVICE)
    whole = given | {"x": torch.cat([previous.unsqueeze(1), given["x"]], dim=1)}
    with use_backend("triton"):
        for ours, theirs in zip(ddlerp(**given, previous=previous), ddlerp(**whole), strict=True):
            torch.testing.assert_close(ours, theirs[:, 1:])
        for ours, theirs in zip(token_mix(given["x"], given["mix"], previous=previous),
                                token_mix(whole["x"], given["mix"]), strict=True):
            torch.testing.assert_close(ours, theirs[:, 1:])


@pytest.mark.parametrize("R", [0, 4])
def test_strided_inputs_and_expanded_gradients(R: int) -> None:
    whole = torch.randn(2, 20, 64, device=DEVICE).requires_grad_()
    given = {name: x.float() for name, x in inputs(20, R=R).items()}
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            y = op(**given | {"x": whole[..., 5:37], "mix": given["mix"].mT.contiguous().mT})
            results.append(torch.autograd.grad(y[0].sum() + y[3].sum(), whole)[0])
    torch.testing.assert_close(*results)


@interpreted
@pytest.mark.parametrize("R", [0, 4])
def test_no_tokens(R: int) -> None:
    given = {name: x.float().requires_grad_() for name, x in inputs(0, R=R).items()}
    with use_backend("triton"):
        torch.stack([y.sum() for y in op(**given)]).sum().backward()
    assert all(not x.grad.any() for x in given.values())


@interpreted
def test_wrong_shapes_are_refused() -> None:
    given = {name: x.float() for name, x in inputs(8).items()}
    with use_backend("triton"):
        with pytest.raises(ZooError, match="mix is"):
            token_mix(given["x"], given["mix"][:, :8])
        with pytest.raises(ZooError, match="down is"):
            ddlerp(**given | {"down": given["down"][:, :8]})
        with pytest.raises(ZooError, match="channels and rank 5000, 1; the kernels take 1 to 4096"):
            ddlerp(**{name: x.float() for name, x in inputs(2, 5000, 1).items()})


@pytest.mark.parametrize("R", [0, 4])
def test_results_are_the_same_every_time(R: int) -> None:
    given = {name: x.float() for name, x in inputs(300, R=R).items()}
    with use_backend("triton"):
        a, b = (outputs_and_gradients(op, given) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@interpreted
def test_the_operators_are_registered_as_they_should_be() -> None:
    given = {name: x.float().requires_grad_() for name, x in inputs(17).items()}
    x, base, down, mix, up = (given[name] for name in ("x", "base", "down", "mix", "up"))
    borders = torch.tensor([0, 4, 17])
    for own, documents in ((x, None), (x[:1], borders)):
        torch.library.opcheck(torch.ops.zoo.ddlerp.default, (own, base, down, mix, up, documents))
        torch.library.opcheck(torch.ops.zoo.token_mix.default, (own, mix[:2], documents))


@pytest.mark.parametrize("R", [0, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_compiled_equals_eager(documents: bool, R: int) -> None:
    given = {name: x.float() if x.is_floating_point() else x for name, x in
             (packed(17, 4, 9, R=R) if documents else inputs(17, R=R)).items()}
    eager, compiled = eager_and_compiled(op, given)
    assert eager["0"].dtype == torch.bfloat16
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_flops_are_counted() -> None:
    given = {name: x.float().requires_grad_() for name, x in inputs(17).items()}
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        y = op(**given)
        assert counter.get_total_flops() == 4 * 2 * 17 * 5 * 4 * 32
        torch.stack([each.sum() for each in y]).sum().backward()
    assert counter.get_total_flops() == 14 * 2 * 17 * 5 * 4 * 32


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "dtype"), [(T, DTYPES[i % 3]) for i, T in enumerate(LENGTHS)])
def test_lengths_on_a_gpu(T: int, dtype: torch.dtype) -> None:
    check(inputs(T, 256, 16), dtype)
    check(inputs(T, 256, 0, 2), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "R", "Z", "dtype"), [
    (512, 32, 5, torch.bfloat16), (768, 32, 5, torch.bfloat16), (128, 8, 5, torch.bfloat16),
    (1024, 64, 5, torch.float16), (100, 5, 5, torch.bfloat16), (512, 32, 5, torch.float32),
    (7, 1, 5, torch.float32), (768, 0, 2, torch.bfloat16), (1000, 0, 1, torch.float32), (256, 0, 5, torch.float16)])
def test_widths_on_a_gpu(D: int, R: int, Z: int, dtype: torch.dtype) -> None:
    check(inputs(333, D, R, Z), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [0, 16])
def test_documents_on_a_gpu(dtype: torch.dtype, R: int) -> None:
    for borders in ((0, 5, 69, 69, 70, 1300), (1, 2, 3), (15, 16, 31, 32, 33, 1023, 1024, 1025)):
        check(packed(1300, *borders, D=256, R=R), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [0, 15, 31, 40])
@pytest.mark.parametrize("R", [0, 4])
def test_only_neighbours_are_seen_on_a_gpu(t: int, R: int) -> None:
    assert not touched(t, torch.bfloat16, R)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(256, 16), (512, 32), (768, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_tests_pass(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    assert ddlerp_triton._self_test(torch.device(DEVICE), dtype, sizes) < 1
    assert token_mix_triton._self_test(torch.device(DEVICE), dtype, sizes[:1]) < 1


@pytest.mark.gpu
def test_other_lengths_and_documents_build_nothing() -> None:
    def step(B: int, T: int, *borders: int) -> None:
        for R in (0, 16):
            given = packed(T, *borders, D=256, R=R) if borders else inputs(T, 256, R, B=B)
            outputs_and_gradients(op, {name: x.bfloat16() if x.is_floating_point() else x for name, x in given.items()})

    with use_backend("triton"):
        step(2, 1000)
        with compilations() as seen:
            for case in ((1, 1), (2, 40), (1, 4096), (1, 100, 3, 3), (1, 2000, 1500)):
                step(*case)
    assert not seen, seen


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    """Five mixtures, x' - x, low, dlow, dx, dpre twice, parts of the gradients of up and mix."""
    given = {name: x.to(torch.float32 if name in KEEP else torch.bfloat16).requires_grad_()
             for name, x in inputs(1024, 256, 16, B=8).items()}
    with use_backend("triton"):
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = op(**given)
            torch.autograd.grad(y, list(given.values()), [given["x"].detach()] * 5)
    size, low, segments = 2 * y[0].numel(), 2 * 8 * 1024 * 5, 8192 // 256
    parameters = 4 * 256 * segments * 5 * 17
    assert torch.cuda.max_memory_allocated() - before <= 7 * size + low * (16 + 16 + 32) + parameters + 2**20


def builds() -> None:
    """The shapes of the models, for `kernel_builds.py`."""
    for dtype, D, R in ((torch.bfloat16, 256, 16), (torch.bfloat16, 512, 32), (torch.float32, 256, 16)):
        x, mix = torch.empty(1, 32, D, dtype=dtype).requires_grad_(), torch.empty(5, D)
        y = ddlerp_triton.ddlerp_triton(x, mix[0], torch.empty(D, 5 * R), mix, torch.empty(5, R, D), None)
        torch.autograd.grad(y, x, y)
        y = token_mix_triton.token_mix_triton(x, mix[:2], None)
        torch.autograd.grad(y, x, y)
