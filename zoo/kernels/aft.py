"""AFT with position biases (2105.14103, equation 2), causal, with its gate; AFT-full and AFT-local. Forward.

    y_t = sigmoid(q_t) * mean_t,   mean_t = num_t / den_t,   num_t, den_t = sum_{s<=t} exp(k_s + w_ts) (v_s, 1)

Per channel the exponentials factor, so that the sums are products of matrices: with A_ts = exp(w_ts - r_t), r_t the
largest bias of the row (made once for all channels, `table`), and e_i the largest key before the block i of BT rows,

    num_t = sum_{s<=t} A_ts exp(k_s - e_i) v_s      as multiples of exp(e_i + r_t).

Before the block all exponents are <= 0. Within it they are not: keys of later rows may be larger. They are used as they
stand where no key of the block exceeds e_i by more than LIMIT, which a program sees before it starts (A's floor of
exp(-60) and exp(LIMIT) keep den a normal number). Otherwise the block's own keys are added one by one to
running maxima: slow, exact, and rare. Block 0, with nothing before, takes its first key for e.

AFT-local is the same with a table of NB blocks back and the rows' own; what lies further back, where biases are 0,
comes as sums from `prepare`, which walks the sequence once and also finds the e_i.

The table is rounded to the operands' type: bf16 for bf16, else float32 (fp16 has no room for exponentials).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, document_chunks, dot, power_of_two

FLOOR = tl.constexpr(-60.0)  # how far below the largest of its row a bias can count
LIMIT = tl.constexpr(20.0)  # how far above e_i a key of block i may be for the block to be one product


class Config(NamedTuple):
    """BT rows of a block, BS keys at once, BC channels."""

    BT: int
    BS: int
    BC: int
    warps: int
    stages: int


# (kernel, local, bytes of an operand); those of 2 bytes measured on H200, torch 2.11, Triton 3.6, 2026-11-24
CONFIGS = {
    ("forward", False, 2): Config(128, 64, 64, 4, 3), ("forward", False, 4): Config(64, 32, 32, 4, 2),
    ("columns", False, 2): Config(128, 64, 64, 4, 3), ("columns", False, 4): Config(64, 32, 32, 4, 2),
    ("table", False, 2): Config(128, 128, 64, 8, 3), ("table", False, 4): Config(64, 64, 32, 4, 2),
    ("forward", True, 2): Config(64, 64, 64, 4, 2), ("forward", True, 4): Config(64, 32, 32, 4, 2),
    ("columns", True, 2): Config(64, 64, 64, 4, 3), ("columns", True, 4): Config(64, 32, 32, 4, 2),
    ("table", True, 2): Config(64, 64, 64, 4, 2), ("table", True, 4): Config(64, 64, 32, 4, 2),
}


def config(kernel: str, local: bool, size: int) -> Config:
    """The configuration on this machine: Triton's interpreter gets small blocks, to have several."""
    return Config(16, 16, 16, 4, 1) if INTERPRETED else CONFIGS[kernel, local, size]


@triton.jit
def document(cu_seqlens, i_n, T, P, BT: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of row or document i_n: its row in memory, its first token there, its length, its first block of all."""
    if DOCUMENTS:
        start = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - start).to(tl.int32)
        return i_n * 0, start, tl.minimum(length, P), start // BT + i_n
    else:
        return i_n, i_n * 0, T, i_n * tl.cdiv(T, BT)


@triton.jit
def locate(slot, blocks, T, BT: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Of program slot: its row or document, -1 for none, and its block there. The longest sums begin first."""
    if DOCUMENTS:
        return tl.load(blocks + 2 * slot).to(tl.int64), tl.load(blocks + 2 * slot + 1)
    else:
        n = tl.cdiv(T, BT)
        return (slot // n).to(tl.int64), n - 1 - slot % n


@triton.jit(do_not_specialize=["bias_t", "rows", "columns", "W"])
def table_kernel(bias, table, far, bias_t, rows, columns, W, BT: tl.constexpr, BC: tl.constexpr, NB: tl.constexpr,
                 LOCAL: tl.constexpr):
    """A [rows, columns], 0 for keys of the future and past the last row; LOCAL: also A of what no window reaches."""
    i_t = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BC)
    p_bias = bias + i_t * bias_t
    within = tl.where(i_t < rows, tl.minimum(W, i_t + 1) if not LOCAL else W, 0)  # biases that count
    largest = tl.full([BC], 0.0 if LOCAL else float("-inf"), tl.float32)
    for i in range(0, within, BC):
        largest = tl.maximum(largest, tl.load(p_bias + i + o, mask=i + o < within, other=float("-inf")).to(tl.float32))
    r = tl.where(within > 0, tl.max(largest, 0), 0.0)
    beyond = tl.exp(tl.maximum(0.0 - r, FLOOR))
    for i in range(0, columns, BC):
        at = i + o
        if LOCAL:
            at = i_t % BT + NB * BT - at  # the distance
        seen = (at >= 0) & (i_t < rows)
        b = tl.load(p_bias + at, mask=seen & (at < within), other=float("-inf")).to(tl.float32)
        a = tl.exp(tl.minimum(tl.maximum(b - r, FLOOR), 0.0))
        if LOCAL:
            a = tl.where(at < within, a, beyond)
        else:
            seen = seen & (at <= i_t)
        tl.store(table + i_t * columns + i + o, tl.where(seen, a, 0.0).to(table.dtype.element_ty), mask=i + o < columns)
    if LOCAL:
        tl.store(far + i_t, tl.where(i_t < rows, beyond, 0.0))


@triton.jit(do_not_specialize=["T", "P", "chunks"])
def prepare_kernel(k, v, tops, past, cu_seqlens, T, P, C, chunks, k_b, k_t, v_b, v_t, BT: tl.constexpr,
                   BC: tl.constexpr, STAGES: tl.constexpr, LOCAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """tops [2, chunks, C]: the largest key before a block and up to its end; LOCAL: past [2, chunks, C], the sums."""
    i_n, i_c = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64), tl.program_id(0) % tl.cdiv(C, BC)
    i_b, start, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    o_c, o_t = i_c * BC + tl.arange(0, BC), tl.arange(0, BT)
    m_c = o_c < C
    p_k = k + i_b * k_b + start * k_t + o_c
    p_v = v + i_b * v_b + start * v_t + o_c
    plane = tl.cast(chunks, tl.int64) * C
    p_tops = tops + chunk * C + o_c
    p_past = past + chunk * C + o_c
    top = tl.load(p_k, mask=m_c & (length > 0), other=0).to(tl.float32)
    num = tl.zeros([BC], tl.float32)
    den = tl.zeros([BC], tl.float32)
    for i_t in tl.range(0, tl.cdiv(length, BT), num_stages=STAGES):
        row = (i_t * BT + o_t)[:, None].to(tl.int64)
        mask = (row < length) & m_c[None, :]
        b_k = tl.load(p_k[None, :] + row * k_t, mask=mask, other=float("-inf")).to(tl.float32)
        after = tl.maximum(top, tl.max(b_k, 0))
        tl.store(p_tops, top, mask=m_c)
        tl.store(p_tops + plane, after, mask=m_c)
        p_tops += C
        if LOCAL:
            b_v = tl.load(p_v[None, :] + row * v_t, mask=mask, other=0).to(tl.float32)
            tl.store(p_past, num, mask=m_c)
            tl.store(p_past + plane, den, mask=m_c)
            p_past += C
            fall = tl.exp(top - after)
            p = tl.where(mask, tl.exp(b_k - after[None, :]), 0.0)
            num = num * fall + tl.sum(p * b_v, 0)
            den = den * fall + tl.sum(p, 0)
        top = after


@triton.jit(do_not_specialize=["T", "P", "chunks", "slots"])
def forward_kernel(q, k, v, y, mean, den, table, far, tops, past, cu_seqlens, blocks, slots, T, P, columns, C, chunks,
                   q_b, q_t, k_b, k_t, v_b, v_t, BT: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
                   NB: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, LOCAL: tl.constexpr,
                   DOCUMENTS: tl.constexpr):
    i_c = tl.program_id(0) // slots
    i_n, i_t = locate(tl.program_id(0) % slots, blocks, T, BT, DOCUMENTS)
    if i_n < 0:
        return
    i_b, start, length, chunk = document(cu_seqlens, i_n, T, P, BT, DOCUMENTS)
    if i_t * BT >= length:
        return
    chunk += i_t
    o_c, o_t, o_s = i_c * BC + tl.arange(0, BC), i_t * BT + tl.arange(0, BT), tl.arange(0, BS)
    m_c = o_c < C
    p_k = k + i_b * k_b + start * k_t + o_c
    p_v = v + i_b * v_b + start * v_t + o_c
    base = i_t * 0
    if LOCAL:
        base = (i_t - NB) * BT  # the key of the table's first column
    p_table = table + o_t[:, None].to(tl.int64) * columns - base
    plane = tl.cast(chunks, tl.int64) * C
    top = tl.load(tops + chunk * C + o_c, mask=m_c, other=0)
    steep = tl.load(tops + plane + chunk * C + o_c, mask=m_c, other=0) - top > LIMIT
    slow = tl.max(steep.to(tl.int32), 0) > 0

    b_num = tl.zeros([BT, BC], tl.float32)
    b_den = tl.zeros([BT, BC], tl.float32)
    if LOCAL:  # noqa: SIM102 - decided while compiling
        if base > 0:
            before = (chunk - NB) * C + o_c
            fall = tl.exp(tl.load(tops + before, mask=m_c, other=0) - top)
            b_far = tl.load(far + o_t)[:, None]
            b_num += b_far * (fall * tl.load(past + before, mask=m_c, other=0))[None, :]
            b_den += b_far * (fall * tl.load(past + plane + before, mask=m_c, other=0))[None, :]
    own = i_t * BT
    for i_s in tl.range(tl.maximum(base, 0), tl.where(slow, own, tl.minimum(own + BT, length)), BS, num_stages=STAGES):
        row = (i_s + o_s)[:, None].to(tl.int64)
        mask = (row < length) & m_c[None, :]
        b_a = tl.load(p_table + (i_s + o_s)[None, :])
        b_k = tl.load(p_k[None, :] + row * k_t, mask=mask, other=float("-inf")).to(tl.float32)
        b_v = tl.load(p_v[None, :] + row * v_t, mask=mask, other=0).to(tl.float32)
        p = tl.exp(b_k - top[None, :])
        b_num = dot(b_a, (p * b_v).to(b_a.dtype), b_num, PRECISION)
        b_den = dot(b_a, p.to(b_a.dtype), b_den, PRECISION)
    if slow:
        b_m = tl.zeros([BT, BC], tl.float32) + top[None, :]
        for i_s in range(own, tl.minimum(own + BT, length)):
            at = tl.cast(i_s, tl.int64)
            b_k = tl.load(p_k + at * k_t, mask=m_c, other=0).to(tl.float32)[None, :]
            b_v = tl.load(p_v + at * v_t, mask=m_c, other=0).to(tl.float32)[None, :]
            b_a = tl.load(table + o_t.to(tl.int64) * columns + (i_s - base)).to(tl.float32)[:, None]
            b_next = tl.where(o_t[:, None] >= i_s, tl.maximum(b_m, b_k), b_m)
            fall = tl.exp(b_m - b_next)
            p = b_a * tl.exp(tl.minimum(b_k - b_next, 0.0))
            b_num = b_num * fall + p * b_v
            b_den = b_den * fall + p
            b_m = b_next
        back = tl.where(steep[None, :], 1.0, tl.exp(tl.minimum(b_m - top[None, :], LIMIT)))
        b_num *= back
        b_den *= back
    row = o_t[:, None].to(tl.int64)
    mask = (row < length) & m_c[None, :]
    b_mean = b_num / b_den
    b_q = tl.load(q + i_b * q_b + (start + row) * q_t + o_c[None, :], mask=mask, other=0).to(tl.float32)
    at = (i_b * T + start + row) * C + o_c[None, :]
    tl.store(y + at, (tl.sigmoid(b_q) * b_mean).to(y.dtype.element_ty), mask=mask)
    tl.store(mean + at, b_mean.to(mean.dtype.element_ty), mask=mask)
    tl.store(den + at, b_den, mask=mask)


class Problem:
    """Shapes, strides and what is made once for all channels, for the launches of one call."""

    def __init__(self, k: Tensor, v: Tensor, bias: Tensor, local: bool, cu_seqlens: Tensor | None):
        self.batch, self.length, self.channels = k.shape
        self.local, self.cu_seqlens = local, cu_seqlens
        self.size = operand(v).itemsize
        self.BT = config("forward", local, self.size).BT
        self.NB = -(-(bias.shape[1] - 1) // self.BT) if local else 0
        self.rows = self.length if cu_seqlens is None else min(self.length, len(bias))
        padded = -(-self.rows // self.BT) * self.BT
        self.columns = (self.NB + 1) * self.BT if local else padded
        self.table_shape = padded, self.columns
        self.PRECISION = "tf32" if v.dtype == torch.float16 else "tf32x3"
        if cu_seqlens is None:
            self.chunks, self.blocks = self.batch * -(-self.length // self.BT), None
            self.documents, self.slots = self.batch, self.chunks
        else:
            self.documents = len(cu_seqlens) - 1
            self.chunks = self.slots = self.length // self.BT + self.documents
            self.blocks = document_chunks(cu_seqlens, self.length, self.BT)

    def options(self, kernel: str) -> tuple[Config, dict[str, int | bool]]:
        """The configuration, and the constants that go with it."""
        c = config(kernel, self.local, self.size)
        return c, {"BT": self.BT, "BC": min(c.BC, max(16, power_of_two(self.channels))), "STAGES": c.stages,
                   "LOCAL": self.local, "DOCUMENTS": self.cu_seqlens is not None, "num_warps": c.warps}


def operand(v: Tensor) -> torch.dtype:
    """The type of the factors of the products."""
    return torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32


def make_table(bias: Tensor, problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A, and A of what no window reaches."""
    table = bias.new_empty(problem.table_shape, dtype=dtype)
    far = bias.new_empty(problem.table_shape[0] if problem.local else 0, dtype=torch.float32)
    BC = min(1024, power_of_two(problem.columns)) if problem.local else 1024  # full: columns are as many as tokens
    table_kernel[(len(table),)](bias, table, far, bias.stride(0), problem.rows, problem.columns, bias.shape[1],
                                BT=problem.BT, BC=BC, NB=problem.NB, LOCAL=problem.local, num_warps=4)
    return table, far


def prepare(k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """The largest keys before and up to the end of every block; the sums before it."""
    p = problem
    tops = k.new_empty(2, p.chunks, p.channels, dtype=torch.float32)
    past = torch.empty_like(tops) if p.local else tops
    BC = 16 if INTERPRETED else 32
    prepare_kernel[(p.documents * triton.cdiv(p.channels, BC),)](
        k, v, tops, past, p.cu_seqlens, p.length, p.rows, p.channels, p.chunks, *k.stride()[:2], *v.stride()[:2],
        BT=p.BT, BC=BC, STAGES=1 if INTERPRETED else 3, LOCAL=p.local, DOCUMENTS=p.cu_seqlens is not None, num_warps=4)
    return tops, past


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, local: bool,
            cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, C], bias [T, T] or, local, [T, W], last axes contiguous -> y [B, T, C] as q, mean [B, T, C] as v,
    den float32 [B, T, C]."""
    y, mean, den = q.new_empty(q.shape), v.new_empty(v.shape), q.new_empty(q.shape, dtype=torch.float32)
    if not q.numel():
        return y, mean, den
    p = Problem(k, v, bias, local, cu_seqlens)
    table, far = make_table(bias, p, operand(v))
    tops, past = prepare(k, v, p)
    c, options = p.options("forward")
    forward_kernel[(p.slots * triton.cdiv(p.channels, options["BC"]),)](
        q, k, v, y, mean, den, table, far, tops, past, cu_seqlens, p.blocks, p.slots, p.length, p.rows, p.columns,
        p.channels, p.chunks, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], BS=c.BS, NB=p.NB,
        PRECISION=p.PRECISION, **options)
    return y, mean, den
