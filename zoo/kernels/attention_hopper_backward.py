"""Gradients of causal attention in Gluon: attention_hopper.py says how, attention_backward.py what."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from zoo.kernels._common import LOG2E, power_of_two
from zoo.kernels.attention import VARYING, describable, section
from zoo.kernels.attention_hopper import STAGES, N, barrier, described, fetch, place, product, put, ring
from zoo.kernels.rotary import in_registers, turn


@gluon.jit
def put_gradient(p, b, p_table, i_b, i_t, i_h, T, ROW: gl.constexpr, K: gl.constexpr, BK: gl.constexpr,
                 TURNED: gl.constexpr):
    """`put` of b [N, BK], which if TURNED is first turned back by the phases [T, 2, K // 2] of its rows; then K = BK.

    Both channels of a pair are in one thread's registers.
    """
    if TURNED:
        HALF: gl.constexpr = product(BK // 2)
        o_t = i_t * N + gl.arange(0, N, gl.SliceLayout(1, HALF))
        o_k = gl.arange(0, BK // 2, gl.SliceLayout(0, HALF))
        p_table += gl.minimum(o_t, T - 1)[:, None] * BK + o_k[None, :]
        b_cos, b_sin = gl.load(p_table), gl.load(p_table + BK // 2)
        b_first, b_second = gl.split(b.reshape([N, 2, BK // 2]).permute((0, 2, 1)))
        b_first = gl.convert_layout(b_first, HALF, assert_trivial=True)
        b_second = gl.convert_layout(b_second, HALF, assert_trivial=True)
        put(p, b_first * b_cos + b_second * b_sin, i_b, i_t, i_h, T, ROW, K, HALF)
        put(p + BK // 2, b_second * b_cos - b_first * b_sin, i_b, i_t, i_h, T, ROW, K, HALF)
    else:
        put(p, b, i_b, i_t, i_h, T, ROW, K, product(BK))


@gluon.jit
def rows_gradient(b_dq, s_q, s_dy, b_lse, b_delta, d_k, d_v, s_k, bars_k, s_v, bars_v, i_b, i_g, first, last, scale,
                  STAGES: gl.constexpr, MASKED: gl.constexpr, S: gl.constexpr, Q: gl.constexpr):
    """dq / scale of tile `last`'s rows, a product under way, over tiles of keys from `first` up to it, or it alone."""
    for i in range(first, last + MASKED):
        n = i % STAGES
        phase = (i // STAGES) & 1
        zero = gl.zeros([N, N], gl.float32, S)
        mbarrier.wait(bars_k.index(n), phase)
        c_s = warpgroup_mma(s_q, s_k.index(n).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(bars_v.index(n), phase)
        c_dp = warpgroup_mma(s_dy, s_v.index(n).permute((1, 0)), zero, use_acc=False, is_async=True)
        b_s, b_dq = warpgroup_mma_wait(1, deps=(c_s, b_dq))
        j = i + STAGES - 1  # takes the places of the tile before this one, which has now been used
        there = (i > 0) & (j <= last)
        mbarrier.expect(bars_k.index(j % STAGES), d_k.block_type.nbytes, there)
        mbarrier.expect(bars_v.index(j % STAGES), d_v.block_type.nbytes, there)
        barrier()
        fetch(d_k, i_b, j, i_g, s_k, bars_k, j % STAGES, there)
        fetch(d_v, i_b, j, i_g, s_v, bars_v, j % STAGES, there)
        b_s = b_s * scale - b_lse[:, None]
        if MASKED:
            o_row, o_key = gl.arange(0, N, gl.SliceLayout(1, S)), gl.arange(0, N, gl.SliceLayout(0, S))
            b_s = gl.where(o_row[:, None] >= o_key[None, :], b_s, float("-inf"))
        b_p = gl.exp2(b_s)
        b_dp = warpgroup_mma_wait(0, deps=(c_dp,))
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_ds = gl.convert_layout(b_ds.to(s_q.dtype), gl.DotOperandLayout(0, Q, 2))
        b_dq = warpgroup_mma(b_ds, s_k.index(n), b_dq, is_async=True)
    return b_dq


@gluon.jit(do_not_specialize=VARYING)
def dq_kernel(d_q, d_k, d_v, d_y, d_dy, p_lse, p_delta, p_dq, p_table, T, NT, HEADS, SECTION, scale, exponent_scale,
              H: gl.constexpr, GROUP: gl.constexpr, K: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
              ROW: gl.constexpr, TURNED: gl.constexpr):
    """dq of N rows, and on the way D, which `dkdv_kernel` needs."""
    S: gl.constexpr = product(N)
    Q: gl.constexpr = product(BK)
    i_head, i_t = place(gl.program_id(0), NT, HEADS, SECTION, True)
    i_b, i_h = i_head // H, i_head % H
    i_g = i_h // GROUP
    s_q, bars_q = ring(d_q, BK, 1)
    s_dy, bars_dy = ring(d_dy, BK, 1)
    s_k, bars_k = ring(d_k, BK, STAGES)
    s_v, bars_v = ring(d_v, BK, STAGES)
    size: gl.constexpr = d_q.block_type.nbytes
    mbarrier.expect(bars_q.index(0), size)
    mbarrier.expect(bars_dy.index(0), size)
    for n in gl.static_range(STAGES):
        mbarrier.expect(bars_k.index(n), size, n <= i_t)
        mbarrier.expect(bars_v.index(n), size, n <= i_t)
    fence_async_shared()
    barrier()
    fetch(d_y, i_b, i_t, i_h, s_q, bars_q, 0, True)  # y first, then q in its place
    fetch(d_dy, i_b, i_t, i_h, s_dy, bars_dy, 0, True)
    for n in gl.static_range(STAGES):
        fetch(d_k, i_b, n, i_g, s_k, bars_k, n, n <= i_t)
        fetch(d_v, i_b, n, i_g, s_v, bars_v, n, n <= i_t)
    s_q, s_dy = s_q.index(0), s_dy.index(0)
    mbarrier.wait(bars_q.index(0), 0)
    mbarrier.wait(bars_dy.index(0), 0)
    b_delta = gl.sum(s_q.load(Q).to(gl.float32) * s_dy.load(Q).to(gl.float32), 1)
    b_delta = gl.convert_layout(b_delta, gl.SliceLayout(1, S))
    mbarrier.expect(bars_q.index(0), size)
    barrier()
    tma.async_copy_global_to_shared(d_q, [i_b, i_t * N, i_h, 0], bars_q.index(0),
                                    s_q._reinterpret(d_q.dtype, d_q.block_shape, d_q.layout))
    o_row = i_head.to(gl.int64) * (NT * N) + i_t * N + gl.arange(0, N, gl.SliceLayout(1, S))
    b_lse = gl.load(p_lse + o_row)
    gl.store(p_delta + o_row, b_delta)
    mbarrier.wait(bars_q.index(0), 1)
    b_dq = warpgroup_mma_init(gl.zeros([N, BK], gl.float32, Q))
    b_dq = rows_gradient(b_dq, s_q, s_dy, b_lse, b_delta, d_k, d_v, s_k, bars_k, s_v, bars_v, i_b, i_g, 0, i_t,
                         exponent_scale, STAGES, False, S, Q)
    b_dq = rows_gradient(b_dq, s_q, s_dy, b_lse, b_delta, d_k, d_v, s_k, bars_k, s_v, bars_v, i_b, i_g, i_t, i_t,
                         exponent_scale, STAGES, True, S, Q)
    b_dq = warpgroup_mma_wait(0, deps=(b_dq,))
    put_gradient(p_dq, b_dq * scale, p_table, i_b, i_t, i_h, T, ROW, K, BK, TURNED)


@gluon.jit
def line_ring(d, STAGES: gl.constexpr):
    """As `ring`, of N numbers in a row."""
    s = gl.allocate_shared_memory(d.dtype, [STAGES, N], d.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(bars.index(n), count=1)
    return s, bars


@gluon.jit
def expect_rows(d, bars, n, there):
    for m in gl.static_range(4):
        mbarrier.expect(bars[m].index(n), d[m].block_type.nbytes, there)


@gluon.jit
def fetch_rows(d, s, bars, i, there, i_b, i_h, i_s, NT, H: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """q, dy, lse and D of step i, of these: for each head of the group its tiles of rows from the last to the one after
    the diagonal; for each head the one on it.
    """
    after = NT - 1 - i_s
    if GROUP == 1:
        i_t = NT - 1 - i
    else:
        on = i >= GROUP * after
        i_h = i_h + gl.where(on, i - GROUP * after, i // gl.maximum(after, 1))
        i_t = gl.where(on, i_s, NT - 1 - i % gl.maximum(after, 1))
    n = i % STAGES
    fetch(d[0], i_b, i_t, i_h, s[0], bars[0], n, there)
    fetch(d[1], i_b, i_t, i_h, s[1], bars[1], n, there)
    o_row = ((i_b * H + i_h) * NT + i_t) * N
    tma.async_copy_global_to_shared(d[2], [o_row], bars[2].index(n), s[2].index(n), there)
    tma.async_copy_global_to_shared(d[3], [o_row], bars[3].index(n), s[3].index(n), there)


@gluon.jit
def keys_gradient(b_dk, b_dv, s_k, s_v, d, s, bars, first, last, i_b, i_h, i_s, NT, scale, H: gl.constexpr,
                  GROUP: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, S: gl.constexpr, Q: gl.constexpr):
    """dk / scale and dv of tile i_s's keys, products under way, over the steps first .. last - 1."""
    for i in range(first, last):
        n = i % STAGES
        phase = (i // STAGES) & 1
        zero = gl.zeros([N, N], gl.float32, S)
        mbarrier.wait(bars[0].index(n), phase)
        c_s = warpgroup_mma(s_k, s[0].index(n).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(bars[1].index(n), phase)
        c_dp = warpgroup_mma(s_v, s[1].index(n).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(bars[2].index(n), phase)
        mbarrier.wait(bars[3].index(n), phase)
        b_lse = s[2].index(n).load(gl.SliceLayout(0, S))
        b_s, b_dk, b_dv = warpgroup_mma_wait(1, deps=(c_s, b_dk, b_dv))
        j = i + STAGES - 1  # takes the places of the tile before this one, which has now been used
        there = (i > 0) & (j < GROUP * (NT - i_s))
        expect_rows(d, bars, j % STAGES, there)
        barrier()
        fetch_rows(d, s, bars, j, there, i_b, i_h, i_s, NT, H, GROUP, STAGES)
        b_s = b_s * scale - b_lse[None, :]
        if MASKED:
            o_key, o_row = gl.arange(0, N, gl.SliceLayout(1, S)), gl.arange(0, N, gl.SliceLayout(0, S))
            b_s = gl.where(o_row[None, :] >= o_key[:, None], b_s, float("-inf"))
        b_p = gl.exp2(b_s)
        b_w = gl.convert_layout(b_p.to(s_k.dtype), gl.DotOperandLayout(0, Q, 2))
        c_dv = warpgroup_mma(b_w, s[1].index(n), b_dv, is_async=True)
        b_delta = s[3].index(n).load(gl.SliceLayout(0, S))
        b_dp = warpgroup_mma_wait(1, deps=(c_dp,))
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_ds = gl.convert_layout(b_ds.to(s_k.dtype), gl.DotOperandLayout(0, Q, 2))
        b_dk = warpgroup_mma(b_ds, s[0].index(n), b_dk, is_async=True)
        b_dv = c_dv
    return b_dk, b_dv


@gluon.jit(do_not_specialize=VARYING)
def dkdv_kernel(d_q, d_k, d_v, d_dy, d_lse, d_delta, p_dk, p_dv, p_table, T, NT, HEADS, SECTION, scale, exponent_scale,
                H: gl.constexpr, GROUP: gl.constexpr, K: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
                ROW: gl.constexpr, TURNED: gl.constexpr):
    """dk and dv of N keys, over the rows of all heads of their group."""
    S: gl.constexpr = product(N)
    Q: gl.constexpr = product(BK)
    G: gl.constexpr = H // GROUP
    i_head, i_s = place(gl.program_id(0), NT, HEADS, SECTION, False)
    i_b, i_g = i_head // G, i_head % G
    i_h = i_g * GROUP
    s_k, bars_k = ring(d_k, BK, 1)
    s_v, bars_v = ring(d_v, BK, 1)
    s_q, bars_q = ring(d_q, BK, STAGES)
    s_dy, bars_dy = ring(d_dy, BK, STAGES)
    s_lse, bars_lse = line_ring(d_lse, STAGES)
    s_delta, bars_delta = line_ring(d_delta, STAGES)
    d, s = (d_q, d_dy, d_lse, d_delta), (s_q, s_dy, s_lse, s_delta)
    bars = bars_q, bars_dy, bars_lse, bars_delta
    steps = GROUP * (NT - i_s)
    before = gl.maximum(steps - GROUP, 0)  # never below 0, but then the compiler knows how many are on the diagonal
    mbarrier.expect(bars_k.index(0), d_k.block_type.nbytes)
    mbarrier.expect(bars_v.index(0), d_v.block_type.nbytes)
    for n in gl.static_range(STAGES):
        expect_rows(d, bars, n, n < steps)
    fence_async_shared()
    barrier()
    fetch(d_k, i_b, i_s, i_g, s_k, bars_k, 0, True)
    fetch(d_v, i_b, i_s, i_g, s_v, bars_v, 0, True)
    for n in gl.static_range(STAGES):
        fetch_rows(d, s, bars, n, n < steps, i_b, i_h, i_s, NT, H, GROUP, STAGES)
    s_k, s_v = s_k.index(0), s_v.index(0)
    mbarrier.wait(bars_k.index(0), 0)
    mbarrier.wait(bars_v.index(0), 0)
    # ptxas serialises all products if it sees sums set to zero between two that run: hence loops alone, diagonal last
    b_dk = warpgroup_mma_init(gl.zeros([N, BK], gl.float32, Q))
    b_dv = warpgroup_mma_init(gl.zeros([N, BK], gl.float32, Q))
    b_dk, b_dv = keys_gradient(b_dk, b_dv, s_k, s_v, d, s, bars, 0, before, i_b, i_h, i_s, NT,
                               exponent_scale, H, GROUP, STAGES, False, S, Q)
    b_dk, b_dv = keys_gradient(b_dk, b_dv, s_k, s_v, d, s, bars, before, steps, i_b, i_h, i_s, NT,
                               exponent_scale, H, GROUP, STAGES, True, S, Q)
    b_dk, b_dv = warpgroup_mma_wait(0, deps=(b_dk, b_dv))
    put_gradient(p_dv, b_dv, p_table, i_b, i_s, i_g, T, ROW, K, BK, False)
    put_gradient(p_dk, b_dk * scale, p_table, i_b, i_s, i_g, T, ROW, K, BK, TURNED)


def backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
             scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, as attention_backward.py's `backward`, of what is taken."""
    out = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    write(*out, dy, q, k, v, y, lse, scale, None)
    return out


def backward_in_row(dqkv: Tensor, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float,
                    table: Tensor) -> None:
    """dq, dk, dv side by side into dqkv [B, T, H + 2 G, K] without gaps; dq and dk turned back (rotary.py)."""
    H, G, K = q.shape[2], k.shape[2], q.shape[3]
    inside = in_registers(K)
    out = dqkv[:, :, :H], dqkv[:, :, H : H + G], dqkv[:, :, H + G :]
    write(*out, dy, q, k, v, y, lse, scale, table if inside else None)
    if not inside:  # a pair's channels are in two threads
        qk = dqkv[:, :, : H + G]
        turn(qk, table, out=qk, back=True)


def write(dq: Tensor, dk: Tensor, dv: Tensor, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
          scale: float, table: Tensor | None) -> None:
    B, T, H, K = q.shape
    G = k.shape[2]
    delta = torch.empty_like(lse)
    if not describable(dy):
        dy = dy.clone(memory_format=torch.contiguous_format)
    NT, BK = triton.cdiv(T, N.value), power_of_two(K)
    common = {"H": H, "GROUP": H // G, "K": K, "BK": BK, "TURNED": table is not None, "num_warps": 4}
    d_q, d_k, d_v, d_dy = (described(x) for x in (q, k, v, dy))
    with torch.cuda.device_of(q):
        dq_kernel[(NT * B * H,)](
            d_q, d_k, d_v, described(y), d_dy, lse, delta, dq, table, T, NT, B * H, section(k) * (H // G), scale,
            scale * LOG2E.value, STAGES=STAGES[BK]["dq"], ROW=dq.stride(1) // K, **common)
        dkdv_kernel[(NT * B * G,)](
            d_q, d_k, d_v, d_dy, described_line(lse), described_line(delta), dk, dv, table, T, NT, B * G,
            max(1, section(q) * G // H), scale, scale * LOG2E.value, STAGES=STAGES[BK]["dkdv"], ROW=dk.stride(1) // K,
            **common)


def described_line(x: Tensor) -> TensorDescriptor:
    """lse or D for TMA, N numbers at a time."""
    return TensorDescriptor(x.view(-1), [x.numel()], [1], [N.value], gl.NVMMASharedLayout(0, 32, 1))
