"""The Triton kernels of FAVOR+ as operators of PyTorch: registration, gradients, FLOPs, self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.ops.backend import Kernel
from zoo.ops.documents import check_documents
from zoo.ops.operator import operator

Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


@operator("zoo::favor_attention")
def favor_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, decay: Tensor | None,
                    initial_state: Tensor | None, max_key_norm: float | None, cu_seqlens: Tensor | None) -> Three:
    """-> y [B, T, H, V], last states [N, H, m, V + 1] float32, and the normalisers' logarithms [B, H, T].

    Those are float32, of float32 inputs float64. Kept for the backward pass: the inputs, y, and they; it takes 4 bytes
    more a token and head. While a pass lasts, the
    state before each chunk is in memory (behind it, in the backward pass, once the other set is done with): m V / 32
    bytes a token and head, for float32 and fp16 inputs m V / 16, of heads wider than 64 m V / 8; m counts as a multiple
    of 64, V as a power of two from 64 (from 32) on.
    """
    from zoo.kernels.favor import forward

    return forward(q, k, v, projection, decay, initial_state, max_key_norm, cu_seqlens)


@favor_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, decay: Tensor | None, initial_state: Tensor | None,
      max_key_norm: float | None, cu_seqlens: Tensor | None) -> Three:
    B, T, H, _ = q.shape
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = v.new_empty(rows, H, projection.shape[0], v.shape[3] + 1, dtype=torch.float32)
    wide = {x.dtype for x in (q, k, v)} == {torch.float32}
    return v.new_empty(v.shape), last, last.new_empty(B, H, T, dtype=torch.float64 if wide else torch.float32)


@operator("zoo::favor_attention_backward")
def favor_attention_backward(dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, projection: Tensor,
                             decay: Tensor | None, initial_state: Tensor | None, y: Tensor, log: Tensor,
                             max_key_norm: float | None, cu_seqlens: Tensor | None) -> Four:
    """-> dq, dk, dv in their inputs' types, the initial state's gradient in float32."""
    from zoo.kernels.favor_backward import backward

    return backward(dy, dlast, q, k, v, projection, decay, initial_state, y, log, max_key_norm, cu_seqlens)


@favor_attention_backward.register_fake
def _(dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, projection: Tensor,
      decay: Tensor | None, initial_state: Tensor | None, y: Tensor, log: Tensor, max_key_norm: float | None,
      cu_seqlens: Tensor | None) -> Four:
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dfirst = v.new_empty(rows, q.shape[2], projection.shape[0], v.shape[3] + 1, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dfirst


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    q, k, v, projection, decay, first, ctx.max_key_norm, cu_seqlens = inputs
    y, _, log = output
    ctx.save_for_backward(q, k, v, projection, decay, first, y, log, cu_seqlens)
    ctx.mark_non_differentiable(log)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, projection, decay, first, y, log, cu_seqlens = ctx.saved_tensors
    if dy is None and dlast is None:
        return (None,) * 8
    dy = torch.zeros_like(v) if dy is None else dy
    dq, dk, dv, dfirst = favor_attention_backward(dy, dlast, q, k, v, projection, decay, first, y, log,
                                                  ctx.max_key_norm, cu_seqlens)
    return dq, dk, dv, None, None, None if first is None else dfirst.to(first.dtype), None, None


favor_attention.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.favor_attention)
def favor_attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], projection: tuple[int, ...],
                          *_: Any, **__: Any) -> int:
    """Features of queries and keys, and a state that each token is added to and reads once."""
    B, T, H, K = q
    return 4 * B * T * H * projection[0] * (K + v[3] + 1)


@register_flop_formula(torch.ops.zoo.favor_attention_backward)
def favor_attention_backward_flops(dy: tuple[int, ...], dlast: tuple[int, ...] | None, q: tuple[int, ...],
                                   k: tuple[int, ...], v: tuple[int, ...], projection: tuple[int, ...],
                                   *_: Any, **__: Any) -> int:
    """Features again and their gradients, the state again, and its gradient, which is read twice."""
    B, T, H, K = q
    return B * T * H * projection[0] * (8 * K + 10 * (v[3] + 1))


def on_triton(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, decay: Tensor | None, initial_state: Tensor | None,
              max_key_norm: float | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """`favor_attention` by kernels."""
    if cu_seqlens is not None:
        check_documents(q, cu_seqlens)
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or projection.shape[1:] != q.shape[3:]:
        raise ZooError(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, projection {list(projection.shape)}; "
                       "allowed: two of [B, T, H, K], one of [B, T, H, V], and [m, K]")
    states = (len(q) if cu_seqlens is None else len(cu_seqlens) - 1, q.shape[2], len(projection), v.shape[3] + 1)
    if initial_state is not None and initial_state.shape != states:
        raise ZooError(f"initial_state {list(initial_state.shape)}; allowed: {list(states)}")
    y, state, _ = favor_attention(q, k, v, projection, decay, initial_state, max_key_norm, cu_seqlens)
    return y, state


def error_of_kernels(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """The largest error of a small problem's results, as a multiple of what the dtype allows."""
    B, T, H, (K, V, m) = 2, 200, 2, sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(draw(B, T, H, K), dim=-1) for _ in range(2))
    k[0, 7] *= 3  # an outlier, beyond the bound
    given = [q, k, draw(B, T, H, V), draw(m, K), draw(B, H, m, V + 1).abs(), draw(B, T, H, V), draw(B, H, m, V + 1)]
    given[4] *= torch.exp(-K / 2 * torch.ones(()))  # about the size of features
    # queries, keys and W in float32, as the mixer has them under autocast: the builds are those of its first step; and
    # states, as fp16 could hold neither sums of features nor their gradients
    narrow = [x.to(dtype if i in (2, 5) else torch.float32).to(device) for i, x in enumerate(given)]
    wide = [x.double() for x in narrow]
    for inputs in (narrow, wide):
        for i in (0, 1, 2, 4):
            inputs[i].requires_grad_()

    def results(found: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        cotangents = [inputs[5].to(found[0].dtype), inputs[6].to(found[1].dtype)]
        return [*found, *torch.autograd.grad(found, [inputs[i] for i in (0, 1, 2, 4)], cotangents)]

    q, k, v, w, state = wide[:5]
    length = w.norm(dim=-1)
    reach = length.clamp(max=2.0)
    largest = length * reach - reach.square() / 2
    phi_q = (q @ w.T + largest).softmax(-1)
    phi_k = (k @ w.T - k.square().sum(-1, keepdim=True) / 2 - largest).exp()
    values = torch.nn.functional.pad(v, (0, 1), value=1.0)
    decay, age = torch.tensor([0.0, 0.02], device=device), torch.arange(T + 1, device=device)  # rates, and tokens
    left = torch.exp2(-decay.double()[:, None] * age)  # [H, T + 1]
    bias = torch.exp2(-decay.double()[:, None, None] * (age[:T, None] - age[:T]).clamp(min=0))
    y = torch.einsum("bhts,bshv->bthv", (torch.einsum("bthm,bshm->bhts", phi_q, phi_k) * bias).tril(), values)
    y = y + torch.einsum("bthm,bhmv,ht->bthv", phi_q, state, left[:, 1:])
    last = state * left[:, -1:, None] + torch.einsum("bthm,bthv,ht->bhmv", phi_k, values, left[:, :-1].flip(1))
    want = results((y[..., :-1] / (y[..., -1:] + 1e-30), last), wide)
    got = results(favor_attention(*narrow[:4], decay, narrow[4], 2.0, None)[:2], narrow)
    allowed = {torch.float32: 5e-5, torch.float16: 4e-3}.get(dtype, 2e-2)
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(got, want, strict=True)]
    errors = torch.stack([(a - b).norm() / b.norm() for a, b in pairs])
    return float(errors.max()) / allowed if bool(errors.isfinite().all()) else float("inf")


kernel = Kernel("favor_attention", error_of_kernels, most=1024, sources=("favor_parts", "favor_backward"), file="favor")
