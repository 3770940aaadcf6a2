"""Exact softmax attention (FlashAttention, 2205.14135; 2307.08691): causal, or a block and summaries of those before.

    y_t = sum_s p_ts v_s,   p_ts = exp(scale q_t . k_s - lse_t),   lse_t = log sum_s exp(scale q_t . k_s)

over the keys s that row t sees: 0 .. t, or (block attention) those from its block's beginning to t and, as a prefix,
the R summaries of every block before. Both are a range of keys for each row, so one loop serves both, over the tiles
that some row sees: without a mask where every row sees all of a tile, with one along the range's ends.

Forward: a program takes BT rows and walks over the keys with a running maximum and sum; y and lse are stored.
Backward, with D_t = sum_s p_ts (dy_t . v_s) = dy_t . y_t and ds_ts = p_ts (dy_t . v_s - D_t):

    dq_t = scale sum_s ds_ts k_s,   dk_s = scale sum_t ds_ts q_t,   dv_s = sum_t p_ts dy_t

in two kernels that each compute p again, so that nothing is added to memory twice and sums have one order: one for
BT rows of dq (and D), one for BS keys of dk and dv, which sums over the query heads of its group. Transposed tiles
are computed (k q^T), never transposed. Exponents are in base 2 and lse is kept so.

Programs come longest first, so that the last to start are short; and the heads that are at work at one time are few
enough for their keys and values to stay in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from zoo.kernels._common import INTERPRETED, LOG2E, document_chunks, dot, power_of_two

VARYING = ["T", "NT", "HEADS", "SECTION"]  # change from batch to batch: never in a compile key
PADDED = tl.constexpr(64)  # lse and D of a head are padded to a multiple of it
L2 = 24 * 2**20  # bytes of keys and values at work at one time: half the cache of an H100


@triton.jit
def place(i, p_tiles, p_borders, T, NT, HEADS, SECTION, BACKWARDS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Program i -> its head, tile, document, and the document's first row and length (0 where there is none)."""
    section = i // (SECTION * NT)
    i -= section * SECTION * NT
    width = tl.minimum(SECTION, HEADS - section * SECTION)
    i_head = section * SECTION + i % width
    i_t = i // width
    if BACKWARDS:
        i_t = NT - 1 - i_t
    i_n, start, length = 0, i_head.to(tl.int64) * 0, T
    if DOCUMENTS:
        i_n = tl.load(p_tiles + 2 * i_t)
        i_t = tl.load(p_tiles + 2 * i_t + 1)
        there = i_n >= 0
        i_n = tl.maximum(i_n, 0)
        start = tl.load(p_borders + i_n).to(tl.int64)
        length = tl.where(there, tl.load(p_borders + i_n + 1).to(tl.int64) - start, 0).to(tl.int32)
    return i_head, i_t, i_n, start, length


@triton.jit
def tile(p, i, stride, end, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BOUNDED: tl.constexpr):
    """N rows from row i on of a matrix with K columns; 0 from row `end` on if BOUNDED (else there are that many)."""
    o, o_k = tl.arange(0, N), tl.arange(0, BK)
    p = p + tl.cast(i, tl.int64) * stride + (o[:, None] * stride + o_k[None, :])
    if BOUNDED and K != BK:
        return tl.load(p, mask=(o < end - i)[:, None] & (o_k < K)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(p, mask=(o < end - i)[:, None], other=0.0)
    elif K != BK:
        return tl.load(p, mask=(o_k < K)[None, :], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def fetch(d, i_b, start, i_h, p, i, stride, end, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
          BOUNDED: tl.constexpr, DESCRIBED: tl.constexpr):
    """As `tile`, or by TMA from a descriptor of x [B, T, H, K], in which the matrix is head i_h from row `start` on."""
    if DESCRIBED:
        return d.load([i_b.to(tl.int32), (start + i).to(tl.int32), i_h, 0]).reshape([N, BK])  # 0 beyond T and K
    else:
        return tile(p, i, stride, end, N, K, BK, BOUNDED)


@triton.jit
def line(i_head, T):
    """Where lse and D of a head begin."""
    return i_head.to(tl.int64) * ((T + PADDED - 1) // PADDED * PADDED)


@triton.jit
def put(p, b, i, stride, end, K: tl.constexpr):
    o, o_k = tl.arange(0, b.shape[0]), tl.arange(0, b.shape[1])
    p = p + tl.cast(i, tl.int64) * stride + (o[:, None] * stride + o_k[None, :])
    tl.store(p, b.to(p.dtype.element_ty), mask=(o < end - i)[:, None] & (o_k < K)[None, :])


@triton.jit
def attend(b_y, b_max, b_sum, b_q, d_k, d_v, i_b, i_h, start, p_k, p_v, stride_k, stride_v, first, last, o_low, o_high,
           scale, K: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr, DESCRIBED: tl.constexpr,
           PRECISION: tl.constexpr):
    """Rows q over the keys first .. last - 1; row t sees o_low <= s < o_high of them, all if not MASKED."""
    for i_s in range(first, last, BS):
        o_s = i_s + tl.arange(0, BS)
        b_k = fetch(d_k, i_b, start, i_h, p_k, i_s, stride_k, last, BS, K, BK, MASKED, DESCRIBED)
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([b_q.shape[0], BS], tl.float32), PRECISION)
        if MASKED:
            seen = (o_s[None, :] >= o_low[:, None]) & (o_s[None, :] < o_high[:, None])
            b_s = tl.where(seen, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_kept = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_kept + tl.sum(b_p, 1)
        b_y = b_y * b_kept[:, None]
        b_v = fetch(d_v, i_b, start, i_h, p_v, i_s, stride_v, last, BS, K, BK, MASKED, DESCRIBED)
        b_y = dot(b_p.to(b_v.dtype), b_v, b_y, PRECISION)
        b_max = b_new
    return b_y, b_max, b_sum


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    d_k, d_v, d_ks, d_vs, p_q, p_k, p_v, p_ks, p_vs, p_y, p_lse, p_tiles, p_borders, p_entries,
    T, NT, HEADS, SECTION, scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, ks_b, ks_t, ks_h, vs_b, vs_t, vs_h, y_b, y_t, y_h,
    H: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, DOCUMENTS: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BOUNDED: tl.constexpr = DESCRIBED and not DOCUMENTS  # a descriptor ends with T, not with a document
    i_head, i_t, i_n, start, length = place(tl.program_id(0), p_tiles, p_borders, T, NT, HEADS, SECTION, True,
                                            DOCUMENTS)
    i_b, i_h = (i_head // H).to(tl.int64), i_head % H
    i_g = i_h // GROUP
    a = i_t * BT
    o_t = a + tl.arange(0, BT)
    p_k += i_b * k_b + start * k_t + i_g * k_h
    p_v += i_b * v_b + start * v_t + i_g * v_h
    b_q = tile(p_q + i_b * q_b + start * q_t + i_h * q_h, a, q_t, length, BT, K, BK, True)
    b_y = tl.zeros([BT, BK], tl.float32)
    b_max = tl.full([BT], -1e30, tl.float32)  # finite: a row may see no key in its first tiles
    b_sum = tl.zeros([BT], tl.float32)
    last = tl.minimum(a + BT, length)
    if C == 0:
        full = a // BS * BS
        o_low = tl.zeros([BT], tl.int32)
        b_y, b_max, b_sum = attend(b_y, b_max, b_sum, b_q, d_k, d_v, i_b, i_g, start, p_k, p_v, k_t, v_t, 0, full,
                                   o_low, o_t + 1, scale, K, BS, BK, False, DESCRIBED, PRECISION)
    else:
        full = a // C * C
        o_low = o_t // C * C
        past = full // C * R // BS * BS
        i_s = start * 0
        if DOCUMENTS:
            i_s = tl.load(p_entries + i_n).to(tl.int64) * R
            p_ks += i_s * ks_t
            p_vs += i_s * vs_t
        p_ks += i_b * ks_b + i_h * ks_h
        p_vs += i_b * vs_b + i_h * vs_h
        b_y, b_max, b_sum = attend(b_y, b_max, b_sum, b_q, d_ks, d_vs, i_b, i_h, i_s, p_ks, p_vs, ks_t, vs_t, 0, past,
                                   o_low, o_t, scale, K, BS, BK, False, DESCRIBED, PRECISION)
        b_y, b_max, b_sum = attend(b_y, b_max, b_sum, b_q, d_ks, d_vs, i_b, i_h, i_s, p_ks, p_vs, ks_t, vs_t, past,
                                   (last - 1) // C * R, o_t * 0, o_low // C * R, scale, K, BS, BK, True, BOUNDED,
                                   PRECISION)
    b_y, b_max, b_sum = attend(b_y, b_max, b_sum, b_q, d_k, d_v, i_b, i_g, start, p_k, p_v, k_t, v_t, full, last, o_low,
                               o_t + 1, scale, K, BS, BK, True, BOUNDED, PRECISION)
    put(p_y + i_b * y_b + start * y_t + i_h * y_h, b_y / b_sum[:, None], a, y_t, length, K)
    tl.store(p_lse + line(i_head, T) + start + o_t, b_max + tl.log2(b_sum), mask=o_t < length)


# (rows BT, keys BS, warps, stages) of the three kernels, by how tiles are loaded and padded head size.
TILES = {
    # 2 bytes by TMA, 64 and 128: the fastest of up to eight each at T = 1k (and within 10 % at 16k), on an H100, torch
    # 2.11, triton 3.6, 2026-11-25, 64 for blocks of 64 and 16 summaries, which Gluon does not take; the others by what
    # the compiler reports for sm_90 (registers, no spills)
    "described": {
        16: {"forward": (64, 128, 4, 2), "dq": (64, 64, 4, 3), "dkdv": (64, 64, 4, 3)},
        32: {"forward": (64, 128, 4, 2), "dq": (64, 64, 4, 3), "dkdv": (64, 64, 4, 3)},
        64: {"forward": (64, 64, 4, 2), "dq": (64, 64, 4, 3), "dkdv": (64, 64, 4, 3)},
        128: {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 2), "dkdv": (64, 64, 4, 2)},
        256: {"forward": (128, 32, 8, 2), "dq": (64, 32, 8, 2), "dkdv": (32, 32, 8, 2)},
    },
    # 2 bytes by pointers: GPUs without TMA, strides that it does not take
    2: {
        16: {"forward": (128, 64, 4, 3), "dq": (128, 64, 8, 3), "dkdv": (64, 128, 8, 3)},
        32: {"forward": (128, 64, 4, 3), "dq": (128, 64, 8, 3), "dkdv": (64, 128, 8, 3)},
        64: {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 3), "dkdv": (32, 64, 4, 3)},
        128: {"forward": (64, 64, 4, 3), "dq": (128, 64, 8, 3), "dkdv": (32, 64, 4, 3)},
        256: {"forward": (128, 32, 8, 2), "dq": (64, 32, 8, 2), "dkdv": (32, 32, 8, 2)},
    },
    4: {
        16: {"forward": (64, 32, 8, 2), "dq": (64, 32, 8, 2), "dkdv": (32, 32, 8, 2)},
        32: {"forward": (64, 32, 8, 2), "dq": (64, 32, 8, 2), "dkdv": (32, 32, 8, 2)},
        64: {"forward": (64, 32, 8, 2), "dq": (64, 32, 8, 2), "dkdv": (32, 32, 8, 2)},
        128: {"forward": (32, 16, 8, 2), "dq": (32, 16, 8, 2), "dkdv": (16, 32, 8, 2)},
        256: {"forward": (16, 32, 8, 1), "dq": (16, 16, 8, 1), "dkdv": (16, 16, 8, 1)},
    },
}


def forward(q: Tensor, k: Tensor, v: Tensor, k_past: Tensor | None, v_past: Tensor | None, scale: float, block: int,
            rank: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [B, T, H, K], k, v [B, T, G, K], summaries [B, M rank, H, K] if block -> y [B, T, H, K] and lse.

    lse [B, H, padded(T)] in base 2, +inf beyond T.
    """
    B, T, H, K = q.shape
    q, k, v = (plain(x) for x in (q, k, v))
    k_past, v_past = (None if x is None else plain(x) for x in (k_past, v_past))
    y, lse = q.new_empty(q.shape), q.new_empty(B, H, padded(T), dtype=torch.float32)
    lse[..., T:] = float("inf")
    if not y.numel():
        return y, lse
    group = H // k.shape[2]
    keys = k, v, k_past, v_past
    by_tma = describable(*keys)
    BK, (BT, BS, warps, stages) = tiling("forward", q, by_tma)
    tiles = None if cu_seqlens is None else document_chunks(cu_seqlens, T, BT)
    NT = triton.cdiv(T, BT) if tiles is None else len(tiles)
    with torch.cuda.device_of(q):
        forward_kernel[(NT * B * H,)](
            *(described(x, BS) if by_tma else None for x in keys),
            q, *keys, y, lse, tiles, cu_seqlens, entries(cu_seqlens, block), T, NT, B * H, section(k) * group,
            scale * LOG2E.value, *strides(q), *(n for x in keys for n in strides(x)), *strides(y),
            H=H, GROUP=group, C=block, R=rank, DOCUMENTS=tiles is not None, K=K, BT=BT, BS=BS, BK=BK,
            DESCRIBED=by_tma, PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages)
    return y, lse


def tiling(kernel: str, x: Tensor, by_tma: bool) -> tuple[int, tuple[int, int, int, int]]:
    BK = max(16, power_of_two(x.shape[-1]))
    return BK, TILES["described" if by_tma else x.element_size()][BK][kernel]


def describable(*tensors: Tensor | None) -> bool:
    """Whether TMA can load tiles of all of them.

    On Hopper and later: 16 bits, channels side by side, strides of a multiple of 16 bytes. Tensors
    on a CPU are Triton's interpreter's, of any dtype, or compiled for a GPU that is not there.
    """
    given = [x for x in tensors if x is not None]
    if given[0].is_cuda:
        if given[0].element_size() != 2 or torch.cuda.get_device_capability(given[0].device) < (9, 0):
            return False
    elif given[0].element_size() != 2 and not INTERPRETED.value:
        return False
    return all(x.numel() and x.stride(-1) == 1 and x.data_ptr() % 16 == 0
               and not any(n * x.element_size() % 16 for n in rows(x)) for x in given)


def rows(x: Tensor) -> list[int]:
    """Strides of all dimensions but the last, those of dimensions of 1 made harmless; 1 where there is none to take."""
    return [(n or 1) if size > 1 else 16 for size, n in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def described(x: Tensor | None, size: int) -> TensorDescriptor | None:
    """x [B, T, H, K] for TMA in tiles of `size` rows of a head."""
    if x is None:
        return None
    return TensorDescriptor(x, list(x.shape), [*rows(x), 1], [1, size, 1, max(16, power_of_two(x.shape[-1]))])


def padded(T: int) -> int:
    return -(-T // PADDED.value) * PADDED.value


def precision(dtype: torch.dtype) -> str:
    """Float32 by multiply-adds: three TF32 products came out over twice as wrong as PyTorch at head sizes over 64."""
    return "ieee" if dtype == torch.float32 else "tf32"


def section(x: Tensor) -> int:
    """How many heads of two tensors like x fit in the L2 cache."""
    return max(1, L2 // (2 * x.shape[1] * x.shape[3] * x.element_size()))


def strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def plain(x: Tensor) -> Tensor:
    """x with its channels side by side, and rows so near that offsets in a tile fit in 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**22 else x.contiguous()


def entries(cu_seqlens: Tensor | None, block: int) -> Tensor | None:
    """The first summary entry of every document, and the end of the last one's [N + 1]."""
    if cu_seqlens is None or not block:
        return None
    counts = (cu_seqlens.diff() + block - 1) // block
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
