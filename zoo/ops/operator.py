"""Operators of PyTorch at less of the host's time a call than torch.library.custom_op takes, which checks each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("zoo", "FRAGMENT")


class Operator:
    """A function as an operator that torch.compile, meta tensors and the FLOP counter see; called like the function.

    register_fake and register_autograd as of torch.library.custom_op. The function must return new tensors, and one
    that has no `register_autograd` gets tensors without gradients.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = name.removeprefix("zoo::")
        schema = torch.library.infer_schema(function, mutates_args=())
        _library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, function, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.zoo, self.name).default

    def __call__(self, *inputs: Any) -> Any:
        return self.overload(*inputs)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"zoo::{self.name}", fake, lib=_library)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        below, overload = torch._C._AutoDispatchBelowAutograd, self.overload

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                with below():
                    output = overload(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return backward(ctx, *gradients)

        def call(*inputs: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
                return Differentiable.apply(*inputs)
            with below():
                return overload(*inputs)

        _library.impl(self.name, call, "Autograd")


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """`@operator("zoo::name")` in place of `@torch.library.custom_op("zoo::name", mutates_args=())`."""
    return lambda function: Operator(name, function)
