"""Causal attention's forward pass in Gluon, for Hopper alone, and what attention_hopper_backward.py shares with it.

The equations are attention.py's, whose kernels take all other GPUs, dtypes and head sizes, documents and blocks. Done
by hand here is what Triton's compiler does not do: a product is waited for where its result is needed, not where it was
issued, so that a tile's exponentials are computed while the next product runs. Tiles are N x N and come by TMA into
rings of shared memory; of a row of tiles only the one on the diagonal is masked.

s_ names shared memory, d_ descriptors, c_ products under way. TMA reads zeros beyond T; lse is +inf there and D 0, so
that such rows have weights of 0 without a mask.
"""

from __future__ import annotations

import functools

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
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from zoo.kernels._common import LOG2E, power_of_two
from zoo.kernels.attention import PADDED, VARYING, describable, padded, rows, section

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the latter before Triton 3.7

N = PADDED  # rows and keys of a tile; of 128, in 4 or 8 warps, all kernels were slower, or at most 1 % faster
# tiles in a ring, by padded head size: the faster of 2 and 3 on an H100, torch 2.11, triton 3.6, 2026-11-25
STAGES = {64: {"forward": 2, "dq": 3, "dkdv": 3}, 128: {"forward": 2, "dq": 2, "dkdv": 2}}


@gluon.jit
def place(i, NT, HEADS, SECTION, BACKWARDS: gl.constexpr):
    """Program i -> its head and tile, in the order of attention.py's `place`."""
    section = i // (SECTION * NT)
    i = i - section * SECTION * NT
    width = gl.minimum(SECTION, HEADS - section * SECTION)
    i_t = i // width
    if BACKWARDS:
        i_t = NT - 1 - i_t
    return section * SECTION + i % width, i_t


@gluon.constexpr_function
def product(columns):
    """The layout of a product [N, columns] of a program's four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def ring(d, BK: gl.constexpr, STAGES: gl.constexpr):
    """Room for STAGES tiles [N, BK] of a descriptor, and for each a barrier that its arrival flips."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, BK], d.dtype)
    s = gl.allocate_shared_memory(d.dtype, [STAGES, N, BK], layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(bars.index(n), count=1)
    return s, bars


@gluon.jit
def fetch(d, i_b, i_t, i_h, s, bars, n, there):
    """If `there`, tile i_t of head i_h of x [B, T, H, K] into place n of a ring whose barrier expects it."""
    tma.async_copy_global_to_shared(d, [i_b, i_t * N, i_h, 0], bars.index(n),
                                    s.index(n)._reinterpret(d.dtype, d.block_shape, d.layout), there)


@gluon.jit
def put(p, b, i_b, i_t, i_h, T, ROW: gl.constexpr, K: gl.constexpr, LAYOUT: gl.constexpr):
    """b [N, columns] as tile i_t of head i_h of x [B, T, H, K], rows of ROW heads without gaps between them."""
    o_t = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    o_k = gl.arange(0, b.shape[1], gl.SliceLayout(0, LAYOUT))
    p += ((i_b.to(gl.int64) * T + i_t * N) * ROW + i_h) * K
    mask = (o_t < T - i_t * N)[:, None] & (o_k < K)[None, :]
    gl.store(p + (o_t[:, None] * (ROW * K) + o_k[None, :]), b.to(p.dtype.element_ty), mask=mask)


@gluon.jit
def weigh(b_s, b_max, b_sum, scale):
    """Scores -> weights, what is kept of the sums before, the new maximum, the new sum."""
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale)
    b_p = gl.exp2(b_s * scale - b_new[:, None])
    b_kept = gl.exp2(b_max - b_new)
    return b_p, b_kept, b_new, b_sum * b_kept + gl.sum(b_p, 1)


@gluon.jit(do_not_specialize=VARYING)
def forward_kernel(d_q, d_k, d_v, p_y, p_lse, T, NT, HEADS, SECTION, scale, H: gl.constexpr, GROUP: gl.constexpr,
                   K: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr):
    """y [B, T, H, K] and lse of N rows, over their tiles of keys from the diagonal back."""
    S: gl.constexpr = product(N)
    Y: gl.constexpr = product(BK)
    i_head, i_t = place(gl.program_id(0), NT, HEADS, SECTION, True)
    i_b, i_h = i_head // H, i_head % H
    i_g = i_h // GROUP
    s_q, bars_q = ring(d_q, BK, 1)
    s_k, bars_k = ring(d_k, BK, STAGES)
    s_v, bars_v = ring(d_v, BK, STAGES)
    size: gl.constexpr = d_q.block_type.nbytes
    mbarrier.expect(bars_q.index(0), size)
    for n in gl.static_range(STAGES):
        mbarrier.expect(bars_k.index(n), size, n <= i_t)
        mbarrier.expect(bars_v.index(n), size, n <= i_t)
    fence_async_shared()  # TMA is to see the barriers' beginnings
    barrier()
    fetch(d_q, i_b, i_t, i_h, s_q, bars_q, 0, True)
    for n in gl.static_range(STAGES):
        fetch(d_k, i_b, i_t - n, i_g, s_k, bars_k, n, n <= i_t)
        fetch(d_v, i_b, i_t - n, i_g, s_v, bars_v, n, n <= i_t)
    s_q = s_q.index(0)
    zero = gl.zeros([N, N], gl.float32, S)
    mbarrier.wait(bars_q.index(0), 0)
    mbarrier.wait(bars_k.index(0), 0)
    c_s = warpgroup_mma(s_q, s_k.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=(c_s,))
    mbarrier.expect(bars_k.index(0), size, i_t >= STAGES)
    barrier()
    fetch(d_k, i_b, i_t - STAGES, i_g, s_k, bars_k, 0, i_t >= STAGES)
    o_row, o_key = gl.arange(0, N, gl.SliceLayout(1, S)), gl.arange(0, N, gl.SliceLayout(0, S))
    b_s = gl.where(o_row[:, None] >= o_key[None, :], b_s, float("-inf"))
    b_max = gl.full([N], -1e30, gl.float32, gl.SliceLayout(1, S))
    b_p, _, b_max, b_sum = weigh(b_s, b_max, gl.zeros([N], gl.float32, gl.SliceLayout(1, S)), scale)
    b_y = gl.zeros([N, BK], gl.float32, Y)
    for i in range(1, i_t + 1):  # tile i's scores, then its weights while those of tile i - 1 are multiplied with v
        at, before = i % STAGES, (i - 1) % STAGES
        mbarrier.wait(bars_k.index(at), (i // STAGES) & 1)
        c_s = warpgroup_mma(s_q, s_k.index(at).permute((1, 0)), zero, use_acc=False, is_async=True)
        b_p = gl.convert_layout(b_p.to(s_q.dtype), gl.DotOperandLayout(0, Y, 2))
        mbarrier.wait(bars_v.index(before), ((i - 1) // STAGES) & 1)
        c_y = warpgroup_mma(b_p, s_v.index(before), b_y, is_async=True)
        b_s = warpgroup_mma_wait(1, deps=(c_s,))
        b_p, b_kept, b_max, b_sum = weigh(b_s, b_max, b_sum, scale)
        b_y = warpgroup_mma_wait(0, deps=(c_y,))
        j = i + STAGES  # the places of this tile's k and the last one's v are free
        mbarrier.expect(bars_k.index(at), size, j <= i_t)
        mbarrier.expect(bars_v.index(before), size, j - 1 <= i_t)
        barrier()
        fetch(d_k, i_b, i_t - j, i_g, s_k, bars_k, at, j <= i_t)
        fetch(d_v, i_b, i_t - j + 1, i_g, s_v, bars_v, before, j - 1 <= i_t)
        b_y = b_y * gl.convert_layout(b_kept, gl.SliceLayout(1, Y))[:, None]
    b_p = gl.convert_layout(b_p.to(s_q.dtype), gl.DotOperandLayout(0, Y, 2))
    mbarrier.wait(bars_v.index(i_t % STAGES), (i_t // STAGES) & 1)
    c_y = warpgroup_mma(b_p, s_v.index(i_t % STAGES), b_y, is_async=True)
    b_y = warpgroup_mma_wait(0, deps=(c_y,))
    put(p_y, b_y / gl.convert_layout(b_sum, gl.SliceLayout(1, Y))[:, None], i_b, i_t, i_h, T, H, K, Y)
    o_row += i_t * N
    b_lse = gl.where(o_row < T, b_max + gl.log2(b_sum), float("inf"))
    gl.store(p_lse + i_head.to(gl.int64) * (NT * N) + o_row, b_lse)


def takes(q: Tensor, k: Tensor, v: Tensor, block: int, cu_seqlens: Tensor | None) -> bool:
    """Whether these kernels run: on Hopper, for 16-bit heads of 40 to 128, and neither blocks nor documents."""
    return (not block and cu_seqlens is None and power_of_two(q.shape[-1]) in STAGES and q.is_cuda
            and torch.cuda.get_device_capability(q.device)[0] == 9 and describable(q, k, v))


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As attention.py's `forward`, of what is taken."""
    B, T, H, K = q.shape
    y, lse = q.new_empty(q.shape), q.new_empty(B, H, padded(T), dtype=torch.float32)
    NT, group, BK = triton.cdiv(T, N.value), H // k.shape[2], power_of_two(K)
    with torch.cuda.device_of(q):
        forward_kernel[(NT * B * H,)](
            described(q), described(k), described(v), y, lse, T, NT, B * H, section(k) * group, scale * LOG2E.value,
            H=H, GROUP=group, K=K, BK=BK, STAGES=STAGES[BK]["forward"], num_warps=4)
    return y, lse


def described(x: Tensor) -> TensorDescriptor:
    """x [B, T, H, K] for TMA in tiles of N rows of a head."""
    BK = power_of_two(x.shape[3])
    return TensorDescriptor(x, list(x.shape), [*rows(x), 1], [1, N.value, 1, BK], tile_layout(BK, x.dtype))


@functools.cache
def tile_layout(BK: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, N.value, 1, BK], element)
