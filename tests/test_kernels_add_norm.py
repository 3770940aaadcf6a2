"""The residual sum and the norm after it by kernels, against their definition in float64, as operator, in a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import Case, tiny
from kernel_cases import DTYPES, check_against_float64, interpreted, nan_memory, relative_error
from torch import Tensor, nn

from zoo.kernels import add_norm as kernels
from zoo.ops import add_norm_triton
from zoo.ops.add_norm import add_norm
from zoo.ops.backend import decisions, forget_decisions, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Pair = tuple[Tensor, Tensor]


def norm_of(weight: Tensor, bias: Tensor) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(weight), device="meta")
    norm._parameters.update(weight=weight, bias=bias)  # the tensors themselves, so that gradients reach them
    return norm


def op(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    return add_norm(x, y, norm_of(weight, bias), narrow=True)


def definition(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    s = x + y
    return s, F.layer_norm(s, weight.shape, weight, bias)


def draw(*shape: int, device: str = DEVICE) -> dict[str, Tensor]:
    D = shape[-1]
    drawn = {"x": torch.randn(shape), "y": torch.randn(shape), "weight": 1 + torch.randn(D) / 5, "bias": torch.randn(D)}
    return {name: x.double().to(device) for name, x in drawn.items()}


@interpreted
@pytest.mark.parametrize("shape", [(2, 5, 16), (1, 1, 1), (3, 50, 24), (1, 7, 300), (2, 3, 1030)], ids=str)
def test_it_is_its_definition(shape: tuple[int, ...]) -> None:
    check_against_float64(op, definition, definition, draw(*shape), FP32)


@interpreted
def test_programs_take_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    for width in (100, 300):
        check_against_float64(op, definition, definition, draw(1, 333, width), FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [16, 256, 512, 768, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(D: int, dtype: torch.dtype) -> None:
    for N in (1, 63, 5000):
        check_against_float64(op, definition, definition, draw(1, N, D, device="cuda"), dtype)


def in_training(shape: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """x and the parameters in float32, y in DTYPE; and all in float64."""
    given = list(draw(*shape).values())
    leaves = [x.to(DTYPE if i == 1 else FP32).requires_grad_() for i, x in enumerate(given)]
    return leaves, [x.detach().double().requires_grad_() for x in leaves]


@pytest.mark.parametrize("use", ["both", "norm", "sum"])
def test_as_in_training(use: str) -> None:
    leaves, wide = in_training((2, 77, 64))
    results = []
    for tensors, function in ((leaves, op), (wide, definition)):
        with use_backend("triton" if function is op else "eager"), nan_memory(), \
                torch.autocast(DEVICE, BF16, enabled=DEVICE == "cuda" and function is op):
            s, n = function(*tensors)
        cotangents = [torch.ones_like(s) / 3 + s.detach(), (n.detach() ** 2).to(n.dtype)]
        used = {"both": slice(0, 2), "norm": slice(1, 2), "sum": slice(0, 1)}[use]
        gradients = torch.autograd.grad([s, n][used], tensors, cotangents[used], allow_unused=True)
        results.append([s, n, *gradients])
    s, n = results[0][:2]
    assert (s.dtype, n.dtype) == (FP32, DTYPE)
    for name, a, b in zip(("s", "n", "dx", "dy", "dw", "db"), *results, strict=True):
        if use == "sum" and name in ("dw", "db"):
            assert a is None
            continue
        assert relative_error(a, b) < (1e-6 if name == "s" else 1e-2 if DTYPE == BF16 else 1e-5), name
    assert results[0][3].dtype == DTYPE


def test_nothing_to_add_and_what_is_not_narrow_take_the_norm_itself() -> None:
    norm, x = nn.LayerNorm(16, device=DEVICE), torch.randn(1, 5, 16, device=DEVICE)
    forget_decisions()
    with use_backend("triton"):
        s, n = add_norm(x, None, norm, narrow=True)
        assert s is x
        assert torch.equal(n, norm(x))
        s, n = add_norm(x, x, norm, narrow=False)
        assert torch.equal(n, norm(2 * x))
    assert not decisions()
    wide = norm.double()
    assert add_norm(x.double(), x.double(), wide, narrow=True)[1].dtype == torch.float64


def test_rows_do_not_touch_each_other() -> None:
    leaves, _ = in_training((1, 40, 64))
    with use_backend("triton"):
        s, n = op(*leaves)
        leaves[0].data[:, 11], leaves[1].data[:, 30] = torch.nan, torch.inf
        other = op(*leaves)
    rows = torch.tensor([i for i in range(40) if i not in (11, 30)], device=DEVICE)
    assert all(torch.equal(a[:, rows], b[:, rows]) for a, b in zip((s, n), other, strict=True))
    assert other[1][:, [11, 30]].isnan().all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_extremes(offset: float) -> None:
    """Rows that are constant, and far from 0: the variance is that of what remains after the mean."""
    x = torch.randn(1, 9, 64, device=DEVICE) + offset
    x[:, 3] = 7.0
    y, norm = torch.zeros_like(x), nn.LayerNorm(64, device=DEVICE)
    with use_backend("triton"):
        _, n = add_norm(x, y, norm, narrow=True)
    assert n.isfinite().all()
    assert (n - F.layer_norm(x.double(), (64,))).abs().max() < 2e-3


def test_two_runs_are_equal() -> None:
    leaves, _ = in_training((2, 300, 64))
    with use_backend("triton"):
        runs = [torch.autograd.grad(sum(z.float().square().sum() for z in op(*leaves)), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_empty() -> None:
    leaves, _ = in_training((2, 0, 16))
    with use_backend("triton"):
        s, n = op(*leaves)
        gradients = torch.autograd.grad(s.sum() + n.float().sum(), leaves)
    assert not gradients[2].any()


def test_operator_checks() -> None:
    leaves, _ = in_training((1, 12, 32))
    torch.library.opcheck(add_norm_triton.add_norm.overload, (*leaves, 1e-5, DTYPE))


def test_compiled_in_one_graph() -> None:
    leaves, _ = in_training((1, 40, 64))
    norm = nn.LayerNorm(64, device=DEVICE)
    torch.compiler.reset()
    with use_backend("triton"):
        run: Callable[..., Pair] = lambda x, y: add_norm(x, y, norm, narrow=True)  # noqa: E731
        pairs = [f(*leaves[:2]) for f in (run, torch.compile(run, fullgraph=True))]
    for a, b in zip(*pairs, strict=True):
        assert torch.equal(a, b)


def test_a_model_takes_it() -> None:
    model = tiny(Case("transformer", ()), layers=2).to(DEVICE)
    tokens = torch.randint(64, (1, 20), device=DEVICE)
    forget_decisions()
    with use_backend("triton"), torch.autocast(DEVICE, BF16, enabled=DEVICE == "cuda"):
        logits = model(tokens)
    assert any(line.startswith("add_norm") and line.endswith(": triton") for line in decisions())
    with use_backend("eager"):
        assert relative_error(logits, model(tokens)) < (3e-2 if DTYPE == BF16 else 1e-5)


def test_self_test() -> None:
    assert add_norm_triton._self_test(torch.device(DEVICE), DTYPE, (100,)) < 0.7


def builds() -> None:
    """At the widths and dtypes that are trained, for tests/kernel_builds.py."""
    for D in (256, 512, 768, 4096):
        x, w = torch.zeros(4, 64, D), torch.zeros(D)
        s, n, h, scale = kernels.forward(x, x.bfloat16(), w, w, 1e-5, BF16)
        kernels.backward(n, s, h, scale, w, FP32, BF16)
