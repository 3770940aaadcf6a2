"""The rotation's kernel, and attention of what it turns, against their definitions in float64 and as an operator."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_cases import DTYPES, LENGTHS, check_against_float64, interpreted, nan_memory, relative_error
from test_kernels_attention import plain
from torch import Tensor

from zoo.errors import ZooError
from zoo.kernels import rotary
from zoo.ops import attention_triton
from zoo.ops.attention import rotary_attention
from zoo.ops.backend import use_backend
from zoo.ops.rotary import phases, turn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def positions(T: int, borders: tuple[int, ...] | None) -> Tensor:
    t = torch.arange(T)
    if borders is None:
        return t
    cu = torch.tensor(borders)
    return t - cu[torch.searchsorted(cu, t, right=True) - 1]


def op(qkv: Tensor, heads: int, borders: tuple[int, ...] | None = None) -> Tensor:
    cu = None if borders is None else torch.tensor(borders, dtype=torch.int32, device=qkv.device)
    table = phases(positions(qkv.shape[1], borders).to(qkv.device), qkv.shape[3],
                   dtype=torch.promote_types(qkv.dtype, FP32))
    return rotary_attention(qkv, table, heads, cu)


def definition(qkv: Tensor, heads: int, borders: tuple[int, ...] | None = None) -> Tensor:
    """With the float32 phases that every dtype gets."""
    table = phases(positions(qkv.shape[1], borders), qkv.shape[3]).to(
        qkv.device, torch.promote_types(qkv.dtype, FP32))
    keys = (qkv.shape[2] - heads) // 2
    q, k, v = qkv.split([heads, keys, keys], dim=2)
    return plain(turn(q, table), turn(k, table), v, borders=borders)


def check(B: int, T: int, H: int, G: int, K: int, dtype: torch.dtype = FP32, borders: tuple[int, ...] | None = None,
          device: str = "cpu") -> None:
    inputs = {"qkv": torch.randn(B, T, H + 2 * G, K, dtype=torch.float64).to(device)}
    run = partial(definition, heads=H, borders=borders)
    check_against_float64(partial(op, heads=H, borders=borders), run, run, inputs, dtype)


@pytest.mark.parametrize("K", [2, 7, 16, 24, 64, 80, 256])
@pytest.mark.parametrize("back", [False, True])
def test_turned_and_back(K: int, back: bool) -> None:
    x = torch.randn(2, 37, 9, K, dtype=DTYPE, device=DEVICE)[:, :, 1:6]  # between others' heads, more than are unrolled
    table = phases(torch.randint(3000, (37,), device=DEVICE), K)
    sign = torch.tensor([1.0, -1.0 if back else 1.0], device=DEVICE)[:, None]
    expected = turn(x.double(), (table * sign).double())
    with nan_memory():
        y = rotary.turn(x, table, back=back)
    assert y.is_contiguous()
    assert relative_error(y, expected) < torch.finfo(DTYPE).eps
    whole = torch.randn(2, 37, 9, K, dtype=DTYPE, device=DEVICE)
    others = whole.clone()
    whole[:, :, 1:6] = x
    rotary.turn(whole[:, :, 1:6], table, out=whole[:, :, 1:6], back=back)
    assert torch.equal(whole[:, :, 1:6], y)
    assert torch.equal(whole[:, :, 6:], others[:, :, 6:])
    assert torch.equal(whole[:, :, :1], others[:, :, :1])


@interpreted
@pytest.mark.parametrize(("B", "T", "H", "G", "K"), [(2, 17, 2, 2, 16), (1, 65, 4, 2, 24), (1, 3, 3, 1, 16),
                                                     (1, 20, 1, 1, 9)])
def test_attention(B: int, T: int, H: int, G: int, K: int) -> None:
    check(B, T, H, G, K)


@interpreted
def test_documents() -> None:
    check(1, 150, 2, 1, 16, borders=(0, 5, 5, 37, 38, 150, 150))


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "dtype", "H", "G"), [(64, BF16, 2, 2), (128, BF16, 2, 1), (64, FP16, 4, 2),
                                                    (80, BF16, 2, 2), (64, FP32, 2, 2), (32, BF16, 2, 2)])
def test_every_length(K: int, dtype: torch.dtype, H: int, G: int) -> None:
    for T in LENGTHS[1:]:  # at T = 1 queries and keys have no gradient but of roundings
        check(2, T, H, G, K, dtype, device="cuda")


@pytest.mark.gpu
def test_documents_in_bf16() -> None:
    check(1, 700, 4, 2, 64, BF16, (0, 0, 127, 128, 256, 600, 700), device="cuda")


def test_two_runs_are_equal_and_no_gap_is_left() -> None:
    qkv = torch.randn(2, 80, 6, 64, dtype=DTYPE, device=DEVICE, requires_grad=True)
    with use_backend("triton"), nan_memory():
        runs = [torch.autograd.grad(op(qkv, 2).square().sum(), qkv)[0] for _ in range(2)]
    assert torch.equal(*runs)
    assert bool(runs[0].isfinite().all())


def test_outputs_do_not_move_with_the_future_or_another_row() -> None:
    qkv = torch.randn(2, 80, 6, 64, dtype=DTYPE, device=DEVICE)
    with use_backend("triton"):
        y = op(qkv, 2)
        for t in (0, 15, 63, 64, 78):
            changed = qkv.clone()
            changed[0, t + 1 :] *= 100
            changed[0, t + 1 :, 2:4] = torch.nan  # keys; a value that is no number would be one times a weight of 0
            changed[1] = 100
            assert torch.equal(op(changed, 2)[0, : t + 1], y[0, : t + 1])


def test_a_projection_whose_rows_lie_apart() -> None:
    whole = torch.randn(2, 40, 8, 64, dtype=DTYPE, device=DEVICE)
    apart = whole[:, :, 1:7].requires_grad_()
    alone = apart.detach().clone().requires_grad_()
    with use_backend("triton"):
        y, expected = op(apart, 2), op(alone, 2)
        assert torch.equal(y, expected)
        a, b = (torch.autograd.grad(z.square().sum(), x)[0] for z, x in ((y, apart), (expected, alone)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5, 6, 16), (2, 0, 6, 16)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    qkv = torch.zeros(shape, dtype=DTYPE, device=DEVICE, requires_grad=True)
    with use_backend("triton"):
        y = op(qkv, 2)
        assert y.shape == (*shape[:2], 2, 16)
        y.sum().backward()


def test_operator_checks() -> None:
    qkv = torch.randn(1, 20, 4, 16, dtype=DTYPE, device=DEVICE, requires_grad=True)
    table = phases(torch.arange(20, device=DEVICE), 16)
    torch.library.opcheck(attention_triton.rotary_attention.overload, (qkv, table, 2, None))


def test_compiled_in_one_graph() -> None:
    qkv = torch.randn(2, 80, 6, 16, dtype=DTYPE, device=DEVICE, requires_grad=True)
    torch.compiler.reset()
    with use_backend("triton"):
        run = partial(op, heads=2)
        eager, compiled = run(qkv), torch.compile(run, fullgraph=True)(qkv)
        assert relative_error(compiled, eager) < 1e-2 * (DTYPE == BF16) + 1e-5  # the compiler's sines are its own
        dy = torch.randn_like(eager)
        a, b = (torch.autograd.grad(y, qkv, dy)[0] for y in (eager, compiled))
    assert relative_error(b, a) < 1e-2 * (DTYPE == BF16) + 1e-5


def test_flops_are_attention_s() -> None:
    qkv = torch.randn(2, 80, 6, 16, dtype=DTYPE, device=DEVICE, requires_grad=True)
    with use_backend("triton"), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y = op(qkv, 2)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 4 * 2 * 2 * 16 * (80 * 81 // 2)
    assert counter.get_total_flops() == forward * 7 // 2


def test_autocast_decides_the_dtype() -> None:
    qkv = torch.randn(1, 20, 4, 16, device=DEVICE)
    for backend in ("triton", "eager"):
        with use_backend(backend), torch.autocast(DEVICE, BF16):
            assert op(qkv, 2).dtype == BF16


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_wrong_shapes_are_refused(backend: str) -> None:
    qkv = torch.zeros(1, 8, 6, 16, dtype=DTYPE, device=DEVICE)
    table = phases(torch.arange(8, device=DEVICE), 16)
    with use_backend(backend):
        for heads in (0, 3, 5, 6):
            with pytest.raises(ZooError, match="G divides heads"):
                rotary_attention(qkv, table, heads)
        with pytest.raises(ZooError, match=r"allowed: \[8, 2, 8\]"):
            rotary_attention(qkv, table[1:], 2)


def test_self_test() -> None:
    assert attention_triton.error_of_rotary(torch.device(DEVICE), DTYPE, 16) < 0.7


def builds() -> None:
    """The rotation, and the gradients that are turned back, for tests/kernel_builds.py."""
    from zoo.kernels import attention_hopper, attention_hopper_backward

    for dtype in DTYPES:
        for K in (16, 64, 80, 128):
            qkv, table = torch.zeros(1, 256, 6, K, dtype=dtype), torch.zeros(256, 2, K // 2)
            turned = rotary.turn(qkv[:, :, :4], table)
            if dtype == BF16 and K >= 64:
                q, k, v = turned[:, :, :2], turned[:, :, 2:], qkv[:, :, 4:]
                y, lse = attention_hopper.forward(q, k, v, 0.1)
                attention_hopper_backward.backward_in_row(qkv, y, q, k, v, y, lse, 0.1, table)
