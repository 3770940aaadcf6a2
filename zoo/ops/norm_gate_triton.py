"""The Triton kernels of norm_gate as operators of PyTorch: registration, gradients, FLOPs, self-test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.ops.backend import Kernel
from zoo.ops.operator import operator
from zoo.ops.token_mix_triton import largest_error

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@operator("zoo::norm_gate")
def _forward(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The inputs are kept for the backward pass, and nothing else."""
    from zoo.kernels.norm_gate import forward

    return forward(y, gate, weight, bias, eps)


@_forward.register_fake
def _(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return gate.new_empty(gate.shape)


@operator("zoo::norm_gate_backward")
def _backward(dz: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Four:
    """-> gradients of y, gate, weight, bias; beside them 8 H K bytes for every 512 tokens."""
    from zoo.kernels.norm_gate import backward

    return backward(dz.contiguous(), y, gate, weight, bias, eps)


@_backward.register_fake
def _(dz: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Four:
    dy, dgate, dweight, dbias = (x.new_empty(x.shape) for x in (y, gate, weight, bias))
    return dy, dgate, dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dz, *ctx.saved_tensors, ctx.eps), None


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.zoo.norm_gate)
def _forward_flops(*_: Any, **__: Any) -> int:
    """No products of matrices."""
    return 0


@register_flop_formula(torch.ops.zoo.norm_gate_backward)
def _backward_flops(*_: Any, **__: Any) -> int:
    return 0


def norm_gate_triton(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """norm_gate by kernels."""
    whole = (*y.shape[:2], y.shape[2] * y.shape[3])
    wanted = {"gate": (gate, whole), "weight": (weight, whole[2:]), "bias": (bias, whole[2:])}
    for name, (given, shape) in wanted.items():
        if tuple(given.shape) != tuple(shape):
            raise ZooError(f"{name} is {list(given.shape)}; allowed beside y {list(y.shape)}: {list(shape)}")
    return _forward(y.contiguous(), gate.contiguous(), weight.contiguous(), bias.contiguous(), eps)


def _self_test(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """Several tiles and segments, the last ragged, a head far from 0, against float64."""
    from zoo.ops.norm_gate import norm_gate

    H, K = 3, sizes[0]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    y = randn(1, 777, H, K)
    y[:, :, 1] += 5
    given = [y.to(dtype), 2 * randn(1, 777, H * K).to(dtype), 1 + randn(H * K), randn(H * K)]
    error = largest_error(lambda y, gate, weight, bias, _: (norm_gate_triton(y, gate, weight, bias, 64e-5),),
                          lambda y, gate, weight, bias: (norm_gate(y, gate, weight, bias, 64e-5),),
                          given, [randn(1, 777, H * K)])
    return error / {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


KERNEL = Kernel("norm_gate", _self_test, least=2)
