"""RWKV-6's five mixtures of a token with the one before it, whose weights come from the data (2404.05892, eq. 4 and 5).

    low = tanh((x + (x' - x) base) down),    m_z = mix_z + low_z up_z,    y_z = x + (x' - x) m_z

down [D, 5 R] and up [5, R, D], R 16 or 32. x' is a row of x like any other: with two matrices one under the other,
W = [(1 - base) down^T; base down^T], low is tanh of one long product, (x, x') W^T. Neither m nor the mixture that low
is of is ever in memory. Backward, with dm_z = dy_z (x' - x) and dpre = dlow (1 - low^2),

    dlow_z = dm_z up_z^T,    dup_z = low_z^T dm_z,    dmix_z = sum dm_z
    dx_t = sum_z dy_zt (1 - m_zt) + dy_z,t+1 m_z,t+1 + (dpre_t, dpre_t+1) W
    ddown = G_0 + base (G_1 - G_0),    dbase = sum_c down (G_1 - G_0),    (G_0, G_1) = x^T (dpre_t, dpre_t+1)

`inputs_kernel` has the sums over z, and writes x' - x; `up_kernel` has the first line, of segments of tokens, from that
and dy; dmix is a product with ones. It writes (dpre_t, dpre_t+1), 0 where another row or
document begins, or where channels are several blocks `pre_kernel` does; the rest is two products of cuBLAS with it.

Memory is far: `inputs_kernel` asks for all it will read before it computes with any of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from zoo.kernels._common import INTERPRETED, cdiv, dot, power_of_two
from zoo.kernels.token_mix import begins, firsts, pair, pick

Z = tl.constexpr(5)


@triton.jit
def tanh(x):
    """CUDA's; in the interpreter by an exponential, and near 0 by its series, where that one's digits cancel."""
    if not INTERPRETED:
        return libdevice.tanh(x)
    square = x * x
    small = x * (1.0 + square * (-0.33333333333 + square * (0.13333333333 + square * (
        -0.05396825397 + square * (0.02186948854 - square * 0.00886323553)))))
    power = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - power) / (1.0 + power)
    return tl.where(square < 0.09, small, tl.where(x < 0, -large, large))


@triton.jit
def vector(p, o, D):
    """[1, BD] of a parameter in float32."""
    return tl.load(p + o, mask=o < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def matrix(p, o_i, o_j, N, M):
    """Rows o_i, columns o_j of a matrix [N, M], 0 beyond."""
    return tl.load(p + o_i.to(tl.int64)[:, None] * M + o_j[None, :], mask=(o_i < N)[:, None] & (o_j < M)[None, :],
                   other=0.0)


@triton.jit
def weights_kernel(p_base, p_down, p_up, p_w, D, C, BC: tl.constexpr, BD: tl.constexpr):
    """W [2, C, D] of base [D], down [D, C], and up [C, D] behind it."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    b_down = tl.trans(matrix(p_down, o_d, o_c, D, C)).to(tl.float32)
    b_base = vector(p_base, o_d, D)
    m = (o_c < C)[:, None] & (o_d < D)[None, :]
    to = p_w + o_c[:, None] * D + o_d[None, :]
    tl.store(to, ((1.0 - b_base) * b_down).to(p_w.dtype.element_ty), mask=m)
    tl.store(to + C * D, (b_base * b_down).to(p_w.dtype.element_ty), mask=m)
    tl.store(to + 2 * C * D, matrix(p_up, o_c, o_d, C, D).to(p_w.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N", "T", "documents"])
def low_kernel(p_x, p_w, p_first, p_low, N, T, D, C, documents, BT: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
               PRECISION: tl.constexpr):
    """low [N, 5 R] of a tile of tokens."""
    o_n = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, BC)
    inner = (o_n < N) & (begins(p_first, o_n, N, T, documents) == 0)
    b_low = tl.zeros([BT, BC], tl.float32)
    steps = tl.cdiv(D, BD)
    for i in range(0, 2 * steps):
        before = i // steps  # first x, then x'
        o_d = (i - before * steps) * BD + tl.arange(0, BD)
        m_n = tl.where(before > 0, inner, o_n < N)
        b_x = tl.load(p_x + (o_n.to(tl.int64) - before)[:, None] * D + o_d[None, :],
                      mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        b_w = tl.load(p_w + (before * C + o_c)[None, :] * D + o_d[:, None],
                      mask=(o_d < D)[:, None] & (o_c < C)[None, :], other=0.0)
        if PRECISION == "ieee":  # a step's sum by itself: long sums of float32 lose digits; where() keeps them apart
            b_low += tl.where((o_c < C)[None, :], dot(b_x, b_w, tl.zeros([BT, BC], tl.float32), PRECISION), 0.0)
        else:
            b_low = dot(b_x, b_w, b_low, PRECISION)
    p_low += o_n.to(tl.int64)[:, None] * C + o_c[None, :]
    tl.store(p_low, tanh(b_low).to(p_low.dtype.element_ty), mask=(o_n < N)[:, None] & (o_c < C)[None, :])


@triton.jit
def parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, i_z: tl.constexpr):
    """What m_z is computed of: low_z [BT, BR], up_z [BR, BD], mix_z [1, BD]."""
    b_low = tl.load(p_low + o_n.to(tl.int64)[:, None] * (R * Z) + i_z * R + o_r[None, :],
                    mask=(o_n < N)[:, None] & (o_r < R)[None, :], other=0.0)
    return b_low, matrix(p_up + i_z * R * D, o_r, o_d, R, D), vector(p_mix + i_z * D, o_d, D)


@triton.jit
def mixing(b_low, b_up, b_mix, PRECISION: tl.constexpr):
    """m_z [BT, BD]."""
    return dot(b_low, b_up, tl.zeros([b_low.shape[0], b_up.shape[1]], tl.float32), PRECISION) + b_mix


@triton.jit(do_not_specialize=["N", "T", "documents"])
def forward_kernel(p_x, p_mix, p_low, p_up, p_first, y0, y1, y2, y3, y4, N, T, D, R, documents, BT: tl.constexpr,
                   BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr):
    """All mixtures of a tile of tokens and channels."""
    blocks = tl.cdiv(D, BD)
    o_n = tl.program_id(0) // blocks * BT + tl.arange(0, BT)
    o_d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    o_r = tl.arange(0, BR)
    read = (parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, 0), parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, 1),
            parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, 2), parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, 3),
            parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, 4))
    b_x, b_delta, _ = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
    o_y = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    m_y = (o_n < N)[:, None] & (o_d < D)[None, :]
    for i_z in tl.static_range(Z):
        p_y = pick(y0, y1, y2, y3, y4, i_z)
        b_low, b_up, b_mix = read[i_z]
        tl.store(p_y + o_y, (b_x + b_delta * mixing(b_low, b_up, b_mix, PRECISION)).to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def moved(x, acc, BT: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr):
    """acc [BT, BD] and every row of x added to the one above. In 16 bits x is cut in two, which are 16 of its own."""
    o_i = tl.arange(0, BT)
    below = tl.where(o_i[:, None] + 1 == o_i[None, :], 1.0, 0.0).to(OP)
    high = x.to(OP)
    acc = dot(below, high, acc, PRECISION)
    if x.dtype != OP:
        acc = dot(below, (x - high.to(tl.float32)).to(OP), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["N", "T", "documents"])
def inputs_kernel(p_x, p_mix, p_low, p_up, p_first, dy0, dy1, dy2, dy3, dy4, p_delta, p_dx, N, T, D, R,
                  documents, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr):
    """Of BT - 1 tokens x' - x [N, D], and dx but for the part of low."""
    blocks = tl.cdiv(D, BD)
    o_i = tl.arange(0, BT)
    o_n = tl.program_id(0) // blocks * (BT - 1) + o_i
    o_d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    o_r = tl.arange(0, BR)
    OP: tl.constexpr = p_x.dtype.element_ty
    o_y = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    m_y = (o_n < N)[:, None] & (o_d < D)[None, :]
    m_own = m_y & (o_i < BT - 1)[:, None]
    dys = (tl.load(dy0 + o_y, mask=m_y, other=0.0), tl.load(dy1 + o_y, mask=m_y, other=0.0),
           tl.load(dy2 + o_y, mask=m_y, other=0.0), tl.load(dy3 + o_y, mask=m_y, other=0.0),
           tl.load(dy4 + o_y, mask=m_y, other=0.0))
    read = (parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, 0), parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, 1),
            parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, 2), parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, 3),
            parts(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, 4))
    _, b_delta, first = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
    tl.store(p_delta + o_y, b_delta.to(OP), mask=m_own)
    b_dx = tl.zeros([BT, BD], tl.float32)
    b_before = tl.zeros([BT, BD], tl.float32)  # for the token before
    for i_z in tl.static_range(Z):
        b_dy = dys[i_z].to(tl.float32)
        b_low, b_up, b_mix = read[i_z]
        b_dy_m = b_dy * mixing(b_low, b_up, b_mix, PRECISION)
        b_before += b_dy_m
        b_dx += b_dy - b_dy_m
    b_dx = moved(tl.where(first[:, None], 0.0, b_before), b_dx, BT, OP, PRECISION)
    tl.store(p_dx + o_y, b_dx.to(OP), mask=m_own)


@triton.jit(do_not_specialize=["N", "T", "documents", "length"])
def up_kernel(p_delta, dy0, dy1, dy2, dy3, dy4, p_low, p_up, p_first, p_dlow, p_dup, N, T, D, R, documents, length,
              WHOLE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
              PRECISION: tl.constexpr):
    """Of a segment, one z and one block of channels: the segment's part of dup with dmix in row R [segments, 5, R + 1,
    D]; the block's part of dlow [blocks, N, 5 R], or if all channels are one block, (dpre_t, dpre_t+1) [N, 10 R]."""
    i_z, i_d, i_s = tl.program_id(0) % Z, tl.program_id(0) // Z, tl.program_id(1)
    o_d, o_r, o_w = i_d * BD + tl.arange(0, BD), tl.arange(0, BR), tl.arange(0, BW)
    BESIDE: tl.constexpr = BR < 32  # a 1 beside low; where that makes 64 columns, a product with 16 rows of ones
    OP: tl.constexpr = p_low.dtype.element_ty
    p_dy = dy0
    if i_z == 1:
        p_dy = dy1
    elif i_z == 2:
        p_dy = dy2
    elif i_z == 3:
        p_dy = dy3
    elif i_z == 4:
        p_dy = dy4
    p_low += i_z * R
    p_dlow += i_d * N.to(tl.int64) * (R * Z) + i_z * R
    b_up = matrix(p_up + i_z * R * D, o_r, o_d, R, D)
    b_dup = tl.zeros([BW if BESIDE else BR, BD], tl.float32)
    if not BESIDE:
        b_ones = (tl.zeros([BW, BT], tl.float32) + 1.0).to(OP)
        b_dmix = tl.zeros([BW, BD], tl.float32)
    for i in range(i_s * length, tl.minimum((i_s + 1) * length, N), BT):
        o_n = i + tl.arange(0, BT)
        n = o_n.to(tl.int64)[:, None]
        m_r = (o_n < N)[:, None] & (o_r < R)[None, :]
        b_dy, b_delta = matrix(p_dy, o_n, o_d, N, D), matrix(p_delta, o_n, o_d, N, D)
        b_dm = (b_dy.to(tl.float32) * b_delta.to(tl.float32)).to(OP)
        if BESIDE:
            b_low = tl.load(p_low + n * (R * Z) + o_w[None, :], mask=(o_n < N)[:, None] & (o_w < R)[None, :], other=0.0)
            b_low = tl.where((o_w == R)[None, :], 1.0, b_low.to(tl.float32)).to(OP)
            b_dup = dot(tl.trans(b_low), b_dm, b_dup, PRECISION)
        else:
            b_low = tl.load(p_low + n * (R * Z) + o_r[None, :], mask=m_r, other=0.0)
            b_dup = dot(tl.trans(b_low), b_dm, b_dup, PRECISION)
            b_dmix = dot(b_ones, b_dm, b_dmix, PRECISION)
        b_dlow = tl.trans(dot(b_up, tl.trans(b_dm), tl.zeros([BR, BT], tl.float32), PRECISION))
        if WHOLE:
            b_own = tl.load(p_low + n * (R * Z) + o_r[None, :], mask=m_r, other=0.0).to(tl.float32)
            b_dpre = b_dlow * (1.0 - b_own * b_own)
            begin = begins(p_first, o_n, N, T, documents)
            to = p_dlow + n * (2 * R * Z) + o_r[None, :]
            tl.store(to, b_dpre.to(OP), mask=m_r)
            tl.store(to - R * Z, tl.where(begin[:, None], 0.0, b_dpre).to(OP), mask=m_r & (o_n > 0)[:, None])
            tl.store(to + R * Z, tl.zeros([BT, BR], OP), mask=m_r & (o_n + 1 == N)[:, None])
        else:
            tl.store(p_dlow + n * (R * Z) + o_r[None, :], b_dlow, mask=m_r)
    if BESIDE:
        to = p_dup + ((i_s * Z + i_z) * (R + 1) + o_w[:, None]).to(tl.int64) * D + o_d[None, :]
        tl.store(to, b_dup, mask=(o_w <= R)[:, None] & (o_d < D)[None, :])
    else:
        p_dup += (i_s * Z + i_z).to(tl.int64) * (R + 1) * D
        tl.store(p_dup + o_r[:, None] * D + o_d[None, :], b_dup, mask=(o_r < R)[:, None] & (o_d < D)[None, :])
        tl.store(p_dup + (R + o_w)[:, None] * D + o_d[None, :], b_dmix, mask=(o_w == 0)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["N", "T", "documents"])
def pre_kernel(p_low, p_dlow, p_first, p_dpre, N, T, C, documents, blocks, BT: tl.constexpr, BC: tl.constexpr):
    """(dpre_t, dpre_t+1) [N, 2 C] of a tile of tokens, from dlow's parts [blocks, N, C]."""
    after = tl.program_id(0) % 2
    o_t = tl.program_id(0) // 2 * BT + tl.arange(0, BT)
    o_n, o_c = o_t + after, tl.arange(0, BC)
    m_n = o_n < N
    if after > 0:
        m_n &= begins(p_first, o_n, N, T, documents) == 0
    m = m_n[:, None] & (o_c < C)[None, :]
    o = o_n.to(tl.int64)[:, None] * C + o_c[None, :]
    b_low = tl.load(p_low + o, mask=m, other=0.0).to(tl.float32)
    b_dlow = tl.load(p_dlow + o, mask=m, other=0.0).to(tl.float32)
    for i in range(1, blocks):
        b_dlow += tl.load(p_dlow + i * N.to(tl.int64) * C + o, mask=m, other=0.0).to(tl.float32)
    to = p_dpre + (o_t.to(tl.int64)[:, None] * 2 + after) * C + o_c[None, :]
    tl.store(to, (b_dlow * (1.0 - b_low * b_low)).to(p_dpre.dtype.element_ty),
             mask=(o_t < N)[:, None] & (o_c < C)[None, :])


@triton.jit(do_not_specialize=["segments"])
def sum_kernel(p_parts, p_dup, p_dmix, D, R, segments, BS: tl.constexpr, BD: tl.constexpr):
    """A row of dup [5, R, D] or of dmix [5, D] from its parts [segments, 5, R + 1, D]."""
    i_z, i_r = tl.program_id(0) // (R + 1), tl.program_id(0) % (R + 1)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    p_parts += tl.program_id(0) * D + o_d[None, :]
    b_sum = tl.zeros([BD], tl.float32)
    for i in range(0, segments, BS):
        o_s = (i + tl.arange(0, BS))[:, None]
        part = tl.load(p_parts + o_s.to(tl.int64) * ((R + 1) * Z * D), mask=(o_s < segments) & m_d[None, :], other=0.0)
        b_sum += tl.sum(part, 0)
    if i_r == R:
        tl.store(p_dmix + i_z * D + o_d, b_sum.to(p_dmix.dtype.element_ty), mask=m_d)
    else:
        tl.store(p_dup + (i_z * R + i_r) * D + o_d, b_sum.to(p_dup.dtype.element_ty), mask=m_d)


@triton.jit
def down_kernel(p_g, p_base, p_down, p_dbase, p_ddown, D, C, BD: tl.constexpr, BC: tl.constexpr):
    """dbase [D] and ddown [D, C] of a block of channels from (G_0, G_1) [D, 2 C]."""
    o_d, o_c = tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BC)
    b_here, b_change = matrix(p_g, o_d, o_c, D, 2 * C), matrix(p_g + C, o_d, o_c, D, 2 * C)
    m = (o_d < D)[:, None] & (o_c < C)[None, :]
    b_change = tl.where(m, b_change - b_here, 0.0)
    b_base = tl.load(p_base + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dbase = tl.sum(b_change * matrix(p_down, o_d, o_c, D, C).to(tl.float32), 1)
    tl.store(p_dbase + o_d, b_dbase.to(p_dbase.dtype.element_ty), mask=o_d < D)
    to = p_ddown + o_d[:, None] * C + o_c[None, :]
    tl.store(to, (b_here + b_base[:, None] * b_change).to(p_ddown.dtype.element_ty), mask=m)


TILES = {"low": (128, 64, 8, 3), "forward": (32, 128, 8, 1), "inputs": (32, 128, 8, 1), "up": (64, 256, 8, 3)}
"""Of each kernel: tokens, most channels of a program's tile, warps, stages. A multiprocessor has room for one `up`."""
WIDE = TILES | {"low": (64, 64, 8, 2), "forward": (64, 64, 8, 1), "inputs": (32, 64, 4, 1), "up": (32, 256, 8, 4)}
"""Where R is over 16."""
LEAST = 256  # tokens whose part of dup one program adds up


def tile(kernel: str, x: Tensor, R: int) -> dict:
    """The compile-time numbers and options of a launch."""
    BT, BD, warps, stages = (WIDE if R > 16 else TILES)[kernel]
    columns = {"BR": max(16, power_of_two(R))}
    if kernel == "up":
        columns["BW"] = max(16, power_of_two(R + 1)) if columns["BR"] < 32 else 16
        BD = BD * 32 // max(32, columns["BR"])
    if kernel == "low":
        columns = {"BC": max(64, power_of_two(5 * R))}
        BT = min(BT, max(16, 128 * 128 // columns["BC"]))
    exact = x.dtype == torch.float32  # sums as long as these show that a tensor core rounds each step towards 0
    if exact:
        BT, BD, stages = 32, 128 if kernel == "up" else 32, 1
    return {"BT": BT, "BD": max(16, min(BD, power_of_two(x.shape[-1]))), "PRECISION": "ieee" if exact else "tf32",
            "num_warps": warps, "num_stages": stages} | columns


def segment(x: Tensor, N: int, blocks: int) -> int:
    """Tokens of a segment, so many that programs of `blocks` to a segment fill the GPU once."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    return max(LEAST, 64 * cdiv(N, 64 * max(1, processors // blocks)))


def weights(base: Tensor, down: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """base [D], down [D, 5 R], up [5, R, D] -> W [10 R, D], up [5 R, D]."""
    D, C = down.shape
    w = torch.empty(3 * C, D, dtype=dtype, device=down.device)
    with torch.cuda.device_of(w):
        weights_kernel[cdiv(C, 16), cdiv(D, 64)](base, down, up, w, D, C, BC=16, BD=64)
    return w[: 2 * C], w[2 * C :]


def forward(x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor,
            cu_seqlens: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """x [B, T, D], base [D], down [D, 5 R], mix [5, D], up [5, R, D] -> low [B, T, 5 R], five mixtures [B, T, D]."""
    (B, T, D), R = x.shape, up.shape[1]
    N, low, y = B * T, x.new_empty(B, T, 5 * R), [torch.empty_like(x) for _ in range(5)]
    if x.numel():
        first, documents = firsts(x, cu_seqlens)
        with torch.cuda.device_of(x):
            w, up = weights(base, down, up, x.dtype)
            launch = tile("low", x, R)
            low_kernel[(cdiv(N, launch["BT"]),)](x, w, first, low, N, T, D, 5 * R, documents, **launch)
            launch = tile("forward", x, R)
            forward_kernel[(cdiv(N, launch["BT"]) * cdiv(D, launch["BD"]),)](
                x, mix, low, up, first, *y, N, T, D, R, documents, **launch)
    return low, y


def backward(dy: list[Tensor], x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor, low: Tensor,
             cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dx, dbase, ddown, dmix, dup."""
    (B, T, D), R = x.shape, up.shape[1]
    new = torch.empty_like if x.numel() else torch.zeros_like
    dx, dbase, ddown, dmix, dup = (new(each) for each in (x, base, down, mix, up))
    N = B * T
    if not N:
        return dx, dbase, ddown, dmix, dup
    first, documents = firsts(x, cu_seqlens)
    delta, dpre = torch.empty_like(x), x.new_empty(N, 10 * R)
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        w, up = weights(base, down, up, x.dtype)
        launch = tile("inputs", x, R)
        inputs_kernel[(cdiv(N, launch["BT"] - 1) * cdiv(D, launch["BD"]),)](
            x, mix, low, up, first, *dy, delta, dx, N, T, D, R, documents, **launch)
        launch = tile("up", x, R)
        blocks = cdiv(D, launch["BD"])
        length = segment(x, N, 5 * blocks)
        sums = torch.empty(cdiv(N, length), 5, R + 1, D, dtype=torch.float32, device=x.device)
        dlow = dpre if blocks == 1 else torch.empty(blocks, N, 5 * R, dtype=torch.float32, device=x.device)
        up_kernel[5 * blocks, len(sums)](delta, *dy, low, up, first, dlow, sums, N, T, D, R, documents, length,
                                          WHOLE=blocks == 1, **launch)
        if blocks > 1:
            pre_kernel[(2 * cdiv(N, 32),)](low, dlow, first, dpre, N, T, 5 * R, documents, blocks, BT=32,
                                           BC=max(16, power_of_two(5 * R)))
        flat = dx.view(N, D)
        torch.addmm(flat, dpre, w, out=flat)
        sum_kernel[5 * (R + 1), cdiv(D, 256)](sums, dup, dmix, D, R, len(sums), BS=32, BD=256, num_warps=8)
        down_kernel[(cdiv(D, 8),)](summed(x.view(N, D), dpre), base, down, dbase, ddown, D, 5 * R, BD=8,
                                   BC=power_of_two(5 * R))
    return dx, dbase, ddown, dmix, dup


def summed(x: Tensor, y: Tensor) -> Tensor:
    """x^T y [D, C] in float32 of x [N, D], y [N, C]."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x.mT, y, out_dtype=torch.float32)
    return torch.mm(x.float().mT, y.float())
