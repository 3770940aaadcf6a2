"""AFT-conv's kernels against the eager op in float64, at the inputs that break such code."""

from __future__ import annotations

from unittest import mock

import aft_cases
import kernel_cases
import pytest
import torch
from aft_cases import Inputs, in_documents, ours
from kernel_cases import interpreted, outputs_and_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.ops import aft_conv_triton
from zoo.ops.aft import EMPTY, Cache, Sums, aft_conv
from zoo.ops.backend import use_backend

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def op(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    return aft_conv(q, k, v, bias, cu_seqlens=cu_seqlens)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The equation as one writes it, all in one dtype but for the softmax's own sums."""
    t = torch.arange(q.shape[1], device=q.device)
    distance, window = t.unsqueeze(1) - t, bias.shape[1]
    w = torch.where(distance < window, bias[:, distance.clamp(0, window - 1)], 0)
    p = (k.mT.unsqueeze(2) + w).masked_fill(distance < 0, -torch.inf).softmax(-1)
    return q.sigmoid() * torch.einsum("bhts,bshk->bthk", p, v)


def inputs(length: int, width: int, batch: int = 2, heads: int = 2, window: int = 9, outlier: float = 0) -> Inputs:
    generator = torch.Generator().manual_seed(length + width)
    q, v = torch.randn(2, batch, length, heads, width, generator=generator, dtype=torch.float64).unbind()
    k = torch.randn(batch, length, heads, generator=generator, dtype=torch.float64)
    if outlier:
        k[-1, length // 2, -1] = outlier
    bias = torch.randn(heads, window, generator=generator, dtype=torch.float64)
    return {key: x.to(DEVICE) for key, x in (("q", q), ("k", k), ("v", v), ("bias", bias))}


def check(given: Inputs, dtype: torch.dtype = torch.float32) -> None:
    aft_cases.check(op, plain, given, dtype, token=16)


@interpreted
@pytest.mark.parametrize(("length", "width", "window"), [(1, 3, 3), (3, 20, 2), (16, 2, 1), (17, 4, 9), (35, 3, 17),
                                                         (100, 2, 5), (70, 2, 33)])
def test_small_shapes(length: int, width: int, window: int) -> None:
    """Rows within a chunk, and such as are cut into segments; heads in one program and in two."""
    check(inputs(length, width, window=window))


@interpreted
@pytest.mark.parametrize("keys", [30.0, 1e4, -90.0])
def test_outliers(keys: float) -> None:
    given = inputs(70, 3, batch=1, outlier=keys)
    if keys < 0:
        given["k"] = keys * given["k"].sign()
    check(given)


def test_extreme_biases() -> None:
    """Up to where the eager path counts them: 60 below the largest of a row."""
    given = inputs(70, 3, batch=1)
    for value in (-50.0, 50.0):
        given["bias"][:, 3] = value
        expected = outputs_and_gradients(op, given)
        for key, x in ours(op, given).items():
            torch.testing.assert_close(x.double(), expected[key], atol=1e-4, rtol=1e-4, msg=f"{key} at {value}")


@interpreted
def test_gradients_of_a_row_add_up_in_bf16() -> None:
    """What an offset of a head's biases gets is what is left when a row's dS cancel: rounding may not decide it."""
    given = {key: x.float() if key == "bias" else x.bfloat16() for key, x in inputs(100, 20).items()}
    with use_backend("eager"):
        exact = outputs_and_gradients(op, {key: x.double() for key, x in given.items()})["dbias"].sum(1)
        theirs = outputs_and_gradients(op, given)["dbias"].double().sum(1)
    with use_backend("triton"):
        found = outputs_and_gradients(op, given)["dbias"].double().sum(1)
    allowed = 3 * kernel_cases.relative_error(theirs, exact)
    assert kernel_cases.relative_error(found, exact) < allowed


@pytest.mark.parametrize("lengths", [[5, 0, 17, 1], [0, 20, 0], [70, 3, 33]])
def test_documents_do_not_touch(lengths: list[int]) -> None:
    for key, x, exact in in_documents(op, inputs(sum(lengths), 3, batch=1, outlier=40), lengths):
        torch.testing.assert_close(x, exact, atol=2e-5, rtol=2e-5, msg=key)


@pytest.mark.parametrize("future", ["random", "outliers", "nan"])
def test_no_output_knows_the_future(future: str) -> None:
    """To the bit. NaN may spoil earlier rows of its own chunk, where zero weights meet it in a product."""
    given = {key: x.float() for key, x in inputs(70, 2, batch=1).items()}
    with use_backend("triton"):
        before = op(**given)
        for cut in (1, 16, 17, 40):
            changed = dict(given)
            for key in ("q", "k", "v"):
                changed[key] = given[key].clone()
                scale = {"random": 1, "outliers": 100, "nan": torch.nan}[future]
                changed[key][:, cut:] = scale * torch.randn_like(given[key][:, cut:])
            after = op(**changed)
            size = 16 if DEVICE == "cpu" else 32
            seen = cut if future != "nan" else cut // size * size
            assert torch.equal(after[:, :seen], before[:, :seen]), cut


def test_strides_and_expanded_gradients() -> None:
    given = {key: x.float() for key, x in inputs(20, 4).items()}
    fused = torch.cat([given["q"].flatten(2), given["k"], given["v"].flatten(2)], -1)
    wide = torch.cat([torch.full_like(fused[:, :1], torch.nan), fused], 1)[:, 1:]
    q, k, v = wide.split([8, 2, 8], -1)
    bias = given["bias"].mT.contiguous().mT  # not even the last axis is contiguous
    split = {"q": q.unflatten(-1, (2, 4)), "k": k, "v": v.unflatten(-1, (2, 4)), "bias": bias}
    found = []
    for tensors in (given, split):
        leaves = {key: x.detach().requires_grad_() for key, x in tensors.items()}
        with use_backend("triton"):
            y = op(**leaves)
            y.sum().backward()
        found.append([y.detach(), *(x.grad for x in leaves.values())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_single_tokens_before_the_batch() -> None:
    """[1, B, H, K] seen as [B, 1, H, K]: PyTorch calls it contiguous, and its tokens are B H K apart."""
    given = {key: x.float() for key, x in inputs(1, 20, batch=3).items()}
    turned = {key: x if key == "bias" else torch.stack([x[:, 0]]).transpose(0, 1) for key, x in given.items()}
    with use_backend("triton"), kernel_cases.nan_memory():
        assert torch.equal(op(**turned), op(**given))


def test_two_runs_are_equal_to_the_bit() -> None:
    given = inputs(70, 20, outlier=40)
    first, second = ours(op, given), ours(op, given)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_empty_row() -> None:
    given = {key: x.float() for key, x in inputs(4, 4).items()}
    given = {key: (x if key == "bias" else x[:, :0]).requires_grad_() for key, x in given.items()}
    with use_backend("triton"):
        y = op(**given)
        y.sum().backward()
    assert y.shape == (2, 0, 2, 4)
    assert torch.equal(given["bias"].grad, torch.zeros(2, 9, device=DEVICE))


def test_what_the_kernels_do_not_take_is_refused() -> None:
    given = {key: x.float() for key, x in inputs(6, 4, window=66).items()}
    with use_backend("triton"), pytest.raises(ZooError, match="windows 66; the kernels take 1 to 65"):
        op(**given)
    given["bias"] = given["bias"][:1, :4]
    with use_backend("triton"), pytest.raises(ZooError, match=r"allowed: .*\[H, W\]"):
        op(**given)


def test_a_state_is_continued_without_kernels() -> None:
    given = {key: x.float() for key, x in inputs(6, 4, window=3).items()}
    q, k, v, bias = given.values()
    sums = Sums(torch.full_like(k[:, 0], EMPTY), torch.zeros_like(v[:, 0]), torch.zeros_like(k[:, 0]))
    cache = Cache(torch.full_like(k[:, :2], EMPTY), torch.zeros_like(v[:, :2]))
    with use_backend("triton"):
        torch.testing.assert_close(aft_conv(q, k, v, bias, sums, cache), op(**given))


def test_registered_as_torch_asks() -> None:
    given = [x.float().requires_grad_() for x in inputs(5, 4, batch=1, window=3).values()]
    torch.library.opcheck(aft_conv_triton._conv, (*given, None),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_one_graph() -> None:
    given = [x.float().requires_grad_() for x in inputs(5, 4, batch=1, window=3).values()]
    with use_backend("triton"):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(op(*given).sum(), given)
        actual = torch.autograd.grad(compiled(*given).sum(), given)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_flops() -> None:
    given = [x.float().requires_grad_() for x in inputs(8, 4, batch=1, window=3).values()]
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        op(*given).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * (4 + 1) * 8 * 4


# On a GPU, in chunks of the sizes that are used.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("length", "width", "window"), [
    (1, 16, 32), (2, 32, 32), (3, 40, 5), (15, 256, 32), (16, 80, 33), (17, 64, 32), (63, 24, 34), (64, 192, 65),
    (65, 96, 32), (127, 160, 50), (129, 128, 32), (300, 64, 32), (1000, 32, 16), (1000, 64, 65)])
def test_grid(dtype: torch.dtype, length: int, width: int, window: int) -> None:
    check(inputs(length, width, window=window, batch=1 if length >= 300 else 2), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize("outlier", [60.0, 1e4, -90.0])
def test_outliers_in_large_blocks(dtype: torch.dtype, outlier: float) -> None:
    given = inputs(700, 64, batch=1, outlier=outlier, window=32)
    if outlier < 0:
        given["k"] = outlier * given["k"].sign()
    check(given, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[700, 0, 1, 299], [40, 2000, 3, 600]])
def test_long_rows_and_documents(lengths: list[int]) -> None:
    for key, x, exact in in_documents(op, inputs(sum(lengths), 96, batch=1, outlier=40, window=32), lengths):
        assert kernel_cases.relative_error(x, exact) < 1e-5, key


def builds() -> None:
    """Every kernel in the benchmark's shapes and types, for tests/kernel_builds.py: rows that are cut, and not."""
    from zoo.kernels import aft_conv, aft_conv_backward

    processors = mock.Mock(return_value=mock.Mock(multi_processor_count=132))
    with mock.patch.object(torch.cuda, "get_device_properties", processors):
        for dtype in (torch.bfloat16, torch.float32):
            for batch, length in ((32, 1024), (1, 32768)):
                q, v, dy = (torch.zeros(batch, length, 8, 64, dtype=dtype) for _ in range(3))
                k, bias = torch.zeros(batch, length, 8, dtype=dtype), torch.zeros(8, 32)
                _, lse = aft_conv.forward(q, k, v, bias, None)
                aft_conv_backward.backward(q, k, v, bias, dy, lse, None)
