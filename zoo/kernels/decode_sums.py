"""One token of the mixers whose memory is sums: FAVOR+'s features, AFT's window and what has left it. For decoding.

States are read once and written in place; a program owns what it writes. Equations: `zoo.ops.favor`, `zoo.ops.aft`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import LOG2E, cdiv, power_of_two
from zoo.kernels.decode import early, leave, ready

PROGRAMS = 132
FEATURES = 16  # of a head, at a time
CHANNELS = {16: 16, 4096: 64}  # of an AFT program, to so many rows
LEAST = tl.constexpr(1e-30)  # added to FAVOR+'s normaliser
FLOOR = tl.constexpr(-60.0)  # how far below the largest of its row an AFT bias can count


@triton.jit(do_not_specialize=["S"])
def favor_kernel(p_qkv, p_projection, p_frequency, p_decay, p_sums, p_position, p_o, p_m, p_l, S, period, scale, reach,
                 H: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BF: tl.constexpr, BP: tl.constexpr,
                 BK: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr):
    """Features M i / S .. of head h: sums = 2^-decay sums + phi(k)^T [v, 1], and their part of the mean.

    Parts as of `decode_attention`, weights phi(q). WHOLE: S is 1, and the mean itself is written, to o.
    """
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    HALF: tl.constexpr = K // 2
    o_p, o_v = tl.arange(0, BP), tl.arange(0, BK)
    m_p, m_v = o_p < HALF, o_v < K
    p_row = p_qkv + i_b * 3 * H * K + i_h * K
    b_angle = (tl.load(p_position + i_b) % period).to(tl.float32) * tl.load(p_frequency + o_p, mask=m_p, other=0.0)
    b_cos, b_sin = tl.cos(b_angle), tl.sin(b_angle)
    b_left = tl.exp2(-tl.load(p_decay + i_h))
    ready(EARLY)
    b_q1 = tl.load(p_row + o_p, mask=m_p, other=0.0) * scale
    b_q2 = tl.load(p_row + HALF + o_p, mask=m_p, other=0.0) * scale
    b_k1 = tl.load(p_row + H * K + o_p, mask=m_p, other=0.0) * scale
    b_k2 = tl.load(p_row + H * K + HALF + o_p, mask=m_p, other=0.0) * scale
    b_v = tl.load(p_row + 2 * H * K + o_v, mask=m_v, other=0.0)
    b_short = tl.rsqrt(1 + (tl.sum(b_q1 * b_q1, 0) + tl.sum(b_q2 * b_q2, 0)) / (reach * reach))
    b_q1, b_q2 = b_q1 * b_short, b_q2 * b_short
    b_q1, b_q2 = b_q1 * b_cos - b_q2 * b_sin, b_q2 * b_cos + b_q1 * b_sin
    b_short = tl.rsqrt(1 + (tl.sum(b_k1 * b_k1, 0) + tl.sum(b_k2 * b_k2, 0)) / (reach * reach))
    b_k1, b_k2 = b_k1 * b_short, b_k2 * b_short
    b_k1, b_k2 = b_k1 * b_cos - b_k2 * b_sin, b_k2 * b_cos + b_k1 * b_sin
    b_square = (tl.sum(b_k1 * b_k1, 0) + tl.sum(b_k2 * b_k2, 0)) / 2

    p_sums += (i_b * H + i_h) * M * (K + 1)
    b_m = -float("inf")
    b_l = 0.0
    b_o = tl.zeros([BK], tl.float32)
    share = tl.cdiv(M, S)
    stop = tl.minimum(i_s * share + share, M)
    for f in range(i_s * share, stop, BF):
        o_f = f + tl.arange(0, BF)
        m_f = o_f < stop
        m_w, m_s = m_f[:, None] & m_p[None, :], m_f[:, None] & m_v[None, :]
        o_s = o_f[:, None] * (K + 1) + o_v[None, :]
        b_s = tl.load(p_sums + o_s, mask=m_s, other=0.0)
        b_n = tl.load(p_sums + o_f * (K + 1) + K, mask=m_f, other=0.0)
        b_w1 = tl.load(p_projection + o_f[:, None] * K + o_p[None, :], mask=m_w, other=0.0)
        b_w2 = tl.load(p_projection + o_f[:, None] * K + HALF + o_p[None, :], mask=m_w, other=0.0)
        b_length = tl.sqrt(tl.sum(b_w1 * b_w1, 1) + tl.sum(b_w2 * b_w2, 1))
        b_reach = tl.minimum(b_length, reach)
        b_largest = b_length * b_reach - b_reach * b_reach / 2
        b_a = tl.sum(b_w1 * b_q1[None, :], 1) + tl.sum(b_w2 * b_q2[None, :], 1) + b_largest
        b_a = tl.where(m_f, b_a * LOG2E, -float("inf"))
        b_phi = tl.sum(b_w1 * b_k1[None, :], 1) + tl.sum(b_w2 * b_k2[None, :], 1)
        b_phi = tl.exp2((b_phi - b_largest - b_square) * LOG2E)
        b_s = b_s * b_left + b_phi[:, None] * b_v[None, :]
        b_n = b_n * b_left + b_phi
        tl.store(p_sums + o_s, b_s, mask=m_s)
        tl.store(p_sums + o_f * (K + 1) + K, b_n, mask=m_f)
        b_new = tl.maximum(b_m, tl.max(b_a, 0))
        b_p, b_old = tl.exp2(b_a - b_new), tl.exp2(b_m - b_new)
        b_l = b_l * b_old + tl.sum(b_p * (b_n + LEAST), 0)
        b_o = b_o * b_old + tl.sum(b_p[:, None] * b_s, 0)
        b_m = b_new
    part = (i_b * S + i_s) * H + i_h
    leave(p_o, p_m, p_l, part, b_o, b_m, b_l, o_v, m_v, K, WHOLE)


@triton.jit
def aft_local_kernel(p_qkv, p_row, p_column, p_keys, p_values, p_max, p_num, p_den, p_position, p_out, D: tl.constexpr,
                     W: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
                     EARLY: tl.constexpr):
    """Channels of a token: window and sums weighed, the gate; then the oldest of the window goes into the sums."""
    i_d, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d, o_w, o_r = i_d * BD + tl.arange(0, BD), tl.arange(0, BW), tl.arange(0, BR)
    m_d, m_r = o_d < D, o_r < R
    position = tl.load(p_position + i_b)
    newest = o_w == W - 1  # rows of the tile: the W - 1 of the cache, oldest first, and the new token
    m_w = o_w < W
    o = i_b * (W - 1) * D + o_w[:, None] * D + o_d[None, :]
    m_cache = (o_w < W - 1)[:, None] & m_d[None, :]
    b_keys = tl.load(p_keys + o, mask=m_cache, other=-1e30).to(tl.float32)
    b_values = tl.load(p_values + o, mask=m_cache, other=0.0).to(tl.float32)
    o_one = i_b * D + o_d
    b_top = tl.load(p_max + o_one, mask=m_d, other=0.0)
    b_num = tl.load(p_num + o_one, mask=m_d, other=0.0)
    b_den = tl.load(p_den + o_one, mask=m_d, other=0.0)

    place = tl.maximum(position - (W - 1 - o_w), 0)
    b_bias = tl.load(p_column + place[:, None] * R + o_r[None, :], mask=m_w[:, None] & m_r[None, :], other=0.0)
    b_bias = tl.sum(b_bias * tl.load(p_row + position * R + o_r, mask=m_r, other=0.0)[None, :], 1)
    b_bias = tl.where(m_w, b_bias, -float("inf"))
    b_largest = tl.maximum(tl.max(b_bias, 0), 0.0)
    b_near = tl.where(m_w, tl.exp(tl.maximum(b_bias - b_largest, FLOOR)), 0.0)
    b_far = tl.exp(tl.maximum(-b_largest, FLOOR))

    ready(EARLY)
    b_q = tl.load(p_qkv + i_b * 3 * D + o_d, mask=m_d, other=0.0)
    b_k = tl.load(p_qkv + i_b * 3 * D + D + o_d, mask=m_d, other=0.0)
    b_v = tl.load(p_qkv + i_b * 3 * D + 2 * D + o_d, mask=m_d, other=0.0)
    b_keys = tl.where(newest[:, None], b_k[None, :], b_keys)
    b_values = tl.where(newest[:, None], b_v[None, :], b_values)
    b_m = tl.maximum(tl.max(b_keys, 0), b_top)
    b_p = b_near[:, None] * tl.exp(b_keys - b_m[None, :])
    b_past = b_far * tl.exp(b_top - b_m)
    b_mean = (tl.sum(b_p * b_values, 0) + b_past * b_num) / (tl.sum(b_p, 0) + b_past * b_den)
    tl.store(p_out + o_one, tl.sigmoid(b_q) * b_mean, mask=m_d)

    oldest = (o_w == 0)[:, None]
    b_key = tl.max(tl.where(oldest, b_keys, -float("inf")), 0)
    b_value = tl.sum(tl.where(oldest, b_values, 0.0), 0)
    b_new = tl.maximum(b_top, b_key)
    b_left, b_in = tl.exp(b_top - b_new), tl.exp(b_key - b_new)
    tl.store(p_max + o_one, b_new, mask=m_d)
    tl.store(p_num + o_one, b_num * b_left + b_in * b_value, mask=m_d)
    tl.store(p_den + o_one, b_den * b_left + b_in, mask=m_d)
    tl.debug_barrier()  # what the others of this program read of the window has been read
    m_cache = ((o_w > 0) & m_w)[:, None] & m_d[None, :]
    tl.store(p_keys + o - D, b_keys.to(p_keys.dtype.element_ty), mask=m_cache)
    tl.store(p_values + o - D, b_values.to(p_values.dtype.element_ty), mask=m_cache)


def parts(rows: int, heads: int, features: int) -> int:
    """Into how many parts to split the features of a head: no more than fill the GPU."""
    return max(1, min(cdiv(features, FEATURES), cdiv(PROGRAMS, rows * heads)))


def favor(qkv: Tensor, projection: Tensor, frequency: Tensor, decay: Tensor, sums: Tensor, position: Tensor,
          period: int, reach: float, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, 3 H K] as projected, sums [B, H, m, K + 1] -> o [B, S, H, K], m, l [B, S, H]; all float32.

    Queries and keys are bound to `reach` and turned here. S = 1: o is the mean; m, l are empty.
    """
    B, H, M, K = *sums.shape[:3], sums.shape[3] - 1
    o, m = qkv.new_empty(B, S, H, K), qkv.new_empty((2, B, S, H) if S > 1 else (2, 0))
    with torch.cuda.device_of(qkv):
        favor_kernel[S, H, B](
            qkv, projection, frequency, decay, sums, position, o, m[0], m[1], S, period, K**-0.25, reach, H=H, K=K, M=M,
            BF=FEATURES, BP=power_of_two(K // 2), BK=power_of_two(K), WHOLE=S == 1, num_warps=4, **early(qkv))
    return o, m[0], m[1]


def aft_local(qkv: Tensor, row: Tensor, column: Tensor, keys: Tensor, values: Tensor, top: Tensor, num: Tensor,
              den: Tensor, position: Tensor) -> Tensor:
    """qkv [B, 3 D], factors of the bias [T, R], cache [B, W - 1, D], sums [B, D] -> sigmoid(q) mean [B, D] float32."""
    B, W, D = keys.shape[0], keys.shape[1] + 1, keys.shape[2]
    R = row.shape[1]
    out = qkv.new_empty(B, D)
    BD = next((channels for rows, channels in CHANNELS.items() if rows >= B), 64)
    with torch.cuda.device_of(qkv):
        aft_local_kernel[cdiv(D, BD), B](
            qkv, row, column, keys, values, top, num, den, position, out, D=D, W=W, R=R, BW=power_of_two(W),
            BR=power_of_two(R), BD=BD, num_warps=4, **early(qkv))
    return out
