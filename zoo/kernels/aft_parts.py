"""What AFT's kernels with position biases share: references of exponentials, tables, sums over blocks, factors.

Keys are taken in units of log2: x = k log2(e). Every block j of BT tokens has, per channel, a level l_j, and
exp2(x - l_j) is what enters a product as an operand: at most exp2(HEAD). A level is a whole number, LIMIT above the
sequence's first key, which every row sees, and stays that, unless a block has a key more than HEAD above, when that
block's level is HEAD below its largest key. So factors between levels are powers of two, exact, and 1 in all channels
whose keys rise by no more than LIMIT + HEAD above the first: those of a trained model do (docs/kernels/aft.md).

Sums up to a row of block i are held as multiples of exp2(ref_i), ref_i the largest level so far. They underflow only
where all keys up to a row lie far below: a row needs den >= exp2(-LIMIT) exp(FLOOR) = 2^-119. Where the largest key
before block i (for i = 0 the first key) is not within LIMIT of ref_i, the block is steep in that channel: its own keys
then enter one by one with a running maximum that begins at ref_i, for such a block no less than any key before it. ref
never falls. Nor do sums overflow, at exp2(HEAD) for each token, and gradients of 2^-30 over den stay in range.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import INTERPRETED, LOG2E, document_chunks, power_of_two

FLOOR = tl.constexpr(-60.0)  # how far below the largest of its row a bias can count, in units of e
HEAD = tl.constexpr(80.0)  # how far above its level a key may be
LIMIT = tl.constexpr(32.0)  # how far below ref_i all keys before a block of rows may be
LN2_HIGH = tl.constexpr(355 / 512)  # of 9 bits: whole numbers to 47,000 times it are exact
LN2_LOW = tl.constexpr(0.6931471805599453 - 355 / 512)


class Config(NamedTuple):
    """BT rows and keys of a block, BS of them at once, BC channels; 0 where another kernel's counts."""

    BT: int
    BS: int
    BC: int
    warps: int
    stages: int


# (kernel, bytes of an operand); those of 2 bytes measured on H100, torch 2.11, Triton 3.6, 2026-11-25
CONFIGS = {
    ("forward", 2): Config(128, 64, 64, 4, 3), ("forward", 4): Config(64, 32, 32, 4, 2),
    ("columns", 2): Config(128, 64, 64, 4, 3), ("columns", 4): Config(64, 32, 32, 4, 2),
    ("tiles", 2): Config(128, 128, 64, 4, 3), ("tiles", 4): Config(64, 64, 32, 4, 2),
    # 4 bytes in blocks of 32 rows: products in blocks of 64, wgmma, were wrong on an H100; float32 takes multiply-adds,
    # as with tf32x3 a bias's gradient that should vanish (one token) missed its bound
    ("local", 2): Config(64, 64, 32, 4, 2), ("local", 4): Config(32, 32, 32, 4, 2),
    ("band", 2): Config(64, 64, 32, 4, 3), ("band", 4): Config(32, 32, 32, 4, 1),
    ("prepare", 2): Config(0, 0, 32, 4, 1), ("prepare", 4): Config(0, 0, 32, 4, 1),
    ("sums", 2): Config(0, 0, 64, 2, 1), ("sums", 4): Config(0, 0, 32, 4, 1),
    ("rows", 2): Config(0, 32, 64, 4, 1), ("rows", 4): Config(0, 32, 32, 4, 1),
    ("local rows", 2): Config(0, 0, 32, 4, 1), ("local rows", 4): Config(0, 0, 32, 4, 1),
}
PROGRAMS = 264  # of the kernels that sum over the batch, at a time: two for each of a GPU's processors


def config(kernel: str, size: int) -> Config:
    """The configuration on this machine: Triton's interpreter gets small blocks, to have several."""
    return Config(16, 16, 16, 4, 1) if INTERPRETED else CONFIGS[kernel, size]


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
def locate(pid, blocks, slots, last, T, C, BT: tl.constexpr, BC: tl.constexpr, BACK: tl.constexpr,
           DOCUMENTS: tl.constexpr):
    """Of program pid: its row or document (-1: none), its block there, its channels.

    All blocks of a row's channels one after the other, from the last: they share operands, and as their sums differ in
    length, programs that run at a time are not all at their ends, which ask memory for the most. For the `last` of
    (row, channels) one block of all after the other, so that no long sum begins late. BACK: from the last row, whose
    operands, made a moment ago, the L2 cache still has.
    """
    if DOCUMENTS:
        slot = pid % slots
        return tl.load(blocks + 2 * slot).to(tl.int64), tl.load(blocks + 2 * slot + 1), pid // slots
    else:
        n, tiles = tl.cdiv(T, BT), tl.cdiv(C, BC)
        pairs = slots // n * tiles
        rest = pid - (pairs - last) * n
        pair, i_t = pid // n, n - 1 - pid % n
        if rest >= 0:
            pair, i_t = pairs - last + rest % last, n - 1 - rest // last
        if BACK:
            pair = pairs - 1 - pair
        return (pair // tiles).to(tl.int64), i_t, pair % tiles


@triton.jit
def before(i_n, i_c, row_step, channel_step, n):
    """Rows and channels so many units of n a row before, without a division."""
    i_c -= channel_step
    i_n -= row_step + (i_c < 0).to(tl.int32)
    return i_n, tl.where(i_c < 0, i_c + n, i_c)


@triton.jit
def raised(flags, chunk, i_c, Cp, BC: tl.constexpr, FLAG: tl.constexpr):
    """Whether a block is flagged in any of a program's channels."""
    n: tl.constexpr = BC // FLAG if BC > FLAG else 1
    return tl.max(tl.load(flags + chunk * (Cp // FLAG) + i_c * BC // FLAG + tl.arange(0, n)), 0) > 0


@triton.jit
def reciprocal(x, EXACT: tl.constexpr):
    """1 / x of finite x > 0; not EXACT: to 2^-21, in fewer instructions than a division."""
    if EXACT:
        return 1 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def exponential(x, level):
    """exp(x) 2^-level to the last bit or two, for whole levels no more than HEAD below x log2(e): a series, as the
    GPU's own is off by two, and a product before it by more the larger x is."""
    whole = tl.floor(x * LOG2E + 0.5)
    r = x - whole * LN2_HIGH - whole * LN2_LOW  # at most 0.35, and all of its digits
    p = 1 + r * (1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r / 5040))))))
    up = tl.minimum(whole - level, HEAD, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(up < -160, 0.0, p * tl.exp2(up))


@triton.jit
def opening(b_q, EXACT: tl.constexpr):
    """1 / sigmoid(q), at most 2^HEAD."""
    if EXACT:
        return 1 + exponential(-b_q.to(tl.float32), 0.0)
    else:
        return 1 + tl.exp2(tl.minimum(b_q.to(tl.float32) * -LOG2E, HEAD))


@triton.jit
def gated(b_q, b_num, b_den, EXACT: tl.constexpr):
    """sigmoid(q) num / den and 1 / den; not EXACT: 0 where sigmoid(q) / den is under 2^-127."""
    by = opening(b_q, EXACT)
    if EXACT:
        b_inv = 1 / b_den
        return b_num * b_inv / by, b_inv
    else:
        b_inv = reciprocal(b_den * by, False)
        return b_num * b_inv, b_inv * by


@triton.jit
def lowered(x, d):
    """x 2^d of whole d <= 0, exact where 2^d alone would be out of range: a weight of 2^HEAD can be 112 levels down."""
    half = tl.floor(d * 0.5)
    return x * tl.exp2(half) * tl.exp2(d - half)


@triton.jit
def power(b_k, level, EXACT: tl.constexpr):
    """exp2(x - level) of keys [rows, channels] no more than HEAD above; EXACT: to the last bit or two, however far the
    level, else as far as float32 has room for x - level."""
    if EXACT:
        return exponential(b_k, level[None, :])
    else:
        return tl.exp2(tl.minimum(b_k * LOG2E - level[None, :], HEAD, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def steep_sums(k, v, table, b_num, b_den, ref, tokens, o_c, C, k_t, v_t, columns, BT: tl.constexpr):
    """num, den of a steep block's rows with its own tokens, one by one; k, v, table point to the first of them. Where
    the block is not steep, the running maximum stays ref."""
    o_t = tl.arange(0, BT)
    b_m = b_num * 0 + ref[None, :]
    for i_s in range(0, tokens):
        b_x = tl.load(k + tl.cast(i_s, tl.int64) * k_t + o_c, mask=o_c < C, other=0).to(tl.float32)[None, :] * LOG2E
        b_v = tl.load(v + tl.cast(i_s, tl.int64) * v_t + o_c, mask=o_c < C, other=0).to(tl.float32)[None, :]
        b_a = tl.load(table + o_t * columns + i_s).to(tl.float32)[:, None]
        b_next = tl.where(o_t[:, None] >= i_s, tl.maximum(b_m, b_x), b_m)
        fall = tl.exp2(b_m - b_next)
        p = b_a * tl.exp2(tl.minimum(b_x - b_next, 0.0))
        b_num = b_num * fall + p * b_v
        b_den = b_den * fall + p
        b_m = b_next
    return b_num, b_den


@triton.jit
def steep_row(q, k, dy, y, inv, i_b, at, m_c, o_c, T, C, q_b, q_t, k_b, k_t, dy_b, dy_t):
    """Of the row at token `at`, which is one of a steep block: its key, and the factors a, b of the gradients."""
    own = (i_b * T + at) * C + o_c
    c_x = tl.load(k + i_b * k_b + at * k_t + o_c, mask=m_c, other=0).to(tl.float32) * LOG2E
    c_q = tl.load(q + i_b * q_b + at * q_t + o_c, mask=m_c, other=0).to(tl.float32)
    c_dy = tl.load(dy + i_b * dy_b + at * dy_t + o_c, mask=m_c, other=0).to(tl.float32)
    by = opening(c_q, inv.dtype.element_ty == tl.float32)
    c_a = c_dy * tl.load(inv + own, mask=m_c, other=0).to(tl.float32) / by
    return c_x, c_a, -c_a * (tl.load(y + own, mask=m_c, other=0).to(tl.float32) * by)


@triton.jit
def flagged(flags, cu_seqlens, share, shares, count, i_t, NB: tl.constexpr, T, P, n, BT: tl.constexpr,
            DOCUMENTS: tl.constexpr):
    """Whether any unit of a share, of a flag's channels each, is flagged at block i_t, which may be steep, or at i_t +
    NB, or its row's last."""
    o_u = tl.arange(0, 128)
    worst = tl.zeros([128], tl.int32)
    for i in range(0, count, 128):
        u = share + (i + o_u) * shares
        there = i + o_u < count
        i_n = (u // n).to(tl.int64)
        if DOCUMENTS:
            start = tl.load(cu_seqlens + i_n, mask=there, other=0).to(tl.int64)
            length = tl.load(cu_seqlens + i_n + 1, mask=there, other=0).to(tl.int64) - start
            chunk = start // BT + i_n
            last = tl.cdiv(tl.minimum(length, P), BT) - 1
        else:
            chunk = i_n * tl.cdiv(T, BT)
            last = i_n * 0 + tl.cdiv(T, BT) - 1
        there = there & (i_t <= last)
        at = flags + chunk * n + u % n
        worst = tl.maximum(worst, tl.load(at + i_t * n, mask=there, other=0))
        if NB > 0:
            worst = tl.maximum(worst, tl.load(at + tl.minimum(i_t + NB, last) * n, mask=there, other=0))
    return tl.max(worst, 0) > 0


def operand(v: Tensor) -> torch.dtype:
    """The type of the factors of the products."""
    return torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32


class Problem:
    """Shapes, and what goes with the launches of one call."""

    def __init__(self, v: Tensor, bias: Tensor, local: bool, cu_seqlens: Tensor | None):
        self.batch, self.length, self.channels = v.shape
        self.local, self.cu_seqlens = local, cu_seqlens
        self.kind = operand(v)
        self.size = self.kind.itemsize
        kernels = ("local", "sums", "local rows", "band") if local else (
            "forward", "prepare", "rows", "columns", "tiles")
        self.BT = self.config(kernels[0]).BT
        widest = max(self.config(kernel).BC for kernel in kernels)
        widest = min(widest, max(32, power_of_two(self.channels)))  # with 16, ptxas loses addresses of tiles
        self.Cp = -(-self.channels // widest) * widest  # channels in memory of our own: whole blocks
        self.flag = self.channel_block(kernels[-1])  # channels of a flag
        self.NB = max(1, -(-(bias.shape[1] - 1) // self.BT)) if local else 0
        self.rows = self.length if cu_seqlens is None else min(self.length, len(bias))
        padded = -(-self.rows // self.BT) * self.BT
        self.columns = (self.NB + 1) * self.BT if local else padded
        self.table_shape = padded, self.columns
        self.PRECISION = "tf32" if v.dtype == torch.float16 else "ieee" if local else "tf32x3"
        if cu_seqlens is None:
            self.documents, self.chunks = self.batch, self.batch * -(-self.length // self.BT)
        else:
            self.documents = len(cu_seqlens) - 1
            self.chunks = self.length // self.BT + self.documents
        self.operand_shape = 2, self.chunks * self.BT, self.Cp

    def config(self, kernel: str) -> Config:
        return config(kernel, self.size)

    def blocks(self) -> Tensor | None:
        """Of each of `chunks` programs, its document and its block there."""
        return None if self.cu_seqlens is None else document_chunks(self.cu_seqlens, self.length, self.BT)

    def channel_block(self, kernel: str) -> int:
        return min(self.config(kernel).BC, self.Cp)

    def last(self, kernel: str) -> int:
        """For `locate`: as many (row, channels) as two rounds of programs take."""
        pairs = self.batch * (self.Cp // self.channel_block(kernel))
        return min(pairs, -(-2 * PROGRAMS // -(-self.length // self.BT)))

    def options(self, kernel: str) -> dict[str, Any]:
        """The constants of a kernel's build."""
        c = self.config(kernel)
        return {"BT": self.BT, "BC": self.channel_block(kernel), "DOCUMENTS": self.cu_seqlens is not None,
                "num_warps": c.warps}

    def products(self, kernel: str) -> dict[str, Any]:
        """The same for one with products."""
        return {**self.options(kernel), "STAGES": self.config(kernel).stages, "PRECISION": self.PRECISION,
                "FLAG": self.flag}


def shares_of(tiles: int, units: int) -> int:
    """How many programs share the sums over `units` of each of `tiles`, to fill the GPU's rounds best."""
    def cost(shares: int) -> int:  # 2: what a sum costs beside its units, in units
        return -(-tiles * shares // PROGRAMS) * (-(-units // shares) + 2)
    return min(range(1, min(units, 32) + 1), key=cost)
