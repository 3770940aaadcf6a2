"""What the kernels of WKV-6 share: a chunk's decays, the first walk over segments, and launches' numbers.

Where rows and heads are too few for the GPU, documents are cut into segments: a first `_walk` gives what each adds to a
state, `_scan` the states at their borders. How many segments there are, and whether rows hold documents, are run-time
numbers: one build does for all of them.

Tiles of r, k and the decays are [K, tokens]: a channel's tokens lie in one warp, and what is computed of them is the
left factor of the next product without leaving its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, LOG2E, cdiv, document_chunks, dot, power_of_two, precision

NOTHING = tl.constexpr(-104.0)  # exp of less is 0 in float32
LOG2LOG2E = tl.constexpr(0.5287663729448977)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(i_row, T, L, pieces, documents, cu_seqlens, table, BT: tl.constexpr):
    """Document; row and first token in it; length; piece of L tokens; its first slots of chunk and of piece states."""
    i_b = (i_row // pieces).to(tl.int64)  # a division of 64 bits takes a hundred instructions
    i_s = (i_row % pieces).to(tl.int64)
    if documents > 0:
        i_n = tl.load(table + i_row.to(tl.int64) * 2).to(tl.int64)
        i_s = tl.load(table + i_row.to(tl.int64) * 2 + 1).to(tl.int64)
        i_b = i_b * 0
        bos = tl.load(cu_seqlens + tl.maximum(i_n, 0)).to(tl.int64)
        length = tl.load(cu_seqlens + tl.maximum(i_n, 0) + 1).to(tl.int64) - bos
        chunk_slot = bos // BT + i_n
        piece_slot = bos // L + i_n
    else:
        i_n = i_b
        bos = i_b * 0
        length = T + bos
        chunk_slot = i_n * tl.cdiv(T, BT)
        piece_slot = i_n * pieces
    return i_n, i_b, bos, length, i_s, chunk_slot, piece_slot


@triton.jit
def exp2(x):
    """2^x by one instruction; less than 2^-126 is 0, where tl.exp2 spends two more on it."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True,
                                         pack=1)


@triton.jit
def decay(x, LOGS2: tl.constexpr):
    """The decay that a sum of log decays is: to base 2, or e."""
    return exp2(x if LOGS2 else x * LOG2E)


@triton.jit
def columns(x, o, m, BT: tl.constexpr, OP: tl.constexpr):
    """A tile [BK, BT] of x at offsets o, in float32, 0 where not m.

    In bf16 by a product with 1, for its result's layout: one in which all that follows is computed. (From a plain load
    Triton computes the same several times over, in every layout in which it is wanted.) So a number that is not finite
    spoils its channel's whole chunk.
    """
    x = tl.load(x + o, mask=m, other=0.0)
    if x.dtype == OP and tl.float32 != OP:
        one = tl.where(tl.arange(0, BT)[:, None] == tl.arange(0, BT)[None, :], 1.0, 0.0)
        return dot(x, one.to(OP), tl.zeros(x.shape, tl.float32), "tf32")
    else:
        return x.to(tl.float32)


@triton.jit
def log_decays(w, b_base, o, m, BT: tl.constexpr, OP: tl.constexpr):
    """Log decays [BK, BT]: w itself, float32; with b_base [BK] those to base 2 of -e^(base + w), in OP.

    b_base = log2(e) base + log2(log2(e)). Rounding logarithms to base 2 is as good as rounding those to base e.
    """
    if b_base is None:
        own = tl.load(w + o, mask=m, other=0.0).to(tl.float32)  # may hold -inf, of which a product would make NaN
        return tl.where(own < NOTHING, NOTHING, own)
    else:
        own = -exp2(columns(w, o, m, BT, OP) * LOG2E + b_base[:, None])
        own = tl.maximum(own, NOTHING * LOG2E, propagate_nan=tl.PropagateNan.ALL)
        return tl.where(m, own, 0.0).to(OP)


@triton.jit
def sums(x, chosen, acc, OP: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr):
    """acc + x [BK, BT] @ chosen [BT, BT]: for every token, a sum over others, by the tensor cores.

    `chosen` holds 0 and 1. In bf16, x is cut in two (SPLIT), or is of that type itself.
    """
    if EXACT:
        return tl.dot(x, chosen.to(tl.float32), acc, input_precision="ieee")
    elif x.dtype == OP:
        return dot(x, chosen.to(OP), acc, "tf32x3")
    else:
        high = x.to(OP)
        acc = dot(high, chosen.to(OP), acc, "tf32")
        if SPLIT:
            acc = dot((x - high.to(tl.float32)).to(OP), chosen.to(OP), acc, "tf32")
        return acc


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents"])
def _walk(a, b, w, base, borders, sums_, cu_seqlens, table, T, L, pieces, documents, H, K, V,
          a_b, a_t, a_h, b_b, b_t, b_h, w_b, w_t, w_h,
          BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
          EXACT: tl.constexpr, REVERSE: tl.constexpr):
    """What a segment adds to a state, in `borders` [K, V], and its sum of log decays: k, v decayed to its end.

    REVERSE: to a state's gradient, r, dy decayed from its start.
    """
    i_h = tl.program_id(0) % H
    i_n, i_b, bos, length, i_s, _, first_piece = place(
        tl.program_id(0) // H, T, L, pieces, documents, cu_seqlens, table, BT)
    if i_n < 0:
        return
    first = i_s * L
    last = tl.minimum(first + L, length)
    o_r = tl.arange(0, BT)
    o_k = tl.program_id(2) * BK + tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    a += i_b * a_b + bos * a_t + i_h * a_h
    b += i_b * b_b + bos * b_t + i_h * b_h
    w += i_b * w_b + bos * w_t + i_h * w_h
    b_base = None
    if base is not None:
        b_base = tl.load(base + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32) * LOG2E + LOG2LOG2E
    LOGS2: tl.constexpr = base is not None
    SPLIT: tl.constexpr = base is None and w.dtype.element_ty != OP
    rest = o_r[:, None] < o_r[None, :] if REVERSE else o_r[:, None] > o_r[None, :]

    b_state = tl.zeros([BK, BV], tl.float32)
    b_sum = tl.zeros([BK], tl.float32)
    chunks = tl.cdiv(last - first, BT).to(tl.int32)
    for n in range(0, chunks):
        o_c = first + (chunks - 1 - n if REVERSE else n) * BT
        left = tl.minimum(last - o_c, BT).to(tl.int32)
        m_tk = m_k[:, None] & (o_r < left)[None, :]
        m_tv = (o_r < left)[:, None] & m_v[None, :]
        b_a = columns(a + o_c * a_t, o_r[None, :] * a_t + o_k[:, None], m_tk, BT, OP)
        b_b_ = tl.load(b + o_c * b_t + o_r[:, None] * b_t + o_v[None, :], mask=m_tv, other=0.0).to(OP)
        own = log_decays(w + o_c * w_t, b_base, o_r[None, :] * w_t + o_k[:, None], m_tk, BT, OP)
        b_a *= decay(sums(own, tl.where(rest, 1.0, 0.0), tl.zeros([BK, BT], tl.float32), OP, EXACT, SPLIT), LOGS2)
        total = tl.sum(own.to(tl.float32), 1)
        b_state = dot(b_a.to(OP), b_b_, b_state * decay(total, LOGS2)[:, None], PRECISION)
        b_sum += total
    i_slot = (first_piece + i_s) * H + i_h
    tl.store(borders + i_slot * K * V + o_k[:, None] * V + o_v[None, :], b_state, mask=m_k[:, None] & m_v[None, :])
    b_sum = b_sum if LOGS2 else b_sum * LOG2E
    tl.store(sums_ + i_slot * K + o_k, b_sum, mask=m_k & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=["L", "pieces", "documents"])
def _scan(borders, sums_, initial, cu_seqlens, L, pieces, documents, H, K, V,
          BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr):
    """Additions of a document's segments become, in their place, the states before them (REVERSE: after them)."""
    i_n = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    count = pieces
    first_piece = i_n * pieces
    if documents > 0:
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        count = tl.cdiv(tl.load(cu_seqlens + i_n + 1).to(tl.int64) - bos, L.to(tl.int64)).to(tl.int32)
        first_piece = bos // L + i_n
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    b_state = tl.zeros([BK, BV], tl.float32)
    if initial is not None:
        b_state = tl.load(initial + (i_n * H + i_h) * K * V + o_state, mask=m, other=0.0).to(tl.float32)
    for n in tl.range(0, count, num_stages=4):
        slot = (first_piece + (count - 1 - n if REVERSE else n)) * H + i_h
        b_added = tl.load(borders + slot * K * V + o_state, mask=m, other=0.0)
        b_decay = exp2(tl.load(sums_ + slot * K + o_k, mask=o_k < K, other=0.0))
        tl.store(borders + slot * K * V + o_state, b_state, mask=m)
        b_state = b_state * b_decay[:, None] + b_added


CONFIGS: dict[tuple[int, int], tuple[int, dict]] = {
    # (class of K, bytes of an operand): tokens of a chunk; then of each kernel: most BK, most BV, warps, stages
    (64, 2): (32, {"walk": (64, 64, 4, 3), "outputs": (64, 64, 4, 3), "gradients": (64, 64, 4, 2)}),
    (128, 2): (32, {"walk": (64, 64, 4, 3), "outputs": (128, 64, 8, 2), "gradients": (128, 64, 8, 2)}),
    (256, 2): (32, {"walk": (64, 64, 4, 3), "outputs": (256, 16, 8, 1), "gradients": (256, 16, 8, 1)}),
    (64, 4): (16, {"walk": (64, 64, 4, 2), "outputs": (64, 32, 4, 2), "gradients": (64, 32, 4, 2)}),
    (128, 4): (16, {"walk": (64, 64, 4, 2), "outputs": (128, 32, 8, 2), "gradients": (128, 32, 8, 2)}),
    (256, 4): (16, {"walk": (64, 64, 4, 2), "outputs": (256, 16, 8, 2), "gradients": (256, 16, 8, 2)}),
}
PROGRAMS = 2  # for each multiprocessor, where documents are cut
SEGMENT = 256  # tokens at least, where they are cut


def chunk_size(r: Tensor, op: torch.dtype) -> int:
    """Tokens of a chunk, at whose borders states are kept."""
    return CONFIGS[max(64, power_of_two(r.shape[-1])), op.itemsize][0]


def numbers(kernel: str, r: Tensor, v: Tensor, op: torch.dtype) -> dict:
    """The compile-time numbers and options of a launch."""
    K, V = r.shape[-1], v.shape[-1]
    BT, kernels = CONFIGS[max(64, power_of_two(K)), op.itemsize]
    BK, BV, warps, stages = kernels[kernel]
    names = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return {"BT": BT, "BK": min(BK, max(64, power_of_two(K))), "BV": max(16, min(BV, power_of_two(V))),
            "OP": names[op], "num_warps": warps, "num_stages": stages}


def operands(*tensors: Tensor) -> tuple[torch.dtype, dict]:
    """What the products are computed in: bf16 if r, k, v are; else float32, whose range fp16's factors need, too.

    fp16's eleven bits are tf32's. Only float32 inputs ask for exact sums.
    """
    dtypes = {x.dtype for x in tensors}
    op = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    wide = torch.float32 if torch.float32 in dtypes else torch.float16
    return op, {"PRECISION": precision(wide), "EXACT": op == torch.float32 and wide == torch.float32}


def chunk_slots(r: Tensor, op: torch.dtype, cu_seqlens: Tensor | None) -> int:
    """Chunk states that the forward pass keeps a head, of which those of documents in a row leave some unused."""
    BT = chunk_size(r, op)
    B, T = r.shape[:2]
    return B * -(-T // BT) if cu_seqlens is None else T // BT + len(cu_seqlens) - 1


class Pieces:
    """Rows, or documents in a row, in pieces of `length` tokens: what `place` needs to find them."""

    def __init__(self, r: Tensor, cu_seqlens: Tensor | None, length: int):
        B, T = r.shape[:2]
        self.per_row = -(-T // length)
        self.documents = 0 if cu_seqlens is None else len(cu_seqlens) - 1
        if cu_seqlens is None:
            self.cu_seqlens = self.table = torch.empty(2, dtype=torch.int32, device=r.device)  # never read
            self.rows = B * self.per_row
        else:
            self.cu_seqlens, self.table = cu_seqlens.int(), document_chunks(cu_seqlens, T, length)
            self.rows = len(self.table)
        self.numbers = self.cu_seqlens, self.table, T, length, self.per_row, self.documents


def segments(r: Tensor, blocks: int, cu_seqlens: Tensor | None, BT: int) -> Pieces:
    """As many segments as keep the GPU busy, of whole chunks."""
    B, T, H, _ = r.shape
    wanted = PROGRAMS * (torch.cuda.get_device_properties(r.device).multi_processor_count if r.is_cuda else 4)
    pieces = max(1, min(wanted // (B * H * blocks), T // (SEGMENT if r.is_cuda else 32)))
    return Pieces(r, cu_seqlens, max(1, -(-T // (BT * pieces))) * BT)


def cut(a: Tensor, b: Tensor, w: Tensor, base: Tensor | None, initial: Tensor | None, ends: Tensor,
        cu_seqlens: Tensor | None, op: torch.dtype, how: dict, blocks: int, reverse: bool) -> tuple[Pieces, Tensor]:
    """Segments for programs that take `blocks` for each, and the states at their borders if there are any.

    `ends` [N, H, K, V] stands in for them if there are none.
    """
    H, K, V = *a.shape[2:], b.shape[-1]
    launch = numbers("walk", a, b, op)
    launch["BT"] *= 2  # a walk has no pairs
    pieces = segments(a, blocks, cu_seqlens, launch["BT"])
    if pieces.per_row <= 1:
        return pieces, ends
    borders, sums_ = (torch.empty(pieces.rows, H, *size, dtype=torch.float32, device=a.device)
                      for size in ((K, V), (K,)))
    _walk[pieces.rows * H, cdiv(V, launch["BV"]), cdiv(K, launch["BK"])](
        a, b, w, base, borders, sums_, *pieces.numbers, H, K, V, *a.stride()[:3], *b.stride()[:3], *w.stride()[:3],
        **launch, **how, REVERSE=reverse)
    _scan[len(ends) * H, cdiv(K, 8)](borders, sums_, initial, pieces.cu_seqlens, *pieces.numbers[3:], H, K, V, BK=8,
                                     BV=max(16, power_of_two(V)), REVERSE=reverse, num_warps=2)
    return pieces, borders
