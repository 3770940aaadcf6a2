"""The kernels of AFT with biases against the eager ops in float64, at the inputs that break such code."""

from __future__ import annotations

import itertools
from functools import partial

import aft_cases
import kernel_cases
import pytest
import torch
from aft_cases import Inputs, in_documents, ours
from kernel_cases import interpreted, outputs_and_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.ops import aft_triton
from zoo.ops.aft import aft_full, aft_local, aft_local_in_row
from zoo.ops.backend import use_backend

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ("full", "local")


def op(name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None,
       cu_seqlens: Tensor | None = None) -> Tensor:
    return (aft_full if name == "full" else aft_local)(q, k, v, bias, cu_seqlens=cu_seqlens)


def plain(name: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Equation 2 as one writes it, all in one dtype but for the softmax's own sums."""
    length = q.shape[1]
    t = torch.arange(length, device=q.device)
    distance = t.unsqueeze(1) - t
    w = q.new_zeros(length, length)
    if name == "full":
        w = bias
    elif name == "local":
        window = bias.shape[1]
        w = torch.where(distance < window, bias.gather(1, distance.clamp(0, window - 1)), 0)
    p = (k.unsqueeze(1) + w.unsqueeze(-1)).masked_fill((distance < 0).unsqueeze(-1), -torch.inf).softmax(2)
    return q.sigmoid() * (p * v.unsqueeze(1)).sum(2)


def inputs(name: str, length: int, channels: int, batch: int = 2, window: int = 19, outlier: float = 0) -> Inputs:
    generator = torch.Generator().manual_seed(length + channels)
    q, k, v = torch.randn(3, batch, length, channels, generator=generator, dtype=torch.float64).unbind()
    if outlier:
        k[-1, length // 2, ::3] = outlier
    columns = length if name == "full" else window
    made = {"q": q, "k": k, "v": v, "bias": torch.randn(length, columns, generator=generator, dtype=torch.float64)}
    return {key: x.to(DEVICE) for key, x in made.items()}


def check(name: str, given: Inputs, dtype: torch.dtype = torch.float32) -> None:
    aft_cases.check(partial(op, name), partial(plain, name), given, dtype)


@interpreted
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("length", "channels"), [(1, 3), (3, 20), (16, 2), (17, 4), (35, 3)])
def test_small_shapes(name: str, length: int, channels: int) -> None:
    check(name, inputs(name, length, channels))


@interpreted
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("keys", [30.0, 110.0, 1e4, -90.0])
def test_outliers(name: str, keys: float) -> None:
    given = inputs(name, 34, 3, batch=1, outlier=keys)
    if keys < 0:
        given["k"] = keys * given["k"].sign()
    check(name, given)


@pytest.mark.parametrize("name", ["full", "local"])
def test_extreme_biases(name: str) -> None:
    given = inputs(name, 34, 3, batch=1)
    for value in (-1e4, 1e4):
        given["bias"][:, 3] = value
        expected = outputs_and_gradients(partial(op, name), given)
        for key, x in ours(partial(op, name), given).items():
            torch.testing.assert_close(x.double(), expected[key], atol=1e-4, rtol=1e-4, msg=f"{key} at {value}")


@pytest.mark.parametrize("window", [1, 2, 18])
def test_any_window(window: int) -> None:
    check("local", inputs("local", 40, 2, batch=1, window=window))


@interpreted
@pytest.mark.parametrize("name", ["full", "local"])
@pytest.mark.parametrize(("length", "window", "steps"), [
    (1, 5, {}), (50, 9, {}), (50, 17, {25: 30.0}), (70, 1, {35: 300.0}), (50, 9, {20: 60.0, 37: 110.0, 45: 200.0}),
    (50, 9, {1: 60.0}), (50, 9, {1: 110.0}), (50, 17, {20: 120.0, 34: -60.0}), (40, 9, {30: -90.0})])
def test_rising_keys(name: str, length: int, window: int, steps: dict[int, float]) -> None:
    """Keys rise by steps that change levels, or leave blocks steep."""
    given = inputs(name, length, 3, window=window)
    for at, height in steps.items():
        given["k"][-1, at:] = given["k"][0, at:] + height
    check(name, given)


@interpreted
@pytest.mark.parametrize("name", OPS)
def test_a_near_key_outweighs_a_larger_one(name: str) -> None:
    """By its bias, in rows whose block has a level 150 above its own: 2^-150 is out of float32's range, what it is
    multiplied to is not."""
    given = inputs(name, 50, 3, batch=1, window=9)
    t = torch.arange(50, device=DEVICE)
    near = t.unsqueeze(1) - t < 8 if name == "full" else slice(None)
    given["bias"][near] += 52
    for at, height in ((6, 148.0), (30, 115.0), (35, 223.0)):
        given["k"][:, at] += height
    check(name, given)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("lengths", [[5, 0, 17, 1], [0, 20, 0]])
def test_documents_do_not_touch(name: str, lengths: list[int]) -> None:
    given = inputs(name, sum(lengths), 3, batch=1, outlier=120)
    if name == "full":  # a table for the longest document alone
        given["bias"] = given["bias"][: max(lengths), : max(lengths)]
    for key, x, exact in in_documents(partial(op, name), given, lengths):
        torch.testing.assert_close(x, exact, atol=2e-5, rtol=2e-5, msg=key)


@interpreted
@pytest.mark.parametrize("name", OPS)
def test_learnt_keys_take_the_usual_path(name: str) -> None:
    """Keys spread as those of the published weights, which are at most 71 above a sequence's first in units of log2,
    have one level; a wider rise is seen, too, in its own channels."""
    from zoo.kernels import aft

    given = {key: x.float() for key, x in inputs(name, 70, 32).items()}
    given["k"] *= 5
    given["k"][:, 0] = -15
    given["k"][0, 20, 3], given["k"][1, 65, 20] = 45, -60

    def flags() -> Tensor:
        return aft.forward(**given, local=name == "local", cu_seqlens=None)[-1].view(2, -1, 2)  # 16 channels a flag

    given = {key: x.to(DEVICE) for key, x in given.items()}
    assert not flags().any()
    given["k"][1, 40, 20] = 75
    assert flags().nonzero().tolist() == [[1, i, 1] for i in (2, 3, 4)]


@pytest.mark.parametrize("name", OPS)
def test_large_sums_under_a_closed_gate(name: str) -> None:
    """den 2^68 and more, sigmoid(q) 2^-100 and less: their quotient has no place in float32."""
    given = inputs(name, 40, 3)
    given["k"][:, 1:] += 70
    given["q"][:, ::3] = -90
    for dtype in (torch.float32, torch.bfloat16):
        found, expected = ours(partial(op, name), given, dtype), outputs_and_gradients(partial(op, name), given)
        for key, x in found.items():
            atol = 64 * torch.finfo(dtype).eps * float(expected[key].abs().max())
            torch.testing.assert_close(x.double(), expected[key], atol=atol, rtol=0, msg=key)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("future", ["random", "outliers", "nan"])
def test_no_output_knows_the_future(name: str, future: str) -> None:
    """To the bit before a block that holds a changed token; inside it to rounding, as an outlier sends the block the
    slow way. NaN may spoil earlier rows of its own block in full and local, where zero weights meet it in a product."""
    given = {key: x.float() for key, x in inputs(name, 30, 2, batch=1).items()}
    with use_backend("triton"):
        before = op(name, **given)
        for cut in (1, 16, 17):
            changed = dict(given)
            for key in ("q", "k", "v"):
                changed[key] = given[key].clone()
                scale = {"random": 1, "outliers": 100, "nan": torch.nan}[future]
                changed[key][:, cut:] = scale * torch.randn_like(given[key][:, cut:])
            after = op(name, **changed)
            block = cut // 16 * 16 if DEVICE == "cpu" else 0
            assert torch.equal(after[:, :block], before[:, :block]), cut
            if future != "nan":
                torch.testing.assert_close(after[:, :cut], before[:, :cut], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_strides_and_expanded_gradients(name: str) -> None:
    given = {key: x.float() for key, x in inputs(name, 20, 4).items()}
    fused = torch.cat([given["q"], given["k"], given["v"]], -1)
    wide = torch.cat([torch.full_like(fused[:, :1], torch.nan), fused], 1)[:, 1:]
    split = {**given, **dict(zip("qkv", wide.split(4, -1), strict=True))}
    split["v"] = given["v"].transpose(1, 2).contiguous().transpose(1, 2)  # not even the last axis is contiguous
    found = []
    for tensors in (given, split):
        leaves = {key: x.detach().requires_grad_() for key, x in tensors.items()}
        with use_backend("triton"):
            y = op(name, **leaves)
            y.sum().backward()
        found.append([y.detach(), *(x.grad for x in leaves.values())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPS)
def test_two_runs_are_equal_to_the_bit(name: str) -> None:
    given = inputs(name, 20, 4, outlier=120)
    first, second = ours(partial(op, name), given), ours(partial(op, name), given)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", OPS)
def test_an_empty_row(name: str) -> None:
    given = {key: x.float() for key, x in inputs(name, 4, 4).items()}
    for key in given:
        given[key] = given[key][:, :0] if key in ("q", "k", "v") or name == "full" else given[key][:0]
    if name == "full":
        given["bias"] = given["bias"][:0]
    with use_backend("triton"):
        assert op(name, **given).shape == (2, 0, 4)


def test_a_bias_of_the_wrong_shape_is_refused() -> None:
    given = {key: x.float() for key, x in inputs("full", 6, 4).items()}
    with use_backend("triton"), pytest.raises(ZooError, match=r"allowed: \[T, T\]"):
        aft_full(given["q"][:, :5], given["k"][:, :5], given["v"][:, :5], given["bias"])


@pytest.mark.parametrize("name", OPS)
def test_registered_as_torch_asks(name: str) -> None:
    given = [x.float().requires_grad_() for x in inputs(name, 5, 4, batch=1, window=3).values()]
    arguments = *given, name == "local", None
    torch.library.opcheck(aft_triton._biased, arguments,
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("name", OPS)
def test_one_graph(name: str) -> None:
    given = [x.float().requires_grad_() for x in inputs(name, 5, 4, batch=1, window=3).values()]
    with use_backend("triton"):
        compiled = torch.compile(lambda *x: op(name, *x), fullgraph=True, backend="aot_eager")
        y = op(name, *given)
        expected = torch.autograd.grad(y.sum(), given)
        actual = torch.autograd.grad(compiled(*given).sum(), given)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_flops() -> None:
    for name, pairs in (("full", 36), ("local", 8 * 4)):
        given = [x.float().requires_grad_() for x in inputs(name, 8, 4, batch=1, window=3).values()]
        with use_backend("triton"), FlopCounterMode(display=False) as counter:
            op(name, *given).sum().backward()
        assert counter.get_total_flops() == 3 * 4 * 4 * pairs


def test_autocast_and_mixed_types() -> None:
    given = {key: x.float().requires_grad_() for key, x in inputs("full", 12, 4).items()}
    with use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
        y = op("full", given["q"], given["k"], given["v"].bfloat16(), given["bias"])
        y.sum().backward()
    assert y.dtype is torch.float32
    with use_backend("eager"):
        torch.testing.assert_close(y, op("full", **given), atol=3e-2, rtol=3e-2)
    assert all(x.grad is not None and x.grad.dtype is torch.float32 for x in given.values())


# On a GPU, in blocks of the sizes that are used.


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("length", "channels"), [(1, 16), (3, 40), (15, 256), (17, 64), (63, 24), (64, 192), (65, 96),
                                                  (127, 160), (129, 80), (300, 128)])
def test_grid(name: str, dtype: torch.dtype, length: int, channels: int) -> None:
    check(name, inputs(name, length, channels, window=33, batch=1 if length == 300 else 2), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize("outlier", [60.0, 110.0, 1e4])
def test_outliers_in_large_blocks(name: str, dtype: torch.dtype, outlier: float) -> None:
    check(name, inputs(name, 260, 64, batch=1, outlier=outlier), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_long_rows_and_documents(name: str) -> None:
    given = inputs(name, 1000, 96, batch=1, outlier=120)
    for key, x, exact in in_documents(partial(op, name), given, [700, 0, 1, 299]):
        assert kernel_cases.relative_error(x, exact) < 1e-5, key


@pytest.mark.parametrize("cut", [None, (0, 5, 5, 70, 131)], ids=["rows", "documents"])
@pytest.mark.parametrize("outlier", [0, 120])
def test_local_in_one_row_is_local(cut: tuple[int, ...] | None, outlier: float) -> None:
    """Bit by bit, forward and backward, steep blocks too; the gradient has no gap."""
    given = inputs("local", 131, 40, batch=1 if cut else 2, outlier=outlier)
    q, k, v, bias = (x.float().requires_grad_() for x in given.values())
    cu = None if cut is None else torch.tensor(cut, dtype=torch.int32, device=DEVICE)
    qkv = torch.cat([q, k, v], dim=-1).detach().requires_grad_()
    with use_backend("triton"), kernel_cases.nan_memory():
        y, expected = aft_local_in_row(qkv, bias, cu), aft_local(q, k, v, bias, cu_seqlens=cu)
        dy = torch.randn_like(y)
        dqkv, dbias = torch.autograd.grad(y, (qkv, bias), dy)
        *parts, dbias_expected = torch.autograd.grad(expected, (q, k, v, bias), dy)
    assert torch.equal(y, expected)
    assert torch.equal(dqkv, torch.cat(parts, dim=-1))
    assert torch.equal(dbias, dbias_expected)
    with use_backend("eager"):
        torch.testing.assert_close(aft_local_in_row(qkv, bias, cu), aft_local(q, k, v, bias, cu_seqlens=cu))


def test_the_operator_of_one_row() -> None:
    given = inputs("local", 40, 16)
    q, k, v, bias = (x.float() for x in given.values())
    qkv = torch.cat([q, k, v], dim=-1).requires_grad_()
    torch.library.opcheck(aft_triton._in_row.overload, (qkv, bias.requires_grad_(), None))
    with use_backend("triton"):
        with FlopCounterMode(display=False) as row:
            aft_local_in_row(qkv, bias).sum().backward()
        with FlopCounterMode(display=False) as apart:
            aft_local(q.requires_grad_(), k, v, bias).sum().backward()
        assert row.get_total_flops() == apart.get_total_flops()
        with pytest.raises(ZooError, match=r"allowed: \[T, W\]"):
            aft_local_in_row(qkv, bias[1:])


def builds() -> None:
    """Every kernel in all types and in widths that take other blocks, for tests/kernel_builds.py."""
    from zoo.kernels import aft

    for dtype, width in itertools.product(kernel_cases.DTYPES, (16, 40, 512)):
        q, k, v, dy = (torch.zeros(2, 1024, width, dtype=dtype) for _ in range(4))
        for local, columns in ((False, 1024), (True, 32)):
            bias = torch.zeros(1024, columns)
            y, *kept = aft.forward(q, k, v, bias, local, None)
            aft.backward(q, k, v, bias, dy, y, kept, local, None)
