"""RWKV-6's five mixtures of a token with the one before it, whose weights come from the data (2404.05892, eq. 4 and 5).

    low = tanh((x + (x' - x) base) down),    m_z = mix_z + low_z up_z,    y_z = x + (x' - x) m_z

down [D, 5 R] and up [5, R, D], R 16 or 32: the products are a tile's, and neither m nor their first operand is ever in
memory. Backward, with dm_z = dy_z (x' - x),

    dlow_z = dm_z up_z^T,   dup_z = low_z^T dm_z,                 dmix_z = sum dm_z
    dlerp = dpre down^T,    ddown = (x + (x' - x) base)^T dpre,   dbase = sum dlerp (x' - x),   dpre = dlow (1 - low^2)
    dx_t = sum_z dy_zt (1 - m_zt) + dy_z,t+1 m_z,t+1 + dlerp_t (1 - base) + dlerp_t+1 base

`up_kernel` has the first line, of segments of tokens: dlow in float32, a part for each block of channels, which who
reads it adds up. `inputs_kernel` has dx and dbase, `down_kernel` ddown.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import cdiv, dot, power_of_two, precision
from zoo.kernels.token_mix import firsts, moved, pair, pick

Z = tl.constexpr(5)


@triton.jit
def tanh(x):
    """By an exponential of what is not above 0, near 0 by its series, where the former's digits cancel."""
    square = x * x
    small = x * (1.0 + square * (-0.33333333333 + square * (0.13333333333 + square * (
        -0.05396825397 + square * (0.02186948854 - square * 0.00886323553)))))
    power = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - power) / (1.0 + power)
    return tl.where(square < 0.09, small, tl.where(x < 0, -large, large))


@triton.jit
def one_of(a, b, c, d, e, i):
    """Of five, the one of a program's number."""
    found = a
    if i == 1:
        found = b
    elif i == 2:
        found = c
    elif i == 3:
        found = d
    elif i == 4:
        found = e
    return found


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
def before_tanh(p_low, p_dlow, o_n, o_c, N, C, blocks):
    """dpre [BT, BC] in float32, from dlow's parts [blocks, N, C]."""
    b_low = matrix(p_low, o_n, o_c, N, C).to(tl.float32)
    b_dlow = matrix(p_dlow, o_n, o_c, N, C)
    for i in range(1, blocks):
        b_dlow += matrix(p_dlow + i * N.to(tl.int64) * C, o_n, o_c, N, C)
    return b_dlow * (1.0 - b_low * b_low)


@triton.jit(do_not_specialize=["N", "T", "documents"])
def low_kernel(p_x, p_base, p_down, p_first, p_low, N, T, D, C, documents, BT: tl.constexpr, BD: tl.constexpr,
               BC: tl.constexpr, PRECISION: tl.constexpr):
    """low of a tile of tokens."""
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


@triton.jit(do_not_specialize=["N", "T", "documents", "length"])
def up_kernel(p_x, p_low, p_up, p_first, dy0, dy1, dy2, dy3, dy4, p_dlow, p_dup, p_dmix, N, T, D, R, documents, length,
              BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr):
    """Of a segment, one z and one block of channels: the block's part of dlow [blocks, N, 5 R], the segment's of dup
    [segments, 5, R, D] and dmix [segments, 5, D]."""
    i_z = tl.program_id(0) % Z
    i_d = tl.program_id(0) // Z
    i_s = tl.program_id(1)
    o_d = i_d * BD + tl.arange(0, BD)
    o_r = tl.arange(0, BR)
    p_dy = one_of(dy0, dy1, dy2, dy3, dy4, i_z)
    p_low += i_z * R
    p_dlow += i_d * N.to(tl.int64) * (R * Z) + i_z * R
    b_up = matrix(p_up + i_z * R * D, o_r, o_d, R, D).to(p_x.dtype.element_ty)
    b_dup = tl.zeros([BR, BD], tl.float32)
    b_dmix = tl.zeros([BD], tl.float32)
    for i in range(i_s * length, tl.minimum((i_s + 1) * length, N), BT):
        o_n = i + tl.arange(0, BT)
        _, b_delta, _ = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
        b_dm = matrix(p_dy, o_n, o_d, N, D).to(tl.float32) * b_delta
        b_dmix += tl.sum(b_dm, 0)
        o_low = o_r[:, None] + o_n.to(tl.int64)[None, :] * (R * Z)
        m_low = (o_r < R)[:, None] & (o_n < N)[None, :]
        b_low = tl.load(p_low + o_low, mask=m_low, other=0.0)
        b_dm = b_dm.to(b_up.dtype)
        b_dup = dot(b_low, b_dm, b_dup, PRECISION)
        b_dlow = dot(b_up, tl.trans(b_dm), tl.zeros([BR, BT], tl.float32), PRECISION)
        tl.store(p_dlow + o_low, b_dlow, mask=m_low)
    tl.store(p_dup + ((i_s * Z + i_z) * R + o_r[:, None]).to(tl.int64) * D + o_d[None, :], b_dup,
             mask=(o_r < R)[:, None] & (o_d < D)[None, :])
    tl.store(p_dmix + (i_s * Z + i_z) * D + o_d, b_dmix, mask=o_d < D)


@triton.jit(do_not_specialize=["N", "T", "documents"])
def inputs_kernel(p_x, p_base, p_down, p_mix, p_low, p_up, p_first, dy0, dy1, dy2, dy3, dy4, p_dlow, p_dx, p_dbase, N,
                  T, D, R, documents, blocks, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
                  PRECISION: tl.constexpr):
    """dx of BT - 1 tokens, and their part of dbase [programs, D]."""
    i_n = tl.program_id(0)
    o_i = tl.arange(0, BT)
    o_n = i_n * (BT - 1) + o_i
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    o_r = tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    OP: tl.constexpr = p_x.dtype.element_ty
    own = (o_i < BT - 1) & (o_n < N)
    b_dpre = before_tanh(p_low, p_dlow, o_n, o_c, N, R * Z, blocks).to(OP)
    b_down = tl.trans(matrix(p_down, o_d, o_c, D, R * Z).to(OP))
    b_dlerp = dot(b_dpre, b_down, tl.zeros([BT, BD], tl.float32), PRECISION)
    _, b_delta, first = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
    b_dbase = tl.sum(tl.where(own[:, None], b_dlerp * b_delta, 0.0), 0)
    tl.store(p_dbase + i_n * D + o_d, b_dbase, mask=o_d < D)
    b_base = vector(p_base, o_d, D)
    b_before = b_dlerp * b_base  # for the token before
    b_dx = b_dlerp - b_before
    for i_z in tl.static_range(Z):
        b_dy = matrix(pick(dy0, dy1, dy2, dy3, dy4, i_z), o_n, o_d, N, D).to(tl.float32)
        b_m = mixing(p_mix, p_low, p_up, o_n, o_d, o_r, N, D, R, i_z, BT, BD, PRECISION)
        b_before += b_dy * b_m
        b_dx += b_dy * (1.0 - b_m)
    b_dx = moved(tl.where(first[:, None], 0.0, b_before), b_dx, BT, OP, PRECISION)
    to = p_dx + o_n.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(to, b_dx.to(OP), mask=own[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["N", "T", "documents", "length"])
def down_kernel(p_x, p_base, p_low, p_first, p_dlow, p_ddown, N, T, D, C, documents, blocks, length, BT: tl.constexpr,
                BD: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):
    """A segment's part of ddown, turned round: [segments, 5 R, D]."""
    i_s = tl.program_id(1)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_c = tl.arange(0, BC)
    OP: tl.constexpr = p_x.dtype.element_ty
    b_base = vector(p_base, o_d, D)
    b_ddown = tl.zeros([BC, BD], tl.float32)
    for i in range(i_s * length, tl.minimum((i_s + 1) * length, N), BT):
        o_n = i + tl.arange(0, BT)
        b_dpre = before_tanh(p_low, p_dlow, o_n, o_c, N, C, blocks).to(OP)
        b_x, b_delta, _ = pair(p_x, p_first, o_n, o_d, N, T, D, documents)
        b_ddown = dot(tl.trans(b_dpre), (b_x + b_delta * b_base).to(OP), b_ddown, PRECISION)
    to = p_ddown + (i_s * C + o_c[:, None]).to(tl.int64) * D + o_d[None, :]
    tl.store(to, b_ddown, mask=(o_c < C)[:, None] & (o_d < D)[None, :])


TILES = {"low": (64, 64, 4, 2), "forward": (32, 128, 4, 1), "up": (32, 128, 4, 2), "inputs": (32, 64, 4, 1),
         "down": (64, 64, 4, 1)}
"""Of each kernel: tokens, most channels of a program's tile, warps, stages."""
SEGMENT = 1024  # tokens whose part of the parameters' gradients one program adds up


def tile(kernel: str, x: Tensor, R: int) -> dict:
    """The compile-time numbers and options of a launch."""
    BT, BD, warps, stages = TILES[kernel]
    if x.element_size() == 4 or R > 32:  # registers
        BD, stages = BD // 2, 1
    widths = {"BR": max(16, power_of_two(R)), "BC": max(64, power_of_two(5 * R))}  # rows of 128 bytes: docs/kernels.md
    taken = {"forward": ("BR",), "up": ("BR",), "inputs": ("BR", "BC")}.get(kernel, ("BC",))
    if "BC" in taken and kernel != "inputs" and widths["BC"] > 128:  # tiles of BT or BD times BC numbers in registers
        warps *= widths["BC"] // 128
    return {"BT": BT, "BD": max(16, min(BD, power_of_two(x.shape[-1]))), "PRECISION": precision(x.dtype),
            "num_warps": warps, "num_stages": stages} | {name: widths[name] for name in taken}


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
    N, segments = B * T, cdiv(B * T, SEGMENT)
    first, documents = firsts(x, cu_seqlens)
    launch = tile("up", x, R)
    blocks, inputs = cdiv(D, launch["BD"]), tile("inputs", x, R)
    programs = cdiv(N, inputs["BT"] - 1)
    dx = torch.empty_like(x)
    dlow, dup, dmix, ddown, dbase = (
        torch.empty(shape, dtype=torch.float32, device=x.device) for shape in
        ((blocks, N, 5 * R), (segments, 5, R, D), (segments, 5, D), (segments, 5 * R, D), (programs, D)))
    with torch.cuda.device_of(x):
        up_kernel[5 * blocks, segments](
            x, low, up, first, *dy, dlow, dup, dmix, N, T, D, R, documents, SEGMENT, **launch)
        inputs_kernel[programs, cdiv(D, inputs["BD"])](
            x, base, down, mix, low, up, first, *dy, dlow, dx, dbase, N, T, D, R, documents, blocks, **inputs)
        launch = tile("down", x, R)
        down_kernel[cdiv(D, launch["BD"]), segments](
            x, base, low, first, dlow, ddown, N, T, D, 5 * R, documents, blocks, SEGMENT, **launch)
    return (dx, dbase.sum(0).to(base.dtype), ddown.sum(0).mT.to(down.dtype).contiguous(), dmix.sum(0).to(mix.dtype),
            dup.sum(0).to(up.dtype))
