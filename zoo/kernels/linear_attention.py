"""Causal linear attention in chunks (2006.16236 eq. 9-12, not normalised), forwards and backwards in one kernel.

    y_t = q_t S_t,   S_t = S_{t-1} + k_t^T v_t,   that is   y_t = sum_{s<=t} (q_t . k_s) v_s + q_t S_0

With A(q, k, v; S_0) for y, and A' for the same with s >= t and the state that comes from the end, the gradients are

    dq = A(dy, v, k; S_0^T),   dv = A'(k, q, dy; dS_T),   dk = A'(v, dy, q; dS_T^T),   dS_0 = dS_T + sum_t q_t^T dy_t

so that a single kernel, `walk`, does all four. A program takes a row of tokens, a head and BV columns of the values,
and goes over chunks of BT tokens with the state [K, BV] in registers, in float32: it reads q, k and v once, writes y
once, and keeps nothing for the backward pass. Where rows and heads are too few to occupy a GPU, rows are cut into
segments: `sums` adds up each segment's k^T v, `scan` turns the sums into the state before each, and `walk` goes over
all segments side by side. Documents packed in a row are rows cut into segments, at borders of their own.

Products take operands of the inputs' 16-bit type (the state is rounded to it as an operand, never as a sum).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import document_chunks, dot, power_of_two, precision

VARYING = ["T", "SEGMENT", "SEGMENTS"]  # change from batch to batch: never in a compile key


@triton.jit
def place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS: tl.constexpr):
    """Segment i_row -> its batch row, first token and number of tokens (0 where there is none), all 64-bit."""
    i_b, start, length = i_row // SEGMENTS, i_row * 0, T
    i_s = (i_row % SEGMENTS).to(tl.int64)
    if DOCUMENTS:
        i_n = tl.load(p_rows + 2 * i_row)
        i_s = tl.load(p_rows + 2 * i_row + 1).to(tl.int64)
        start = tl.load(p_borders + tl.maximum(i_n, 0)).to(tl.int64)
        length = tl.where(i_n >= 0, tl.load(p_borders + tl.maximum(i_n, 0) + 1).to(tl.int64) - start, 0)
        i_b = i_row * 0
    return i_b, start + i_s * SEGMENT, tl.maximum(tl.minimum(length - i_s * SEGMENT, SEGMENT), 0)


@triton.jit
def tile(p, first, length, o_t, o_k, stride, SIZE: tl.constexpr, OPERAND: tl.constexpr):
    """Tokens first + o_t of a segment, columns o_k; 0 past its end."""
    p += first * stride
    return tl.load(p + o_t[:, None] * stride + o_k[None, :], mask=(first + o_t < length)[:, None] & (o_k < SIZE)[None],
                   other=0.0).to(OPERAND)


@triton.jit(do_not_specialize=VARYING)
def walk_kernel(
    p_q, p_k, p_v, p_y, p_before, p_after, p_rows, p_borders, T, SEGMENT, SEGMENTS,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, state_k, state_v,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):
    """y of BV columns of a segment, from the state before it (behind it if REVERSE); the state after it."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0).to(tl.int64)
    i_row, i_h, i_v = i // (H * NV), i // NV % H, i % NV
    i_b, start, length = place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    p_q += i_b * q_b + start * q_t + i_h * q_h
    p_k += i_b * k_b + start * k_t + i_h * k_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    p_y += i_b * y_b + start * y_t + i_h * y_h
    o_state = (i_row * H + i_h) * (K * V) + o_k[:, None] * state_k + o_v[None, :] * state_v
    m_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_state = tl.zeros([BK, BV], tl.float32)
    if p_before is not None:
        b_state += tl.load(p_before + o_state, mask=m_state, other=0.0).to(tl.float32)
    seen = o_t[:, None] <= o_t[None, :] if REVERSE else o_t[:, None] >= o_t[None, :]
    chunks = (length + BT - 1) // BT
    for i_c in range(chunks):
        first = (chunks - 1 - i_c) * BT if REVERSE else i_c * BT
        b_q = tile(p_q, first, length, o_t, o_k, q_t, K, OPERAND)
        b_k = tile(p_k, first, length, o_t, o_k, k_t, K, OPERAND)
        b_v = tile(p_v, first, length, o_t, o_v, v_t, V, OPERAND)
        b_scores = dot(b_q, tl.trans(b_k), tl.zeros([BT, BT], tl.float32), PRECISION)
        b_scores = tl.where(seen, b_scores, 0.0)
        b_y = dot(b_q, b_state.to(OPERAND), tl.zeros([BT, BV], tl.float32), PRECISION)
        b_y = dot(b_scores.to(OPERAND), b_v, b_y, PRECISION)
        b_state = dot(tl.trans(b_k), b_v, b_state, PRECISION)
        p_to = p_y + first * y_t + o_t[:, None] * y_t + o_v[None, :]
        tl.store(p_to, b_y.to(p_y.dtype.element_ty), mask=(first + o_t < length)[:, None] & (o_v < V)[None, :])
    if p_after is not None:
        tl.store(p_after + o_state, b_state, mask=m_state)


@triton.jit(do_not_specialize=VARYING)
def sums_kernel(
    p_k, p_v, p_sums, p_rows, p_borders, T, SEGMENT, SEGMENTS, k_b, k_t, k_h, v_b, v_t, v_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DOCUMENTS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):
    """sum_t k_t^T v_t of a segment."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0).to(tl.int64)
    i_row, i_h, i_v = i // (H * NV), i // NV % H, i % NV
    i_b, start, length = place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    p_k += i_b * k_b + start * k_t + i_h * k_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    b_state = tl.zeros([BK, BV], tl.float32)
    for first in range(0, length, BT):
        b_k = tile(p_k, first, length, o_t, o_k, k_t, K, OPERAND)
        b_v = tile(p_v, first, length, o_t, o_v, v_t, V, OPERAND)
        b_state = dot(tl.trans(b_k), b_v, b_state, PRECISION)
    o_state = (i_row * H + i_h) * (K * V) + o_k[:, None] * V + o_v[None, :]
    tl.store(p_sums + o_state, b_state, mask=(o_k < K)[:, None] & (o_v < V)[None, :])


@triton.jit(do_not_specialize=["SEGMENTS"])
def scan_kernel(p_sums, p_states, p_first, p_last, p_ends, SEGMENTS, SIZE: tl.constexpr, REVERSE: tl.constexpr,
                DOCUMENTS: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr):
    """The state before (REVERSE: behind) each segment of a row or document, and the last; BR segments at a time.

    Numbers of a segment never enter the state before it, not even to be taken off again: that would leave a rounding.
    """
    NB: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i = tl.program_id(0).to(tl.int64)
    i_n = i // NB
    o, o_r = i % NB * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BR)
    first, last = i_n * SEGMENTS, (i_n + 1) * SEGMENTS
    if DOCUMENTS:
        first = tl.load(p_ends + i_n).to(tl.int64)
        last = tl.load(p_ends + i_n + 1).to(tl.int64)
    b_state = tl.zeros([BLOCK], tl.float32)
    if p_first is not None:
        b_state += tl.load(p_first + i_n * SIZE + o, mask=o < SIZE, other=0.0).to(tl.float32)
    for i_r in range(0, last - first, BR):
        o_in = i_r + o_r - 1  # the segment before
        row, row_in = first + i_r + o_r, first + o_in
        if REVERSE:
            row, row_in = last - 1 - i_r - o_r, last - 1 - o_in
        m_in = ((o_in >= i_r) & (o_in < last - first))[:, None] & (o < SIZE)[None, :]
        b_in = tl.load(p_sums + row_in[:, None] * SIZE + o[None, :], mask=m_in, other=0.0)
        b_sums = b_state[None, :] + tl.cumsum(b_in, 0)
        m_out = (i_r + o_r < last - first)[:, None] & (o < SIZE)[None, :]
        tl.store(p_states + row[:, None] * SIZE + o[None, :], b_sums, mask=m_out)
        end = i_r + BR - 1  # the one that b_in has not
        row_end = last - 1 - end if REVERSE else first + end
        b_last = tl.load(p_sums + row_end * SIZE + o, mask=(o < SIZE) & (end < last - first), other=0.0)
        b_state = b_state + tl.sum(b_in, 0) + b_last
    tl.store(p_last + i_n * SIZE + o, b_state, mask=o < SIZE)


PROGRAMS = 256  # about two for each multiprocessor: rows are cut until there are as many
# (tokens BT, columns BV, warps, stages) by bytes of an operand's element and padded key width
TILES = {
    2: {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (64, 64, 4, 2)},
    4: {16: (32, 64, 4, 2), 32: (32, 64, 4, 2), 64: (32, 32, 4, 2), 128: (16, 32, 4, 1), 256: (16, 32, 8, 1)},
}
NAMES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def operand(*tensors: Tensor) -> torch.dtype:
    """What the products take: the inputs' 16-bit type if there is one (float32 ones are rounded), else float32."""
    types = {x.dtype for x in tensors}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in types), torch.float32)


class Rows:
    """How rows of tokens are cut: into segments of whole chunks, enough of them for `heads` heads to occupy a GPU."""

    def __init__(self, B: int, T: int, heads: int, cu_seqlens: Tensor | None):
        wanted = max(1, PROGRAMS // max(1, heads * B))
        self.segment = max(1, triton.cdiv(T, 64 * wanted)) * 64
        self.borders, self.T = cu_seqlens, T
        if cu_seqlens is None:
            self.segments = max(1, triton.cdiv(T, self.segment))
            self.number, self.count, self.table, self.ends = B, B * self.segments, None, None
        else:
            self.segments, self.number = 1, len(cu_seqlens) - 1
            self.table = document_chunks(cu_seqlens, T, self.segment)
            self.count = len(self.table)
            lengths = (cu_seqlens.diff() + self.segment - 1) // self.segment
            self.ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

    @property
    def whole(self) -> bool:
        """Every row is one segment, whose state before it is the row's own."""
        return self.segments == 1 and self.table is None


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def scan(sums: Tensor, first: Tensor | None, rows: Rows, reverse: bool) -> tuple[Tensor, Tensor]:
    """Sums of segments [R, H, ...] -> the state before (behind) each, and the last of each row [N, H, ...]."""
    states = torch.empty_like(sums)
    last = sums.new_empty(rows.number, *sums.shape[1:])
    size = sums[0].numel()
    if last.numel():
        scan_kernel[(rows.number * triton.cdiv(size, 128),)](
            sums, states, first, last, rows.ends, rows.segments, SIZE=size, REVERSE=reverse,
            DOCUMENTS=rows.ends is not None, BR=16, BLOCK=128, num_warps=4)
    return states, last


def states(k: Tensor, v: Tensor, first: Tensor | None, rows: Rows, reverse: bool,
           dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What `walk` starts each segment from; and the last states, or None where it shall find them itself."""
    if rows.whole:
        return first, None
    H, K, V = *k.shape[2:], v.shape[3]
    sums = torch.empty(rows.count, H, K, V, dtype=torch.float32, device=k.device)
    BK, BT, BV, warps, stages = tiling(K, V, dtype)
    sums_kernel[(rows.count * H * triton.cdiv(V, BV),)](
        k, v, sums, rows.table, rows.borders, rows.T, rows.segment, rows.segments, *k.stride()[:3], *v.stride()[:3],
        H=H, K=K, V=V, DOCUMENTS=rows.table is not None, BT=BT, BK=BK, BV=BV, OPERAND=NAMES[dtype],
        PRECISION=precision(dtype), num_warps=warps, num_stages=stages)
    return scan(sums, first, rows, reverse)


def walk(q: Tensor, k: Tensor, v: Tensor, y: Tensor, before: Tensor | None, after: Tensor | None, rows: Rows,
         dtype: torch.dtype, *, reverse: bool = False, transposed: bool = False) -> None:
    """Write y, and `after` if it is wanted; states are [R, H, K, V], or [R, H, V, K] if transposed."""
    H, K, V = *q.shape[2:], v.shape[3]
    BK, BT, BV, warps, stages = tiling(K, V, dtype)
    walk_kernel[(rows.count * H * triton.cdiv(V, BV),)](
        q, k, v, y, before, after, rows.table, rows.borders, rows.T, rows.segment, rows.segments, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *y.stride()[:3], *((1, K) if transposed else (V, 1)),
        H=H, K=K, V=V, REVERSE=reverse, DOCUMENTS=rows.table is not None, BT=BT, BK=BK, BV=BV, OPERAND=NAMES[dtype],
        PRECISION=precision(dtype), num_warps=warps, num_stages=stages)


def tiling(K: int, V: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    BK = max(16, power_of_two(K))
    BT, BV, warps, stages = TILES[dtype.itemsize][BK]
    return BK, BT, min(BV, max(16, power_of_two(V))), warps, stages


def forward(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None,
            cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], initial_state [N, H, K, V] -> y in v's type, the last states in float32."""
    dtype = operand(q, k, v)
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    B, T, H, K = q.shape
    y = v.new_empty(v.shape)
    rows = Rows(B, T, H * triton.cdiv(v.shape[3], 64), cu_seqlens)
    first = None if initial_state is None else initial_state.contiguous()
    with torch.cuda.device_of(q):
        before, last = states(k, v, first, rows, False, dtype)
        after = None
        if last is None:
            last = after = torch.empty(B, H, K, v.shape[3], dtype=torch.float32, device=q.device)
        if rows.count * H:
            walk(q, k, v, y, before, after, rows, dtype)
    return y, last


def backward(dy: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None,
             cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv in their inputs' types and the gradient of the initial state in float32."""
    dtype = operand(q, k, v)
    dy, q, k, v = (last_contiguous(x) for x in (dy, q, k, v))
    B, T, H, K = q.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    rows = Rows(B, T, H * triton.cdiv(v.shape[3], 64), cu_seqlens)
    first, behind = (None if x is None else x.contiguous() for x in (initial_state, dlast))
    with torch.cuda.device_of(q):
        before, _ = states(k, v, first, rows, False, dtype)
        behind, dfirst = states(q, dy, behind, rows, True, dtype)
        after = None
        if dfirst is None:
            dfirst = after = torch.empty(B, H, K, v.shape[3], dtype=torch.float32, device=q.device)
        if rows.count * H:
            walk(dy, v, k, dq, before, None, rows, dtype, transposed=True)
            walk(k, q, dy, dv, behind, after, rows, dtype, reverse=True)
            walk(v, dy, q, dk, behind, None, rows, dtype, reverse=True, transposed=True)
    return dq, dk, dv, dfirst
