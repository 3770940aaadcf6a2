"""FAVOR+ (Performer, 2009.14794): linear attention over positive random features that are never in memory; forward.

    y_t = phi(q_t) S_t / (phi(q_t) z_t + EPS),   S_t = sum_{s<=t} phi(k_s)^T v_s,   z_t = sum_{s<=t} phi(k_s)

    phi(q) = softmax_j(w_j . q + largest_j),   phi(k)_j = exp(w_j . k - |k|^2 / 2 - largest_j) <= 1

A program takes a row of tokens (or a segment of it, see `linear_attention`), a head, BM features and BV columns of the
values, and goes over chunks of BT tokens with the state [BM, BV] and z in registers. Each chunk's features are computed
from q, k and W, used as scores inside the chunk and with the state, and dropped. Where all features are in one block,
the softmax's maximum cancels in the quotient and needs nobody else; else `lse_kernel` finds its logarithm first, and
blocks' numerators and denominators are added up afterwards. Kept for the backward pass: lse and 1 / (phi z + EPS), two
float32 numbers a query. What must be transposed is computed so (W k^T), as the transpose of a product is not safe.

bf16 products: exponents want float32's digits, so W, and float32 queries and keys, are taken as sums of two bf16
numbers. fp16 could not hold the features: its products are TF32 ones, which have as many digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import dot, power_of_two
from zoo.kernels.linear_attention import VARYING, Rows, last_contiguous, place, scan

EPS = tl.constexpr(1e-30)


@triton.jit
def prepare_kernel(p_w, p_high, p_low, p_largest, w_m, w_k, bound, M: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
                   BK: tl.constexpr, BOUNDED: tl.constexpr):
    """W as a sum of two numbers of the operands' type, and the largest exponent that a key (within bounds) can have."""
    o_m, o_k = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BK)
    m = (o_m < M)[:, None] & (o_k < K)[None, :]
    b_w = tl.load(p_w + o_m[:, None] * w_m + o_k[None, :] * w_k, mask=m, other=0.0).to(tl.float32)
    b_length = tl.sqrt(tl.sum(b_w * b_w, 1))
    b_reach = tl.minimum(b_length, bound) if BOUNDED else b_length
    tl.store(p_largest + o_m, b_length * b_reach - b_reach * b_reach / 2, mask=o_m < M)
    b_high = b_w.to(p_high.dtype.element_ty)
    o = o_m[:, None] * K + o_k[None, :]
    tl.store(p_high + o, b_high, mask=m)
    tl.store(p_low + o, (b_w - b_high.to(tl.float32)).to(p_low.dtype.element_ty), mask=m)


@triton.jit
def rows_of(p, first, length, o_t, o, stride, SIZE: tl.constexpr):
    """Tokens first + o_t of a segment, columns o; 0 past its end."""
    p += first * stride
    return tl.load(p + o_t[:, None] * stride + o[None, :], mask=(first + o_t < length)[:, None] & (o < SIZE)[None, :],
                   other=0.0)


@triton.jit
def exponents(b_x, b_high, b_low, OPERAND: tl.constexpr, X_LOW: tl.constexpr, W_LOW: tl.constexpr,
              TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """x W^T [BT, BM], or W x^T if TRANSPOSED; terms of two numbers' low parts alone are left out."""
    BT: tl.constexpr = b_x.shape[0]
    BM: tl.constexpr = b_high.shape[0]
    b_x_high = b_x.to(OPERAND)
    if TRANSPOSED:
        b_e = dot(b_high, tl.trans(b_x_high), tl.zeros([BM, BT], tl.float32), PRECISION)
        if W_LOW:
            b_e = dot(b_low, tl.trans(b_x_high), b_e, PRECISION)
        if X_LOW:
            b_e = dot(b_high, tl.trans((b_x - b_x_high.to(tl.float32)).to(OPERAND)), b_e, PRECISION)
    else:
        b_e = dot(b_x_high, tl.trans(b_high), tl.zeros([BT, BM], tl.float32), PRECISION)
        if W_LOW:
            b_e = dot(b_x_high, tl.trans(b_low), b_e, PRECISION)
        if X_LOW:
            b_e = dot((b_x - b_x_high.to(tl.float32)).to(OPERAND), tl.trans(b_high), b_e, PRECISION)
    return b_e


@triton.jit
def key_features(b_k, b_high, b_low, b_largest, m_t, m_m, OPERAND: tl.constexpr, X_LOW: tl.constexpr,
                 W_LOW: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """phi(k) [BT, BM] or [BM, BT], 0 outside of the masks."""
    b_e = exponents(b_k, b_high, b_low, OPERAND, X_LOW, W_LOW, TRANSPOSED, PRECISION)
    b_wide = b_k.to(tl.float32)
    b_half = tl.sum(b_wide * b_wide, 1) / 2
    if TRANSPOSED:
        return tl.where(m_m[:, None] & m_t[None, :], tl.exp(b_e - b_half[None, :] - b_largest[:, None]), 0.0)
    else:
        return tl.where(m_t[:, None] & m_m[None, :], tl.exp(b_e - b_half[:, None] - b_largest[None, :]), 0.0)


@triton.jit
def query_features(b_q, b_high, b_low, b_largest, b_lse, m_m, OPERAND: tl.constexpr, X_LOW: tl.constexpr,
                   W_LOW: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """phi(q) [BT, BM] or [BM, BT]; 0 where lse is infinite."""
    b_e = exponents(b_q, b_high, b_low, OPERAND, X_LOW, W_LOW, TRANSPOSED, PRECISION)
    if TRANSPOSED:
        return tl.where(m_m[:, None], tl.exp(b_e + b_largest[:, None] - b_lse[None, :]), 0.0)
    else:
        return tl.where(m_m[None, :], tl.exp(b_e + b_largest[None, :] - b_lse[:, None]), 0.0)


@triton.jit
def weights(p_high, p_low, p_largest, o_m, o_k, M: tl.constexpr, K: tl.constexpr, W_LOW: tl.constexpr):
    o, m = o_m[:, None] * K + o_k[None, :], (o_m < M)[:, None] & (o_k < K)[None, :]
    b_high = tl.load(p_high + o, mask=m, other=0.0)
    b_low = b_high
    if W_LOW:
        b_low = tl.load(p_low + o, mask=m, other=0.0)
    return b_high, b_low, tl.load(p_largest + o_m, mask=o_m < M, other=0.0)


@triton.jit(do_not_specialize=["T"])
def lse_kernel(p_q, p_high, p_low, p_largest, p_lse, T, q_b, q_t, q_h, H: tl.constexpr, K: tl.constexpr,
               M: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, OPERAND: tl.constexpr,
               X_LOW: tl.constexpr, W_LOW: tl.constexpr, PRECISION: tl.constexpr):
    """log sum_j exp(w_j . q + largest_j) of BT queries."""
    i = tl.program_id(0).to(tl.int64)
    chunks = (T + BT - 1) // BT
    i_h, first, i_b = i % H, i // H % chunks * BT, i // (H * chunks)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, BK)
    b_q = rows_of(p_q + i_b * q_b + i_h * q_h, first, T, o_t, o_k, q_t, K)
    b_max = tl.full([BT], -1e30, tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    for i_m in range(0, M, BM):
        o_m = i_m + tl.arange(0, BM)
        b_high, b_low, b_largest = weights(p_high, p_low, p_largest, o_m, o_k, M, K, W_LOW)
        b_e = exponents(b_q, b_high, b_low, OPERAND, X_LOW, W_LOW, False, PRECISION) + b_largest[None, :]
        b_e = tl.where((o_m < M)[None, :], b_e, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_e, 1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_e - b_new[:, None]), 1)
        b_max = b_new
    tl.store(p_lse + (i_b * H + i_h) * T + first + o_t, b_max + tl.log(b_sum), mask=first + o_t < T)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    p_q, p_k, p_v, p_high, p_low, p_largest, p_y, p_den, p_lse, p_before, p_after, p_rows, p_borders,
    T, SEGMENT, SEGMENTS, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h, y_m, den_m,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, DOCUMENTS: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, OPERAND: tl.constexpr, Q_LOW: tl.constexpr,
    K_LOW: tl.constexpr, W_LOW: tl.constexpr, PRECISION: tl.constexpr,
):
    """y, 1 / (phi z + EPS) and lse where BM is all of M; else a block's numerators and denominators."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NM: tl.constexpr = (M + BM - 1) // BM
    i = tl.program_id(0).to(tl.int64)
    i_row, i_h, i_m, i_v = i // (H * NM * NV), i // (NM * NV) % H, i // NV % NM, i % NV
    i_b, start, length = place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, BK)
    o_v, o_m = i_v * BV + tl.arange(0, BV), i_m * BM + tl.arange(0, BM)
    p_q += i_b * q_b + start * q_t + i_h * q_h
    p_k += i_b * k_b + start * k_t + i_h * k_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    p_y += i_m * y_m + i_b * y_b + start * y_t + i_h * y_h
    o_row = (i_b * H + i_h) * T + start
    p_den += i_m * den_m + o_row
    p_lse += o_row
    b_high, b_low, b_largest = weights(p_high, p_low, p_largest, o_m, o_k, M, K, W_LOW)
    o_z = (i_row * H + i_h) * (M * (V + 1)) + o_m * (V + 1)
    m_m, m_state = o_m < M, (o_m < M)[:, None] & (o_v < V)[None, :]
    b_state, b_z = tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32)
    if p_before is not None:
        b_state += tl.load(p_before + o_z[:, None] + o_v[None, :], mask=m_state, other=0.0).to(tl.float32)
        b_z += tl.load(p_before + o_z + V, mask=m_m, other=0.0).to(tl.float32)
    for first in range(0, length, BT):
        m_t = first + o_t < length
        b_k = rows_of(p_k, first, length, o_t, o_k, k_t, K)
        b_fk = key_features(b_k, b_high, b_low, b_largest, m_t, m_m, OPERAND, K_LOW, W_LOW, True, PRECISION).to(OPERAND)
        b_q = rows_of(p_q, first, length, o_t, o_k, q_t, K)
        if NM == 1:
            b_e = exponents(b_q, b_high, b_low, OPERAND, Q_LOW, W_LOW, False, PRECISION) + b_largest[None, :]
            b_e = tl.where(m_m[None, :], b_e, float("-inf"))
            b_max = tl.max(b_e, 1)
            b_wide = tl.exp(b_e - b_max[:, None])
            b_sum = tl.sum(b_wide, 1)
            b_fq = b_wide.to(OPERAND)
        else:
            b_lse = tl.load(p_lse + first + o_t, mask=m_t, other=float("inf"))
            b_fq = query_features(b_q, b_high, b_low, b_largest, b_lse, m_m, OPERAND, Q_LOW, W_LOW, False,
                                  PRECISION).to(OPERAND)
        b_v = rows_of(p_v, first, length, o_t, o_v, v_t, V).to(OPERAND)
        b_scores = dot(b_fq, b_fk, tl.zeros([BT, BT], tl.float32), PRECISION)
        b_scores = tl.where(o_t[:, None] >= o_t[None, :], b_scores, 0.0)
        b_den = tl.sum(b_fq.to(tl.float32) * b_z[None, :], 1) + tl.sum(b_scores, 1)
        b_y = dot(b_fq, b_state.to(OPERAND), tl.zeros([BT, BV], tl.float32), PRECISION)
        b_y = dot(b_scores.to(OPERAND), b_v, b_y, PRECISION)
        b_state = dot(b_fk, b_v, b_state, PRECISION)
        b_z += tl.sum(b_fk.to(tl.float32), 1)
        if NM == 1:
            b_scale = 1 / (b_den + EPS * b_sum)
            b_y *= b_scale[:, None]
            if i_v == 0:
                tl.store(p_den + first + o_t, b_scale * b_sum, mask=m_t)
                tl.store(p_lse + first + o_t, b_max + tl.log(b_sum), mask=m_t)
        elif i_v == 0:
            tl.store(p_den + first + o_t, b_den, mask=m_t)
        p_to = p_y + first * y_t + o_t[:, None] * y_t + o_v[None, :]
        tl.store(p_to, b_y.to(p_y.dtype.element_ty), mask=m_t[:, None] & (o_v < V)[None, :])
    if p_after is not None:
        tl.store(p_after + o_z[:, None] + o_v[None, :], b_state, mask=m_state)
        if i_v == 0:
            tl.store(p_after + o_z + V, b_z, mask=m_m)


@triton.jit(do_not_specialize=VARYING)
def sums_kernel(
    p_x, p_v, p_high, p_low, p_largest, p_lse, p_scale, p_weight, p_sums, p_rows, p_borders, T, SEGMENT, SEGMENTS,
    x_b, x_t, x_h, v_b, v_t, v_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr, QUERIES: tl.constexpr, DOCUMENTS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, OPERAND: tl.constexpr, X_LOW: tl.constexpr,
    W_LOW: tl.constexpr, PRECISION: tl.constexpr,
):
    """sum_t phi(k_t)^T [v_t, 1] of a segment, or of QUERIES sum_t phi(q_t)^T [scale_t v_t, weight_t]."""
    NV: tl.constexpr = (V + BV - 1) // BV
    NM: tl.constexpr = (M + BM - 1) // BM
    i = tl.program_id(0).to(tl.int64)
    i_row, i_h, i_m, i_v = i // (H * NM * NV), i // (NM * NV) % H, i // NV % NM, i % NV
    i_b, start, length = place(i_row, p_rows, p_borders, T, SEGMENT, SEGMENTS, DOCUMENTS)
    o_t, o_k = tl.arange(0, BT), tl.arange(0, BK)
    o_v, o_m = i_v * BV + tl.arange(0, BV), i_m * BM + tl.arange(0, BM)
    p_x += i_b * x_b + start * x_t + i_h * x_h
    p_v += i_b * v_b + start * v_t + i_h * v_h
    o_row = (i_b * H + i_h) * T + start
    b_high, b_low, b_largest = weights(p_high, p_low, p_largest, o_m, o_k, M, K, W_LOW)
    m_m = o_m < M
    b_state, b_z = tl.zeros([BM, BV], tl.float32), tl.zeros([BM], tl.float32)
    for first in range(0, length, BT):
        m_t = first + o_t < length
        b_x = rows_of(p_x, first, length, o_t, o_k, x_t, K)
        b_v = rows_of(p_v, first, length, o_t, o_v, v_t, V)
        if QUERIES:
            b_lse = tl.load(p_lse + o_row + first + o_t, mask=m_t, other=float("inf"))
            b_f = query_features(b_x, b_high, b_low, b_largest, b_lse, m_m, OPERAND, X_LOW, W_LOW, True, PRECISION)
            b_v = b_v.to(tl.float32) * tl.load(p_scale + o_row + first + o_t, mask=m_t, other=0.0)[:, None]
            b_weight = tl.load(p_weight + o_row + first + o_t, mask=m_t, other=0.0)
            b_f = b_f.to(OPERAND)
            b_z += tl.sum(b_f.to(tl.float32) * b_weight[None, :], 1)
        else:
            b_f = key_features(b_x, b_high, b_low, b_largest, m_t, m_m, OPERAND, X_LOW, W_LOW, True,
                               PRECISION).to(OPERAND)
            b_z += tl.sum(b_f.to(tl.float32), 1)
        b_state = dot(b_f, b_v.to(OPERAND), b_state, PRECISION)
    o_z = (i_row * H + i_h) * (M * (V + 1)) + o_m * (V + 1)
    tl.store(p_sums + o_z[:, None] + o_v[None, :], b_state, mask=m_m[:, None] & (o_v < V)[None, :])
    if i_v == 0:
        tl.store(p_sums + o_z + V, b_z, mask=m_m)


# (tokens BT, columns BV, features BM times padded key width at most, BM at most, warps, stages), by bytes of an operand
TILES = {2: {"forward": (64, 64, 16384, 256, 8, 2), "sums": (64, 64, 16384, 256, 8, 2),
             "dq": (64, 64, 16384, 256, 8, 1), "dkdv": (64, 64, 16384, 128, 8, 1)},
         4: {"forward": (32, 32, 4096, 64, 4, 1), "sums": (32, 32, 4096, 64, 4, 1),
             "dq": (32, 32, 4096, 64, 4, 1), "dkdv": (32, 32, 4096, 64, 4, 1)}}
NAMES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Shapes:
    """What all kernels of a call share: types of products, W, blocks, segments."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, projection: Tensor, bound: float | None,
                 cu_seqlens: Tensor | None):
        types = {q.dtype, k.dtype, v.dtype}
        self.dtype = torch.bfloat16 if torch.bfloat16 in types else torch.float32
        self.exact = "tf32" if torch.float16 in types else "tf32x3"
        self.B, self.T, self.H, self.K = q.shape
        self.V, self.M = v.shape[3], len(projection)
        self.BK = max(16, power_of_two(self.K))
        narrow = self.dtype == torch.bfloat16
        self.low = {"W_LOW": narrow and projection.dtype != torch.bfloat16}
        self.q_low, self.k_low = (narrow and x.dtype != torch.bfloat16 for x in (q, k))
        self.high = torch.empty(self.M, self.K, dtype=self.dtype, device=q.device)
        self.rest, self.largest = torch.empty_like(self.high), self.high.new_empty(self.M, dtype=torch.float32)
        with torch.cuda.device_of(q):
            prepare_kernel[(triton.cdiv(self.M, 16),)](
                projection, self.high, self.rest, self.largest, *projection.stride(), bound or 0.0, M=self.M, K=self.K,
                BM=16, BK=self.BK, BOUNDED=bound is not None)
        self.rows = Rows(self.B, self.T, self.H * self.blocks("forward") * triton.cdiv(self.V, 64), cu_seqlens)

    @property
    def w(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.high, self.rest, self.largest

    @property
    def place(self) -> tuple[Tensor | None, Tensor | None, int, int, int]:
        return self.rows.table, self.rows.borders, self.T, self.rows.segment, self.rows.segments

    def block(self, kernel: str) -> int:
        _, _, product, most, _, _ = TILES[self.dtype.itemsize][kernel]
        return max(16, min(power_of_two(self.M), most, product // self.BK))

    def blocks(self, kernel: str) -> int:
        return triton.cdiv(self.M, self.block(kernel))

    def columns(self, kernel: str) -> int:
        return min(TILES[self.dtype.itemsize][kernel][1], max(16, power_of_two(self.V)))

    def options(self, kernel: str) -> dict[str, object]:
        BT, _, _, _, warps, stages = TILES[self.dtype.itemsize][kernel]
        return {"H": self.H, "K": self.K, "V": self.V, "M": self.M, "DOCUMENTS": self.rows.table is not None, "BT": BT,
                "BK": self.BK, "BV": self.columns(kernel), "BM": self.block(kernel), "OPERAND": NAMES[self.dtype],
                "PRECISION": self.exact, "num_warps": warps, "num_stages": stages, **self.low}

    def grid(self, kernel: str) -> tuple[int]:
        return (self.rows.count * self.H * self.blocks(kernel) * triton.cdiv(self.V, self.columns(kernel)),)

    def states(self, x: Tensor, v: Tensor, first: Tensor | None, lse: Tensor | None = None, scale: Tensor | None = None,
               weight: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """The state before each segment, of keys x; or behind it, of queries x with all the rest. And the last."""
        first = None if first is None else first.contiguous()
        if self.rows.whole:
            return first, None
        sums = torch.empty(self.rows.count, self.H, self.M, self.V + 1, dtype=torch.float32, device=x.device)
        sums_kernel[self.grid("sums")](
            x, v, *self.w, lse, scale, weight, sums, *self.place, *x.stride()[:3], *v.stride()[:3],
            QUERIES=lse is not None, X_LOW=self.k_low if lse is None else self.q_low, **self.options("sums"))
        return scan(sums, first, self.rows, lse is not None)

    def new_state(self) -> Tensor:
        return torch.empty(self.B, self.H, self.M, self.V + 1, dtype=torch.float32, device=self.high.device)


def forward(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, initial_state: Tensor | None, bound: float | None,
            cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y in v's type, last states [N, H, M, V + 1], and lse, 1 / denominators [B, H, T] for `backward`; float32."""
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    shapes = Shapes(q, k, v, projection, bound, cu_seqlens)
    B, T, H, M = shapes.B, shapes.T, shapes.H, shapes.blocks("forward")
    y = v.new_empty(v.shape)
    lse, scale = (torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(2))
    with torch.cuda.device_of(q):
        before, last = shapes.states(k, v, initial_state)
        after = None
        if last is None:
            last = after = shapes.new_state()
        if not shapes.rows.count * H:
            return y, last, lse, scale
        to, den = y.unsqueeze(0), scale.unsqueeze(0)
        if M > 1:
            to = torch.empty(M, *v.shape, dtype=torch.float32, device=q.device)
            den = lse.new_empty(M, B, H, T)
            options = {name: x for name, x in shapes.options("forward").items() if name not in ("V", "BV", "DOCUMENTS")}
            if T:
                lse_kernel[(B * H * triton.cdiv(T, options["BT"]),)](
                    q, *shapes.w, lse, T, *q.stride()[:3], X_LOW=shapes.q_low, **options)
        forward_kernel[shapes.grid("forward")](
            q, k, v, *shapes.w, to, den, lse, before, after, *shapes.place, *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], *to.stride()[1:4], to.stride(0), den.stride(0), Q_LOW=shapes.q_low, K_LOW=shapes.k_low,
            **shapes.options("forward"))
        if M > 1:
            scale = 1 / (den.sum(0) + EPS.value)
            y = (to.sum(0) * scale.transpose(1, 2).unsqueeze(-1)).to(v.dtype)
    return y, last, lse, scale
