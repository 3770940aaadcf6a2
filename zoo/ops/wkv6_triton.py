"""WKV-6 by its Triton kernels: the custom ops that autograd, torch.compile and the FLOP counter see, and their test."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.ops.backend import Kernel, use_backend
from zoo.ops.documents import check_documents


def wkv6_triton(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, state: Tensor | None,
                cu_seqlens: Tensor | None, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What wkv6 does, for floating types of any mixture; with a base [H, K] the log decays are -e^(base + log_decay).

    r, k, v in bf16 are multiplied in bf16, in fp16 in TF32, which has fp16's digits and float32's range, and in a
    mixture with float32 in float32 precision. Sums, states and exponents are float32. Saved for the backward pass: the
    inputs, and of every chunk of C tokens a state and its pairs in the products' type, K V / C + C numbers a token and
    head: C is 32 for bf16, else 16.
    """
    rows = r.shape[0]
    if cu_seqlens is not None:
        check_documents(r, cu_seqlens)
        rows, cu_seqlens = len(cu_seqlens) - 1, cu_seqlens.contiguous()
    _check_shapes(r, k, v, log_decay, u, state, rows, base)
    r, k, v, log_decay = (x if x.stride(-1) == 1 else x.contiguous() for x in (r, k, v, log_decay))
    given = r, k, v, log_decay, u.contiguous(), None if state is None else state.contiguous()
    base = None if base is None else base.contiguous()
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*given, base))
    y, final, *_ = _forward(*given, cu_seqlens, keep, base)
    return y, final


def _check_shapes(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, state: Tensor | None,
                  rows: int, base: Tensor | None) -> None:
    wanted = {"k": (k, r.shape), "log_decay": (log_decay, r.shape), "v": (v, (*r.shape[:3], v.shape[-1])),
              "u": (u, r.shape[2:])}
    if state is not None:
        wanted["initial_state"] = state, (rows, *r.shape[2:], v.shape[-1])
    if base is not None:
        wanted["base"] = base, r.shape[2:]
    for name, (x, shape) in wanted.items():
        if tuple(x.shape) != tuple(shape):
            raise ZooError(f"{name} is {list(x.shape)}; allowed beside r {list(r.shape)}: {list(shape)}")


@torch.library.custom_op("zoo::wkv6", mutates_args=())
def _forward(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, state: Tensor | None,
             cu_seqlens: Tensor | None, keep: bool,
             base: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y, final state, and if `keep`, for the backward pass, the states before chunks and their A."""
    from zoo.kernels import wkv6

    return wkv6.forward(r, k, v, log_decay, u, state, cu_seqlens, keep, base)


@_forward.register_fake
def _(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, state: Tensor | None,
      cu_seqlens: Tensor | None, keep: bool, base: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from zoo.kernels import wkv6

    op, _ = wkv6.operands(r, k, v)
    documents = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    H, K, V = *r.shape[2:], v.shape[-1]
    slots = wkv6.chunk_slots(r, op, cu_seqlens) if keep else 0
    size = wkv6.chunk_size(r, op)
    return (r.new_empty(*r.shape[:3], V), r.new_empty(documents, H, K, V, dtype=torch.float32),
            r.new_empty(slots, H, K, V, dtype=op), r.new_empty(slots, H, size, size, dtype=op))


@torch.library.custom_op("zoo::wkv6_backward", mutates_args=())
def _backward(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, states: Tensor, pairs: Tensor,
              dy: Tensor, dfinal: Tensor | None, cu_seqlens: Tensor | None, base: Tensor | None
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of r, k, v, log_decay, u, the initial state, and base (without elements if there is none)."""
    from zoo.kernels import wkv6

    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    return wkv6.backward(r, k, v, log_decay, u, states, pairs, dy, dfinal, cu_seqlens, base)


@_backward.register_fake
def _(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, states: Tensor, pairs: Tensor, dy: Tensor,
      dfinal: Tensor | None, cu_seqlens: Tensor | None,
      base: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    documents = r.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dr, dk, dv, dw, du = (x.new_empty(x.shape) for x in (r, k, v, log_decay, u))
    dinitial = r.new_empty(documents, *r.shape[2:], v.shape[-1], dtype=torch.float32)
    return dr, dk, dv, dw, du, dinitial, u.new_empty(0) if base is None else base.new_empty(base.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    r, k, v, log_decay, u, state, cu_seqlens, _, base = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(r, k, v, log_decay, u, *output[2:], cu_seqlens, base)
    ctx.state_dtype = None if state is None else state.dtype


def _gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    r, k, v, log_decay, u, states, pairs, cu_seqlens, base = ctx.saved_tensors
    if dy is None:
        dy = r.new_zeros(*r.shape[:3], v.shape[-1])
    *grads, dinitial, dbase = _backward(r, k, v, log_decay, u, states, pairs, dy, dfinal, cu_seqlens, base)
    dinitial = None if ctx.state_dtype is None else dinitial.to(ctx.state_dtype)
    return *grads, dinitial, None, None, None if base is None else dbase


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.wkv6)
def _forward_flops(r: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """The recurrence: a state written and read at every token."""
    return 4 * math.prod(r) * v[-1]


@register_flop_formula(torch.ops.zoo.wkv6_backward)
def _backward_flops(r: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _forward_flops(r, k, v)


def _self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], of: bool = False) -> float:
    """Chunks of several kinds, some too steep for factors, the last ragged, states both ways, against float64.

    Rows are long enough to be cut into segments, so that the first use compiles all that any length wants. of: of d and
    a base instead of log decays, which are other builds.
    """
    from zoo.ops.wkv6 import wkv6, wkv6_of

    K, V = sizes
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    B, T, H = 2, 777, 2
    d, base = randn(B, T, H, K), -2 - randn(H, K).abs()
    d[:, 40:43] += 6
    log_decay = d.to(dtype) if of else -torch.exp(base + d)
    r, k, v = (randn(B, T, H, size).to(dtype) for size in (K, K, V))
    k[0, 20] *= 10
    given = [r, k, v, log_decay, *([base] if of else []), randn(H, K), randn(B, H, K, V)]
    cotangents = randn(B, T, H, V).to(dtype), randn(B, H, K, V)
    leaves = [x.detach().requires_grad_() for x in given]
    y, final, *_ = _forward(*leaves[:4], *leaves[-2:], None, True, leaves[4] if of else None)
    ours = [y, final, *torch.autograd.grad((y, final), leaves, cotangents)]
    wide = [x.detach().double().requires_grad_() for x in given]
    with use_backend("eager"):
        exact = list((wkv6_of if of else wkv6)(*wide))
        exact += torch.autograd.grad(exact, wide, [x.double() for x in cotangents])
    allowed = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    errors = [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) / allowed
              for a, b in zip(ours, exact, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def _self_test_of(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    return _self_test(device, dtype, sizes, of=True)


KERNEL = Kernel("wkv6", _self_test, sources=("wkv6_parts",))
OF = Kernel("wkv6_of", _self_test_of, sources=("wkv6_parts",), file="wkv6")
