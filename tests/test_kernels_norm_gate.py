"""The kernels of norm_gate against float64: in the interpreter on few tokens, on a GPU on all lengths, head sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    DTYPES,
    HEAD_SIZES,
    LENGTHS,
    SHORT_LENGTHS,
    check_against_float64,
    compilations,
    interpreted,
    outputs_and_gradients,
)
from torch import Tensor

from zoo.errors import ZooError
from zoo.ops import norm_gate_triton as registered
from zoo.ops.backend import use_backend
from zoo.ops.norm_gate import norm_gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEEP = ["weight", "bias"]
EPS = 64e-5


def inputs(T: int, K: int = 16, H: int = 3, B: int = 2, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = {"y": (B, T, H, K), "gate": (B, T, H * K), "weight": (H * K,), "bias": (H * K,)}
    given = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    given["y"] = scale * given["y"]
    given["gate"] = 3 * given["gate"]
    return {name: x.to(DEVICE) for name, x in given.items()}


def ours(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return norm_gate(y, gate, weight, bias, EPS)


def plain(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normed = F.group_norm(y.flatten(0, 1).flatten(1), y.shape[2], weight.to(y.dtype), bias.to(y.dtype), EPS)
    return normed.view_as(gate) * F.silu(gate)


def test_the_eager_path_is_the_equation() -> None:
    given = inputs(20)
    with use_backend("eager"):
        theirs, mine = (outputs_and_gradients(function, given) for function in (plain, ours))
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name])


def check(given: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    check_against_float64(ours, ours, plain, given, dtype, keep=KEEP)


@interpreted
@pytest.mark.parametrize("T", [*SHORT_LENGTHS, 300])
def test_values_and_gradients(T: int) -> None:
    check(inputs(T))


@interpreted
@pytest.mark.parametrize("K", [2, 5, 40, 256])
def test_widths(K: int) -> None:
    check(inputs(17, K))


@interpreted
def test_two_channels_in_two_segments() -> None:
    """The widest tile there is would take a token of the next segment's, and its part of dw and db twice."""
    check(inputs(600, 2, B=1))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_scales(dtype: torch.dtype, scale: float) -> None:
    check(inputs(20, scale=scale), dtype)


def test_large_gates_and_rows_of_one_value() -> None:
    """silu of +-1000 is exact, its gradient 1 or 0; a row without variance has a norm of 0 and a finite gradient."""
    given = {name: x.float() for name, x in inputs(4).items()}
    given["gate"] = 1000 * given["gate"].sign()
    given["y"][0] = 7.0
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            results.append(outputs_and_gradients(ours, given))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=2e-2)


def other_rows_move_nothing() -> bool:
    """Tokens and heads are each alone, forward and backward, whatever stands beside them."""
    given = {name: x.float() for name, x in inputs(40).items()}
    dz = torch.randn(2, 40, 48, device=DEVICE)

    def results(y: Tensor, gate: Tensor, dz: Tensor) -> list[Tensor]:
        leaves = y.clone().requires_grad_(), gate.clone().requires_grad_()
        z = norm_gate(*leaves, given["weight"], given["bias"], EPS)
        return [x.view(2, 40, 3, 16)[1, 5, 1] for x in (z, *torch.autograd.grad(z, leaves, dz))]

    with use_backend("triton"):
        before = results(given["y"], given["gate"], dz)
        y, gate, changed = (torch.full_like(x, float("nan")) for x in (given["y"], given["gate"], dz))
        y[1, 5, 1] = given["y"][1, 5, 1]
        for new, old in ((gate, given["gate"]), (changed, dz)):
            new[1, 5, 16:32] = old[1, 5, 16:32]
        return all(torch.equal(a, b) for a, b in zip(before, results(y, gate, changed), strict=True))


@interpreted
def test_other_rows_move_nothing() -> None:
    assert other_rows_move_nothing()


def test_strided_inputs_and_expanded_gradients() -> None:
    y, gate = torch.randn(2, 9, 3, 20, device=DEVICE)[..., 2:18], torch.randn(2, 48, 9, device=DEVICE).mT
    y.requires_grad_()
    weight, bias = torch.randn(2, 48, device=DEVICE)
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            results.append(torch.autograd.grad(norm_gate(y, gate, weight, bias, EPS).sum(), y)[0])
    torch.testing.assert_close(*results)


@interpreted
def test_no_tokens_and_no_wrong_shapes() -> None:
    with use_backend("triton"):
        given = {name: x.float().requires_grad_() for name, x in inputs(0).items()}
        ours(**given).sum().backward()
        assert all(not x.grad.any() for x in given.values())
        with pytest.raises(ZooError, match="gate is"):
            ours(**{name: x.float() for name, x in inputs(8).items()} | {"gate": torch.ones(2, 8, 24, device=DEVICE)})
        with pytest.raises(ZooError, match="kernels take 2 to 256"):  # of one channel nothing is left to be normed
            ours(**{name: x.float() for name, x in inputs(8, 1).items()})


def test_results_are_the_same_every_time() -> None:
    given = {name: x.float() for name, x in inputs(600).items()}
    with use_backend("triton"):
        a, b = (outputs_and_gradients(ours, given) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


@interpreted
def test_the_operator_is_registered_as_it_should_be() -> None:
    given = [x.float().requires_grad_() for x in inputs(17).values()]
    torch.library.opcheck(torch.ops.zoo.norm_gate.default, (*given, EPS))


def test_compiled_equals_eager() -> None:
    given = {name: x.float() for name, x in inputs(17).items()}
    with use_backend("triton"):
        eager = outputs_and_gradients(ours, given)
        compiled = outputs_and_gradients(torch.compile(ours, fullgraph=True, backend="aot_eager"), given)
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "dtype"), [(T, DTYPES[i % 3]) for i, T in enumerate(LENGTHS)])
def test_lengths_on_a_gpu(T: int, dtype: torch.dtype) -> None:
    check(inputs(T, 64), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "dtype"), [(K, DTYPES[i % 3]) for i, K in enumerate((2, 5, *HEAD_SIZES))])
def test_widths_on_a_gpu(K: int, dtype: torch.dtype) -> None:
    check(inputs(129, K), dtype)


@pytest.mark.gpu
def test_other_rows_move_nothing_on_a_gpu() -> None:
    assert other_rows_move_nothing()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_self_test_passes(dtype: torch.dtype) -> None:
    assert registered._self_test(torch.device(DEVICE), dtype, (64,)) < 1


@pytest.mark.gpu
def test_other_lengths_build_nothing() -> None:
    def step(B: int, T: int) -> None:
        outputs_and_gradients(ours, {name: x.bfloat16() for name, x in inputs(T, 64, B=B).items()})

    with use_backend("triton"):
        step(2, 1000)
        with compilations() as seen:
            for case in ((1, 1), (2, 40), (1, 4096)):
                step(*case)
    assert not seen, seen


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    """z, dy, dgate; two vectors in float32 for every 256 tokens."""
    leaves = [x.bfloat16().requires_grad_() for x in inputs(1024, 64, 8, B=8).values()]
    with use_backend("triton"):
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            z = ours(*leaves)
            torch.autograd.grad(z, leaves, leaves[1].detach())
    assert torch.cuda.max_memory_allocated() - before <= 3 * 2 * z.numel() + 2 * 4 * 512 * 32 + 2**20


def builds() -> None:
    """The shapes of the models, for `kernel_builds.py`."""
    for dtype, K in ((torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float32, 64)):
        y, gate = torch.empty(1, 32, 4, K, dtype=dtype), torch.empty(1, 32, 4 * K, dtype=dtype)
        z = registered.norm_gate_triton(y.requires_grad_(), gate, torch.empty(4 * K), torch.empty(4 * K), EPS)
        torch.autograd.grad(z, y, z)
