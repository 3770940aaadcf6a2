"""The kernels of linears against float64: in the interpreter on few tokens, on a GPU on models' widths."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    LENGTHS,
    check_against_float64,
    compilations,
    eager_and_compiled,
    interpreted,
    outputs_and_gradients,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.ops import linears_triton as registered
from zoo.ops.backend import use_backend
from zoo.ops.linears import linears

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(T: int, D: int = 32, F: int = 48, B: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)
    given = {f"x{i}": torch.randn(B, T, D, generator=generator, dtype=torch.float64) for i in range(4)}
    given |= {f"w{i}": torch.randn(F, D, generator=generator, dtype=torch.float64) / D**0.5 for i in range(4)}
    return {name: x.to(DEVICE) for name, x in given.items()}


def op(**given: Tensor) -> tuple[Tensor, ...]:
    return linears([given[f"x{i}"] for i in range(4)], [given[f"w{i}"] for i in range(4)])


def plain(**given: Tensor) -> tuple[Tensor, ...]:
    return tuple(given[f"x{i}"] @ given[f"w{i}"].mT for i in range(4))


def check(given: dict[str, Tensor]) -> None:
    check_against_float64(op, op, plain, given, torch.bfloat16)


@interpreted
@pytest.mark.parametrize(("T", "D", "F"), [(1, 32, 48), (70, 32, 48), (300, 100, 30), (40, 300, 7)])
def test_values_and_gradients(T: int, D: int, F: int) -> None:
    check(inputs(T, D, F))


def test_gradients_under_autocast_are_of_float32() -> None:
    """They have more digits than a product in bf16 would leave of them."""
    given = {name: x.float().requires_grad_() for name, x in inputs(40).items()}
    dy = [torch.randn(2, 40, 48, device=DEVICE).bfloat16() for _ in range(4)]
    with torch.autocast(DEVICE, torch.bfloat16), use_backend("triton"):
        y = op(**given)
        dw = torch.autograd.grad(y, [given[f"w{i}"] for i in range(4)], dy)
    for i in range(4):
        exact = dy[i].double().flatten(0, 1).mT @ given[f"x{i}"].bfloat16().double().flatten(0, 1)
        assert y[i].dtype == torch.bfloat16
        assert dw[i].dtype == torch.float32
        torch.testing.assert_close(dw[i].double(), exact, rtol=1e-5, atol=1e-5)


@interpreted
def test_no_tokens_and_no_wrong_shapes() -> None:
    given = {name: x.bfloat16().requires_grad_() for name, x in inputs(0).items()}
    with use_backend("triton"):
        torch.stack(op(**given)).sum().backward()
        assert all(x.grad is not None and not x.grad.any() for x in given.values())
        with pytest.raises(ZooError, match="weight 2 is"):
            op(**given | {"w2": given["w2"].mT})


def test_one_output_alone_strided_inputs_and_expanded_gradients() -> None:
    given = {name: x.bfloat16() for name, x in inputs(20).items()}
    whole = torch.randn(2, 20, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            y = op(**given | {"x1": whole[..., 5:37], "w1": given["w1"].mT.contiguous().mT})
            results.append(torch.autograd.grad(y[1].sum(), whole)[0])
    torch.testing.assert_close(*results)


def test_results_are_the_same_every_time() -> None:
    given = {name: x.bfloat16() for name, x in inputs(200).items()}
    with use_backend("triton"):
        a, b = (outputs_and_gradients(op, given) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_others_are_eager() -> None:
    """float32, and other numbers of layers, under any backend."""
    given = {name: x.float() for name, x in inputs(9).items()}
    with use_backend("triton"):
        torch.testing.assert_close(op(**given), plain(**given))
        half = [given[name].bfloat16() for name in ("x0", "x1", "w0", "w1")]
        torch.testing.assert_close(linears(half[:2], half[2:])[1], half[1] @ half[3].mT)


@interpreted
def test_the_operator_is_registered_as_it_should_be() -> None:
    given = [x.bfloat16().flatten(0, -2).requires_grad_() for x in inputs(17).values()]
    torch.library.opcheck(torch.ops.zoo.linears.default, tuple(given))


def test_compiled_equals_eager() -> None:
    given = {name: x.float() for name, x in inputs(17).items()}
    eager, compiled = eager_and_compiled(op, given)
    assert eager["0"].dtype == torch.bfloat16
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_flops_are_counted() -> None:
    given = {name: x.bfloat16().requires_grad_() for name, x in inputs(17).items()}
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        y = op(**given)
        assert counter.get_total_flops() == 4 * 2 * 2 * 17 * 32 * 48
        torch.stack(y).sum().backward()
    assert counter.get_total_flops() == 3 * 4 * 2 * 2 * 17 * 32 * 48


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "D", "F"), [*((T, 256, 256) for T in LENGTHS), (1333, 512, 512), (333, 768, 768),
                                           (333, 100, 36), (5000, 256, 256)])
def test_lengths_and_widths_on_a_gpu(T: int, D: int, F: int) -> None:
    check(inputs(T, D, F))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(256, 256), (512, 512), (768, 768)])
def test_the_self_tests_pass(sizes: tuple[int, int]) -> None:
    assert registered._self_test(torch.device(DEVICE), torch.bfloat16, sizes) < 1


@pytest.mark.gpu
def test_other_lengths_build_nothing() -> None:
    def step(T: int) -> None:
        outputs_and_gradients(op, {name: x.bfloat16() for name, x in inputs(T, 256, 256).items()})

    with use_backend("triton"):
        step(1000)
        with compilations() as seen:
            for T in (1, 33, 4096):
                step(T)
    assert not seen, seen


def builds() -> None:
    """The shapes of the models, for `kernel_builds.py`."""
    for D in (256, 512):
        x = [torch.empty(32, D, dtype=torch.bfloat16).requires_grad_() for _ in range(4)]
        y = registered.linears_triton(*x, *(torch.empty(D, D).requires_grad_() for _ in range(4)))
        torch.autograd.grad(y, x, y)
