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


def cdiv(n: int, size: int) -> int:
    """The number of blocks of `size` that n takes. triton.cdiv is a kernel's function, and slow outside of one."""
    return -(-n // size)


def power_of_two(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << (n - 1).bit_length()


@triton.jit(do_not_specialize=["N", "ROWS", "SIZE"])
def cut_kernel(p_cu, p_table, p_borders, p_ends, N, ROWS, SIZE, BLOCK: tl.constexpr):
    """A document's rows of the table, and where they begin; program N fills the rows that are left over."""
    i_n, o = tl.program_id(0), tl.arange(0, BLOCK)
    b_chunks = tl.zeros([BLOCK], tl.int32)  # of the documents before
    for i in range(0, i_n, BLOCK):
        b_from = tl.load(p_cu + i + o, mask=i + o < i_n, other=0)
        b_to = tl.load(p_cu + i + o + 1, mask=i + o < i_n, other=0)
        b_chunks += ((b_to - b_from + SIZE - 1) // SIZE).to(tl.int32)
    first, start = tl.sum(b_chunks), tl.load(p_cu + i_n)
    tl.store(p_ends + i_n, first)
    tl.store(p_borders + i_n, start.to(tl.int32))
    end = tl.load(p_cu + i_n + 1, mask=i_n < N, other=0)
    chunks = tl.where(i_n < N, ((end - start + SIZE - 1) // SIZE).to(tl.int32), ROWS - first)
    for i in range(0, chunks, BLOCK):
        to = p_table + 2 * (first + i + o)
        tl.store(to, tl.where(i_n < N, i_n, -1), mask=i + o < chunks)
        tl.store(to + 1, tl.where(i_n < N, i + o, 0), mask=i + o < chunks)


def cut_documents(cu_seqlens: Tensor, total: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of `size` tokens of documents packed in a row -> what `document_chunks` gives, borders and ends [N + 1].

    All int32; borders are cu_seqlens, ends[n] is the row of the table where document n's chunks begin. One launch.
    """
    N, device = len(cu_seqlens) - 1, cu_seqlens.device
    table = torch.empty(total // size + N, 2, dtype=torch.int32, device=device)
    borders, ends = (torch.empty(N + 1, dtype=torch.int32, device=device) for _ in range(2))
    with torch.cuda.device_of(table):
        cut_kernel[(N + 1,)](cu_seqlens.contiguous(), table, borders, ends, N, len(table), size, BLOCK=256, num_warps=2)
    return table, borders, ends


def document_chunks(cu_seqlens: Tensor, total: int, size: int) -> Tensor:
    """Chunks of `size` tokens of documents packed in a row -> int32 [total // size + N, 2]: document, chunk in it.

    cu_seqlens [N + 1], on the device and ascending from 0 to `total`; documents may be empty. The number of rows is
    a bound, known without waiting for the device; rows past the last chunk have document -1, chunk 0.
    """
    return cut_documents(cu_seqlens, total, size)[0]
