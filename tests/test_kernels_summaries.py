"""Attention over blocks and their learned projections by kernels, against its definition in float64, as an operator."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, LENGTHS, check_against_float64, interpreted, nan_memory, relative_error
from test_kernels_attention import plain
from torch import Tensor

from zoo.errors import ZooError
from zoo.ops import summary_attention_triton
from zoo.ops.backend import decisions, forget_decisions, use_backend
from zoo.ops.rotary import phases, turn
from zoo.ops.summary_attention import summary_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Inputs = dict[str, Tensor]


def draw(B: int, T: int, H: int, K: int, C: int, R: int, device: str = DEVICE) -> Inputs:
    """E and F so that a summary is about as large as what it is made of."""
    return {"qkv": torch.randn(B, T, 3 * H, K, dtype=torch.float64, device=device),
            **{name: torch.randn(H, R, C, dtype=torch.float64, device=device) / C**0.5 for name in ("E", "F")}}


def tables(qkv: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, whatever the dtype, as all get them: the kernels' rounding is measured, not the phases'."""
    T, K, (R, C) = qkv.shape[1], qkv.shape[3], E.shape[1:]
    M = max(-(-T // C) - 1, 0)
    at = (torch.arange(M)[:, None] * C + (torch.arange(R).double() + 0.5) * C / R - 0.5).flatten()
    wide = torch.promote_types(qkv.dtype, FP32)
    return tuple(phases(p, K).to(qkv.device, wide) for p in (torch.arange(T), at))  # type: ignore[return-value]


def op(qkv: Tensor, E: Tensor, F: Tensor) -> Tensor:
    return summary_attention(qkv, E, F, *tables(qkv, E))


def definition(qkv: Tensor, E: Tensor, F: Tensor) -> Tensor:
    (R, C), (table, past_table) = E.shape[1:], tables(qkv, E)
    M = past_table.shape[0] // R
    q, k, v = qkv.chunk(3, dim=2)
    k_past, v_past = (torch.einsum("hrc,bmchk->bmrhk", P, x[:, : M * C].unflatten(1, (M, C)))
                      for P, x in ((E, k), (F, v)))
    k_past = turn(k_past.flatten(1, 2), past_table).view_as(k_past)
    return plain(turn(q, table), turn(k, table), v, k_past, v_past, C)


def check(B: int, T: int, H: int, K: int, C: int, R: int, dtype: torch.dtype = FP32, device: str = "cpu") -> None:
    check_against_float64(op, definition, definition, draw(B, T, H, K, C, R, device), dtype)


@interpreted
@pytest.mark.parametrize(("B", "T", "H", "K", "C", "R"), [
    (2, 70, 2, 16, 16, 3), (2, 200, 2, 16, 64, 5), (1, 192, 1, 32, 64, 37), (1, 64, 1, 32, 16, 16),
    (1, 65, 1, 16, 16, 1), (2, 50, 1, 16, 10, 2), (1, 20, 2, 16, 64, 16),
    (1, 7, 1, 16, 1, 1), (3, 200, 1, 16, 17, 17)])
def test_attention(B: int, T: int, H: int, K: int, C: int, R: int) -> None:
    forget_decisions()
    check(B, T, H, K, C, R)
    assert any(line.startswith("summary_attention") and line.endswith(": triton") for line in decisions())


@pytest.mark.gpu
@pytest.mark.parametrize(("K", "dtype", "C", "R"), [(64, BF16, 64, 16), (128, BF16, 64, 16), (32, BF16, 64, 16),
                                                    (64, FP16, 128, 33), (64, FP32, 64, 16), (64, BF16, 10, 3)])
def test_every_length(K: int, dtype: torch.dtype, C: int, R: int) -> None:
    for T in (2, *LENGTHS[3:], 192):
        check(3, T, 2, K, C, R, dtype, "cuda")


@pytest.mark.parametrize(("K", "C", "R"), [(24, 16, 3), (16, 16, 80), (64, 300, 4)])
def test_what_the_kernels_do_not_take_is_put_together(K: int, C: int, R: int) -> None:
    forget_decisions()
    check_against_float64(op, definition, definition, draw(1, C + 5, 1, K, C, R), DTYPE)
    assert not any(line.startswith("summary_attention") for line in decisions())


def test_outputs_do_not_move_with_the_future_or_another_row() -> None:
    qkv, E, F = (x.to(DTYPE) for x in draw(2, 80, 2, 16, 16, 3).values())
    with use_backend("triton"):
        y = op(qkv, E, F)
        for t in (0, 15, 16, 31, 63, 64, 78):
            changed = qkv.clone()
            changed[0, t + 1 :] *= 100
            changed[1] = 100
            assert torch.equal(op(changed, E, F)[0, : t + 1], y[0, : t + 1])
            own = (t + 1) // 16 * 16  # of a block that is under way, no summary is seen
            changed[0, max(own, t + 1) :, 2:4] = torch.nan
            assert torch.equal(op(changed, E, F)[0, : t + 1], y[0, : t + 1])


def test_two_runs_are_equal_and_no_gap_is_left() -> None:
    leaves = [x.to(DTYPE).requires_grad_() for x in draw(2, 150, 2, 64, 64, 16).values()]
    with use_backend("triton"), nan_memory():
        runs = [torch.autograd.grad(op(*leaves).square().sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(bool(x.isfinite().all()) for x in runs[0])


@pytest.mark.parametrize("shape", [(0, 40, 6, 16), (2, 0, 6, 16), (2, 10, 6, 16)])
def test_nothing_to_summarise(shape: tuple[int, ...]) -> None:
    qkv = torch.randn(shape, dtype=DTYPE, device=DEVICE, requires_grad=True)
    E, F = (torch.randn(2, 3, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    with use_backend("triton"):
        y = op(qkv, E, F)
        assert y.shape == (*shape[:2], 2, 16)
        y.sum().backward()
    assert E.grad is not None
    assert bool((shape[0] == 0) | (shape[1] < 17)) == (not E.grad.any())


def test_float32_projections_of_16_bit_tokens() -> None:
    """As in training: parameters in float32 and autocast. Their gradients are float32, and no sum of 16-bit numbers."""
    given = draw(2, 150, 2, 16, 16, 3)
    low = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    leaves = [given["qkv"].to(low).requires_grad_(), *(given[name].float().requires_grad_() for name in ("E", "F"))]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    with use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        y = op(*leaves)
    expected = definition(*wide)
    assert y.dtype == low
    for a, b in zip(torch.autograd.grad(y.float().square().sum(), leaves),
                    torch.autograd.grad(expected.square().sum(), wide), strict=True):
        assert relative_error(a, b) < (1e-5 if low == FP32 else 3e-2)
    assert torch.autograd.grad(op(*leaves).float().sum(), leaves[1])[0].dtype == FP32


def test_operator_checks() -> None:
    qkv, E, F = (x.to(DTYPE).requires_grad_() for x in draw(1, 40, 1, 16, 16, 3).values())
    torch.library.opcheck(summary_attention_triton.summary_attention.overload, (qkv, E, F, *tables(qkv, E)))


def test_compiled_in_one_graph() -> None:
    leaves = [x.to(DTYPE).requires_grad_() for x in draw(2, 80, 2, 16, 16, 3).values()]
    torch.compiler.reset()
    with use_backend("triton"):
        compiled = torch.compile(summary_attention, fullgraph=True)
        runs = [run(*leaves, *tables(*leaves[:2])) for run in (summary_attention, compiled)]
        assert torch.equal(*runs)
        dy = torch.randn_like(runs[0])
        for a, b in zip(*(torch.autograd.grad(y, leaves, dy) for y in runs), strict=True):
            assert torch.equal(a, b)


def test_flops_are_those_of_the_pairs_and_the_projections() -> None:
    leaves = [x.to(DTYPE).requires_grad_() for x in draw(2, 80, 2, 16, 16, 3).values()]
    with use_backend("triton"), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y = op(*leaves)
        forward = counter.get_total_flops()
        y.sum().backward()
    pairs, projected = 5 * (16 * 17 // 2) + 16 * 3 * (4 + 3 + 2 + 1), 4 * 16 * 3
    assert forward == 4 * 2 * 2 * 16 * (pairs + projected)
    assert counter.get_total_flops() == 4 * 2 * 2 * 16 * (pairs * 7 // 2 + 3 * projected)


def test_wrong_shapes_are_refused() -> None:
    qkv, E, F = (x.to(DTYPE) for x in draw(1, 40, 2, 16, 16, 3).values())
    table, past_table = tables(qkv, E)
    for wrong in ((qkv[:, :, 1:], E, F, table, past_table), (qkv, E, F[:1], table, past_table),
                  (qkv, E, F, table[1:], past_table), (qkv, E, F, table, past_table[3:])):
        for backend in ("triton", "eager"):
            with use_backend(backend), pytest.raises(ZooError, match=r"allowed: \[B, T, 3 H, K\], two of \[H, R, C\]"):
                summary_attention(*wrong)


def test_self_test() -> None:
    assert summary_attention_triton.error_of_kernels(torch.device(DEVICE), DTYPE, (16, 3, 16)) < 0.7


def builds() -> None:
    """All kernels at the sizes that are trained, and the gradients that are turned back, for tests/kernel_builds.py."""
    from zoo.kernels import attention_backward, summaries

    for dtype in DTYPES:
        for K in (32, 64, 128):
            if K == 128 and dtype == FP32:
                continue
            qkv, E = torch.zeros(1, 256, 6, K, dtype=dtype), torch.zeros(2, 16, 64)
            q, k, v = qkv.chunk(3, dim=2)
            table, past_table = torch.zeros(256, 2, K // 2), torch.zeros(48, 2, K // 2)
            ks, vs = summaries.forward(k, v, E, E, past_table)
            lse = torch.zeros(1, 2, 256)
            for inside in {False, attention_backward.takes_projections(64, lse, q, q, k, v, ks, vs)}:
                attention_backward.backward(q, q, k, v, ks, vs, q, lse, 0.1, 64, 16, None, (q, k, v), table, past_table,
                                            (E, E) if inside else None)
                summaries.backward(ks, vs, k, v, E, E, k, v, add=not inside)
