"""FAVOR+ (Performer, 2009.14794): linear attention over positive random features that are never in memory; forward.

    y_t = phi(q_t) S_t / n_t,   S_t = 2^-r S_{t-1} + phi(k_t)^T v_t,   n_t = phi(q_t) z_t + EPS,
    z_t = 2^-r z_{t-1} + phi(k_t),   with a rate r of each head;

    phi(q) = softmax_j(w_j . q + largest_j),   phi(k)_j = exp(w_j . k - |k|^2 / 2 - largest_j) <= 1

In two levels. `walk_kernel` goes over a row of tokens with a block of the state, BM features by BV columns, in
registers, and writes the state before each chunk of BT tokens, as the products will take it. Then every chunk is a
program of its own, `read_kernel`: over blocks of features it computes both sides' features from q, k and W in
registers, adds up their scores and the query's share of the state, and at last the scores' share of the values. The
gradients are the same three shapes again (`favor_backward`), so each kernel has a name for either side: features of a
side x are 2^(w . x + c + shift), with a constant c of each row and a shift of each feature, logarithms to the base 2.

What the rate leaves of a token is part of c: features of keys are as seen from their chunk's last token, psi as seen
from the token before the chunk, and so are the states on either side; scores lack one factor for the whole chunk,
`across`. Of float32 features, whose c has no digits to lose, it is a factor of its own, and so of the forward pass's
queries, whose largest feature is looked for.

Kept for the backward pass: y and the logarithm of n, 4 bytes a query (8 of float32, to which it has too few digits),
which makes psi(q_t) = phi(q_t) / n_t features of another constant c.

Where rows and heads are too few to occupy a GPU, rows are cut into segments of whole chunks: `walk_kernel` first finds
each segment's sum, then again walks from those of all segments before. Documents are rows with borders of their own.

16-bit inputs: exponents are products of fp16 numbers, of 11 bits each (of queries and keys, what is beyond fp16's range
counts as its largest). All other products take bf16; for fp16 inputs TF32, as fp16 could not hold the features.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cut_documents, dot, power_of_two
from zoo.kernels.favor_parts import across, exponents, place, power, prepare_kernel, side, tile

EPS = tl.constexpr(1e-30)
VARYING = ["T", "SIZE", "PARTS", "CHUNKS", "DOCUMENTS", "BEFORE", "SUMS"]  # by batch: never in a compile key


@triton.jit(do_not_specialize=VARYING)
def walk_kernel(
    p_x, p_v, p_w, p_decay, p_shift, p_log, p_weight, p_first, p_last, p_sums, p_states, p_z, p_table, p_borders,
    p_chunks, T, SIZE, PARTS, DOCUMENTS, CHUNKS, BEFORE, SUMS, x_b, x_t, x_h, v_b, v_t, v_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, VP: tl.constexpr,
    QUERIES: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr,
    OPERAND: tl.constexpr, EXPONENT: tl.constexpr, PRECISION: tl.constexpr,
):
    """Sums over a segment's tokens of what is left of phi(k_t)^T [v_t, 1], on top of the row's first state and of all
    segments before.

    Of QUERIES, from the row's end: psi(q_t)^T [v_t, weight_t]. Written are the state before (behind) each
    chunk, and the row's last; with SUMS the segment's own sum and nothing else.
    """
    NV: tl.constexpr = VP // BV
    NM: tl.constexpr = MP // BM
    i = tl.program_id(0).to(tl.int64)
    i_row, i_h, i_m, i_v = i // (H * NM * NV), i // (NM * NV) % H, i // NV % NM, i % NV
    i_n, i_s, i_b, start, rest = place(i_row, p_table, p_borders, T, SIZE, PARTS, DOCUMENTS)
    length = tl.maximum(tl.minimum(rest, SIZE), 0)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, KB)
    o_v, o_m = i_v * BV + tl.arange(0, BV), i_m * BM + tl.arange(0, BM)
    p_x += i_b * x_b + start * x_t + i_h * x_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    o_row = (i_b * H + i_h) * T + start
    b_w = tl.load(p_w + o_m[:, None] * BK + o_k[None, :])
    b_shift = tl.load(p_shift + (0 if QUERIES else MP) + o_m)
    rate = tl.load(p_decay + i_h)
    o_z = i_h * (M * (V + 1)) + o_m * (V + 1)
    m_z, m_state = o_m < M, (o_m < M)[:, None] & (o_v < V)[None, :]
    p = p_first + tl.maximum(i_n, 0) * (H * M * (V + 1)) + o_z
    b_state = tl.load(p[:, None] + o_v[None, :], mask=m_state & (BEFORE != 0), other=0.0).to(tl.float32)
    b_z = tl.load(p + V, mask=m_z & (BEFORE != 0), other=0.0).to(tl.float32)
    before = tl.where(SUMS != 0, 0, (rest + SIZE - 1) // SIZE - 1 if QUERIES else i_s)
    for j in range(0, before):
        p = p_sums + (i_row + before - j if QUERIES else i_row - before + j) * (H * M * (V + 1)) + o_z
        left = tl.exp2(-rate * (tl.minimum(rest - (before - j) * SIZE, SIZE) if QUERIES else SIZE))
        b_state = b_state * left + tl.load(p[:, None] + o_v[None, :], mask=m_state, other=0.0)
        b_z = b_z * left + tl.load(p + V, mask=m_z, other=0.0)
    i_c = i_n * CHUNKS
    if DOCUMENTS:
        i_c = tl.load(p_chunks + tl.maximum(i_n, 0)).to(tl.int64)
    i_c += i_s * (SIZE // BT)
    chunks = (length + BT - 1) // BT
    i_c = (i_c + (chunks - 1 if QUERIES else 0)) * H + i_h  # the first chunk's place among all states
    p_states += i_c * (MP * VP) + o_m[:, None] * VP + o_v[None, :]
    p_z += i_c * MP + o_m
    STEP: tl.constexpr = -H if QUERIES else H
    keep = (SUMS == 0) & (chunks > 0)
    tl.store(p_states, b_state.to(OPERAND), mask=keep)
    tl.store(p_z, b_z, mask=keep & (i_v == 0))
    for j in range(0, chunks):
        n = chunks - 1 - j if QUERIES else j
        first = n * BT
        here = tl.minimum(length - first, BT).to(tl.int32)
        if QUERIES:  # early: only operands of products are fetched ahead of their turn
            b_weight = tl.load(p_weight + o_row + first + o_t, mask=o_t < here, other=0.0)
        b_x, b_c, b_left = side(p_x + first * x_t, x_t, p_log + o_row + first if QUERIES else p_log, here, o_t, rate, K,
                                BK, KB, EXPONENT, QUERIES, True)
        b_v = tile(p_v + first * v_t, here, o_t, o_v, v_t, V)
        b_f = power(exponents(b_x, b_c, b_w, b_shift, p_x + first * x_t, x_t, p_w, here, o_t, o_m, K, BK, True,
                              PRECISION), b_left, EXPONENT, True)
        left = tl.exp2(-rate * here)
        b_z *= left
        if QUERIES:
            b_z += tl.sum(b_f * b_weight[None, :], 1)
        else:
            b_z += tl.sum(b_f, 1)
        b_state = dot(b_f.to(OPERAND), b_v.to(OPERAND), b_state * left, PRECISION)
        keep = (SUMS == 0) & (j + 1 < chunks)
        p_states += STEP * MP * VP
        p_z += STEP * MP
        tl.store(p_states, b_state.to(OPERAND), mask=keep)
        tl.store(p_z, b_z, mask=keep & (i_v == 0))
    if SUMS != 0:
        p_to = p_sums + i_row * (H * M * (V + 1)) + o_z
    else:
        p_to = p_last + tl.maximum(i_n, 0) * (H * M * (V + 1)) + o_z
    ends = (i_s == 0 if QUERIES else rest <= SIZE) & (i_n >= 0) | (SUMS != 0)
    tl.store(p_to[:, None] + o_v[None, :], b_state, mask=m_state & ends)
    tl.store(p_to + V, b_z, mask=m_z & ends & (i_v == 0))


@triton.jit(do_not_specialize=VARYING)
def read_kernel(
    p_a, p_b, p_v, p_w, p_decay, p_shift, p_log, p_states, p_z, p_y, p_table, p_borders, T, SIZE, PARTS, DOCUMENTS,
    a_b, a_t, a_h, b_b, b_t, b_h, v_b, v_t, v_h, y_b, y_t, y_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, MP: tl.constexpr, VP: tl.constexpr, BACKWARD: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, OPERAND: tl.constexpr,
    EXPONENT: tl.constexpr, PRECISION: tl.constexpr,
):
    """y of a chunk and the logarithm of n; a are queries, b keys.

    BACKWARD: dv of a chunk, from v = dy and that logarithm; a are keys, b queries, states those behind the chunks.
    """
    NV: tl.constexpr = VP // BV
    i = tl.program_id(0).to(tl.int64)
    i_c, i_h, i_v = i // (H * NV), i // NV % H, i % NV
    _, _, i_b, start, rest = place(i_c, p_table, p_borders, T, SIZE, PARTS, DOCUMENTS)
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, KB), i_v * BV + tl.arange(0, BV)
    here, o_row = tl.minimum(rest, BT).to(tl.int32), (i_b * H + i_h) * T + start
    p_a += i_b * a_b + start * a_t + i_h * a_h
    p_b += i_b * b_b + start * b_t + i_h * b_h
    rate = tl.load(p_decay + i_h)
    b_a, b_ac, b_al = side(p_a, a_t, p_log + o_row, here, o_t, rate, K, BK, KB, EXPONENT, not BACKWARD, False)
    b_b, b_bc, b_bl = side(p_b, b_t, p_log + o_row, here, o_t, rate, K, BK, KB, EXPONENT, BACKWARD, True)
    b_y, b_scores = tl.zeros([BT, BV], tl.float32), tl.zeros([BT, BT], tl.float32)
    b_sum, b_den = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    if not BACKWARD:
        b_max = tl.full([BT], float("-inf"), tl.float32)
        for i_m in range(0, MP, BM):
            o_m = i_m + tl.arange(0, BM)
            b_w = tl.load(p_w + o_m[:, None] * BK + o_k[None, :])
            b_e = exponents(b_a, b_ac, b_w, tl.load(p_shift + o_m), p_a, a_t, p_w, here, o_t, o_m, K, BK, False,
                            PRECISION)
            b_max = tl.maximum(b_max, tl.max(b_e, 1))
        b_ac = -b_max
    p_states += (i_c * H + i_h) * (MP * VP)
    p_z += (i_c * H + i_h) * MP
    for i_m in range(0, MP, BM):
        o_m = i_m + tl.arange(0, BM)
        b_w = tl.load(p_w + o_m[:, None] * BK + o_k[None, :])
        b_fb = power(exponents(b_b, b_bc, b_w, tl.load(p_shift + (0 if BACKWARD else MP) + o_m), p_b, b_t, p_w, here,
                               o_t, o_m, K, BK, True, PRECISION), b_bl, EXPONENT, True).to(OPERAND)
        b_fa = power(exponents(b_a, b_ac, b_w, tl.load(p_shift + (MP if BACKWARD else 0) + o_m), p_a, a_t, p_w, here,
                               o_t, o_m, K, BK, False, PRECISION), b_al, EXPONENT, False)
        b_state = tl.load(p_states + o_m[:, None] * VP + o_v[None, :])
        if not BACKWARD:
            b_sum += tl.sum(b_fa, 1)
            b_den += tl.sum(b_fa * tl.load(p_z + o_m)[None, :], 1)
        b_fa = b_fa.to(OPERAND)
        b_scores = dot(b_fa, b_fb, b_scores, PRECISION)
        b_y = dot(b_fa, b_state, b_y, PRECISION)
    if BACKWARD:
        b_scores = tl.where(o_t[:, None] <= o_t[None, :], b_scores * across(rate, here), 0.0)
    else:
        b_left = tl.exp2(-rate * (o_t + 1))
        b_scores = tl.where(o_t[:, None] >= o_t[None, :], b_scores * tl.exp2(rate * (here - 1 - o_t))[:, None], 0.0)
        b_y *= b_left[:, None]
        b_den *= b_left
    b_v = tile(p_v + i_b * v_b + start * v_t + i_h * v_h, here, o_t, o_v, v_t, V)
    b_y = dot(b_scores.to(OPERAND), b_v.to(OPERAND), b_y, PRECISION)
    if not BACKWARD:
        b_den += tl.sum(b_scores, 1) + EPS * b_sum
        b_y /= b_den[:, None]
        b_log = b_max.to(p_log.dtype.element_ty) + tl.log2(b_den)
        tl.store(p_log + o_row + o_t, b_log, mask=(o_t < here) & (i_v == 0))
    p_y += i_b * y_b + start * y_t + i_h * y_h
    tl.store(p_y + o_t[:, None] * y_t + o_v[None, :], b_y.to(p_y.dtype.element_ty),
             mask=(o_t < here)[:, None] & (o_v < V)[None, :])


PROGRAMS = 512  # about four for each multiprocessor: rows are cut until as many walk
# by bytes of an operand and padded width of a head, to 64, 128, 256: tokens of a chunk, channels KB of a product; of
# each kernel features BM, columns BV at most (of products in `gradient`), warps, stages, and registers at most (168 let
# three programs on a multiprocessor, 128 four)
CHUNKS = {2: ((64, 64), (64, 128), (64, 64)), 4: ((64, 64), (32, 64), (32, 64))}
TILES = {
    2: {"walk": ((64, 64, 4, 3, 128), (64, 64, 4, 2, 168), (64, 64, 4, 1, 255)),
        "read": ((64, 64, 4, 3, 168), (64, 128, 4, 2, 255), (64, 64, 4, 1, 255)),
        "gradient": ((64, 64, 4, 1, 168), (64, 128, 4, 1, 255), (64, 64, 4, 1, 255))},
    4: {"walk": ((32, 64, 4, 1, 255), (32, 64, 4, 1, 255), (32, 64, 4, 1, 255)),
        "read": ((32, 64, 4, 1, 255), (32, 64, 4, 1, 255), (32, 64, 4, 1, 255)),
        "gradient": ((32, 64, 4, 1, 255), (32, 64, 4, 1, 255), (16, 64, 4, 1, 255))},
}
NAMES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Call:
    """What all kernels of a call share: types of products, W, blocks, chunks and segments of rows."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, projection: Tensor, decay: Tensor | None, bound: float | None,
                 cu_seqlens: Tensor | None):
        types, device = {q.dtype, k.dtype, v.dtype}, q.device
        self.dtype = torch.bfloat16 if torch.bfloat16 in types else torch.float32
        exponent = torch.float32 if types == {torch.float32} else torch.float16
        self.B, self.T, self.H, self.K = q.shape
        self.V, self.M, self.cu_seqlens = v.shape[3], len(projection), cu_seqlens
        self.number = self.B if cu_seqlens is None else len(cu_seqlens) - 1
        # rows of tiles of at least 128 bytes: see docs/kernels/favor.md
        self.BK, self.VP = (max(size, power_of_two(x)) for size, x in (
            (128 // exponent.itemsize, self.K), (128 // self.dtype.itemsize, self.V)))
        self.MP = triton.cdiv(self.M, 64) * 64
        width = max(self.BK, self.VP)
        self.width = 0 if width <= 64 else 1 if width == 128 else 2  # its place in the tables
        self.tokens, self.KB = CHUNKS[self.dtype.itemsize][self.width]
        self.decay = torch.zeros(self.H, device=device) if decay is None else decay.float().contiguous()
        self.w = torch.empty(self.MP, self.BK, dtype=exponent, device=device)
        self.w_gradient = torch.empty(self.MP, self.BK, dtype=self.dtype, device=device)
        self.shift = torch.empty(2, self.MP, dtype=torch.float32, device=device)
        prepare_kernel[(self.MP // 16,)](
            projection, self.w, self.w_gradient, self.shift, *projection.stride(), bound or 0.0, M=self.M, K=self.K,
            MP=self.MP, BM=16, BK=self.BK, BOUNDED=bound is not None)
        parts = max(1, min(32, PROGRAMS // max(1, self.B * self.H * self.programs("walk"))))
        self.segment = max(1, triton.cdiv(self.T, self.tokens * parts)) * self.tokens
        self.segments, self.chunks = triton.cdiv(self.T, self.segment), triton.cdiv(self.T, self.tokens)
        self.segment_count, self.chunk_count = self.B * self.segments, self.B * self.chunks
        self.segment_table = self.chunk_table = self.borders = self.first_chunks = nothing(device, torch.int32)
        if cu_seqlens is not None:
            self.segment_table = cut_documents(cu_seqlens, self.T, self.segment)[0]
            self.chunk_table, self.borders, self.first_chunks = cut_documents(cu_seqlens, self.T, self.tokens)
            self.segment_count, self.chunk_count = len(self.segment_table), len(self.chunk_table)

    def programs(self, kernel: str) -> int:
        """How many blocks of features (`walk`) or of columns (`read`) there are."""
        BM, BV, *_ = TILES[self.dtype.itemsize][kernel][self.width]
        return self.VP // min(BV, self.VP) * (self.MP // BM if kernel == "walk" else 1)

    def options(self, kernel: str) -> dict[str, object]:
        BM, BV, warps, stages, registers = TILES[self.dtype.itemsize][kernel][self.width]
        return {"H": self.H, "K": self.K, "V": self.V, "MP": self.MP, "VP": self.VP, "BT": self.tokens, "BK": self.BK,
                "KB": min(self.KB, self.BK), "BV": min(BV, self.VP), "BM": BM, "OPERAND": NAMES[self.dtype],
                "EXPONENT": NAMES[self.w.dtype], "PRECISION": "tf32" if self.w.dtype == torch.float16 else "tf32x3",
                "num_warps": warps, "num_stages": stages, "maxnreg": registers}

    def place(self) -> tuple[Tensor, Tensor, int, int, int, int]:
        """Of chunks, for kernels that have one for each program."""
        return self.chunk_table, self.borders, self.T, self.tokens, self.chunks, int(self.cu_seqlens is not None)

    def states(self, x: Tensor, v: Tensor, first: Tensor | None, log: Tensor | None = None,
               weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """States before each chunk, of keys x; or behind it, of queries x with all the rest -> states, z, the last."""
        device = x.device
        none, last = nothing(device, torch.float32), self.last(first, device)
        states = torch.empty(self.chunk_count, self.H, self.MP, self.VP, dtype=self.dtype, device=device)
        z = torch.empty(self.chunk_count, self.H, self.MP, dtype=torch.float32, device=device)
        of_queries = [none if each is None else each for each in (log, weight)]
        before = none if first is None else first.float().contiguous()
        cut = self.segment < self.T
        sums = none if not cut else torch.empty(self.segment_count, *last.shape[1:], dtype=torch.float32, device=device)
        for sums_alone in (True, False)[not cut:]:
            walk_kernel[(self.segment_count * self.H * self.programs("walk"),)](
                x, v, self.w, self.decay, self.shift, *of_queries, before, last, sums, states, z, self.segment_table,
                self.borders, self.first_chunks, self.T, self.segment, self.segments, int(self.cu_seqlens is not None),
                self.chunks, int(first is not None and not sums_alone), int(sums_alone), *x.stride()[:3],
                *v.stride()[:3], M=self.M, QUERIES=log is not None, **self.options("walk"))
        return states, z, last

    def last(self, first: Tensor | None, device: torch.device) -> Tensor:
        """Room for the last states [N, H, M, V + 1]; of documents without tokens, what they are."""
        shape = self.number, self.H, self.M, self.V + 1
        if self.cu_seqlens is None and self.T:
            return torch.empty(shape, dtype=torch.float32, device=device)
        return torch.zeros(shape, dtype=torch.float32, device=device) if first is None else first.float().clone()


@functools.cache
def nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Stands for a tensor that is not there: None would have a build of its own."""
    return torch.empty(0, dtype=dtype, device=device)


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def log_type(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if {x.dtype for x in inputs} == {torch.float32} else torch.float32


def forward(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, decay: Tensor | None, initial_state: Tensor | None,
            bound: float | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> y in v's type, last states [N, H, M, V + 1] float32, and for `backward` the logarithms of n [B, H, T]."""
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    B, T, H, _ = q.shape
    y, log = v.new_empty(v.shape), torch.empty(B, H, T, dtype=log_type(q, k, v), device=q.device)
    with torch.cuda.device_of(q):
        call = Call(q, k, v, projection, decay, bound, cu_seqlens)
        if not y.numel():
            return y, call.last(initial_state, q.device), log
        states, z, last = call.states(k, v, initial_state)
        read_kernel[(call.chunk_count * H * call.programs("read"),)](
            q, k, v, call.w, call.decay, call.shift, log, states, z, y, *call.place(), *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], *y.stride()[:3], BACKWARD=False, **call.options("read"))
    return y, last, log
