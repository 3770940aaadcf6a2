"""Attention of one token a row to a cache, its keys split over programs (flash-decoding), and Linformer's blocks.

The length is read from the device, so that a recorded launch serves every position. A program has a head's share of the
cache and leaves its mean as a part: o = sum_t 2^(s_t - m) v_t, m = max_t s_t, l = sum_t 2^(s_t - m), with scores s in
powers of two; `decode.merge_linear` puts the parts together. The first program of a head has the new token, too: it
turns its key (RoPE) and writes it to the cache.

With BLOCK (Linformer) the cache holds RANK summaries of every finished block, and keys of the block under way stand
beside it as they were projected: the first program turns them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import LOG2E, cdiv, power_of_two
from zoo.kernels.decode import early, leave, ready

BT = 64  # cache entries at a time
STAGES = 3  # of them under way
ENTRIES = 64  # of the cache's room, that are worth a program
MOST_PARTS = 32
PROGRAMS = 264  # two to a multiprocessor


@triton.jit
def attend(b_m, b_l, b_o, b_score, b_v):
    """The running mean with more entries: scores [BT], values [BT, BK]."""
    b_new = tl.maximum(b_m, tl.max(b_score, 0))
    b_p, b_left = tl.exp2(b_score - b_new), tl.exp2(b_m - b_new)
    return b_new, b_l * b_left + tl.sum(b_p, 0), b_o * b_left + tl.sum(b_p[:, None] * b_v, 0)


@triton.jit
def entries(p_k, p_v, t, stop, stride, K: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr):
    """Cache entries t .. of a head: the two halves of their keys [BT, BP], their values [BT, BK]."""
    o_t, o_p, o_k = t + tl.arange(0, BT), tl.arange(0, BP), tl.arange(0, BK)
    m_t, o = (o_t < stop)[:, None], o_t.to(tl.int64)[:, None] * stride
    m_p = m_t & (o_p < K // 2)[None, :]
    b_k1 = tl.load(p_k + o + o_p[None, :], mask=m_p, other=0.0).to(tl.float32)
    b_k2 = tl.load(p_k + o + K // 2 + o_p[None, :], mask=m_p, other=0.0).to(tl.float32)
    return b_k1, b_k2, tl.load(p_v + o + o_k[None, :], mask=m_t & (o_k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["ROOM", "S"])
def attention_kernel(p_qkv, p_frequency, p_k, p_v, p_k_own, p_v_own, p_position, p_o, p_m, p_l, ROOM, S, scale,
                     H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
                     BT: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
                     STAGES: tl.constexpr, EARLY: tl.constexpr):
    """WHOLE: S is 1, and the mean itself is written, to o."""
    i_s, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_g = i_h // (H // G)
    HALF: tl.constexpr = K // 2
    o_p, o_k = tl.arange(0, BP), tl.arange(0, BK)
    m_p, m_k = o_p < HALF, o_k < K
    position = tl.load(p_position + i_b)
    b_frequency = tl.load(p_frequency + o_p, mask=m_p, other=0.0)
    p_row = p_qkv + i_b * (H + 2 * G) * K
    b_phase = position.to(tl.float32) * b_frequency
    b_cos, b_sin = tl.cos(b_phase), tl.sin(b_phase)

    length = position // BLOCK * RANK if BLOCK else position
    share = tl.cdiv(tl.cdiv(length, S), BT) * BT
    start = i_s * share
    stop = tl.minimum(start + share, length)
    p_k += i_b * ROOM * G * K + i_g * K
    p_v += i_b * ROOM * G * K + i_g * K
    b_c1, b_c2, b_c = entries(p_k, p_v, start, stop, G * K, K, BT, BP, BK)  # older than this step

    ready(EARLY)
    b_q1 = tl.load(p_row + i_h * K + o_p, mask=m_p, other=0.0) * scale * LOG2E
    b_q2 = tl.load(p_row + i_h * K + HALF + o_p, mask=m_p, other=0.0) * scale * LOG2E
    b_q1, b_q2 = b_q1 * b_cos - b_q2 * b_sin, b_q2 * b_cos + b_q1 * b_sin
    b_m = -float("inf")
    b_l = 0.0
    b_o = tl.zeros([BK], tl.float32)

    if i_s == 0:  # the new token, and what stands beside it in its block
        b_k1 = tl.load(p_row + (H + i_g) * K + o_p, mask=m_p, other=0.0)
        b_k2 = tl.load(p_row + (H + i_g) * K + HALF + o_p, mask=m_p, other=0.0)
        b_v = tl.load(p_row + (H + G + i_g) * K + o_k, mask=m_k, other=0.0)
        if BLOCK:
            offset = position % BLOCK
            p_k_own += i_b * BLOCK * G * K + i_g * K
            p_v_own += i_b * BLOCK * G * K + i_g * K
        else:
            offset = position
            p_k_own, p_v_own = p_k, p_v
            b_k1, b_k2 = b_k1 * b_cos - b_k2 * b_sin, b_k2 * b_cos + b_k1 * b_sin
        kind = p_k_own.dtype.element_ty
        b_k1, b_k2, b_v = b_k1.to(kind), b_k2.to(kind), b_v.to(kind)
        if i_h % (H // G) == 0:
            tl.store(p_k_own + offset * G * K + o_p, b_k1, mask=m_p)
            tl.store(p_k_own + offset * G * K + HALF + o_p, b_k2, mask=m_p)
            tl.store(p_v_own + offset * G * K + o_k, b_v, mask=m_k)
        b_k1, b_k2 = b_k1.to(tl.float32), b_k2.to(tl.float32)
        if BLOCK:
            b_k1, b_k2 = b_k1 * b_cos - b_k2 * b_sin, b_k2 * b_cos + b_k1 * b_sin
        b_m = tl.sum(b_k1 * b_q1, 0) + tl.sum(b_k2 * b_q2, 0)
        b_l = 1.0
        b_o = b_v.to(tl.float32)
        if BLOCK:
            for t in range(0, offset, BT):
                o_t = t + tl.arange(0, BT)
                m_t = o_t < offset
                o = o_t[:, None] * (G * K)
                b_w1 = tl.load(p_k_own + o + o_p[None, :], mask=m_t[:, None] & m_p[None, :], other=0.0).to(tl.float32)
                b_w2 = tl.load(p_k_own + o + HALF + o_p[None, :], mask=m_t[:, None] & m_p[None, :],
                               other=0.0).to(tl.float32)
                b_w = tl.load(p_v_own + o + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0).to(tl.float32)
                b_angle = (position - offset + o_t).to(tl.float32)[:, None] * b_frequency[None, :]
                b_x, b_y = tl.cos(b_angle), tl.sin(b_angle)
                b_score = tl.sum((b_w1 * b_x - b_w2 * b_y) * b_q1[None, :], 1)
                b_score += tl.sum((b_w2 * b_x + b_w1 * b_y) * b_q2[None, :], 1)
                b_m, b_l, b_o = attend(b_m, b_l, b_o, tl.where(m_t, b_score, -float("inf")), b_w)

    if start < stop:
        b_score = tl.sum(b_c1 * b_q1[None, :], 1) + tl.sum(b_c2 * b_q2[None, :], 1)
        b_score = tl.where(start + tl.arange(0, BT) < stop, b_score, -float("inf"))
        b_m, b_l, b_o = attend(b_m, b_l, b_o, b_score, b_c)
    for t in tl.range(start + BT, stop, BT, num_stages=STAGES):
        b_t1, b_t2, b_t = entries(p_k, p_v, t, stop, G * K, K, BT, BP, BK)
        b_score = tl.sum(b_t1 * b_q1[None, :], 1) + tl.sum(b_t2 * b_q2[None, :], 1)
        b_score = tl.where(t + tl.arange(0, BT) < stop, b_score, -float("inf"))
        b_m, b_l, b_o = attend(b_m, b_l, b_o, b_score, b_t)

    part = (i_b * S + i_s) * H + i_h
    leave(p_o, p_m, p_l, part, b_o, b_m, b_l, o_k, m_k, K, WHOLE)


@triton.jit
def summary_kernel(p_k_own, p_v_own, p_e, p_f, p_frequency, p_k, p_v, p_position, ROOM, H: tl.constexpr,
                   K: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
                   BP: tl.constexpr, EARLY: tl.constexpr):
    """Where the new token is the last of its block: E k, turned, and F v of the block, into the cache; else nothing."""
    i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = tl.load(p_position + i_b)
    ready(EARLY)
    if (position + 1) % C == 0:
        HALF: tl.constexpr = K // 2
        o_r, o_p = tl.arange(0, BR), tl.arange(0, BP)
        m_r, m_p = o_r < R, o_p < HALF
        b_k1 = tl.zeros([BR, BP], tl.float32)
        b_k2 = tl.zeros([BR, BP], tl.float32)
        b_v1 = tl.zeros([BR, BP], tl.float32)
        b_v2 = tl.zeros([BR, BP], tl.float32)
        for c in range(0, C, BC):  # summed along the last axis: along the middle one Triton makes a TF32 product of it
            o_c = c + tl.arange(0, BC)
            o_own = (i_b * C + o_c)[None, :] * (H * K) + i_h * K + o_p[:, None]
            m_own = (o_c < C)[None, :] & m_p[:, None]
            o_ef = (i_h * R + o_r)[:, None] * C + o_c[None, :]
            m_ef = m_r[:, None] & (o_c < C)[None, :]
            b_e = tl.load(p_e + o_ef, mask=m_ef, other=0.0).to(tl.float32)[:, None, :]
            b_f = tl.load(p_f + o_ef, mask=m_ef, other=0.0).to(tl.float32)[:, None, :]
            b_k1 += tl.sum(b_e * tl.load(p_k_own + o_own, mask=m_own, other=0.0).to(tl.float32)[None], 2)
            b_k2 += tl.sum(b_e * tl.load(p_k_own + HALF + o_own, mask=m_own, other=0.0).to(tl.float32)[None], 2)
            b_v1 += tl.sum(b_f * tl.load(p_v_own + o_own, mask=m_own, other=0.0).to(tl.float32)[None], 2)
            b_v2 += tl.sum(b_f * tl.load(p_v_own + HALF + o_own, mask=m_own, other=0.0).to(tl.float32)[None], 2)
        b_place = (position - (C - 1)).to(tl.float32) + ((o_r.to(tl.float32) + 0.5) * (C / R) - 0.5)
        b_phase = b_place[:, None] * tl.load(p_frequency + o_p, mask=m_p, other=0.0)[None, :]
        b_cos, b_sin = tl.cos(b_phase), tl.sin(b_phase)
        kind = p_k.dtype.element_ty
        o = ((i_b * ROOM + position // C * R + o_r)[:, None] * H + i_h) * K + o_p[None, :]
        m = m_r[:, None] & m_p[None, :]
        tl.store(p_k + o, (b_k1 * b_cos - b_k2 * b_sin).to(kind), mask=m)
        tl.store(p_k + o + HALF, (b_k2 * b_cos + b_k1 * b_sin).to(kind), mask=m)
        tl.store(p_v + o, b_v1.to(kind), mask=m)
        tl.store(p_v + o + HALF, b_v2.to(kind), mask=m)


def parts(rows: int, heads: int, room: int) -> int:
    """Into how many parts to split a cache of `room` entries: no more than fill the GPU.

    Rounded up: a part of one entry more than a tile holds would take twice as long.
    """
    return max(1, min(MOST_PARTS, cdiv(room, ENTRIES), cdiv(PROGRAMS, rows * heads)))


def attention(qkv: Tensor, frequency: Tensor, k: Tensor, v: Tensor, position: Tensor, heads: int, S: int,
              own: tuple[Tensor, Tensor] | None = None, rank: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, (H + 2 G) K] float32, caches [B, L, G, K], position [B] int64 -> o [B, S, H, K], m, l [B, S, H].

    own: keys and values of the block under way [B, C, G, K]; the cache then holds `rank` entries of each block before.
    S = 1: o is the mean; m, l are empty.
    """
    B, ROOM, G, K = k.shape
    o, m = qkv.new_empty(B, S, heads, K), qkv.new_empty((2, B, S, heads) if S > 1 else (2, 0))
    with torch.cuda.device_of(qkv):
        attention_kernel[S, heads, B](
            qkv, frequency, k, v, *(own or (k, v)), position, o, m[0], m[1], ROOM, S, K**-0.5, H=heads, G=G, K=K,
            BLOCK=own[0].shape[1] if own else 0, RANK=rank, BT=BT, BP=power_of_two(K // 2), BK=power_of_two(K),
            WHOLE=S == 1, STAGES=STAGES, num_warps=4, **early(qkv))
    return o, m[0], m[1]


def summarise(own: tuple[Tensor, Tensor], E: Tensor, F: Tensor, frequency: Tensor, k: Tensor, v: Tensor,
              position: Tensor) -> None:
    """Rows whose block of C tokens `own` [B, C, H, K] is full get its summaries, in k, v [B, M R, H, K]."""
    (H, R, C), B, K = E.shape, len(k), k.shape[3]
    with torch.cuda.device_of(k):
        summary_kernel[H, B](*own, E, F, frequency, k, v, position, k.shape[1], H=H, K=K, C=C, R=R,
                             BC=min(8, power_of_two(C)), BR=power_of_two(R), BP=power_of_two(K // 2), num_warps=4,
                             **early(k))
