"""The kernels of exact attention against its definition in float64, and as operators of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from attention_cases import Inputs, draw, plain, seen
from kernel_cases import (
    DTYPES,
    HEAD_SIZES,
    LENGTHS,
    SHORT_LENGTHS,
    check_against_float64,
    interpreted,
    nan_memory,
    outputs_and_gradients,
)
from torch import Tensor

from zoo.errors import ZooError
from zoo.kernels.attention import describable
from zoo.ops import attention_triton
from zoo.ops.attention import block_attention, causal_attention
from zoo.ops.backend import use_backend


def op(C: int = 0, borders: tuple[int, ...] | None = None) -> Callable[..., Tensor]:
    """The op as a function of tensors alone."""
    def run(q: Tensor, k: Tensor, v: Tensor, *past: Tensor, **named: Tensor) -> Tensor:
        cu = None if borders is None else torch.tensor(borders, dtype=torch.int32, device=q.device)
        if C:
            return block_attention(q, k, v, *past, *named.values(), C, cu_seqlens=cu)
        return causal_attention(q, k, v, cu_seqlens=cu)
    return run


def check(B: int, T: int, H: int, G: int, K: int, C: int = 0, R: int = 0, borders: tuple[int, ...] | None = None,
          dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    inputs = draw(B, T, H, G, K, C, R, len(borders) - 1 if borders else 0, device)
    reference = partial(plain, C=C, borders=borders)
    if T == 1:  # one key, weight 1: q and k have no gradient, but for the rounding of y
        inputs = {name: x.to(dtype) for name, x in inputs.items()}
        with use_backend("triton"), nan_memory():
            found = outputs_and_gradients(op(C, borders), inputs)
        assert (found["0"] - inputs["v"]).abs().max() <= 4 * torch.finfo(dtype).eps
        assert all(found[name].abs().max() <= 40 * torch.finfo(dtype).eps for name in ("dq", "dk"))
        return
    check_against_float64(op(C, borders), reference, reference, inputs, dtype)


BORDERS = (0, 5, 5, 37, 38, 150, 150)  # documents may be empty


@interpreted
@pytest.mark.parametrize("T", SHORT_LENGTHS)
def test_causal(T: int) -> None:
    check(2, T, 2, 2, 16)


@interpreted
@pytest.mark.parametrize(("T", "H", "G", "K"), [(150, 4, 2, 16), (33, 3, 1, 24), (20, 1, 1, 40), (20, 1, 1, 8)])
def test_causal_at_other_shapes(T: int, H: int, G: int, K: int) -> None:
    check(1, T, H, G, K)


@interpreted
@pytest.mark.parametrize(("T", "K", "C", "R"), [(150, 16, 16, 3), (70, 24, 10, 1), (40, 16, 64, 5), (40, 16, 1, 1),
                                                (200, 16, 80, 37), (1, 16, 16, 4), (64, 16, 32, 32)])
def test_blocks(T: int, K: int, C: int, R: int) -> None:
    check(1, T, 2, 2, K, C, R)


@interpreted
@pytest.mark.parametrize("T", [2, 3])
def test_float32_rounds_no_more_than_pytorch_where_gradients_cancel(T: int) -> None:
    """D as dy . y alone was up to 3 times over the bound in such rows."""
    for seed in range(25):
        torch.manual_seed(seed)
        check(2, T, 2, 2, 64)


@interpreted
@pytest.mark.parametrize("C", [0, 16])
def test_documents(C: int) -> None:
    check(1, 150, 2, 2 if C else 1, 16, C, 3 if C else 0, BORDERS)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "dtype", "C"), [(64, BF16, 0), (64, BF16, 64), (64, FP32, 0), (128, BF16, 0),
                                               (128, FP16, 0)])
def test_every_length(K: int, dtype: torch.dtype, C: int) -> None:
    for T in LENGTHS:
        check(2, T, 2, 2, K, C, 16, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("K", [*HEAD_SIZES, 17])
def test_every_head_size(K: int) -> None:
    check(1, 300, 2, 2, K, dtype=(BF16, FP16)[K // 8 % 2], device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("K", [24, 128, 256])
def test_float32_at_head_sizes(K: int) -> None:
    check(1, 150, 2, 2, K, dtype=FP32, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("K", [40, 128, 256])
def test_blocks_at_head_sizes(K: int) -> None:
    check(1, 300, 2, 2, K, 48, 7, dtype=BF16, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "C", "R"), [(999, 10, 1), (999, 256, 100), (300, 1, 1)])
def test_every_kind_of_block(T: int, C: int, R: int) -> None:
    check(2, T, 2, 2, 64, C, R, dtype=BF16, device="cuda")


@pytest.mark.gpu
def test_documents_in_blocks() -> None:
    for borders in ((0, 1, 1, 100, 228, 999), (0, 64, 128, 999), (0, 999)):
        check(1, 999, 2, 2, 64, 64, 16, borders, dtype=BF16, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "G"), [(4, 1), (6, 2)])
def test_groups_and_documents(H: int, G: int) -> None:
    check(2, 700, H, G, 64, dtype=BF16, device="cuda")
    check(1, 700, H, G, 64, borders=(0, 0, 127, 128, 256, 600, 700), dtype=BF16, device="cuda")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
TOLERANCE = 3e-2 if torch.cuda.is_available() else 1e-5


def small(C: int = 0, scale: float = 1.0) -> Inputs:
    return {name: (scale * x).to(DTYPE) for name, x in draw(2, 80, 2, 2, 16, C, 3, device=DEVICE).items()}


@pytest.mark.parametrize("C", [0, 16])
def test_views_and_expanded_gradients(C: int) -> None:
    fused = torch.randn(5, 40, 3 * 64, dtype=DTYPE, device=DEVICE)[1:3].unflatten(-1, (-1, 16))  # a storage offset, too
    past = list(draw(2, 40, 4, 4, 16, C, 3, device=DEVICE).values())[3:]
    turned = [x.to(DTYPE).transpose(-1, -2).contiguous().transpose(-1, -2) for x in past]  # channels far apart
    results = []
    for backend, wide in (("triton", DTYPE), ("eager", torch.float64)):
        a, *rest = (x.detach().to(wide).requires_grad_() for x in (fused, *turned))
        with use_backend(backend):
            y = op(C)(*a.chunk(3, dim=2), *rest)
            results.append([y, *torch.autograd.grad(y.sum(), [a, *rest])])
    for x, expected in zip(*results, strict=True):
        assert (x - expected).norm() < TOLERANCE * expected.norm()


@pytest.mark.parametrize("C", [0, 16])
@pytest.mark.parametrize("gap", [8, 1])
def test_strides_that_tma_takes_or_not(gap: int, C: int) -> None:
    """Rows `gap` numbers apart: tiles come by TMA if that keeps them aligned to 16 bytes, else by pointers."""
    inputs = {name: torch.cat([x, x[..., :gap]], -1)[..., :16] for name, x in small(C).items()}
    able = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)
    assert describable(*inputs.values()) == (able and gap == 8)
    results = []
    for backend, wide in (("triton", DTYPE), ("eager", torch.float64)):
        leaves = [x.to(wide).requires_grad_() for x in inputs.values()]
        assert leaves[0].stride() == inputs["q"].stride() or wide != DTYPE
        with use_backend(backend):
            y = op(C)(*leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for x, expected in zip(*results, strict=True):
        assert (x - expected).norm() < TOLERANCE * expected.norm()


@pytest.mark.parametrize("C", [0, 16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_outputs_do_not_move_with_the_future_or_another_row(C: int, scale: float) -> None:
    inputs = small(C)
    other = {name: scale * torch.randn_like(x) for name, x in inputs.items()}
    with use_backend("triton"):
        y = op(C)(**inputs)
        for t in (0, 15, 16, 31, 63, 64, 78):
            changed = {}
            for name, x in inputs.items():
                now = (t + 1) // 16 if "summary" in name else t + 1
                changed[name] = torch.cat([x[:, :now], other[name][:, now:]], 1)
                changed[name][1] = other[name][1]
            changed["k"][0, t + 1 :] = torch.nan  # weights of the future are exactly 0, but 0 times a NaN value is NaN
            assert torch.equal(op(C)(**changed)[0, : t + 1], y[0, : t + 1])


@pytest.mark.parametrize("C", [0, 16])
def test_gradients_do_not_move_with_another_document(C: int) -> None:
    """The gradients of a document are not moved by another's tokens."""
    inputs = {name: x.to(DTYPE).requires_grad_() for name, x in draw(1, 80, 2, 2, 16, C, 3, 2, DEVICE).items()}
    changed = {name: x.detach().clone() for name, x in inputs.items()}
    for x in changed.values():
        x[:, 40:] *= 50
    if C:
        for name in ("k_summary", "v_summary"):
            changed[name] = torch.cat([inputs[name][:, :3].detach(), 50 * inputs[name][:, 3:].detach()], 1)
    run, dy = op(C, (0, 40, 80)), torch.randn(1, 80, 2, 16, dtype=DTYPE, device=DEVICE)
    with use_backend("triton"):
        a = torch.autograd.grad(run(**inputs), list(inputs.values()), dy)
        leaves = [x.requires_grad_() for x in changed.values()]
        b = torch.autograd.grad(run(**changed), leaves, dy)
    for x, y in zip(a[:3], b[:3], strict=True):
        assert torch.equal(x[:, :40], y[:, :40])
    for x, y in zip(a[3:], b[3:], strict=True):
        assert torch.equal(x[:, :3], y[:, :3])


@pytest.mark.parametrize("C", [0, 16])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 90.0])
def test_extremes_stay_finite(C: int, scale: float) -> None:
    inputs = small(C, scale)
    inputs["k"][0, 5] *= 100  # one token's keys stand out
    leaves = [x.requires_grad_() for x in inputs.values()]
    with use_backend("triton"), nan_memory():
        y = op(C)(*leaves)
        assert y.isfinite().all()
        assert all(x.isfinite().all() for x in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("C", [0, 16])
def test_two_runs_are_equal(C: int) -> None:
    leaves = [x.requires_grad_() for x in small(C).values()]
    with use_backend("triton"):
        runs = [torch.autograd.grad(op(C)(*leaves).square().sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape, dtype=DTYPE, device=DEVICE, requires_grad=True)
    past = torch.zeros(shape[0], 0, 3, 2, 16, dtype=DTYPE, device=DEVICE)
    with use_backend("triton"):
        for y in (causal_attention(q, q, q), block_attention(q, q, q, past, past, 16)):
            assert y.shape == shape
            y.sum().backward()


@pytest.mark.parametrize("C", [0, 16])
def test_operator_checks(C: int) -> None:
    q, k, v, *past = (x[:1, :, :1].requires_grad_() if x.ndim == 4 else x[:1, ..., :1, :].requires_grad_()
                      for x in small(C).values())
    past = [x.flatten(1, 2) for x in past] or [None, None]
    torch.library.opcheck(attention_triton.attention, (q, k, v, *past, C, 3 if C else 0, None))


@pytest.mark.parametrize("C", [0, 16])
def test_compiled_in_one_graph(C: int) -> None:
    leaves = [x.requires_grad_() for x in small(C).values()]
    torch.compiler.reset()
    with use_backend("triton"):
        run = op(C)
        plain_run, compiled = (f(*leaves) for f in (run, torch.compile(run, fullgraph=True)))
        assert torch.equal(plain_run, compiled)
        dy = torch.randn_like(plain_run)
        for a, b in zip(*(torch.autograd.grad(y, leaves, dy) for y in (plain_run, compiled)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("C", [0, 16])
def test_flops_are_those_of_the_pairs_that_see_each_other(C: int) -> None:
    leaves = [x.requires_grad_() for x in small(C).values()]
    with use_backend("triton"), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y = op(C)(*leaves)
        forward = counter.get_total_flops()
        y.sum().backward()
    pairs = int(seen(80, C, 3, 4, None).sum())
    assert forward == 4 * 2 * 2 * 16 * pairs
    assert counter.get_total_flops() == forward * 7 // 2


def test_mixed_dtypes_and_autocast() -> None:
    q, k, v = (x.float() for x in small().values())
    with use_backend("triton"):
        assert causal_attention(q, k, v.to(DTYPE)).dtype == torch.float32
        with torch.autocast(DEVICE, torch.bfloat16):
            assert causal_attention(q, k, v).dtype == torch.bfloat16


def test_wrong_shapes_are_refused_before_launch() -> None:
    q, k, v, k_summary, v_summary = small(16).values()
    cu = torch.tensor([0, 80], device=DEVICE)
    with use_backend("triton"):
        for wrong in ((q, k[:, :-1], v), (q, k, v[:, :, :1]), (q[:, :, :1], k, v)):
            with pytest.raises(ZooError, match=r"allowed: q \[B, T, H, K\]"):
                causal_attention(*wrong)
        with pytest.raises(ZooError, match="two of"):
            block_attention(q, k, v, k_summary[:, 1:], v_summary[:, 1:], 16)
        with pytest.raises(ZooError, match="one row"):
            causal_attention(q, k, v, cu_seqlens=cu)
        with pytest.raises(ZooError, match="head sizes 300"):
            causal_attention(*(torch.zeros(1, 2, 1, 300, device=DEVICE) for _ in range(3)))


@pytest.mark.parametrize("block", [0, 48])
def test_self_test(block: int) -> None:
    assert attention_triton.error_of_kernels(torch.device(DEVICE), DTYPE, 16, block) < 0.7


@pytest.mark.parametrize("C", [0, 16])
def test_channels_that_lie_apart(C: int) -> None:
    """Every other number of rows twice as long, at a head size that Hopper has kernels of its own for."""
    exact = {name: x.to(DTYPE) for name, x in draw(1, 70, 1, 1, 64, C, 3, device=DEVICE).items()}
    apart = {name: torch.stack([x, x + 1], -1).flatten(-2)[..., ::2] for name, x in exact.items()}
    assert not describable(apart["q"])
    runs = []
    with use_backend("triton"):
        for inputs in (exact, apart):
            leaves = [x.requires_grad_() for x in inputs.values()]
            y = op(C)(*leaves)
            runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for x, expected in zip(*runs, strict=True):
        assert (x - expected).norm() < TOLERANCE * expected.norm()


@pytest.mark.gpu
def test_memory_and_offsets_past_32_bits() -> None:
    """Inputs are views whose rows lie 2^31 elements apart; a batch row equals the same one alone."""
    T, H, K = 512, 4, 64
    room = torch.empty(2**31 + 3 * T * H * K, dtype=torch.bfloat16, device="cuda")
    views = [room.as_strided((2, T, H, K), (2**31, H * K, K, 1), i * T * H * K) for i in range(3)]
    for x in views:
        x.copy_(torch.randn_like(x))
    leaves = [x.detach().requires_grad_() for x in views]
    alone = [x[1:].detach().clone().requires_grad_() for x in views]
    dy = torch.randn(2, T, H, K, dtype=torch.bfloat16, device="cuda")
    with use_backend("triton"):
        a = torch.autograd.grad(causal_attention(*leaves), leaves, dy)
        b = torch.autograd.grad(causal_attention(*alone), alone, dy[1:])
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x[1:], y)


@pytest.mark.gpu
def test_memory_is_what_the_docstring_says() -> None:
    B, T, H, K = 1, 16384, 4, 64
    q, k, v = (torch.randn(B, T, H, K, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    tensor, lse = q.numel() * 2, 4 * B * H * T
    with use_backend("triton"):
        causal_attention(q, k, v).sum().backward()
        q.grad = k.grad = v.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = causal_attention(q, k, v)
        assert torch.cuda.memory_allocated() - before <= tensor + lse + 4096
        y.backward(torch.ones_like(y))
    assert torch.cuda.max_memory_allocated() - before <= 5 * tensor + 2 * lse + 4096


def builds() -> None:
    """Every kernel at the benchmark's head sizes and dtypes, for tests/kernel_builds.py."""
    from zoo.kernels import attention, attention_backward, attention_hopper, attention_hopper_backward

    for dtype in DTYPES:
        for K in (16, 32, 64, 128, 256) if dtype != torch.float16 else (64,):
            q = torch.zeros(1, 256, 2, K, dtype=dtype)
            past = torch.zeros(1, 48, 2, K, dtype=dtype)
            for block, p in ((0, None), (64, past)):
                y, lse = attention.forward(q, q, q, p, p, 0.1, block, 16, None)
                attention_backward.backward(y, q, q, q, p, p, y, lse, 0.1, block, 16, None)
    for K, dtype, groups in ((64, BF16, 2), (128, BF16, 2), (64, FP16, 1), (96, BF16, 1)):
        q, k = (torch.zeros(1, 256, H, K, dtype=dtype) for H in (2, groups))
        y, lse = attention_hopper.forward(q, k, k, 0.1)
        attention_hopper_backward.backward(y, q, k, k, y, lse, 0.1)
