"""Causal linear attention in chunks (2006.16236 eq. 9-12, not normalised), forwards and backwards.

    y_t = q_t S_t,   S_t = S_{t-1} + k_t^T v_t,   that is   y_t = sum_{s<=t} (q_t . k_s) v_s + q_t S_0

With A(q, k, v; S_0) for y, and A' for the same with s >= t and the state that comes from the end, the gradients are

    dq = A(dy, v, k; S_0^T),   dv = A'(k, q, dy; dS_T),   dk = A'(v, dy, q; dS_T^T),   dS_0 = dS_T + sum_t q_t^T dy_t

so that one kernel, `walk`, does all four: a program takes a row of tokens, a head and BV columns of the values, and
goes over chunks of BT tokens with the state [BK, BV] in registers, in float32, reading q, k, v and writing y once. A
state too large for registers is cut along K too, and the parts' y are added up afterwards. Where the state is small
and operands have 16 bits, `walk` leaves the state before every chunk in memory, and `linear_attention_backward` goes
once from the end for dq, dk and dv together: 13 tensors instead of 16 pass through memory.

Where rows and heads are too few to occupy a GPU, rows are cut into segments: `sums` adds up each segment's k^T v,
`scan` turns the sums into the state before each, and all segments are walked side by side. Documents packed in a row
are rows cut into segments, at borders of their own. That there are documents, segments or a first state is told by
numbers and no build's own.

Products take operands of the inputs' 16-bit type (the state is rounded to it as an operand, never as a sum).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, cut_documents, dot, power_of_two, precision

# These change from batch to batch, and are in no compile key.
VARYING = ["T", "SEGMENT", "SEGMENTS", "DOCUMENTS", "FROM_END", "BEFORE", "AFTER"]


@triton.jit
def place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS):
    """Segment i_row -> its batch row, first token and number of tokens (0 where there is none), all 64-bit."""
    i_b, start, length = i_row // SEGMENTS, i_row * 0, i_row * 0 + T
    i_s = i_row % SEGMENTS
    if DOCUMENTS:
        i_n = tl.load(p_rows + 2 * i_row).to(tl.int64)
        i_s = tl.load(p_rows + 2 * i_row + 1).to(tl.int64)
        start = tl.load(p_borders + tl.maximum(i_n, 0)).to(tl.int64)
        length = tl.where(i_n >= 0, tl.load(p_borders + tl.maximum(i_n, 0) + 1).to(tl.int64) - start, 0)
        i_b = i_row * 0
    return i_b, start + i_s * SEGMENT, tl.maximum(tl.minimum(length - i_s * SEGMENT, SEGMENT), 0)


@triton.jit
def ending(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS, REVERSE):
    """The row or document of segment i_row, and whether a walk (from the end if REVERSE) ends with that segment."""
    i_n, i_s, length = i_row // SEGMENTS, i_row % SEGMENTS, i_row * 0 + T
    if DOCUMENTS:
        i_n = tl.load(p_rows + 2 * i_row).to(tl.int64)
        i_s = tl.load(p_rows + 2 * i_row + 1).to(tl.int64)
        p_borders += tl.maximum(i_n, 0)
        length = tl.load(p_borders + 1).to(tl.int64) - tl.load(p_borders).to(tl.int64)
    return i_n, (i_n >= 0) & tl.where(REVERSE != 0, i_s == 0, (i_s + 1) * SEGMENT >= length)


@triton.jit
def kept(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS, KEEP: tl.constexpr):
    """The place of the first state that is kept of segment i_row, in a list of one every KEEP tokens of a document."""
    first = i_row // SEGMENTS * ((T + KEEP - 1) // KEEP) + i_row % SEGMENTS * (SEGMENT // KEEP)
    if DOCUMENTS:
        i_n = tl.maximum(tl.load(p_rows + 2 * i_row), 0).to(tl.int64)
        i_s = tl.load(p_rows + 2 * i_row + 1).to(tl.int64)
        first = tl.load(p_borders + i_n).to(tl.int64) // KEEP + i_n + i_s * (SEGMENT // KEEP)
    return first


@triton.jit
def tile(p, first, length, o_t, o_k, stride, SIZE: tl.constexpr, OPERAND: tl.constexpr):
    """Tokens first + o_t of a segment, columns o_k; 0 past its end."""
    p += first * stride
    return tl.load(p + o_t[:, None] * stride + o_k[None, :], mask=(first + o_t < length)[:, None] & (o_k < SIZE)[None],
                   other=0.0).to(OPERAND)


@triton.jit
def put(p, b, first, length, o_t, o_k, stride, SIZE: tl.constexpr):
    """The converse of `tile`."""
    p += first * stride
    tl.store(p + o_t[:, None] * stride + o_k[None, :], b.to(p.dtype.element_ty),
             mask=(first + o_t < length)[:, None] & (o_k < SIZE)[None])


@triton.jit(do_not_specialize=VARYING)
def walk_kernel(
    p_q, p_k, p_v, p_y, p_before, p_after, p_kept, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS, BEFORE, AFTER,
    q_b, q_h, k_b, k_h, v_b, v_h, y_k, q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, KEEP: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):
    """y of BV columns of a segment, from the state before it (behind it if REVERSE); the last state if AFTER.

    States are [R, H, K, V], or [R, H, V, K] if TRANSPOSED. With BK under K, the share of BK rows of the state in y.
    Tokens' strides are constants, which spares a register or two for each row of a tile.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0).to(tl.int64)
    i_row, i_h, i_k, i_v = i // (H * NK * NV), i // (NK * NV) % H, i // NV % NK, i % NV
    i_b, start, length = place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS)
    o_t, o_k = tl.arange(0, BT), i_k.to(tl.int32) * BK + tl.arange(0, BK)
    o_v = i_v.to(tl.int32) * BV + tl.arange(0, BV)
    p_q += i_b * q_b + start * q_t + i_h * q_h
    p_k += i_b * k_b + start * k_t + i_h * k_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    p_y += i_k * y_k + ((i_b * T + start) * H + i_h) * V
    o_state = o_k[:, None] + o_v[None, :] * K if TRANSPOSED else o_k[:, None] * V + o_v[None, :]
    m_state = (o_k < K)[:, None] & (o_v < V)[None, :]
    p_before += (i_row * H + i_h) * (K * V)
    b_state = tl.load(p_before + o_state, mask=m_state & (BEFORE != 0), other=0.0)
    if KEEP:
        p_kept += (kept(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS, KEEP) * H + i_h) * (K * V)
    seen = o_t[:, None] <= o_t[None, :] if REVERSE else o_t[:, None] >= o_t[None, :]
    chunks = (length + BT - 1) // BT
    for i_c in range(chunks):
        first = (chunks - 1 - i_c) * BT if REVERSE else i_c * BT
        b_q = tile(p_q, first, length, o_t, o_k, q_t, K, OPERAND)
        b_k = tile(p_k, first, length, o_t, o_k, k_t, K, OPERAND)
        b_v = tile(p_v, first, length, o_t, o_v, v_t, V, OPERAND)
        b_before = b_state.to(OPERAND)
        if KEEP:
            tl.store(p_kept + first // KEEP * (H * K * V) + o_state, b_before, mask=m_state & (first % KEEP == 0))
        b_scores = dot(b_q, tl.trans(b_k), tl.zeros([BT, BT], tl.float32), PRECISION)
        b_scores = tl.where(seen, b_scores, 0.0)
        b_y = dot(b_q, b_before, tl.zeros([BT, BV], tl.float32), PRECISION)
        b_y = dot(b_scores.to(OPERAND), b_v, b_y, PRECISION)
        b_state = dot(tl.trans(b_k), b_v, b_state, PRECISION)
        put(p_y, b_y, first, length, o_t, o_v, H * V, V)
    i_n, ends = ending(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS, REVERSE)
    p_after += (i_n * H + i_h) * (K * V)
    tl.store(p_after + o_state, b_state, mask=m_state & ends & (AFTER != 0))


@triton.jit(do_not_specialize=VARYING)
def sums_kernel(
    p_k, p_v, p_sums, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS, FROM_END, k_b, k_t, k_h, v_b, v_t, v_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):
    """sum_t k_t^T v_t of a segment, BK rows and BV columns of it; not of one that nobody stands behind."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0).to(tl.int64)
    i_row, i_h, i_k, i_v = i // (H * NK * NV), i // (NK * NV) % H, i // NV % NK, i % NV
    i_b, start, length = place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS)
    o_t, o_k = tl.arange(0, BT), i_k.to(tl.int32) * BK + tl.arange(0, BK)
    o_v = i_v.to(tl.int32) * BV + tl.arange(0, BV)
    p_k += i_b * k_b + start * k_t + i_h * k_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    _, ends = ending(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS, FROM_END)
    length = tl.where(ends, 0, length)
    b_state = tl.zeros([BK, BV], tl.float32)
    for first in range(0, length, BT):
        b_k = tile(p_k, first, length, o_t, o_k, k_t, K, OPERAND)
        b_v = tile(p_v, first, length, o_t, o_v, v_t, V, OPERAND)
        b_state = dot(tl.trans(b_k), b_v, b_state, PRECISION)
    o_state = (i_row * H + i_h) * (K * V) + o_k[:, None] * V + o_v[None, :]
    tl.store(p_sums + o_state, b_state, mask=(o_k < K)[:, None] & (o_v < V)[None, :] & (length > 0))


@triton.jit(do_not_specialize=["SEGMENTS", "DOCUMENTS", "BEFORE"])
def scan_kernel(p_sums, p_states, p_first, p_last, p_ends, SEGMENTS, DOCUMENTS, BEFORE, SIZE: tl.constexpr,
                REVERSE: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr):
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
    b_state = tl.load(p_first + i_n * SIZE + o, mask=(o < SIZE) & (BEFORE != 0), other=0.0)
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
# (tokens BT, columns BV, warps, stages) by bytes of an operand's element and rows BK of the state
TILES = {2: {64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (64, 64, 8, 2)},
         4: {32: (32, 64, 4, 2), 64: (32, 32, 4, 2)}}
ROW = 128  # bytes of a tile's row at least: from narrower ones ptxas 12.8 made code with registers that nobody wrote
KEEP = 64  # tokens between kept states
NAMES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def operand(*tensors: Tensor) -> torch.dtype:
    """What the products take: the inputs' 16-bit type if there is one (float32 ones are rounded), else float32."""
    types = {x.dtype for x in tensors}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in types), torch.float32)


class Rows:
    """How rows of tokens are cut: into segments of whole chunks, enough of them for `heads` heads to occupy a GPU."""

    def __init__(self, B: int, T: int, heads: int, cu_seqlens: Tensor | None):
        wanted = max(1, PROGRAMS // max(1, heads * B))
        self.segment = max(1, cdiv(T, 64 * wanted)) * 64
        self.T = T
        if cu_seqlens is None:
            self.segments = max(1, cdiv(T, self.segment))
            self.number, self.count = B, B * self.segments
            self.table = self.borders = self.ends = None
        else:
            self.segments, self.number = 1, len(cu_seqlens) - 1
            self.table, self.borders, self.ends = cut_documents(cu_seqlens, T, self.segment)
            self.count = len(self.table)

    @property
    def whole(self) -> bool:
        """Every row is one segment, whose state before it is the row's own."""
        return self.segments == 1 and self.table is None

    def place(self, device: torch.device) -> tuple[Tensor, Tensor, int, int, int, int]:
        """The arguments of the kernels' `place`, of the same types with documents and without."""
        if self.table is None or self.borders is None:
            none = nothing(device, torch.int32)
            return none, none, self.T, self.segment, self.segments, 0
        return self.table, self.borders, self.T, self.segment, 1, 1


@functools.cache
def nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Stands for a tensor that is not there: None would have a build of its own."""
    return torch.empty(0, dtype=dtype, device=device)


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def scan(sums: Tensor, first: Tensor | None, rows: Rows, reverse: bool) -> tuple[Tensor, Tensor]:
    """Sums of segments [R, H, ...] -> the state before (behind) each, and the last of each row [N, H, ...].

    The segments that rows end with count in the last state alone, and may be anything for who finds it otherwise.
    """
    states = torch.empty_like(sums)
    last = sums.new_empty(rows.number, *sums.shape[1:])
    size = sums[0].numel()
    if last.numel():
        scan_kernel[(rows.number * cdiv(size, 128),)](
            sums, states, sums if first is None else first.float(), last,
            nothing(sums.device, torch.int32) if rows.ends is None else rows.ends, rows.segments,
            int(rows.ends is not None), int(first is not None), SIZE=size, REVERSE=reverse, BR=16, BLOCK=128,
            num_warps=4)
    return states, last


def states(k: Tensor, v: Tensor, first: Tensor | None, rows: Rows, reverse: bool,
           dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """What `walk` starts each segment from; and room for its last states, filled already where there are no tokens."""
    H, K, V = *k.shape[2:], v.shape[3]
    if rows.whole:
        return first, torch.empty(rows.number, H, K, V, dtype=torch.float32, device=k.device)
    sums = torch.empty(rows.count, H, K, V, dtype=torch.float32, device=k.device)
    BK, BT, BV, warps, stages = tiling(K, V, dtype)
    sums_kernel[(rows.count * H * cdiv(K, BK) * cdiv(V, BV),)](
        k, v, sums, *rows.place(k.device), int(reverse), *k.stride()[:3], *v.stride()[:3], H=H, K=K, V=V, BT=BT, BK=BK,
        BV=BV, OPERAND=NAMES[dtype], PRECISION=precision(dtype), num_warps=warps, num_stages=stages)
    return scan(sums, first, rows, reverse)


def walk(q: Tensor, k: Tensor, v: Tensor, y_dtype: torch.dtype, before: Tensor | None, after: Tensor | None,
         rows: Rows, dtype: torch.dtype, *, reverse: bool = False, transposed: bool = False, kept: Tensor | None = None,
         every: int = 0) -> Tensor:
    """-> y. `after` is written if it is given, and the state before every `every` tokens to `kept`."""
    H, K, V = *q.shape[2:], v.shape[3]
    BK, BT, BV, warps, stages = tiling(K, V, dtype)
    parts = cdiv(K, BK)
    y = torch.empty(parts, *v.shape, dtype=y_dtype if parts == 1 else torch.float32, device=v.device)
    none = nothing(q.device, torch.float32)
    walk_kernel[(rows.count * H * parts * cdiv(V, BV),)](
        q, k, v, y, none if before is None else before, none if after is None else after, kept,
        *rows.place(q.device), int(before is not None), int(after is not None), q.stride(0), q.stride(2), k.stride(0),
        k.stride(2), v.stride(0), v.stride(2), y.stride(0), q_t=q.stride(1), k_t=k.stride(1), v_t=v.stride(1), H=H,
        K=K, V=V, REVERSE=reverse, TRANSPOSED=transposed, KEEP=every, BT=BT, BK=BK, BV=BV, OPERAND=NAMES[dtype],
        PRECISION=precision(dtype), num_warps=warps, num_stages=stages)
    return y[0] if parts == 1 else y.sum(0).to(y_dtype)


@functools.cache
def tiling(K: int, V: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    tiles = TILES[dtype.itemsize]
    BK = min(padded(K, dtype), max(tiles))
    BT, BV, warps, stages = tiles[BK]
    return BK, BT, min(BV, padded(V, dtype)), warps, stages


def padded(size: int, dtype: torch.dtype) -> int:
    """The columns of a tile that holds `size`."""
    return max(ROW // dtype.itemsize, power_of_two(size))


def forward(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
            kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], initial_state [N, H, K, V] -> y in v's type, the last states in float32."""
    dtype = operand(q, k, v)
    q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
    B, T, H, _ = q.shape
    rows = Rows(B, T, H * cdiv(v.shape[3], 64), cu_seqlens)
    first = None if initial_state is None else initial_state.float().contiguous()
    with torch.cuda.device_of(q):
        before, last = states(k, v, first, rows, False, dtype)
        if not rows.count * H:
            return v.new_empty(v.shape), last
        y = walk(q, k, v, v.dtype, before, last, rows, dtype, kept=kept, every=0 if kept is None else KEEP)
    return y, last
