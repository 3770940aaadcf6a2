"""What WKV-6's two walks share: a chunk's decays and pairs, segments of documents, and launches' numbers.

Where rows and heads are too few for the GPU, documents are cut into segments: `_segments` gives each segment's own
addition to a state, `_scan` the states at their borders.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import document_chunks, dot, power_of_two, precision

NOTHING = tl.constexpr(-104.0)  # exp of less is 0 in float32


@triton.jit
def place(i_row, T, L, n_segments, cu_seqlens, segments, BT: tl.constexpr, VARLEN: tl.constexpr):
    """Document; row and first token in it; its length; segment; its first slots of chunk states, of segment states."""
    i_row = i_row.to(tl.int64)
    if VARLEN:
        i_n = tl.load(segments + i_row * 2).to(tl.int64)
        i_s = tl.load(segments + i_row * 2 + 1).to(tl.int64)
        bos = tl.load(cu_seqlens + tl.maximum(i_n, 0)).to(tl.int64)
        length = tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1).to(tl.int64) - bos
        return i_n, i_row * 0, bos, length, i_s, bos // BT + i_n, bos // L + i_n
    else:
        i_n = i_row // n_segments
        length = T + i_row * 0
        return i_n, i_n, i_row * 0, length, i_row % n_segments, i_n * tl.cdiv(T, BT), i_n * n_segments


@triton.jit
def rows(x, stride, o_t, o_c, m):
    """Rows o_t, columns o_c of a tensor, 0 where not m."""
    return tl.load(x + o_t[:, None] * stride + o_c[None, :], mask=m, other=0.0)


@triton.jit
def decays(w, w_t, o_t, o_k, last, K, BT: tl.constexpr, EXACT: tl.constexpr):
    """Sums of log sums [BT, K]: each token's own, those before it in the chunk, up to it, after it; all [K].

    EXACT adds what belongs to a sum and subtracts nothing, as float32 wants it.
    """
    o_r = tl.arange(0, BT)
    m_k = (o_k < K)[None, :]
    own = rows(w, w_t, o_t, o_k, (o_t < last)[:, None] & m_k).to(tl.float32)
    own = tl.where(own < NOTHING, NOTHING, own)
    total = tl.sum(own, 0)
    if EXACT:
        left = rows(w, w_t, o_t - 1, o_k, ((o_r > 0) & (o_t <= last))[:, None] & m_k).to(tl.float32)
        right = rows(w, w_t, o_t + 1, o_k, ((o_r < BT - 1) & (o_t + 1 < last))[:, None] & m_k).to(tl.float32)
        before = tl.cumsum(tl.where(left < NOTHING, NOTHING, left), 0)
        after = tl.cumsum(tl.where(right < NOTHING, NOTHING, right), 0, reverse=True)
        upto = before + own
    else:
        upto = tl.cumsum(own, 0)
        before = upto - own
        after = total[None, :] - upto
    return own, before, upto, after, total


@triton.jit
def references(own, before, upto, total, BT: tl.constexpr):
    """Half of the block's sum, from the chunk's start on; decay from or to the border of the blocks; worst block."""
    if BT == 16:
        return (total * 0.5)[None, :] + tl.zeros_like(own), own, tl.max(-total, 0)
    else:
        second = (tl.arange(0, BT) >= 16)[:, None]
        first = tl.sum(tl.where(second, 0.0, own), 0)
        middle = tl.where(second, ((first + total) * 0.5)[None, :], (first * 0.5)[None, :])
        border = tl.exp(tl.minimum(tl.where(second, before - first[None, :], first[None, :] - upto), 0.0))
        return middle, border, tl.max(tl.maximum(-first, first - total), 0)


@triton.jit
def steep_scores(r, k_p, w_p, k_t, w_t, o_t, o_k, last, K, BT: tl.constexpr):
    """A [BT, BT] of pairs s < t of a block, by a loop over s down the block: exponents sum what lies between."""
    o_r = tl.arange(0, BT)
    o_i = o_r % 16
    scores = tl.zeros([BT, BT], tl.float32)
    between = tl.zeros_like(r)
    for n in range(16):
        s = 15 - n
        m_s = ((o_t - o_i + s) < last)[:, None] & (o_k < K)[None, :]
        later = (o_i > s)[:, None]
        b_k = rows(k_p, k_t, o_t - o_i + s, o_k, m_s).to(tl.float32)
        b_w = rows(w_p, w_t, o_t - o_i + s, o_k, m_s).to(tl.float32)
        column = tl.sum(tl.where(later, r * b_k * tl.exp(between), 0.0), 1)
        scores += tl.where(o_r[None, :] == (o_r - o_i + s)[:, None], column[:, None], 0.0)
        between += tl.where(later, tl.where(b_w < NOTHING, NOTHING, b_w), 0.0)
    return scores


@triton.jit
def steep_products(weights, x_p, w_p, x_t, w_t, o_t, o_k, last, K, BT: tl.constexpr, BK: tl.constexpr,
                    LATER: tl.constexpr):
    """sum over the block of weights [BT, BT] x e^(what lies between), for every row its column's token.

    LATER: rows are the later of a pair, and the loop goes down the block; or the earlier, and it goes up.
    """
    o_r = tl.arange(0, BT)
    o_i = o_r % 16
    between = tl.zeros([BT, BK], tl.float32)
    found = tl.zeros([BT, BK], tl.float32)
    for n in range(16):
        s = 15 - n if LATER else n
        m_s = ((o_t - o_i + s) < last)[:, None] & (o_k < K)[None, :]
        paired = ((o_i > s) if LATER else (o_i < s))[:, None]
        b_x = rows(x_p, x_t, o_t - o_i + s, o_k, m_s).to(tl.float32)
        b_w = rows(w_p, w_t, o_t - o_i + s, o_k, m_s).to(tl.float32)
        weight = tl.sum(tl.where(o_r[None, :] == (o_r - o_i + s)[:, None], weights, 0.0), 1)
        found += tl.where(paired, weight[:, None] * b_x * tl.exp(between), 0.0)
        between += tl.where(paired, tl.where(b_w < NOTHING, NOTHING, b_w), 0.0)
    return found


@triton.jit(do_not_specialize=["T", "L", "n_segments"])
def _segments(a, b, w, ends, sums, cu_seqlens, segments, T, L, n_segments, H, K, V,
              a_b, a_t, a_h, b_b, b_t, b_h, w_b, w_t, w_h,
              BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
              EXACT: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr):
    """What a segment adds to a state, [V, K]: sum_s b_s^T (a_s e^...), a, b = k, v to its end; r, dy from its start."""
    i_h = tl.program_id(0) % H
    i_n, i_b, bos, length, i_s, _slot, first_segment = place(
        tl.program_id(0) // H, T, L, n_segments, cu_seqlens, segments, BT, VARLEN)
    if i_n < 0:
        return
    first = i_s * L
    last = tl.minimum(first + L, length)
    o_r = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    a += i_b * a_b + bos * a_t + i_h * a_h
    b += i_b * b_b + bos * b_t + i_h * b_h
    w += i_b * w_b + bos * w_t + i_h * w_h
    b_state = tl.zeros([BV, BK], tl.float32)
    decay = tl.zeros([BK], tl.float32)
    chunks = tl.cdiv(last - first, BT)
    for n in range(0, chunks):
        o_t = first + (chunks - 1 - n if REVERSE else n) * BT + o_r
        b_a = rows(a, a_t, o_t, o_k, (o_t < last)[:, None] & m_k[None, :]).to(tl.float32)
        b_b_ = rows(b, b_t, o_t, o_v, (o_t < last)[:, None] & m_v[None, :]).to(OP)
        _own, before, _upto, after, total = decays(w, w_t, o_t, o_k, last, K, BT, EXACT)
        b_a *= tl.exp(before if REVERSE else after)
        b_state = dot(tl.trans(b_b_), b_a.to(OP), b_state * tl.exp(total)[None, :], PRECISION)
        decay += total
    slot = (first_segment + i_s) * H + i_h
    tl.store(ends + slot * K * V + o_v[:, None] * K + o_k[None, :], b_state, mask=m_v[:, None] & m_k[None, :])
    tl.store(sums + slot * K + o_k, decay, mask=m_k & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=["T", "L", "n_segments"])
def _scan(ends, sums, initial, cu_seqlens, T, L, n_segments, H, K, V,
          BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr):
    """Additions of a document's segments become, in their place, the states before them (REVERSE: after them)."""
    i_n = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    if VARLEN:
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        count = tl.cdiv(tl.load(cu_seqlens + i_n + 1).to(tl.int64) - bos, L)
        first_segment = bos // L + i_n
    else:
        count = n_segments + i_n * 0
        first_segment = i_n * n_segments
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m = (o_v < V)[:, None] & (o_k < K)[None, :]
    b_state = tl.zeros([BV, BK], tl.float32)
    if initial is not None:
        b_state = tl.load(initial + (i_n * H + i_h) * K * V + o_k[None, :] * V + o_v[:, None], mask=m, other=0.0)
        b_state = b_state.to(tl.float32)
    for n in range(0, count):
        slot = (first_segment + (count - 1 - n if REVERSE else n)) * H + i_h
        p_ends = ends + slot * K * V + o_v[:, None] * K + o_k[None, :]
        added = tl.load(p_ends, mask=m, other=0.0)
        decay = tl.exp(tl.load(sums + slot * K + o_k, mask=o_k < K, other=0.0))
        tl.store(p_ends, b_state, mask=m)
        b_state = b_state * decay[None, :] + added


CONFIGS = {  # (direction, class of K, bytes of an operand): BT, most BV, warps, stages
    # 64, 2: measured on an H200, torch 2.11, Triton 3.6, 2026-11-24; the others chosen to fit
    ("forward", 64, 2): (16, 64, 4, 3), ("backward", 64, 2): (16, 64, 4, 3), ("segments", 64, 2): (32, 64, 4, 3),
    ("forward", 128, 2): (16, 64, 4, 2), ("backward", 128, 2): (16, 64, 8, 2), ("segments", 128, 2): (32, 64, 4, 2),
    ("forward", 256, 2): (16, 32, 8, 1), ("backward", 256, 2): (16, 32, 8, 1), ("segments", 256, 2): (16, 32, 8, 1),
    ("forward", 64, 4): (16, 64, 4, 2), ("backward", 64, 4): (16, 64, 4, 2), ("segments", 64, 4): (16, 64, 4, 2),
    ("forward", 128, 4): (16, 32, 4, 1), ("backward", 128, 4): (16, 32, 8, 1), ("segments", 128, 4): (16, 32, 4, 1),
    ("forward", 256, 4): (16, 16, 8, 1), ("backward", 256, 4): (16, 16, 8, 1), ("segments", 256, 4): (16, 16, 8, 1),
}
PROGRAMS = 2  # for each multiprocessor, before documents are left in one piece
SEGMENT = 256  # tokens at least, where they are cut


def numbers(direction: str, r: Tensor, v: Tensor, op: torch.dtype) -> dict:
    """The compile-time numbers and options of a launch."""
    K, V = r.shape[-1], v.shape[-1]
    BK = max(16, power_of_two(K))
    BT, BV, warps, stages = CONFIGS[direction, max(64, BK), op.itemsize]
    names = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return {"BT": BT, "BK": BK, "BV": max(16, min(BV, power_of_two(V))), "OP": names[op], "num_warps": warps,
            "num_stages": stages}


def operands(*tensors: Tensor) -> tuple[torch.dtype, dict]:
    """What the products are computed in: bf16 if r, k, v are; else float32, whose range fp16's factors need, too.

    fp16's eleven bits are tf32's. Only float32 inputs ask for exact sums, and for a narrow range of exponents.
    """
    dtypes = {x.dtype for x in tensors}
    op = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    wide = torch.float32 if torch.float32 in dtypes else torch.float16
    exact = op == torch.float32 and wide == torch.float32
    return op, {"PRECISION": precision(wide), "EXACT": exact, "LIMIT": 16.0 if exact else 60.0}


def chunk_slots(r: Tensor, v: Tensor, op: torch.dtype, cu_seqlens: Tensor | None) -> int:
    """Chunk states that the forward pass keeps a head, of which those of documents in a row leave some unused."""
    BT = numbers("forward", r, v, op)["BT"]
    B, T = r.shape[:2]
    return B * -(-T // BT) if cu_seqlens is None else T // BT + len(cu_seqlens) - 1


class Cut:
    """How documents are cut into segments: a table of programs' documents and segments, or a regular grid."""

    def __init__(self, r: Tensor, value_blocks: int, cu_seqlens: Tensor | None):
        B, T, H, _ = r.shape
        wanted = PROGRAMS * (torch.cuda.get_device_properties(r.device).multi_processor_count if r.is_cuda else 4)
        smallest = SEGMENT if r.is_cuda else 32
        pieces = max(1, min(wanted // (B * H * value_blocks), T // smallest))
        self.length = max(1, -(-T // (32 * pieces))) * 32
        self.per_row = -(-T // self.length)
        self.documents = B if cu_seqlens is None else len(cu_seqlens) - 1
        self.table = None if cu_seqlens is None else document_chunks(cu_seqlens, T, self.length)
        self.rows = B * self.per_row if self.table is None else len(self.table)
        self.several = self.per_row > 1

    def borders(self, a: Tensor, b: Tensor, w: Tensor, r: Tensor, v: Tensor, initial: Tensor | None,
                cu_seqlens: Tensor | None, op: torch.dtype, how: dict, reverse: bool) -> Tensor:
        """States before the segments, or their gradients after them, [slots, H, V, K]."""
        T, H, K, V = *r.shape[1:], v.shape[-1]
        slots = self.documents * self.per_row if self.table is None else len(self.table)
        ends, sums = (torch.empty(slots, H, *rest, dtype=torch.float32, device=r.device) for rest in ((V, K), (K,)))
        launch = numbers("segments", r, v, op)
        blocks = triton.cdiv(V, launch["BV"])
        grid = T, self.length, self.per_row, H, K, V
        limits = {key: how[key] for key in ("PRECISION", "EXACT")}
        varlen = self.table is not None
        _segments[self.rows * H, blocks](a, b, w, ends, sums, cu_seqlens, self.table, *grid, *a.stride()[:3],
                                         *b.stride()[:3], *w.stride()[:3], **launch, **limits, REVERSE=reverse,
                                         VARLEN=varlen)
        _scan[self.documents * H, triton.cdiv(V, 16)](ends, sums, initial, cu_seqlens, *grid, BK=launch["BK"], BV=16,
                                                      REVERSE=reverse, VARLEN=varlen)
        return ends
