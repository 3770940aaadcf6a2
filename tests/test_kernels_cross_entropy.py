"""The linear head with cross-entropy on its kernels, against float64 and beside plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from held_memory import Held
from kernel_cases import DTYPES, check_against_float64, interpreted, nan_memory, relative_error
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.ops import cross_entropy, cross_entropy_triton
from zoo.ops.backend import use_backend
from zoo.ops.cross_entropy import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for every problem, and pieces of 128 rows or columns in the small problems here."""
    kernels = pytest.importorskip("zoo.kernels.cross_entropy")
    monkeypatch.setattr(cross_entropy, "FEW_LOGITS", 0)
    monkeypatch.setattr(kernels, "LEAST", 1)
    monkeypatch.setattr(kernels, "TOKENS", 1)
    if not torch.cuda.is_available():
        monkeypatch.setattr(kernels, "ALIGNED", 16)
        monkeypatch.setattr(kernels, "WHOLE", 64)
        monkeypatch.setattr(kernels, "TILE", 128)


def inputs(N: int, D: int, V: int, ignored: float = 0.2, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(N + D + V)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(V, D, generator=generator, dtype=torch.float64) / D**0.5
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = IGNORED
    return {"x": x.to(DEVICE), "weight": weight.to(DEVICE), "targets": targets.to(DEVICE)}


def plain(reduction: str = "mean", z_loss: float = 0.0) -> Callable[..., Tensor]:
    """What a user would write; the mean over no token at all is 0."""
    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        counted = targets != IGNORED
        losses = F.cross_entropy(logits, targets, reduction="none") + z_loss * logits.logsumexp(1).square() * counted
        if reduction == "none":
            return losses
        return losses.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1)
    return loss


def ours(reduction: str = "mean", z_loss: float = 0.0) -> Callable[..., Tensor]:
    return lambda x, weight, targets: linear_cross_entropy(x, weight, targets, reduction=reduction, z_loss=z_loss)


def check(N: int, D: int, V: int, dtype: torch.dtype, reduction: str, z_loss: float = 0.0, **options: float) -> None:
    check_against_float64(ours(reduction, z_loss), plain(reduction, z_loss), plain(reduction, z_loss),
                          inputs(N, D, V, **options), dtype)


# (40, 24, 17): logits kept for the backward pass; else, but for reduction "none", both gradients in the forward pass,
# in chunks; (37, 8, 90): a slice at a time for "none", and rows in two blocks
@interpreted
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("N", "D", "V"), [(1, 8, 5), (37, 8, 90), (50, 5, 33), (130, 7, 17), (40, 24, 17)])
def test_losses_and_gradients(N: int, D: int, V: int, reduction: str) -> None:
    check(N, D, V, torch.float32, reduction, z_loss=1e-2 if D == 8 else 0.0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "V", "reduction"), [
    (37, 90, "mean"), (130, 17, "mean"), (37, 90, "none"), (130, 7, "mean"), (130, 7, "none")])
def test_half_precision(N: int, V: int, reduction: str, dtype: torch.dtype) -> None:
    check(N, 8, V, dtype, reduction, z_loss=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "V", "reduction", "z_loss"), [
    (1, 16, 1000, "mean", 0.0), (65, 24, 1000, "none", 1e-3), (129, 64, 8192, "mean", 1e-3),
    (1000, 40, 257, "mean", 0.0),
    (1000, 768, 50257, "mean", 1e-3), (777, 80, 50304, "none", 0.0), (4099, 128, 1023, "sum", 0.0),
    (3000, 256, 12345, "sum", 1e-3), (127, 16, 2, "mean", 1e-3), (1000, 64, 64, "mean", 1e-3),
    (4099, 300, 257, "none", 1e-3), (32768, 512, 256, "mean", 0.0)])
def test_losses_and_gradients_on_a_gpu(N: int, D: int, V: int, reduction: str, z_loss: float,
                                       dtype: torch.dtype) -> None:
    check(N, D, V, dtype, reduction, z_loss)


@pytest.mark.parametrize(("N", "V"), [(19, 90), (100, 20), (30, 7)])
def test_extreme_logits_stay_finite(N: int, V: int) -> None:
    """Logits of hundreds: a softmax that is one-hot, right or wrong; and logits known to their last bit, 2^-15."""
    given = inputs(N, 8, V, scale=100.0)
    wide = [given[name].float().double().requires_grad_() for name in ("x", "weight")]
    want = plain()(*wide, given["targets"])
    x, weight = (each.detach().float().requires_grad_() for each in wide)
    with use_backend("triton"), nan_memory():
        got = linear_cross_entropy(x, weight, given["targets"])
    pairs = zip((got, *torch.autograd.grad(got, (x, weight))), (want, *torch.autograd.grad(want, wide)), strict=True)
    assert all(relative_error(one, exact) < 2**-15 for one, exact in pairs)


@pytest.mark.parametrize(("N", "V"), [(19, 90), (100, 20), (30, 7)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_to_predict_is_a_loss_of_zero(N: int, V: int, reduction: str) -> None:
    given = inputs(N, 8, V, ignored=2.0)
    x, weight = (given[name].float().requires_grad_() for name in ("x", "weight"))
    with use_backend("triton"), nan_memory():
        loss = linear_cross_entropy(x, weight, given["targets"], reduction=reduction, z_loss=1e-2)
        loss.sum().backward()
    assert not loss.any()
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dx", [True, False])
@pytest.mark.parametrize("V", [20, 7])
def test_one_gradient_alone(V: int, dx: bool, reduction: str) -> None:
    given = inputs(100, 8, V)
    both = [given[name].float().requires_grad_() for name in ("x", "weight")]
    alone = [each.detach().requires_grad_(wanted) for each, wanted in zip(both, (dx, not dx), strict=True)]
    with use_backend("triton"), nan_memory():
        for x, weight in (both, alone):
            linear_cross_entropy(x, weight, given["targets"], reduction=reduction).sum().backward()
    for one, same in zip(alone, both, strict=True):
        assert (one.grad is not None) == one.requires_grad
        if one.grad is not None:
            torch.testing.assert_close(one.grad, same.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("V", [7, 20, 90])
def test_strided_inputs(V: int) -> None:
    """Columns of a wider x, a transposed weight, every other target, and one loss's cotangent for all of them."""
    given = inputs(20 if V == 90 else 100, 8, V)
    wide = torch.cat([given["x"]] * 2, 1).float()
    with use_backend("triton"), nan_memory():
        found = []
        for x, weight, targets in (
                (given["x"].float(), given["weight"].float(), given["targets"]),
                (wide[:, 8:], given["weight"].float().mT.contiguous().mT, given["targets"].repeat_interleave(2)[::2]),
                (given["x"].float().mT.contiguous().mT, given["weight"].float(), given["targets"])):
            leaves = x.requires_grad_(), weight.requires_grad_()
            for reduction in ("none", "mean"):
                loss = linear_cross_entropy(*leaves, targets, reduction=reduction).sum()
                found.append((loss, *torch.autograd.grad(loss, leaves)))
    for i, each in enumerate(found[2:]):
        for one, same in zip(each, found[i % 2], strict=True):
            torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("N", "V", "reduction"), [
    (100, 20, "mean"), (20, 90, "mean"), (20, 90, "none"), (100, 7, "mean"), (100, 7, "none")])
def test_every_run_is_the_same_to_the_bit(N: int, V: int, reduction: str) -> None:
    given = inputs(N, 8, V)
    x, weight = (given[name].float().requires_grad_() for name in ("x", "weight"))
    with use_backend("triton"):
        runs = [(loss, *torch.autograd.grad(loss.sum(), (x, weight))) for loss in (
            linear_cross_entropy(x, weight, given["targets"], reduction=reduction) for _ in range(2))]
    for one, same in zip(*runs, strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize("V", [7, 20, 90])
def test_float32_weight_under_autocast_gets_a_float32_gradient(V: int) -> None:
    given = inputs(20 if V == 90 else 100, 8, V)
    x, weight = (given[name].float().requires_grad_() for name in ("x", "weight"))
    rounded = [each.detach().bfloat16().double().requires_grad_() for each in (x, weight)]
    want = torch.autograd.grad(plain()(*rounded, given["targets"]), rounded)
    with use_backend("triton"), nan_memory(), torch.autocast(DEVICE, torch.bfloat16):
        got = torch.autograd.grad(linear_cross_entropy(x, weight, given["targets"]), (x, weight))
    assert all(each.dtype == torch.float32 for each in got)
    assert all(relative_error(g, w) < 0.01 for g, w in zip(got, want, strict=True))
    assert not torch.equal(got[1], got[1].bfloat16().float())


@pytest.mark.parametrize("V", [7, 20, 90])
def test_small_cotangents_in_float16(V: int) -> None:
    """The mean over many tokens: a probability over their number is below float16's range."""
    given = inputs(20 if V == 90 else 100, 8, V)
    x, weight = (given[name].half().requires_grad_() for name in ("x", "weight"))
    wide = [each.detach().double().requires_grad_() for each in (x, weight)]
    want = torch.autograd.grad(plain("sum")(*wide, given["targets"]), wide[1])[0]
    with use_backend("triton"), nan_memory():
        for reduction in ("sum", "none"):
            loss = linear_cross_entropy(x, weight, given["targets"], reduction=reduction).sum()
            got = torch.autograd.grad(loss * 2.0**-9, weight)[0]
            assert relative_error(got.double() * 2.0**9, want) < 0.01


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("V", [7, 90])
def test_a_target_that_is_no_class_shows(V: int, reduction: str) -> None:
    given = inputs(20, 8, V)
    given["targets"][3] = V
    with use_backend("triton"):
        loss = linear_cross_entropy(given["x"].float(), given["weight"].float(), given["targets"], reduction=reduction)
    assert loss.isnan().sum() == 1


@pytest.mark.parametrize("kind", ["total", "each", "small"])
def test_registration(kind: str) -> None:
    given = inputs(40, 8, 7 if kind == "small" else 20)
    x, weight, targets = given["x"].float().requires_grad_(), given["weight"].float().requires_grad_(), given["targets"]
    if kind == "total":
        torch.library.opcheck(torch.ops.zoo.cross_entropy_total, (x, weight, targets, IGNORED, 0.1, True))
        loss, unit, dx, dweight = torch.ops.zoo.cross_entropy_total(x, weight, targets, IGNORED, 0.1, True)
        assert not dx.requires_grad
        torch.library.opcheck(torch.ops.zoo.cross_entropy_total_backward, (
            loss.detach(), unit, dx, dweight, torch.float32))
    elif kind == "small":
        torch.library.opcheck(torch.ops.zoo.cross_entropy_small, (x, weight, targets, IGNORED, 0.1, True, True))
        loss, unit, dlogits = torch.ops.zoo.cross_entropy_small(x, weight, targets, IGNORED, 0.1, True, True)
        torch.library.opcheck(torch.ops.zoo.cross_entropy_small_backward, (
            loss.detach(), unit, x.detach(), weight.detach(), dlogits, True, True))
    else:
        torch.library.opcheck(torch.ops.zoo.cross_entropy, (x, weight, targets, IGNORED, 0.1, True, True))
        losses, lse, dx = torch.ops.zoo.cross_entropy(x.detach(), weight.detach(), targets, IGNORED, 0.1, True, True)
        torch.library.opcheck(torch.ops.zoo.cross_entropy_backward, (
            losses, x.detach(), weight.detach(), targets, lse, dx, IGNORED, 0.1, True, True))


@pytest.mark.parametrize(("N", "V", "reduction", "autocast"), [
    (50, 10, "mean", True), (20, 90, "mean", True), (20, 90, "none", False), (50, 7, "mean", True),
    (50, 7, "none", False)])
def test_compiled_without_a_break(N: int, V: int, reduction: str, autocast: bool) -> None:
    given = inputs(N, 8, V)
    x, weight = (given[name].float().requires_grad_() for name in ("x", "weight"))

    def call(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x * 2, weight, targets, reduction=reduction)

    torch.compiler.reset()
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    with use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        runs = [(loss, *torch.autograd.grad(loss.sum(), (x, weight))) for loss in (
            f(x, weight, given["targets"]) for f in (call, torch.compile(call, fullgraph=True, backend=backend)))]
    for one, same in zip(*runs, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("N", "V", "reduction", "products"), [
    (100, 20, "mean", 3), (20, 90, "mean", 3), (20, 90, "none", 4), (100, 8, "mean", 3), (100, 8, "none", 4)])
def test_products_are_counted(N: int, V: int, reduction: str, products: int) -> None:
    given = inputs(N, 8, V)
    x, weight = (given[name].float().requires_grad_() for name in ("x", "weight"))
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight, given["targets"], reduction=reduction).sum().backward()
    assert counter.get_total_flops() == products * 2 * N * 8 * V


def test_a_second_derivative_is_refused() -> None:
    for N, V, reduction in ((100, 20, "mean"), (20, 90, "none"), (100, 7, "mean")):
        given = inputs(N, 8, V)
        x, weight = (given[name].float().requires_grad_() for name in ("x", "weight"))
        with use_backend("triton"):
            loss = linear_cross_entropy(x, weight, given["targets"], reduction=reduction).sum()
        (dx,) = torch.autograd.grad(loss.square(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            dx.sum().backward()


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ZooError, match="allowed"):
        linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(4, dtype=torch.int64))


def test_few_logits_take_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own calls, which the compiler sees through: no op of the zoo is left in what it gets."""
    monkeypatch.undo()
    for reduction in ("mean", "sum", "none"):
        check(30, 8, 256, torch.float32, reduction, z_loss=1e-2)
        check(3, 8, 256, torch.float32, reduction, ignored=2.0)
    given, graphs = inputs(30, 8, 256), []

    def seen(graph: torch.fx.GraphModule, example: object) -> torch.fx.GraphModule:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    torch.compiler.reset()
    with use_backend("triton"):
        torch.compile(linear_cross_entropy, fullgraph=True, backend=seen)(*(x.float() if x.is_floating_point() else x
                                                                            for x in given.values()))
    assert len(graphs) == 1
    assert any("cross_entropy" in name for name in graphs[0])
    assert not any("zoo" in name for name in graphs[0])


@interpreted
@pytest.mark.parametrize(("N", "D", "V", "reduction"), [
    (256, 64, 512, "mean"), (256, 64, 512, "none"), (96, 64, 40, "mean")])
def test_memory_is_within_the_formula_by_count(N: int, D: int, V: int, reduction: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.kernels import cross_entropy as kernels

    monkeypatch.setattr(kernels, "TOKENS", 128)
    monkeypatch.setattr(kernels, "WHOLE", 256)
    x, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with use_backend("triton"), Held() as held:
        linear_cross_entropy(x, weight, torch.randint(V, (N,)), reduction=reduction).sum().backward()
    bound = cross_entropy_triton.memory(N, D, V, 4, reduction == "mean")
    assert held.peak <= bound
    assert held.peak > 0.8 * bound


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("N", "D", "V", "dtype"), [
    (16384, 256, 50304, torch.bfloat16), (32768, 256, 4096, torch.bfloat16), (8192, 512, 32000, torch.float32),
    (32768, 768, 640, torch.bfloat16)])
def test_memory_is_within_the_formula(N: int, D: int, V: int, dtype: torch.dtype, reduction: str,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for is; what the allocator hands out, which rounds, is about 1 MiB more at most in all."""
    monkeypatch.undo()
    x = torch.randn(N, D, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (N,), device="cuda")
    with use_backend("triton"):
        for _ in range(2):  # cuBLAS takes its workspace at the first call
            x.grad = weight.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_stats()
            linear_cross_entropy(x, weight, targets, reduction=reduction).sum().backward()
            after = torch.cuda.memory_stats()
    asked, taken = (after[f"{what}_bytes.all.peak"] - before[f"{what}_bytes.all.current"]
                    for what in ("requested", "allocated"))
    bound = cross_entropy_triton.memory(N, D, V, x.element_size(), reduction == "mean")
    assert asked <= bound
    assert taken <= bound + 32 * N + 2**20


@pytest.mark.gpu
def test_more_logits_than_int32_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk of 2^31 logits and more: the last rows are right."""
    from zoo.kernels import cross_entropy as kernels

    monkeypatch.setattr(kernels, "LEAST", 1 << 40)
    N, D, V = 44000, 16, 50304
    generator = torch.Generator(device="cuda").manual_seed(0)
    x, weight = (torch.randn(n, D, device="cuda", generator=generator).bfloat16().requires_grad_() for n in (N, V))
    targets = torch.randint(V, (N,), device="cuda", generator=generator)
    tail = x.detach()[-64:].requires_grad_()
    with use_backend("triton"):
        losses = linear_cross_entropy(x, weight, targets, reduction="none")
        dx, _ = torch.autograd.grad(losses.sum(), (x, weight))
    want = plain("none")(tail, weight, targets[-64:])
    torch.testing.assert_close(losses[-64:], want, rtol=1e-3, atol=1e-3)
    assert relative_error(dx[-64:], torch.autograd.grad(want.sum(), tail)[0]) < 0.02


def builds() -> None:
    """Every kernel as the benchmark's shapes launch it."""
    from zoo.kernels import cross_entropy as kernels

    targets, lse = torch.zeros(64, dtype=torch.int64), torch.zeros(2, 64)
    for dtype in DTYPES:
        for V in (256, 1024, 8192, 50304):
            logits = torch.zeros(16, V, dtype=dtype)
            for gradient in (True, False):
                kernels.rows(logits, targets, lse[0], lse, IGNORED, 0.0, gradient)
        kernels.scaled(logits, lse[0, 0], lse[0, 0], dtype)
        x, weight = torch.zeros(64, 16, dtype=dtype), torch.zeros(256, 16, dtype=dtype)
        kernels.reduced(lse[0], targets, IGNORED, True)
        kernels.backward(lse[0], x, weight, targets, lse, 0, 0.0)
