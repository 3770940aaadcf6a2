"""What the kernels of WKV-6 share: a chunk's decays and pairs, the walk over chunks' borders, and launches' numbers.

Where rows and heads are too few for the GPU, documents are cut into segments: a first `_walk` gives what each adds to a
state, `_scan` the states at their borders. How many segments there are, and whether rows hold documents, are run-time
numbers: one build does for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, LOG2E, document_chunks, dot, power_of_two, precision

NOTHING = tl.constexpr(-104.0)  # exp of less is 0 in float32
MOST = tl.constexpr(5.0)  # e^5 is more than enough to be one of those


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
def rows(x, stride, o_t, o_c, m):
    """Rows o_t, columns o_c of a tensor, 0 where not m."""
    return tl.load(x + o_t[:, None] * stride + o_c[None, :], mask=m, other=0.0)


@triton.jit
def ask_for(x, stride, o_t, last, columns, WIDTH: tl.constexpr):
    """Sets rows o_t of a tensor on their way to the L2 cache; 32 bytes of it for every prefetch.

    Triton waits for each tile before it loads the next, as it puts it into shared memory at once.
    """
    if not INTERPRETED:
        STEP: tl.constexpr = 256 // x.dtype.element_ty.primitive_bitwidth
        o_c = tl.arange(0, WIDTH // STEP) * STEP
        m = (o_t < last)[:, None] & (o_c < columns)[None, :]
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
            [(x + o_t[:, None] * stride + o_c[None, :]).to(tl.int64), m.to(tl.int32)], dtype=tl.int32, is_pure=False,
            pack=1)


@triton.jit
def log_decays(w, base, stride, o_t, o_k, m, m_k, OP: tl.constexpr):
    """Log decays: w itself; with a base [K] -e^(base + w) of the sum in float32, rounded to OP as w itself would be."""
    own = rows(w, stride, o_t, o_k, m).to(tl.float32)
    if base is not None:
        own += tl.load(base + o_k, mask=m_k, other=0.0).to(tl.float32)[None, :]
        own = tl.where(m, -exp(tl.minimum(own, MOST)), 0.0).to(OP).to(tl.float32)
    return tl.where(own < NOTHING, NOTHING, own)


@triton.jit
def sums(chosen, x, acc, OP: tl.constexpr, EXACT: tl.constexpr, SPLIT: tl.constexpr):
    """acc + chosen [BT, BT] @ x [BT, K]: of every token, a sum over others, by the tensor cores.

    `chosen` holds 0, 1 and halves, which are exact. In bf16, x is cut in two (SPLIT), or is of that type itself.
    """
    if EXACT:
        return tl.dot(chosen, x, acc, input_precision="ieee")
    elif x.dtype == OP:
        return dot(chosen, x, acc, "tf32x3")
    else:
        high = x.to(OP)
        acc = dot(chosen.to(OP), high, acc, "tf32")
        if SPLIT:
            acc = dot(chosen.to(OP), (x - high.to(tl.float32)).to(OP), acc, "tf32")
        return acc


@triton.jit
def exp(x):
    """e^x by one instruction; less than 2^-126 is 0, where tl.exp spends three more on it."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2E], dtype=tl.float32,
                                         is_pure=True, pack=1)


@triton.jit(do_not_specialize=["T", "L", "pieces", "documents"])
def _walk(a, b, w, base, initial, borders, sums_, final, states, cu_seqlens, table, T, L, pieces, documents, H, K, V,
          a_b, a_t, a_h, b_b, b_t, b_h, w_b, w_t, w_h,
          BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
          EXACT: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr):
    """States [V, K] at the borders of a segment's chunks, adding b_s^T (a_s e^...): k, v to the chunk's end.

    REVERSE: gradients, of r, dy from the chunk's start. KEEP: into `states` before every chunk (REVERSE: after it), and
    the last one into `final` [K, V]; else from zero, and what was added goes to `borders`, the decay to `sums_`.
    """
    i_h = tl.program_id(0) % H
    i_n, i_b, bos, length, i_s, slot, first_piece = place(
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
    m_state = m_v[:, None] & m_k[None, :]
    o_state = o_v[:, None] * K + o_k[None, :]
    o_given = o_k[None, :] * V + o_v[:, None]
    a += i_b * a_b + bos * a_t + i_h * a_h
    b += i_b * b_b + bos * b_t + i_h * b_h
    w += i_b * w_b + bos * w_t + i_h * w_h
    if base is not None:
        base += i_h * K
    states += (slot * H + i_h) * K * V + o_state
    p_border = borders + ((first_piece + i_s) * H + i_h) * K * V + o_state
    inside = o_r[None, :] < o_r[:, None] if REVERSE else o_r[None, :] > o_r[:, None]

    b_state = tl.zeros([BV, BK], tl.float32)
    if KEEP:
        if pieces > 1:
            b_state = tl.load(p_border, mask=m_state, other=0.0)
        elif initial is not None:
            b_state = tl.load(initial + (i_n * H + i_h) * K * V + o_given, mask=m_state, other=0.0).to(tl.float32)
    decay = tl.zeros([BK], tl.float32)
    chunks = tl.cdiv(last - first, BT)
    for n in range(0, chunks):
        i_c = first // BT + (chunks - 1 - n if REVERSE else n)
        o_t = i_c * BT + o_r
        m_tk = (o_t < last)[:, None] & m_k[None, :]
        b_a = rows(a, a_t, o_t, o_k, m_tk).to(tl.float32)
        b_b_ = rows(b, b_t, o_t, o_v, (o_t < last)[:, None] & m_v[None, :]).to(OP)
        own = log_decays(w, base, w_t, o_t, o_k, m_tk, m_k, OP)
        if KEEP:
            tl.store(states + i_c * H * K * V, b_state.to(OP), mask=m_state)
        b_a *= exp(sums(tl.where(inside, 1.0, 0.0), own, tl.zeros([BT, BK], tl.float32), OP, EXACT,
                           base is None and w.dtype.element_ty != OP))
        total = tl.sum(own, 0)
        b_state = dot(tl.trans(b_b_), b_a.to(OP), b_state * tl.exp(total)[None, :], PRECISION)
        decay += total
    if KEEP:
        if first == 0 if REVERSE else last == length:
            tl.store(final + (i_n * H + i_h) * K * V + o_given, b_state, mask=m_state)
    else:
        tl.store(p_border, b_state, mask=m_state)
        tl.store(sums_ + ((first_piece + i_s) * H + i_h) * K + o_k, decay, mask=m_k & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=["L", "pieces", "documents"])
def _scan(borders, sums_, initial, cu_seqlens, L, pieces, documents, H, K, V,
          BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr):
    """Additions of a document's segments become, in their place, the states before them (REVERSE: after them)."""
    i_n = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    count = pieces + i_n * 0
    first_piece = i_n * pieces
    if documents > 0:
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        count = tl.cdiv(tl.load(cu_seqlens + i_n + 1).to(tl.int64) - bos, L.to(tl.int64))
        first_piece = bos // L + i_n
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m = (o_v < V)[:, None] & (o_k < K)[None, :]
    b_state = tl.zeros([BV, BK], tl.float32)
    if initial is not None:
        b_state = tl.load(initial + (i_n * H + i_h) * K * V + o_k[None, :] * V + o_v[:, None], mask=m, other=0.0)
        b_state = b_state.to(tl.float32)
    for n in range(0, count):
        slot = (first_piece + (count - 1 - n if REVERSE else n)) * H + i_h
        p_border = borders + slot * K * V + o_v[:, None] * K + o_k[None, :]
        added = tl.load(p_border, mask=m, other=0.0)
        decay = tl.exp(tl.load(sums_ + slot * K + o_k, mask=o_k < K, other=0.0))
        tl.store(p_border, b_state, mask=m)
        b_state = b_state * decay[None, :] + added


CONFIGS: dict[tuple[int, int], tuple[int, dict]] = {
    # (class of K, bytes of an operand): tokens of a chunk; then of each kernel: most BK, most BV, warps, stages,
    # registers a thread (None: as many as the compiler likes)
    (64, 2): (32, {"walk": (32, 64, 4, 3, None), "outputs": (64, 64, 4, 1, 168), "gradients": (64, 64, 4, 1, None)}),
    (128, 2): (32, {"walk": (32, 64, 4, 3, None), "outputs": (128, 64, 8, 1, None),
                    "gradients": (128, 64, 8, 1, None)}),
    (256, 2): (32, {"walk": (32, 64, 4, 3, None), "outputs": (256, 64, 8, 1, None),
                    "gradients": (256, 32, 8, 1, None)}),
    (64, 4): (16, {"walk": (32, 64, 4, 2, None), "outputs": (64, 64, 4, 1, None),
                   "gradients": (64, 64, 4, 1, None)}),
    (128, 4): (16, {"walk": (32, 64, 4, 2, None), "outputs": (128, 32, 4, 1, None),
                    "gradients": (128, 32, 8, 1, None)}),
    (256, 4): (16, {"walk": (32, 64, 4, 2, None), "outputs": (256, 16, 8, 1, None),
                    "gradients": (256, 16, 8, 1, None)}),
}
PROGRAMS = 4  # of a walk, for each multiprocessor, where documents are cut
SEGMENT = 256  # tokens at least, where they are cut


def chunk_size(r: Tensor, op: torch.dtype) -> int:
    """Tokens of a chunk, at whose borders states are kept."""
    return CONFIGS[max(64, power_of_two(r.shape[-1])), op.itemsize][0]


def numbers(kernel: str, r: Tensor, v: Tensor, op: torch.dtype) -> dict:
    """The compile-time numbers and options of a launch."""
    K, V = r.shape[-1], v.shape[-1]
    BT, kernels = CONFIGS[max(64, power_of_two(K)), op.itemsize]
    BK, BV, warps, stages, registers = kernels[kernel]
    names = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    found = {"BT": BT, "BK": max(16, min(BK, power_of_two(K))), "BV": max(16, min(BV, power_of_two(V))),
             "OP": names[op], "num_warps": warps, "num_stages": stages}
    return found if registers is None else found | {"maxnreg": registers}


def operands(*tensors: Tensor) -> tuple[torch.dtype, dict]:
    """What the products are computed in: bf16 if r, k, v are; else float32, whose range fp16's factors need, too.

    fp16's eleven bits are tf32's. Only float32 inputs ask for exact sums, and for a narrow range of exponents.
    """
    dtypes = {x.dtype for x in tensors}
    op = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
    wide = torch.float32 if torch.float32 in dtypes else torch.float16
    exact = op == torch.float32 and wide == torch.float32
    return op, {"PRECISION": precision(wide), "EXACT": exact, "LIMIT": 16.0 if exact else 60.0}


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
            self.rows = self.slots = B * self.per_row
        else:
            self.cu_seqlens, self.table = cu_seqlens.int(), document_chunks(cu_seqlens, T, length)
            self.rows = self.slots = len(self.table)
        self.numbers = self.cu_seqlens, self.table, T, length, self.per_row, self.documents


def segments(r: Tensor, blocks: int, cu_seqlens: Tensor | None, BT: int) -> Pieces:
    """As many segments as keep the GPU busy, of whole chunks; two would take as long, in two walks, as one in one."""
    B, T, H, _ = r.shape
    wanted = PROGRAMS * (torch.cuda.get_device_properties(r.device).multi_processor_count if r.is_cuda else 4)
    pieces = max(1, min(wanted // (B * H * blocks), T // (SEGMENT if r.is_cuda else 32)))
    return Pieces(r, cu_seqlens, max(1, -(-T // (BT * (pieces if pieces > 2 else 1)))) * BT)


def walk(a: Tensor, b: Tensor, w: Tensor, base: Tensor | None, initial: Tensor | None, final: Tensor, slots: int,
         cu_seqlens: Tensor | None, op: torch.dtype, how: dict, reverse: bool) -> Tensor:
    """States before the chunks, or their gradients after them, [slots, H, V, K]; the last one into `final`."""
    H, K, V = *a.shape[2:], b.shape[-1]
    launch = numbers("walk", a, b, op)
    launch |= {key: how[key] for key in ("PRECISION", "EXACT")} | {"REVERSE": reverse}
    blocks = triton.cdiv(V, launch["BV"]), triton.cdiv(K, launch["BK"])
    cut = segments(a, blocks[0] * blocks[1], cu_seqlens, launch["BT"])
    rest = *cut.numbers, H, K, V, *a.stride()[:3], *b.stride()[:3], *w.stride()[:3]
    new = torch.empty if cu_seqlens is None else torch.zeros  # some slots may stay unused, an output has no garbage
    states = new(slots, H, V, K, dtype=op, device=a.device)
    borders, decay = final, final
    if cut.per_row > 1:
        borders, decay = (torch.empty(cut.slots, H, *size, dtype=torch.float32, device=a.device) for size in
                          ((V, K), (K,)))
        _walk[cut.rows * H, *blocks](a, b, w, base, None, borders, decay, final, states, *rest, **launch, KEEP=False)
        _scan[len(final) * H, triton.cdiv(V, 16)](
            borders, decay, initial, cut.cu_seqlens, *cut.numbers[3:], H, K, V, BK=max(16, power_of_two(K)), BV=16,
            REVERSE=reverse)
    _walk[cut.rows * H, *blocks](a, b, w, base, initial, borders, decay, final, states, *rest, **launch, KEEP=True)
    return states
