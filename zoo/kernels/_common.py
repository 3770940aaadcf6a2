"""What the Triton kernels share: exponentials, products of tiles, documents packed in a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. PRECISION "tf32x3" keeps float32 operands to about 2^-21; bf16 and fp16 ignore it.

    The interpreter multiplies the bit patterns of bf16 numbers, so it gets them as float32.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


def precision(dtype: torch.dtype) -> str:
    """The PRECISION of `dot` that operands of a dtype ask for."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def power_of_two(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << (n - 1).bit_length()


def document_chunks(cu_seqlens: Tensor, total: int, size: int) -> Tensor:
    """Chunks of `size` tokens of documents packed in a row -> int32 [total // size + N, 2]: document, chunk in it.

    cu_seqlens [N + 1], on the device and ascending from 0 to `total`; documents may be empty. The number of rows is
    a bound, known without waiting for the device; rows past the last chunk have document -1.
    """
    lengths = cu_seqlens.diff()
    chunks = (lengths + size - 1) // size
    ends = chunks.cumsum(0)
    row = torch.arange(total // size + len(lengths), device=cu_seqlens.device)
    document = torch.searchsorted(ends, row, right=True)
    inside = document < len(lengths)
    first = (ends - chunks)[document.clamp(max=len(lengths) - 1)]
    table = torch.stack([torch.where(inside, document, -1), torch.where(inside, row - first, 0)], 1)
    return table.to(torch.int32)
