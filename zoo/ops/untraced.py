"""Hand-written autograd Functions, kept out of torch.compile until they are custom ops."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch


def untraced(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, run as it stands inside torch.compile too, which breaks its graph there.

    The compiler of torch 2.11 traces such Functions into wrong gradients (AFT's biases get none) or fails; that of 2.13
    does not. Asking torch to leave a function alone imports its compiler, a second's work: done once it is there.
    """
    hidden: list[Callable[..., Any]] = []

    @functools.wraps(call)
    def either(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return call(*args)
        if not hidden:
            hidden.append(torch.compiler.disable(call))
        return hidden[0](*args)

    return either
