"""Gradients of exact softmax attention by Triton kernels; attention.py has the equations and the plan."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from zoo.kernels._common import LOG2E, document_chunks, dot
from zoo.kernels.attention import (
    VARYING,
    describable,
    described,
    entries,
    fetch,
    line,
    place,
    plain,
    precision,
    put,
    section,
    strides,
    tile,
    tiling,
)
from zoo.kernels.rotary import turned
from zoo.kernels.summaries import matrix, summary


@triton.jit
def rows_gradient(b_dq, b_rest, b_pk, b_q, b_dy, b_lse, b_delta, d_k, d_v, i_b, i_h, start, p_k, p_v, stride_k,
                  stride_v, first, last, o_low, o_high, scale, K: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
                  MASKED: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr):
    """dq / scale of rows over the keys first .. last - 1, as `attend` goes over them; in float32 sums of ds and p k.

    Over all keys ds sums up to 0, but for roundings: D is dy . y, and not a sum of the p that are computed here.
    """
    for i_s in range(first, last, BS):
        o_s = i_s + tl.arange(0, BS)
        b_k = fetch(d_k, i_b, start, i_h, p_k, i_s, stride_k, last, BS, K, BK, MASKED, DESCRIBED)
        b_v = fetch(d_v, i_b, start, i_h, p_v, i_s, stride_v, last, BS, K, BK, MASKED, DESCRIBED)
        zero = tl.zeros([b_q.shape[0], BS], tl.float32)
        b_s = dot(b_q, tl.trans(b_k), zero, PRECISION)
        b_dp = dot(b_dy, tl.trans(b_v), zero, PRECISION)
        b_s = b_s * scale - b_lse[:, None]
        if MASKED:
            b_s = tl.where((o_s[None, :] >= o_low[:, None]) & (o_s[None, :] < o_high[:, None]), b_s, float("-inf"))
        b_p = tl.exp2(b_s)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq, PRECISION)
        if PRECISION == "ieee":
            b_rest += tl.sum(b_ds, 1)
            b_pk = dot(b_p, b_k, b_pk, PRECISION)
    return b_dq, b_rest, b_pk


@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    d_k, d_v, d_ks, d_vs, p_q, p_k, p_v, p_ks, p_vs, p_y, p_dy, p_lse, p_delta, p_dq, p_tiles, p_borders, p_entries,
    p_table, T, NT, HEADS, SECTION, scale, exponent_scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, ks_b, ks_t, ks_h, vs_b, vs_t, vs_h, y_b, y_t, y_h, dy_b, dy_t, dy_h,
    dq_b, dq_t, dq_h,
    H: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, DOCUMENTS: tl.constexpr,
    K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, DESCRIBED: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq, and on the way D, which `dkdv_kernel` needs."""
    BOUNDED: tl.constexpr = DESCRIBED and not DOCUMENTS
    i_head, i_t, i_n, start, length = place(tl.program_id(0), p_tiles, p_borders, T, NT, HEADS, SECTION, True,
                                            DOCUMENTS)
    i_b, i_h = (i_head // H).to(tl.int64), i_head % H
    i_g = i_h // GROUP
    a = i_t * BT
    o_t = a + tl.arange(0, BT)
    p_k += i_b * k_b + start * k_t + i_g * k_h
    p_v += i_b * v_b + start * v_t + i_g * v_h
    b_dy = tile(p_dy + i_b * dy_b + start * dy_t + i_h * dy_h, a, dy_t, length, BT, K, BK, True)
    b_y = tile(p_y + i_b * y_b + start * y_t + i_h * y_h, a, y_t, length, BT, K, BK, True)
    b_delta = tl.sum(b_dy.to(tl.float32) * b_y.to(tl.float32), 1)
    o_row = line(i_head, T) + start + o_t
    b_lse = tl.load(p_lse + o_row, mask=o_t < length, other=float("inf"))  # exp2(s - inf) = 0: such rows are inert
    b_q = tile(p_q + i_b * q_b + start * q_t + i_h * q_h, a, q_t, length, BT, K, BK, True)
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_rest, b_pk = tl.zeros([BT], tl.float32), tl.zeros([BT, BK], tl.float32)
    last = tl.minimum(a + BT, length)
    if C == 0:
        full = a // BS * BS
        o_low = tl.zeros([BT], tl.int32)
        b_dq, b_rest, b_pk = rows_gradient(b_dq, b_rest, b_pk, b_q, b_dy, b_lse, b_delta, d_k, d_v, i_b, i_g, start,
                                           p_k, p_v, k_t, v_t, 0, full, o_low, o_t + 1, exponent_scale, K, BS, BK,
                                           False, DESCRIBED, PRECISION)
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
        b_dq, b_rest, b_pk = rows_gradient(b_dq, b_rest, b_pk, b_q, b_dy, b_lse, b_delta, d_ks, d_vs, i_b, i_h, i_s,
                                           p_ks, p_vs, ks_t, vs_t, 0, past, o_low, o_t, exponent_scale, K, BS, BK,
                                           False, DESCRIBED, PRECISION)
        b_dq, b_rest, b_pk = rows_gradient(b_dq, b_rest, b_pk, b_q, b_dy, b_lse, b_delta, d_ks, d_vs, i_b, i_h, i_s,
                                           p_ks, p_vs, ks_t, vs_t, past, (last - 1) // C * R, o_t * 0,
                                           o_low // C * R, exponent_scale, K, BS, BK, True, BOUNDED, PRECISION)
    b_dq, b_rest, b_pk = rows_gradient(b_dq, b_rest, b_pk, b_q, b_dy, b_lse, b_delta, d_k, d_v, i_b, i_g, start, p_k,
                                       p_v, k_t, v_t, full, last, o_low, o_t + 1, exponent_scale, K, BS, BK, True,
                                       BOUNDED, PRECISION)
    if PRECISION == "ieee":  # as if D had been the sum of the p that were computed here
        b_dq -= b_rest[:, None] * b_pk
        b_delta += b_rest
    tl.store(p_delta + o_row, b_delta, mask=o_t < length)
    b_dq *= scale
    if TURNED:
        b_dq = turned(b_dq, p_table, start + o_t, o_t < length, -1.0, BK)
    put(p_dq + i_b * dq_b + start * dq_t + i_h * dq_h, b_dq, a, dq_t, length, K)


@triton.jit
def keys_gradient(b_dk, b_dv, b_k, b_v, d_q, d_dy, d_lse, d_delta, i_b, i_h, start, o_row, p_q, p_dy, p_lse, p_delta,
                  stride_q, stride_dy, first, tiles, jump, o_low, o_high, length, scale, K: tl.constexpr,
                  BT: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr, DESCRIBED: tl.constexpr,
                  LINES: tl.constexpr, PRECISION: tl.constexpr):
    """dk / scale and dv of keys over `tiles` of rows from `first` on, the last of them `jump` rows further away.

    Key s is seen by the rows o_low <= t < o_high. Without MASKED all tiles' rows are there, and see every key.
    """
    for i in range(tiles):
        i_t = first + i * BT
        if MASKED:
            i_t += tl.where(i == tiles - 1, jump, 0)
        o_t = i_t + tl.arange(0, BT)
        b_q = fetch(d_q, i_b, start, i_h, p_q, i_t, stride_q, length, BT, K, BK, MASKED, DESCRIBED)
        b_dy = fetch(d_dy, i_b, start, i_h, p_dy, i_t, stride_dy, length, BT, K, BK, MASKED, DESCRIBED)
        if LINES:  # by pointers each thread would fetch all that it needs for itself, 32 numbers
            b_lse, b_delta = d_lse.load([o_row + i_t]), d_delta.load([o_row + i_t])
        elif MASKED:
            b_lse = tl.load(p_lse + o_t, mask=o_t < length, other=float("inf"))
            b_delta = tl.load(p_delta + o_t, mask=o_t < length, other=0.0)
        else:
            b_lse, b_delta = tl.load(p_lse + o_t), tl.load(p_delta + o_t)
        zero = tl.zeros([b_k.shape[0], BT], tl.float32)
        b_s = dot(b_k, tl.trans(b_q), zero, PRECISION)
        b_dp = dot(b_v, tl.trans(b_dy), zero, PRECISION)
        b_s = b_s * scale - b_lse[None, :]
        if MASKED:
            seen = (o_t[None, :] >= o_low[:, None]) & (o_t[None, :] < o_high[:, None])
            b_s = tl.where(seen, b_s, float("-inf"))
        b_p = tl.exp2(b_s)
        b_dv = dot(b_p.to(b_dy.dtype), b_dy, b_dv, PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if MASKED:  # D beyond T is another head's, perhaps no number
            b_ds = tl.where(seen, b_ds, 0.0)
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk, PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=[*VARYING, "S"])
def dkdv_kernel(
    d_q, d_dy, d_lse, d_delta, p_q, p_k, p_v, p_dy, p_lse, p_delta, p_dk, p_dv, p_tiles, p_borders, p_entries,
    p_table, p_e, p_f, p_dks, p_dvs, T, S, NT, HEADS, SECTION, scale, exponent_scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h,
    H: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SUMMARIES: tl.constexpr,
    PROJECTED: tl.constexpr, DOCUMENTS: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr, DESCRIBED: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):
    """dk and dv of BS keys, which with SUMMARIES are those of block attention: p_k, p_v have S rows in all."""
    BOUNDED: tl.constexpr = DESCRIBED and not DOCUMENTS
    LINES: tl.constexpr = BOUNDED and C % 4 == 0  # lse and D by TMA, which wants 16 bytes' alignment of the first row
    i_head, i_s, i_n, start, length = place(tl.program_id(0), p_tiles, p_borders, T, NT, HEADS, SECTION, False,
                                            DOCUMENTS)
    i_b, i_g = (i_head // (H // GROUP)).to(tl.int64), i_head % (H // GROUP)
    first_key, keys = start, length
    if SUMMARIES:
        first_key, keys = start * 0, S
        if DOCUMENTS:
            first_key = tl.load(p_entries + i_n).to(tl.int64) * R
            keys = (length + C - 1) // C * R
    a = i_s * BS
    o_s = a + tl.arange(0, BS)
    b_k = tile(p_k + i_b * k_b + first_key * k_t + i_g * k_h, a, k_t, keys, BS, K, BK, True)
    b_v = tile(p_v + i_b * v_b + first_key * v_t + i_g * v_h, a, v_t, keys, BS, K, BK, True)
    b_dk = tl.zeros([BS, BK], tl.float32)
    b_dv = tl.zeros([BS, BK], tl.float32)
    # rows: `masked` tiles from `first` on that some keys do not see, `whole` ones from `full` on that all keys see and,
    # where rows are left over at the end, one more masked tile: `jump` rows after the place of the next
    if SUMMARIES:  # seen from the block after theirs on
        o_low, o_high = (o_s // R + 1) * C, o_s * 0 + length
        first, full = (a // R + 1) * C, ((a + BS - 1) // R + 1) * C
    elif C == 0:
        o_low, o_high = o_s, o_s * 0 + length
        first, full = a, a + BS
    else:
        o_low, o_high = o_s, tl.minimum((o_s // C + 1) * C, length)
        first, full = a, tl.minimum(((a + BS - 1) // C + 1) * C, length)
    masked = tl.cdiv(tl.maximum(tl.minimum(full, length) - first, 0), BT)
    full = first + masked * BT
    whole, jump = 0, 0
    if SUMMARIES or C == 0:
        whole = tl.maximum(length - full, 0) // BT
        if full + whole * BT < length:
            masked += 1
            jump = whole * BT
    for i in range(GROUP):
        i_h = i_g * GROUP + i
        p_q_ = p_q + i_b * q_b + start * q_t + i_h * q_h
        p_dy_ = p_dy + i_b * dy_b + start * dy_t + i_h * dy_h
        o_row = line(i_b * H + i_h, T) + start
        b_dk, b_dv = keys_gradient(b_dk, b_dv, b_k, b_v, d_q, d_dy, d_lse, d_delta, i_b, i_h, start, o_row.to(tl.int32),
                                   p_q_, p_dy_, p_lse + o_row, p_delta + o_row, q_t, dy_t, first, masked, jump,
                                   o_low, o_high, length, exponent_scale, K, BT, BK, True, BOUNDED, LINES,
                                   PRECISION)
        if SUMMARIES or C == 0:
            b_dk, b_dv = keys_gradient(b_dk, b_dv, b_k, b_v, d_q, d_dy, d_lse, d_delta, i_b, i_h, start,
                                       o_row.to(tl.int32), p_q_, p_dy_, p_lse + o_row, p_delta + o_row, q_t, dy_t, full,
                                       whole, 0, o_low, o_high, length, exponent_scale, K, BT, BK, False, DESCRIBED,
                                       LINES, PRECISION)
    b_dk *= scale
    if TURNED:
        b_dk = turned(b_dk, p_table, first_key + o_s, o_s < keys, -1.0, BK)
    if PROJECTED:  # the tile is a block, and gets what its summaries got: E^T dk', F^T dv'
        blocks = (length + C - 1) // C - 1
        if i_s < blocks:
            BR: tl.constexpr = triton.next_power_of_2(R) if R > 16 else 16
            dtype: tl.constexpr = p_dks.dtype.element_ty
            p, m = summary(p_dks, i_b * blocks + i_s, i_g, H, R, BR, BK)
            b_dk = dot(tl.trans(matrix(p_e, i_g, dtype, R, C, BR, BS)), tl.load(p, mask=m, other=0.0), b_dk, PRECISION)
            p, m = summary(p_dvs, i_b * blocks + i_s, i_g, H, R, BR, BK)
            b_dv = dot(tl.trans(matrix(p_f, i_g, dtype, R, C, BR, BS)), tl.load(p, mask=m, other=0.0), b_dv, PRECISION)
    put(p_dk + i_b * dk_b + first_key * dk_t + i_g * dk_h, b_dk, a, dk_t, keys, K)
    put(p_dv + i_b * dv_b + first_key * dv_t + i_g * dv_h, b_dv, a, dv_t, keys, K)


def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, k_past: Tensor | None, v_past: Tensor | None, y: Tensor,
             lse: Tensor, scale: float, block: int, rank: int, cu_seqlens: Tensor | None,
             out: tuple[Tensor, ...] | None = None, table: Tensor | None = None, past_table: Tensor | None = None,
             projections: tuple[Tensor, Tensor] | None = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """-> dq, dk, dv, which are `out` if given (channels side by side), and the gradients of the summaries.

    With a table of phases [T, 2, K // 2], K a power of two of at least 16, dq and dk are turned back by it (rotary.py);
    those of the summaries by one [M rank, 2, K // 2]. With E, F [H, rank, block] (summaries.py), which
    `takes_projections` must allow, dk and dv get the share of the summaries' gradients.
    """
    B, T, H, K = q.shape
    dy, q, k, v = (plain(x) for x in (dy, q, k, v))
    k_past, v_past = (None if x is None else plain(x) for x in (k_past, v_past))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v)) if out is None else out
    # entries after the last document's are nobody's, and their gradients 0
    new = torch.empty_like if cu_seqlens is None and T else torch.zeros_like
    dk_past, dv_past = (None if x is None else new(x, memory_format=torch.contiguous_format) for x in (k_past, v_past))
    if not q.numel():
        return dq, dk, dv, dk_past, dv_past
    delta = torch.empty_like(lse)
    keys = k, v, k_past, v_past
    by_tma = by_descriptors(lse, dy, q, *keys)
    group = H // k.shape[2]
    common = {"H": H, "C": block, "R": rank, "K": K, "DOCUMENTS": cu_seqlens is not None, "DESCRIBED": by_tma,
              "TURNED": table is not None, "PRECISION": precision(q.dtype)}
    first = entries(cu_seqlens, block)
    BK, (BT, BS, warps, stages) = tiling("dq", q, by_tma)
    tiles = None if cu_seqlens is None else document_chunks(cu_seqlens, T, BT)
    NT = triton.cdiv(T, BT) if tiles is None else len(tiles)
    with torch.cuda.device_of(q):
        dq_kernel[(NT * B * H,)](
            *(described(x, BS) if by_tma else None for x in keys),
            q, *keys, y, dy, lse, delta, dq, tiles, cu_seqlens, first, table, T, NT, B * H,
            section(k) * group, scale, scale * LOG2E.value, *strides(q), *(n for x in keys for n in strides(x)),
            *strides(y), *strides(dy), *strides(dq), GROUP=group, BT=BT, BS=BS, BK=BK, num_warps=warps,
            num_stages=stages, **common)
        BK, (BT, BS, warps, stages) = tiling("dkdv", q, by_tma)
        rows = (None,) * 4
        if by_tma:
            rows = described(q, BT), described(dy, BT), described_lines(lse, BT), described_lines(delta, BT)
        E, F = projections or (None, None)
        for k_, v_, dk_, dv_ in ((k_past, v_past, dk_past, dv_past), (k, v, dk, dv)):
            summaries = k_ is k_past
            if k_ is None or not k_.numel():
                continue
            S = k_.shape[1]
            if cu_seqlens is None:
                tiles, NT = None, triton.cdiv(S, BS)
            else:
                tiles = document_chunks(cu_seqlens if first is None or not summaries else first * rank, S, BS)
                NT = len(tiles)
            shared = 1 if summaries else group
            dkdv_kernel[(NT * B * k_.shape[2],)](
                *rows, q, k_, v_, dy, lse, delta, dk_, dv_, tiles, cu_seqlens, first,
                past_table if summaries else table, E, F, dk_past, dv_past, T, S, NT, B * k_.shape[2],
                max(1, section(q) // shared), scale, scale * LOG2E.value, *strides(q), *strides(k_), *strides(v_),
                *strides(dy), *strides(dk_), *strides(dv_), GROUP=shared, SUMMARIES=summaries,
                PROJECTED=E is not None and not summaries, BT=BT, BS=BS, BK=BK, num_warps=warps, num_stages=stages,
                **common)
    return dq, dk, dv, dk_past, dv_past


def by_descriptors(lse: Tensor, *loaded: Tensor | None) -> bool:
    """Whether tiles come by TMA, and lines of lse."""
    return describable(*loaded) and lse.numel() < 2**31


def takes_projections(block: int, lse: Tensor, *loaded: Tensor) -> bool:
    """Whether `backward` takes E and F: a tile of its keys is a block. loaded: dy, q, k, v and the summaries."""
    return tiling("dkdv", loaded[1], by_descriptors(lse, *loaded))[1][1] == block


def described_lines(x: Tensor, size: int) -> TensorDescriptor:
    """lse or D, for TMA in pieces of `size`."""
    return TensorDescriptor(x.view(-1), [x.numel()], [1], [size])
