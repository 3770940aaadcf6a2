"""The Triton kernels of token_mix as operators of PyTorch: registration, gradients, FLOPs, self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.ops.backend import Kernel, use_backend
from zoo.ops.documents import check_documents
from zoo.ops.operator import operator

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("zoo::token_mix")
def _forward(x: Tensor, mix: Tensor, cu_seqlens: Tensor | None) -> Five:
    """-> as many mixtures as mix has, then tensors without elements. The inputs are kept for the backward pass."""
    from zoo.kernels.token_mix import forward

    y = forward(x, mix, cu_seqlens)
    a, b, c, d, e = y + [x.new_empty(0) for _ in range(5 - len(y))]
    return a, b, c, d, e


@_forward.register_fake
def _(x: Tensor, mix: Tensor, cu_seqlens: Tensor | None) -> Five:
    a, b, c, d, e = (x.new_empty(x.shape if z < mix.shape[0] else (0,)) for z in range(5))
    return a, b, c, d, e


@operator("zoo::token_mix_backward")
def _backward(dy: list[Tensor], x: Tensor, mix: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> gradients of x and mix; beside them 4 Z D bytes for every 32 tokens."""
    from zoo.kernels.token_mix import backward

    return backward([each.contiguous() for each in dy], x, mix, cu_seqlens)


@_backward.register_fake
def _(dy: list[Tensor], x: Tensor, mix: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), mix.new_empty(mix.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Five) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    x, mix, cu_seqlens = ctx.saved_tensors
    dy = [torch.zeros_like(x) if each is None else each for each in given[: len(mix)]]
    return *_backward(dy, x, mix, cu_seqlens), None


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.token_mix)
def _forward_flops(*_: Any, **__: Any) -> int:
    """No products of matrices."""
    return 0


@register_flop_formula(torch.ops.zoo.token_mix_backward)
def _backward_flops(*_: Any, **__: Any) -> int:
    return 0


def token_mix_triton(x: Tensor, mix: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """token_mix by kernels."""
    if cu_seqlens is not None:
        check_documents(x, cu_seqlens)
    check_shapes(x, {"mix": (mix, (mix.shape[0], x.shape[-1]))})
    return _forward(x.contiguous(), mix.contiguous(), cu_seqlens)[: mix.shape[0]]


def check_shapes(x: Tensor, wanted: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Raise ZooError where a tensor's shape is not the one wanted beside x."""
    for name, (given, shape) in wanted.items():
        if tuple(given.shape) != shape:
            raise ZooError(f"{name} is {list(given.shape)}; allowed beside x {list(x.shape)}: {list(shape)}")


def _self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """Two rows of several tiles, the last ragged, and two mixtures, against float64."""
    from zoo.ops.token_mix import token_mix

    x, mix, *dys = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device) for i, shape in
                    enumerate([(2, 333, *sizes), (2, *sizes), *[(2, 333, *sizes)] * 2]))
    error = largest_error(token_mix_triton, token_mix, [x.to(dtype), mix], dys)
    return error / {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def largest_error(kernel: Any, exact: Any, given: list[Tensor], dys: list[Tensor]) -> float:
    """The largest relative error of an output or a gradient of kernel(*given, None) against exact(*given) in float64.

    dys: of the outputs, given to both in the outputs' dtype.
    """
    leaves = [x.detach().requires_grad_() for x in given]
    y = kernel(*leaves, None)
    dys = [dy.to(y[0].dtype) for dy in dys]
    ours = [*y, *torch.autograd.grad(y, leaves, dys)]
    wide = [x.detach().double().requires_grad_() for x in given]
    with use_backend("eager"):
        y = exact(*wide)
    theirs = [*y, *torch.autograd.grad(y, wide, [dy.double() for dy in dys])]
    errors = [float((a.detach().double() - b.detach()).norm() / b.detach().norm())
              for a, b in zip(ours, theirs, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


KERNEL = Kernel("token_mix", _self_test, most=1 << 20, sized="channels")
