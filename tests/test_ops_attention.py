"""Exact attention over tokens, caches and blocks with summaries, against its definition in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zoo.ops import attention
from zoo.ops.attention import attend_cache, block_attention, causal_attention, masked_attention

LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129)


def dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the keys that `visible` [t, L] or [B, t, L] shows; key heads are repeated."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    visible = visible if visible.ndim == 2 else visible.unsqueeze(1)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dense(q, k, v, torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril())


def blockwise(q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor, block: int) -> Tensor:
    t, rank = torch.arange(q.shape[1]), k_summary.shape[2]
    slot = torch.arange(k_summary.shape[1]).repeat_interleave(rank)
    own = (t[:, None] // block == t // block) & (t <= t[:, None])
    visible = torch.cat([slot < t[:, None] // block, own], dim=1)
    return dense(q, torch.cat([k_summary.flatten(1, 2), k], 1), torch.cat([v_summary.flatten(1, 2), v], 1), visible)


def block_inputs(B: int, T: int, H: int, K: int, block: int, rank: int, scale: float = 1.0) -> list[Tensor]:
    past = -(-T // block) - 1
    return [scale * torch.randn(B, T, H, K) for _ in range(3)] + [torch.randn(B, past, rank, H, K) for _ in range(2)]


def agree(f: Callable[..., Tensor], g: Callable[..., Tensor], inputs: list[Tensor], tolerance: float = 2e-5) -> None:
    """Outputs and gradients of float32 f are those of float64 g, up to `tolerance` of their largest entry."""
    narrow = [x.detach().requires_grad_() for x in inputs]  # views and strides stay as they came
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = f(*narrow), g(*wide)
    assert y.dtype == narrow[0].dtype
    dy = torch.randn(expected.shape)
    got = [y, *torch.autograd.grad(y, narrow, dy)]
    want = [expected, *torch.autograd.grad(expected, wide, dy.double())]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("T", [*LENGTHS, 1000])
def test_causal_attention_is_its_definition(T: int) -> None:
    agree(causal_attention, causal, [torch.randn(1 + (T < 100), T, 2, 32) for _ in range(3)])


@pytest.mark.parametrize(("H", "K"), [(1, 16), (3, 24), (2, 40), (1, 256)])
def test_causal_attention_at_other_shapes(H: int, K: int) -> None:
    agree(causal_attention, causal, [torch.randn(1, 33, H, K) for _ in range(3)])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_read_the_key_head_of_their_group(groups: int) -> None:
    agree(causal_attention, causal, [torch.randn(2, 65, 4, 16), *(torch.randn(2, 65, groups, 16) for _ in range(2))])


@pytest.mark.parametrize("T", LENGTHS)
def test_block_attention_is_its_definition(T: int) -> None:
    inputs = block_inputs(2, T, 2, 16, block=16, rank=3)
    agree(lambda *x: block_attention(*x, 16), lambda *x: blockwise(*x, 16), inputs)


@pytest.mark.parametrize(("H", "K", "block", "rank"), [(1, 16, 64, 16), (3, 24, 10, 1), (1, 256, 33, 33), (2, 8, 1, 1)])
def test_block_attention_at_other_shapes(H: int, K: int, block: int, rank: int) -> None:
    inputs = block_inputs(1, 70, H, K, block, rank)
    agree(lambda *x: block_attention(*x, block), lambda *x: blockwise(*x, block), inputs)


BORDERS = ((0, 70), (0, 5, 5, 37, 38, 70), (0, 0, 16, 32, 48, 64, 70, 70))  # documents may be empty, or whole blocks


@pytest.mark.parametrize("borders", BORDERS)
def test_documents_in_a_row_are_each_on_their_own(borders: tuple[int, ...]) -> None:
    cu_seqlens, C = torch.tensor(borders, dtype=torch.int32), 16
    t = torch.arange(70)
    document = torch.searchsorted(cu_seqlens, t.int(), right=True) - 1
    lengths = cu_seqlens.diff()
    entries = (lengths + C - 1) // C
    first = entries.cumsum(0) - entries
    block = (t - cu_seqlens[document]) // C
    own = (document[:, None] == document) & (t <= t[:, None])

    def causal_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense(q, k, v, own)

    def block_documents(q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor) -> Tensor:
        slot = torch.arange(k_summary.shape[1]).repeat_interleave(k_summary.shape[2])
        past = (slot >= first[document][:, None]) & (slot < (first[document] + block)[:, None])
        visible = torch.cat([past, own & (block[:, None] == block)], dim=1)
        return dense(q, torch.cat([k_summary.flatten(1, 2), k], 1), torch.cat([v_summary.flatten(1, 2), v], 1), visible)

    inputs = [torch.randn(1, 70, 2, 16) for _ in range(3)]
    inputs += [torch.randn(1, 70 // C + len(lengths), 3, 2, 16) for _ in range(2)]
    agree(lambda *x: causal_attention(*x, cu_seqlens=cu_seqlens), causal_documents, inputs[:3])
    agree(lambda *x: block_attention(*x, C, cu_seqlens=cu_seqlens), block_documents, inputs)


@pytest.mark.parametrize("op", [causal_attention, block_attention])
def test_views_of_a_fused_projection_and_expanded_gradients(op: Callable[..., Tensor]) -> None:
    fused = torch.randn(5, 40, 3 * 64)[1:3].unflatten(-1, (-1, 16))  # an offset into its storage, too
    rest = [*block_inputs(2, 40, 4, 16, 16, 2)[3:], 16] if op is block_attention else []
    reference = blockwise if op is block_attention else causal
    a, b = fused.clone().requires_grad_(), fused.double().requires_grad_()
    op(*a.chunk(3, dim=2), *rest).sum().backward()  # a gradient with strides of 0
    reference(*b.chunk(3, dim=2), *(x.double() if isinstance(x, Tensor) else x for x in rest)).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad - b.grad).abs().max() < 2e-5


@pytest.mark.parametrize("scale", [0.0, 1e-6, 90.0])
def test_extreme_inputs_stay_finite_and_right(scale: float) -> None:
    """Scores of +-90^2 sqrt(K): past 1e4 the softmax is a choice, and its gradient a rounding error of large terms."""
    inputs = block_inputs(1, 40, 2, 16, 16, 2, scale)
    inputs[1][0, 5] *= 100  # one token's keys stand out
    narrow = [x.requires_grad_() for x in inputs]
    y = block_attention(*narrow, 16)
    grads = torch.autograd.grad(y.sum(), narrow)
    expected = blockwise(*(x.detach().double() for x in inputs), 16)
    assert (y - expected).abs().max() < 2e-3 * expected.abs().max()
    assert all(g.isfinite().all() for g in grads)
    assert causal_attention(*narrow[:3]).isfinite().all()


@pytest.mark.parametrize("op", [causal_attention, lambda *x: block_attention(*x, 16)], ids=["causal", "block"])
def test_bf16_errs_at_most_twice_as_much_as_plain_bf16(op: Callable[..., Tensor]) -> None:
    count = 3 if op is causal_attention else 5
    reference = causal if count == 3 else lambda *x: blockwise(*x, 16)
    inputs = [x.bfloat16() for x in block_inputs(2, 129, 2, 32, 16, 4)[:count]]
    exact = reference(*(x.double() for x in inputs))
    y = op(*inputs)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 2 * (reference(*inputs) - exact).abs().max()


def test_block_attention_keeps_float32_under_autocast() -> None:
    inputs = [x.requires_grad_() for x in block_inputs(2, 50, 2, 16, 16, 2)]
    plain = torch.autograd.grad(block_attention(*inputs, 16).square().sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.autograd.grad(block_attention(*inputs, 16).square().sum(), inputs)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def leak(op: Callable[..., Tensor], scale: float) -> float:
    """How far tokens after t, and row 1, replaced at the op's own inputs move row 0 up to t; blocks of 16."""
    q, k, v = (torch.randn(2, 80, 2, 16) for _ in range(3))
    k_summary, v_summary = (torch.randn(2, 4, 3, 2, 16) for _ in range(2))
    y, worst = op(q, k, v, k_summary, v_summary), 0.0
    for t in (0, 1, 14, 15, 16, 31, 32, 63, 64, 78):
        tokens = [torch.cat([x[:, : t + 1], scale * torch.randn(2, 79 - t, 2, 16)], dim=1) for x in (q, k, v)]
        seen = (t + 1) // 16  # finished blocks; the summaries after them hold the future
        past = [torch.cat([x[:, :seen], scale * torch.randn(2, 4 - seen, 3, 2, 16)], dim=1)
                for x in (k_summary, v_summary)]
        changed = [torch.cat([x[:1], scale * torch.randn(1, *x.shape[1:])]) for x in (*tokens, *past)]
        worst = max(worst, (op(*changed) - y)[0, : t + 1].abs().max().item())
    return worst


def stabilised_by_the_whole_row(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """A mutant: the maximum is taken before the mask, an eps added after."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 4
    p = (torch.exp(scores - scores.amax(-1, keepdim=True)) + 1e-4).tril()
    return torch.einsum("bhts,bshk->bthk", p / p.sum(-1, keepdim=True), v)


def own_block_summarised(q: Tensor, k: Tensor, v: Tensor, k_summary: Tensor, v_summary: Tensor) -> Tensor:
    """A mutant: the summary of a block is seen one block early."""
    k_summary, v_summary = (torch.cat([x[:, 1:], x[:, :1]], dim=1) for x in (k_summary, v_summary))
    return block_attention(q, k, v, k_summary, v_summary, 16)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_outputs_do_not_move_with_the_future_or_another_row(scale: float) -> None:
    assert leak(lambda q, k, v, *_: causal_attention(q, k, v), scale) == 0
    assert leak(lambda *x: block_attention(*x, 16), scale) == 0


@pytest.mark.parametrize("mutant", [stabilised_by_the_whole_row, own_block_summarised])
def test_planted_leaks_are_caught(mutant: Callable[..., Tensor]) -> None:
    assert leak(mutant, 3.0) > 1e-3


def test_no_pairwise_weights_are_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    inputs = [x.requires_grad_() for x in block_inputs(1, 512, 1, 8, 32, 4)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        block_attention(*inputs, 32).sum().backward()
        causal_attention(*inputs[:3]).sum().backward()
    assert max(kept) == 512 * 8


def test_cache_rows_stand_at_their_own_positions() -> None:
    """Queries of any length, also past the piece they are taken in, and whatever lies behind a row's position."""
    T = 2 * attention.QUERIES + 30
    q, k, v = torch.randn(2, T, 4, 8), torch.randn(2, T, 2, 8), torch.randn(2, T, 2, 8)
    expected = causal(q.double(), k.double(), v.double())
    for start, t in (((0, 0), T), ((0, 5), T - 5), ((7, 300), 1), ((255, 256), 2)):
        positions = torch.tensor(start)[:, None] + torch.arange(t)
        k_cache, v_cache = torch.full((2, T + 9, 2, 8), 1e4), torch.full((2, T + 9, 2, 8), 1e4)
        for row, last in enumerate(positions[:, -1]):
            k_cache[row, : last + 1], v_cache[row, : last + 1] = k[row, : last + 1], v[row, : last + 1]
        rows = torch.arange(2)[:, None]
        y = attend_cache(q[rows, positions], k_cache, v_cache, positions)
        assert (y - expected[rows, positions]).abs().max() < 1e-5


def test_masked_attention_computes_in_the_dtype_of_the_cache() -> None:
    q, k, v = torch.randn(2, 3, 2, 8).bfloat16(), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    visible = torch.rand(2, 3, 5) < 0.5
    visible[..., 0] = True
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_attention(q, k, v, visible)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, masked_attention(q.float(), k, v, visible).bfloat16())
    assert (y - dense(q.double(), k.double(), v.double(), visible)).abs().max() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_with_the_definition(dtype: torch.dtype, groups: int) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    q, *rest = (x.to(dtype) for x in block_inputs(2, 129, 4, 64, 16, 4))
    k, v = (x[:, :, :groups] for x in rest[:2])
    visible = torch.ones(129, 129, dtype=torch.bool).tril()
    on_gpu = [x.cuda() for x in (q, k, v)]
    for y in (causal_attention(*on_gpu), masked_attention(*on_gpu, visible.cuda().expand(2, -1, -1))):
        assert (y.cpu() - causal(q.double(), k.double(), v.double())).abs().max() < tolerance
    y = block_attention(q.cuda(), *(x.cuda() for x in rest), 16)
    assert (y.cpu() - blockwise(q.double(), *(x.double() for x in rest), 16)).abs().max() < tolerance
