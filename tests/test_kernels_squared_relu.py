"""The kernel of squared_relu against float64: in the interpreter on few tokens, on a GPU on models' widths."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
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
from zoo.ops import squared_relu_triton as registered
from zoo.ops.backend import use_backend
from zoo.ops.squared_relu import squared_relu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(T: int, D: int = 32, F: int = 80, B: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = {"x": (B, T, D), "inner": (F, D), "outer": (D, F)}
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    given["inner"], given["outer"] = given["inner"] / D**0.5, given["outer"] / F**0.5
    return {name: x.to(DEVICE) for name, x in given.items()}


def plain(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    k = (x @ inner.mT).clamp_min(0)
    return (k * k) @ outer.mT


def check(given: dict[str, Tensor]) -> None:
    check_against_float64(squared_relu, squared_relu, plain, given, torch.bfloat16)


def test_the_eager_path_is_the_equation() -> None:
    given = inputs(20)
    with use_backend("eager"):
        theirs, ours = (outputs_and_gradients(function, given) for function in (plain, squared_relu))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name])


@interpreted
@pytest.mark.parametrize("T", [*SHORT_LENGTHS, 200])
def test_values_and_gradients(T: int) -> None:
    check(inputs(T))


@interpreted
@pytest.mark.parametrize(("D", "F"), [(64, 128), (100, 30), (7, 300)])
def test_widths(D: int, F: int) -> None:
    check(inputs(40, D, F))


@interpreted
def test_outliers_and_what_is_not_above_0() -> None:
    given = inputs(40)
    given["x"][:, 3] *= 1000
    given["x"][:, 5] = 0
    given["inner"][7] = -given["inner"][7].abs()
    check(given)


@interpreted
def test_no_tokens_and_no_wrong_shapes() -> None:
    given = {name: x.bfloat16().requires_grad_() for name, x in inputs(0).items()}
    with use_backend("triton"):
        squared_relu(**given).sum().backward()
        assert all(not x.grad.any() for x in given.values())
        with pytest.raises(ZooError, match="outer is"):
            squared_relu(**given | {"outer": given["inner"]})


def test_other_dtypes_are_eager() -> None:
    """float32 has as many digits as it had, under any backend."""
    given = {name: x.float() for name, x in inputs(9).items()}
    with use_backend("triton"):
        torch.testing.assert_close(squared_relu(**given), plain(**given))


def test_strided_inputs_and_expanded_gradients() -> None:
    given = {name: x.bfloat16() for name, x in inputs(20).items()}
    whole = torch.randn(2, 20, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            y = squared_relu(whole[..., 5:37], given["inner"].mT.contiguous().mT, given["outer"])
            results.append(torch.autograd.grad(y.sum(), whole)[0].float())
    assert (results[0] - results[1]).norm() < 2e-2 * results[1].norm()


def test_results_are_the_same_every_time() -> None:
    given = {name: x.bfloat16() for name, x in inputs(200).items()}
    with use_backend("triton"):
        a, b = (outputs_and_gradients(squared_relu, given) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@interpreted
def test_the_operator_is_registered_as_it_should_be() -> None:
    x, inner, outer = (x.bfloat16().requires_grad_() for x in inputs(17).values())
    torch.library.opcheck(torch.ops.zoo.squared_relu.default, (x.detach()[0].requires_grad_(), inner, outer))


def test_compiled_equals_eager() -> None:
    given = {name: x.float() for name, x in inputs(17).items()}
    eager, compiled = eager_and_compiled(squared_relu, given)
    assert eager["0"].dtype == torch.bfloat16
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_flops_are_counted() -> None:
    given = {name: x.bfloat16().requires_grad_() for name, x in inputs(17).items()}
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        y = squared_relu(**given)
        assert counter.get_total_flops() == 2 * 2 * 2 * 17 * 32 * 80
        y.sum().backward()
    assert counter.get_total_flops() == 6 * 2 * 2 * 17 * 32 * 80


@pytest.mark.gpu
@pytest.mark.parametrize("T", LENGTHS)
def test_lengths_on_a_gpu(T: int) -> None:
    check(inputs(T, 256, 640))


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "F"), [(128, 320), (512, 1280), (768, 1984), (100, 300), (64, 96), (7, 1)])
def test_widths_on_a_gpu(D: int, F: int) -> None:
    check(inputs(333, D, F))


@pytest.mark.gpu
def test_the_self_test_passes() -> None:
    assert registered._self_test(torch.device(DEVICE), torch.bfloat16, (640, 256)) < 1


@pytest.mark.gpu
def test_other_lengths_build_nothing() -> None:
    def step(B: int, T: int) -> None:
        outputs_and_gradients(squared_relu, {name: x.bfloat16() for name, x in inputs(T, 256, 640, B=B).items()})

    with use_backend("triton"):
        step(2, 1000)
        with compilations() as seen:
            for case in ((1, 1), (2, 40), (1, 4096)):
                step(*case)
    assert not seen, seen


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    """y, h, dk, dx, the weights' gradients."""
    leaves = [x.bfloat16().requires_grad_() for x in inputs(1024, 256, 640, B=16).values()]
    with use_backend("triton"):
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = squared_relu(*leaves)
            torch.autograd.grad(y, leaves, leaves[0].detach())
    rows = 2 * 16 * 1024
    assert torch.cuda.max_memory_allocated() - before <= rows * 2 * (256 + 640) + 2 * 2 * 2 * 256 * 640 + 2**20


def builds() -> None:
    """The shapes of the models, for `kernel_builds.py`."""
    for D, F in ((256, 640), (512, 1280)):
        x, inner, outer = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((32, D), (F, D), (D, F)))
        y = registered.squared_relu_triton(x.requires_grad_(), inner, outer)
        torch.autograd.grad(y, x, y)
