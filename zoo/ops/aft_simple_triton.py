"""AFT-simple's kernels as ops that torch.compile, autograd and the FLOP counter see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.backend import Kernel, use_backend
from zoo.ops.documents import check_documents

State = tuple[Tensor, Tensor, Tensor]


def simple(q: Tensor, k: Tensor, v: Tensor, state: State | None, cu_seqlens: Tensor | None) -> Tensor:
    """aft_simple on its kernels; state: max, num, den [B, C] of the tokens before."""
    if cu_seqlens is not None:
        check_documents(q, cu_seqlens)
    top, num, den = (None,) * 3 if state is None else (x.float().contiguous() for x in state)
    return _simple(q, k, v, top, num, den, cu_seqlens)[0]


@torch.library.custom_op("zoo::aft_simple", mutates_args=())
def _simple(q: Tensor, k: Tensor, v: Tensor, top: Tensor | None, num: Tensor | None, den: Tensor | None,
            cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, and for the backward pass float32 sums before every chunk, and where rows become steep."""
    from zoo.kernels import aft_simple

    return aft_simple.forward(q, k, v, top, num, den, cu_seqlens)


@_simple.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, top: Tensor | None, num: Tensor | None, den: Tensor | None,
      cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from zoo.kernels import aft_simple

    states, steep = aft_simple.kept_shapes(k, cu_seqlens)
    return q.new_empty(q.shape), q.new_empty(states, dtype=torch.float32), q.new_empty(steep, dtype=torch.int32)


@torch.library.custom_op("zoo::aft_simple_backward", mutates_args=())
def _simple_backward(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, states: Tensor, steep: Tensor, top: Tensor | None,
                     num: Tensor | None, den: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """-> dq, dk, dv, and with a state the gradients of top, num, den."""
    from zoo.kernels import aft_simple_backward

    return list(aft_simple_backward.backward(q, k, v, dy, states, steep, top, num, den, cu_seqlens))


@_simple_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, states: Tensor, steep: Tensor, top: Tensor | None,
      num: Tensor | None, den: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, top, num, den) if x is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)


def _vjp(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    q, k, v, top, num, den, cu_seqlens, states, steep = ctx.saved_tensors
    found = _simple_backward(q, k, v, dy, states, steep, top, num, den, cu_seqlens)
    return (*found, *(None,) * (7 - len(found)))


_simple.register_autograd(_vjp, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.aft_simple)
def _flops(q: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Two multiply-adds a token and channel, for num and den."""
    return 4 * q[0] * q[1] * q[2]


@register_flop_formula(torch.ops.zoo.aft_simple_backward)
def _backward_flops(q: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(q)


def _self_test(device: torch.device, dtype: torch.dtype, _: tuple[int, ...]) -> float:
    """Rows that are cut, after a state, a ragged end, and an outlier that is treated with care; eager float64."""
    from zoo.ops import aft

    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = torch.randn(4, 2, 700, 40, generator=generator, dtype=torch.float64).unbind()
    k[1, 350, ::3] = 70
    q, k, v, dy = (x.to(device, dtype) for x in (q, k, v, dy))
    state = torch.rand(3, 2, 40, generator=generator).to(device) + 0.5
    worst = 0.0
    for given in ((q, k, v), (q, k, v, *state.unbind())):
        leaves = [x.double().requires_grad_() for x in given]
        with use_backend("eager"):
            exact = aft.aft_simple(leaves[0], leaves[1], leaves[2], aft.Sums(*leaves[3:]) if leaves[3:] else None)
        gradients = torch.autograd.grad(exact, leaves, dy.double())
        before = given[3:] or (None,) * 3
        y, *kept = _simple(q, k, v, *before, None)
        ours = [y, *_simple_backward(q, k, v, dy, *kept, *before, None)]
        errors = [(x.double() - e).norm() / e.norm() for x, e in zip(ours, [exact.detach(), *gradients], strict=True)]
        worst = max(worst, *(float(x) if x == x else float("inf") for x in errors))
    return worst / (1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps)


SIMPLE = Kernel("aft_simple", _self_test, sources=("aft_simple_backward", "aft_sums"))
