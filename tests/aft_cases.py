"""How the tests of AFT's kernels measure: beside plain PyTorch, single tokens, documents packed in a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from kernel_cases import Function, check_against_float64, nan_memory, outputs_and_gradients
from torch import Tensor

from zoo.ops.backend import use_backend

Inputs = dict[str, Tensor]


def ours(op: Function, given: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Outputs and gradients on the kernels."""
    with use_backend("triton"), nan_memory():
        return outputs_and_gradients(op, {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()})


def check(op: Function, plain: Function, given: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, *,
          keep: Sequence[str] = (), token: float = 8) -> None:
    """The rule of `check_against_float64`. A token by itself, with no state before it, has gradients of 0, and an error
    has nothing to be relative to: there the eager op's results count, to `token` times the dtype's eps."""
    if given["q"].shape[1] > 1 or "top" in given:
        check_against_float64(op, op, plain, given, dtype, keep=keep)
        return
    with use_backend("eager"):
        expected = outputs_and_gradients(op, {key: x.to(dtype) for key, x in given.items()})
    for key, x in ours(op, given, dtype).items():
        torch.testing.assert_close(x, expected[key], atol=token * torch.finfo(dtype).eps, rtol=1e-2, msg=key)


def in_documents(op: Function, given: Inputs, lengths: Sequence[int],
                 dtype: torch.dtype = torch.int64) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The one row of `given` as documents, their borders in `dtype` -> the name of each output and gradient, what the
    kernels find, and the eager op in float64."""
    borders = torch.tensor([0, *lengths], device=given["q"].device).cumsum(0).to(dtype)
    given = {**given, "cu_seqlens": borders}
    with use_backend("eager"):
        exact = outputs_and_gradients(op, given)
    for key, x in ours(op, given).items():
        yield key, x.double(), exact[key]
