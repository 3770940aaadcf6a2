"""RWKV-6's five mixtures of a token with the one before it, whose weights come from the data (2404.05892, eq. 4 and 5).

    low = tanh((x + (x' - x) base) down),    m_z = mix_z + low_z up_z,    y_z = x + (x' - x) m_z

down [D, 5 R] and up [5, R, D], R 16 or 32: forward the products are a tile's, and neither m nor what is multiplied
with down is ever in memory. Backward, with dm_z = dy_z (x' - x),

    dlow_z = dm_z up_z^T,   dup_z = low_z^T dm_z,                 dmix_z = sum dm_z
    dlerp = dpre down^T,    ddown = (x + (x' - x) base)^T dpre,   dbase = sum dlerp (x' - x),   dpre = dlow (1 - low^2)
    dx_t = sum_z dy_zt (1 - m_zt) + dy_z,t+1 m_z,t+1 + dlerp_t (1 - base) + dlerp_t+1 base

`inputs_kernel` has the sums over z, and writes dm; `up_kernel` has the first line, of segments of tokens, from one read
of dm; beside low_z it has a 1, which makes dmix a row of dup. `down_kernel` has ddown, and writes dpre for dlerp's
product; token_mix's kernel adds dlerp's part to dx. To have dm in registers alone took twice as long: each of its
numbers was made by more instructions than the bytes are worth, as what multiplies it is wanted in three layouts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from zoo.kernels._common import INTERPRETED, cdiv, dot, power_of_two
from zoo.kernels.token_mix import backward as lerp_backward
from zoo.kernels.token_mix import firsts, moved, pair, pick

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


@triton.jit(do_not_specialize=["N", "T", "documents"])
def low_kernel(p_x, p_base, p_down, p_first, p_low, N, T, D, C, documents, BT: tl.constexpr, BD: tl.constexpr,
               BC: tl.constexpr, PRECISION: tl.constexpr):
    """low [N, 5 R] of a tile of tokens."""
    o_n = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, BC)
    b_low = tl.zeros([BT, BC], tl.float32)
    for i in range(0, D, BD):
        o_d = i + tl.arange(0, BD)
        b_x, b_delta, _ = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
        b_lerp = (b_x + b_delta * vector(p_base, o_d, D)).to(p_x.dtype.element_ty)
        b_low = dot(b_lerp, matrix(p_down, o_d, o_c, D, C).to(b_lerp.dtype), b_low, PRECISION)
    p_low += o_n.to(tl.int64)[:, None] * C + o_c[None, :]
    tl.store(p_low, tanh(b_low).to(p_low.dtype.element_ty), mask=(o_n < N)[:, None] & (o_c < C)[None, :])


@triton.jit
def mixing(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, i_z: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
           PRECISION: tl.constexpr):
    """m_z [BT, BD]."""
    p_low += o_n.to(tl.int64)[:, None] * (R * Z) + i_z * R + o_r[None, :]
    b_low = tl.load(p_low, mask=(o_n < N)[:, None] & (o_r < R)[None, :], other=0.0)
    b_up = matrix(p_up + i_z * R * D, o_r, o_d, R, D).to(b_low.dtype)
    return dot(b_low, b_up, tl.zeros([BT, BD], tl.float32), PRECISION) + vector(p_mix + i_z * D, o_d, D)


@triton.jit(do_not_specialize=["N", "T", "documents"])
def forward_kernel(p_x, p_mix, p_low, p_up, p_first, y0, y1, y2, y3, y4, N, T, D, R, documents, BT: tl.constexpr,
                   BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr):
    """All mixtures of a tile of tokens and channels."""
    o_n = tl.program_id(0) * BT + tl.arange(0, BT)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    o_r = tl.arange(0, BR)
    b_x, b_delta, _ = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
    o_y = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    m_y = (o_n < N)[:, None] & (o_d < D)[None, :]
    for i_z in tl.static_range(Z):
        p_y = pick(y0, y1, y2, y3, y4, i_z)
        b_m = mixing(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, i_z, BT, BD, PRECISION)
        tl.store(p_y + o_y, (b_x + b_delta * b_m).to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["N", "T", "documents"])
def inputs_kernel(p_x, p_mix, p_low, p_up, p_first, dy0, dy1, dy2, dy3, dy4, p_dm, p_dx, N, T, D, R, documents,
                  BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr):
    """Of BT - 1 tokens dm [5, N, D], and dx but for the part of dlerp."""
    o_i = tl.arange(0, BT)
    o_n = tl.program_id(0) * (BT - 1) + o_i
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    o_r = tl.arange(0, BR)
    OP: tl.constexpr = p_x.dtype.element_ty
    _, b_delta, first = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
    o_y = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    m_y = (o_n < N)[:, None] & (o_d < D)[None, :]
    m_own = m_y & (o_i < BT - 1)[:, None]
    b_dx = tl.zeros([BT, BD], tl.float32)
    b_before = tl.zeros([BT, BD], tl.float32)  # for the token before
    for i_z in tl.static_range(Z):
        b_dy = tl.load(pick(dy0, dy1, dy2, dy3, dy4, i_z) + o_y, mask=m_y, other=0.0).to(tl.float32)
        tl.store(p_dm + i_z * N.to(tl.int64) * D + o_y, (b_dy * b_delta).to(OP), mask=m_own)
        b_dy_m = b_dy * mixing(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, i_z, BT, BD, PRECISION)
        b_before += b_dy_m
        b_dx += b_dy - b_dy_m
    b_dx = moved(tl.where(first[:, None], 0.0, b_before), b_dx, BT, OP, PRECISION)
    tl.store(p_dx + o_y, b_dx.to(OP), mask=m_own)


@triton.jit(do_not_specialize=["N", "length"])
def up_kernel(p_dm, p_low, p_up, p_dlow, p_dup, N, D, R, length, BT: tl.constexpr, BD: tl.constexpr,
              BR: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr):
    """Of a segment, one z and one block of channels: the block's part of dlow [blocks, 5, N, R], the segment's of dup
    with dmix in row R [segments, 5, R + 1, D]."""
    i_z, i_d, i_s = tl.program_id(0) % Z, tl.program_id(0) // Z, tl.program_id(1)
    o_d, o_r, o_w = i_d * BD + tl.arange(0, BD), tl.arange(0, BR), tl.arange(0, BW)
    p_dm += i_z * N.to(tl.int64) * D
    p_dlow += (i_d * Z + i_z) * N.to(tl.int64) * R
    b_up = matrix(p_up + i_z * R * D, o_r, o_d, R, D)
    b_dup = tl.zeros([BW, BD], tl.float32)
    for i in range(i_s * length, tl.minimum((i_s + 1) * length, N), BT):
        o_n = i + tl.arange(0, BT)
        b_dm = matrix(p_dm, o_n, o_d, N, D)
        b_low = tl.load(p_low + o_n.to(tl.int64)[None, :] * (R * Z) + i_z * R + o_w[:, None],
                        mask=(o_n < N)[None, :] & (o_w < R)[:, None], other=0.0)
        b_low = tl.where((o_w == R)[:, None], 1.0, b_low.to(tl.float32)).to(b_low.dtype)
        b_dup = dot(b_low, b_dm, b_dup, PRECISION)
        b_dlow = dot(b_up, tl.trans(b_dm), tl.zeros([BR, BT], tl.float32), PRECISION)
        tl.store(p_dlow + o_n.to(tl.int64)[None, :] * R + o_r[:, None], b_dlow.to(p_dlow.dtype.element_ty),
                 mask=(o_n < N)[None, :] & (o_r < R)[:, None])
    to = p_dup + ((i_s * Z + i_z) * (R + 1) + o_w[:, None]).to(tl.int64) * D + o_d[None, :]
    tl.store(to, b_dup, mask=(o_w <= R)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["N", "T", "documents", "length"])
def down_kernel(p_x, p_base, p_low, p_first, p_dlow, p_dpre, p_ddown, N, T, D, R, documents, blocks, length,
                BT: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):
    """Of a segment dpre [N, 5 R], from dlow's parts [blocks, 5, N, R], and its part of ddown [segments, 5 R, D]."""
    i_s = tl.program_id(1)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_c = tl.arange(0, BC)
    o_z, o_r = o_c // R, o_c % R
    OP: tl.constexpr = p_x.dtype.element_ty
    b_base = vector(p_base, o_d, D)
    b_ddown = tl.zeros([BC, BD], tl.float32)
    for i in range(i_s * length, tl.minimum((i_s + 1) * length, N), BT):
        o_n = i + tl.arange(0, BT)
        m = (o_n < N)[:, None] & (o_c < R * Z)[None, :]
        n = o_n.to(tl.int64)[:, None]
        b_low = tl.load(p_low + n * (R * Z) + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        p_part = p_dlow + o_z[None, :] * N.to(tl.int64) * R + n * R + o_r[None, :]
        b_dlow = tl.load(p_part, mask=m, other=0.0).to(tl.float32)
        for i_b in range(1, blocks):
            b_dlow += tl.load(p_part + i_b * N.to(tl.int64) * (R * Z), mask=m, other=0.0).to(tl.float32)
        b_dpre = (b_dlow * (1.0 - b_low * b_low)).to(OP)
        if tl.program_id(0) == 0:
            tl.store(p_dpre + n * (R * Z) + o_c[None, :], b_dpre, mask=m)
        b_x, b_delta, _ = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
        b_ddown = dot(tl.trans(b_dpre), (b_x + b_delta * b_base).to(OP), b_ddown, PRECISION)
    to = p_ddown + (i_s * (R * Z) + o_c[:, None]).to(tl.int64) * D + o_d[None, :]
    tl.store(to, b_ddown, mask=(o_c < R * Z)[:, None] & (o_d < D)[None, :])


TILES = {"low": (128, 64, 8, 2), "forward": (64, 64, 8, 1), "inputs": (16, 128, 4, 1), "up": (64, 256, 4, 3),
         "down": (64, 128, 8, 2)}
"""Of each kernel: tokens, most channels of a program's tile, warps, stages."""
PROGRAMS = {"up": 2, "down": 1}  # that a multiprocessor has room for
LEAST = 256  # tokens whose part of dup or ddown one program adds up


def tile(kernel: str, x: Tensor, R: int) -> dict:
    """The compile-time numbers and options of a launch."""
    BT, BD, warps, stages = TILES[kernel]
    columns = {"BR": max(16, power_of_two(R))}
    if kernel == "up":
        columns["BW"], over = max(16, power_of_two(R + 1)), cdiv(columns["BR"], 16)
        warps, BD = warps * min(over, 2), BD * 2 // max(over, 2)
    if kernel in ("low", "down"):
        BC = max(64, power_of_two(5 * R))
        columns, over = {"BC": BC}, cdiv(BC, 128)  # times as many columns as registers were counted for
        BT, BD = max(16, BT // over), BD if kernel == "low" else max(16, BD // over)
    exact = x.dtype == torch.float32  # sums as long as these show that a tensor core rounds each step towards 0
    if exact:
        BT, BD, stages = 32, 128 if kernel == "up" else 32, 1
    return {"BT": BT, "BD": max(16, min(BD, power_of_two(x.shape[-1]))), "PRECISION": "ieee" if exact else "tf32",
            "num_warps": warps, "num_stages": stages} | columns


def segment(kernel: str, x: Tensor, N: int, blocks: int) -> int:
    """Tokens of a segment, so many that programs of `blocks` to a segment fill the GPU once."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    most = max(1, PROGRAMS[kernel] * processors // blocks)
    return max(LEAST, 64 * cdiv(N, 64 * most))


def forward(x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor,
            cu_seqlens: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """x [B, T, D], base [D], down [D, 5 R], mix [5, D], up [5, R, D] -> low [B, T, 5 R], five mixtures [B, T, D]."""
    (B, T, D), R = x.shape, up.shape[1]
    N, low, y = B * T, x.new_empty(B, T, 5 * R), [torch.empty_like(x) for _ in range(5)]
    if x.numel():
        first, documents = firsts(x, cu_seqlens)
        with torch.cuda.device_of(x):
            launch = tile("low", x, R)
            low_kernel[(cdiv(N, launch["BT"]),)](x, base, down, first, low, N, T, D, 5 * R, documents, **launch)
            launch = tile("forward", x, R)
            forward_kernel[cdiv(N, launch["BT"]), cdiv(D, launch["BD"])](
                x, mix, low, up, first, *y, N, T, D, R, documents, **launch)
    return low, y


def backward(dy: list[Tensor], x: Tensor, base: Tensor, down: Tensor, mix: Tensor, up: Tensor, low: Tensor,
             cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dx, dbase, ddown, dmix, dup."""
    (B, T, D), R = x.shape, up.shape[1]
    if not x.numel():
        dbase, ddown, dmix, dup = (torch.zeros_like(each) for each in (base, down, mix, up))
        return torch.empty_like(x), dbase, ddown, dmix, dup
    N = B * T
    first, documents = firsts(x, cu_seqlens)
    dx, dm, dpre = torch.empty_like(x), x.new_empty(5, N, D), x.new_empty(N, 5 * R)
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        up_there, down_there = up.to(x.dtype), down.to(x.dtype)
        launch = tile("inputs", x, R)
        inputs_kernel[cdiv(N, launch["BT"] - 1), cdiv(D, launch["BD"])](
            x, mix, low, up_there, first, *dy, dm, dx, N, T, D, R, documents, **launch)
        launch = tile("up", x, R)
        blocks = cdiv(D, launch["BD"])
        length = segment("up", x, N, 5 * blocks)
        dup = torch.empty(cdiv(N, length), 5, R + 1, D, dtype=torch.float32, device=x.device)
        dlow = torch.empty(blocks, 5, N, R, dtype=x.dtype if blocks == 1 else torch.float32, device=x.device)
        up_kernel[5 * blocks, len(dup)](dm, low, up_there, dlow, dup, N, D, R, length, **launch)
        launch = tile("down", x, R)
        length = segment("down", x, N, cdiv(D, launch["BD"]))
        ddown = torch.empty(cdiv(N, length), 5 * R, D, dtype=torch.float32, device=x.device)
        down_kernel[cdiv(D, launch["BD"]), len(ddown)](
            x, base, low, first, dlow, dpre, ddown, N, T, D, R, documents, blocks, length, **launch)
        dlerp = torch.mm(dpre, down_there.mT)
        dx, dbase = lerp_backward([dlerp], x, base.unsqueeze(0), cu_seqlens, added_to=dx)
    dup = dup.sum(0)
    return (dx, dbase.squeeze(0), ddown.sum(0).mT.to(down.dtype).contiguous(),
            dup[:, R].to(mix.dtype).contiguous(), dup[:, :R].to(up.dtype).contiguous())
