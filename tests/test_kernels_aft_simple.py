"""AFT-simple's kernels against the eager op in float64, at the inputs that break such code."""

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
from zoo.ops import aft_simple_triton
from zoo.ops.aft import EMPTY, Sums, absorb, aft_simple
from zoo.ops.backend import use_backend

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def op(q: Tensor, k: Tensor, v: Tensor, top: Tensor | None = None, num: Tensor | None = None,
       den: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    return aft_simple(q, k, v, None if top is None else Sums(top, num, den), cu_seqlens)


def plain(q: Tensor, k: Tensor, v: Tensor, top: Tensor | None = None, num: Tensor | None = None,
          den: Tensor | None = None) -> Tensor:
    """Equation 5 as one writes it, all in one dtype but for the softmax's own sums; a state is one more token."""
    if top is not None:
        k = torch.cat([(top + den.log()).unsqueeze(1).to(k), k], 1)
        v = torch.cat([(num / den).unsqueeze(1).to(v), v], 1)
    future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(k.shape[1] - q.shape[1] + 1)
    p = k.unsqueeze(1).expand(-1, q.shape[1], -1, -1).masked_fill(future.unsqueeze(-1), -torch.inf).softmax(2)
    return q.sigmoid() * (p * v.unsqueeze(1)).sum(2)


def inputs(length: int, channels: int, batch: int = 2, outlier: float = 0, state: bool = False) -> Inputs:
    generator = torch.Generator().manual_seed(length + channels)
    q, k, v = torch.randn(3, batch, length, channels, generator=generator, dtype=torch.float64).unbind()
    if outlier:
        k[-1, length // 2, ::3] = outlier
    made = {"q": q, "k": k, "v": v}
    if state:
        top, num, den = torch.randn(3, batch, channels, generator=generator, dtype=torch.float64).unbind()
        made |= {"top": top, "num": num, "den": den.exp() + 1}
    return {key: x.to(DEVICE) for key, x in made.items()}


def check(given: Inputs, dtype: torch.dtype = torch.float32) -> None:
    aft_cases.check(op, plain, given, dtype, keep=("top", "num", "den"))


@interpreted
@pytest.mark.parametrize("state", [False, True], ids=["new", "continued"])
@pytest.mark.parametrize(("length", "channels"), [(1, 3), (3, 20), (16, 2), (17, 4), (35, 3), (100, 2)])
def test_small_shapes(length: int, channels: int, state: bool) -> None:
    """Rows within a chunk, and such as are cut into segments of two chunks."""
    check(inputs(length, channels, state=state))


@interpreted
@pytest.mark.parametrize("keys", [30.0, 60.0, 1e4, -90.0])
@pytest.mark.parametrize("state", [False, True], ids=["new", "continued"])
def test_outliers(keys: float, state: bool) -> None:
    given = inputs(70, 16, batch=1, outlier=keys, state=state)
    if keys < 0:
        given |= {name: keys * given[name].sign() for name in ("k", "top") if name in given}
    check(given)


@interpreted
@pytest.mark.parametrize("keys", [30.0, 1e4])
def test_a_key_that_outweighs_all_others(keys: float) -> None:
    """Its gradient is next to nothing, the difference of two sums over the many tokens after it."""
    given = inputs(300, 3, batch=1)
    given["k"][:, 10] = keys
    check(given)


@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_values_of_any_size(scale: float) -> None:
    """Sums that overflow where weights are taken as they are: done again with care."""
    given = inputs(70, 3, batch=1, outlier=30)
    given["v"] = given["v"] * scale
    check(given)


def test_the_careful_way_agrees_with_the_other() -> None:
    """Bit by bit it cannot: with no weight small enough, all chunks go the careful way."""
    from zoo.kernels import aft_simple as kernels

    given = inputs(70, 3, state=True)
    expected = ours(op, given)
    with mock.patch.object(kernels, "steepest", return_value=0.0):
        found = ours(op, given)
    assert any(not torch.equal(found[key], expected[key]) for key in found)
    for key, x in found.items():
        torch.testing.assert_close(x, expected[key], atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("lengths", [[5, 0, 17, 1], [0, 20, 0], [70, 3, 33]])
def test_documents_do_not_touch(lengths: list[int]) -> None:
    for key, x, exact in in_documents(op, inputs(sum(lengths), 3, batch=1, outlier=40), lengths):
        torch.testing.assert_close(x, exact, atol=2e-5, rtol=2e-5, msg=key)


def test_many_documents() -> None:
    """More than a program looks at together."""
    lengths = [1, 0, 2] * (6 if DEVICE == "cpu" else 50)
    for key, x, exact in in_documents(op, inputs(sum(lengths), 2, batch=1), lengths, torch.int32):
        torch.testing.assert_close(x, exact, atol=2e-5, rtol=2e-5, msg=key)


@pytest.mark.parametrize("future", ["random", "outliers", "nan"])
def test_no_output_knows_the_future(future: str) -> None:
    """To the bit before a chunk that holds a changed token; inside it to rounding, as an outlier sends it the careful
    way."""
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
            block = cut // 16 * 16 if DEVICE == "cpu" else cut // 32 * 32
            assert torch.equal(after[:, :block], before[:, :block]), cut
            torch.testing.assert_close(after[:, :cut], before[:, :cut], atol=1e-6, rtol=1e-5)


def test_strides_and_expanded_gradients() -> None:
    given = {key: x.float() for key, x in inputs(20, 4).items()}
    fused = torch.cat([given["q"], given["k"], given["v"]], -1)
    wide = torch.cat([torch.full_like(fused[:, :1], torch.nan), fused], 1)[:, 1:]
    split = {**given, **dict(zip("qkv", wide.split(4, -1), strict=True))}
    split["v"] = given["v"].transpose(1, 2).contiguous().transpose(1, 2)  # not even the last axis is contiguous
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
    """[1, B, C] seen as [B, 1, C]: PyTorch calls it contiguous, and its tokens are B C apart."""
    given = {key: x.float() for key, x in inputs(1, 20, batch=3).items()}
    with use_backend("triton"), kernel_cases.nan_memory():
        turned = {key: torch.stack([x[:, 0]]).transpose(0, 1) for key, x in given.items()}
        assert torch.equal(op(**turned), op(**given))


def test_two_runs_are_equal_to_the_bit() -> None:
    given = inputs(70, 4, outlier=70, state=True)
    first, second = ours(op, given), ours(op, given)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_empty_row() -> None:
    given = {key: x.float()[:, :0].requires_grad_() for key, x in inputs(4, 4).items()}
    with use_backend("triton"):
        y = op(**given)
        y.sum().backward()
    assert y.shape == given["k"].grad.shape == (2, 0, 4)


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_row_in_two_parts(cut: int) -> None:
    """The state between them is made by `absorb`; gradients reach the first part's keys and values through it."""
    given = {key: x.float() for key, x in inputs(50, 3).items()}

    def parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        empty = Sums(torch.full_like(k[:, 0], EMPTY), torch.zeros_like(v[:, 0]), torch.zeros_like(v[:, 0]))
        first = aft_simple(q[:, :cut], k[:, :cut], v[:, :cut], empty)
        state = absorb(empty, k[:, :cut], v[:, :cut])
        return torch.cat([first, aft_simple(q[:, cut:], k[:, cut:], v[:, cut:], state)], 1)

    with use_backend("triton"):
        found, expected = outputs_and_gradients(parts, given), outputs_and_gradients(op, given)
    for key, x in found.items():
        torch.testing.assert_close(x, expected[key], atol=1e-5, rtol=1e-5, msg=key)


def test_documents_are_not_continued() -> None:
    given = {key: x.float() for key, x in inputs(6, 4, batch=1, state=True).items()}
    with use_backend("triton"), pytest.raises(ZooError, match="no sums"):
        op(**given, cu_seqlens=torch.tensor([0, 6], device=DEVICE))


@pytest.mark.parametrize("state", [False, True], ids=["new", "continued"])
def test_registered_as_torch_asks(state: bool) -> None:
    given = [x.float().requires_grad_() for x in inputs(5, 4, batch=1, state=state).values()]
    arguments = (*given, *(None,) * (7 - len(given)))
    torch.library.opcheck(aft_simple_triton._simple, arguments,
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("state", [False, True], ids=["new", "continued"])
def test_one_graph(state: bool) -> None:
    given = [x.float().requires_grad_() for x in inputs(5, 4, batch=1, state=state).values()]
    with use_backend("triton"):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(op(*given).sum(), given)
        actual = torch.autograd.grad(compiled(*given).sum(), given)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_flops() -> None:
    given = [x.float().requires_grad_() for x in inputs(8, 4, batch=1).values()]
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        op(*given).sum().backward()
    assert counter.get_total_flops() == 3 * 4 * 4 * 8


# On a GPU, in chunks of the sizes that are used.


@pytest.mark.gpu
@pytest.mark.parametrize("state", [False, True], ids=["new", "continued"])
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize(("length", "channels"), [(1, 16), (2, 32), (3, 40), (15, 256), (16, 80), (17, 64), (31, 33),
                                                  (32, 16), (33, 65), (63, 24), (64, 192), (65, 96), (127, 160),
                                                  (129, 80), (300, 128), (1000, 40)])
def test_grid(dtype: torch.dtype, length: int, channels: int, state: bool) -> None:
    check(inputs(length, channels, batch=1 if length >= 300 else 2, state=state), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kernel_cases.DTYPES)
@pytest.mark.parametrize("outlier", [30.0, 60.0, 1e4, -90.0])
@pytest.mark.parametrize("length", [260, 700])
def test_outliers_in_large_blocks(dtype: torch.dtype, outlier: float, length: int) -> None:
    given = inputs(length, 64, batch=1, outlier=outlier, state=length == 700)
    if outlier < 0:
        given |= {name: outlier * given[name].sign() for name in ("k", "top") if name in given}
    check(given, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[700, 0, 1, 299], [40, 2000, 3, 600]])
def test_long_rows_and_documents(lengths: list[int]) -> None:
    for key, x, exact in in_documents(op, inputs(sum(lengths), 96, batch=1, outlier=60), lengths):
        assert kernel_cases.relative_error(x, exact) < 1e-5, key


def builds() -> None:
    """Every kernel in the benchmark's shapes and types, for tests/kernel_builds.py: rows that are cut, and not."""
    from zoo.kernels import aft_simple, aft_simple_backward

    processors = mock.Mock(return_value=mock.Mock(multi_processor_count=132))
    with mock.patch.object(torch.cuda, "get_device_properties", processors):
        for dtype in (torch.bfloat16, torch.float32):
            for shape in ((32, 1024, 512), (1, 32768, 512)):
                q, k, v, dy = (torch.zeros(shape, dtype=dtype) for _ in range(4))
                _, *kept = aft_simple.forward(q, k, v, None, None, None, None)
                aft_simple_backward.backward(q, k, v, dy, *kept, None, None, None, None)
