"""Linear head and cross-entropy: matrix products by cuBLAS, and between them single passes over a piece of the logits.

    l_ij = W_j . x_i,   lse_i = log sum_j exp(l_ij),   loss_i = lse_i - l_i,y_i + z lse_i^2
    d loss_i / d l_ij = p_ij (1 + 2 z lse_i) - [j = y_i],   p_ij = exp(l_ij - lse_i)

Three plans, N tokens of width C and V classes; a product of N x C x V costs 2NCV operations.

`small`, for the mean or sum over tokens where a row of logits is no longer than one of x: the logits become their own
gradient in place and are kept for the backward pass, where the cotangent goes into the smaller operand of each product.
`total`, for the mean or sum with more classes: a chunk of tokens at a time, its logits become their own gradient in
place, and dx and dW come from them at once; dW adds up in float32, 4VC bytes. 6NCV, like `small`.
`forward` and `backward`, one loss a token, or one gradient alone: the forward pass goes over chunks of tokens and
leaves lse and dx for a cotangent of 1 (row i of dx is linear in the cotangent of loss i); the backward pass goes over
slices of the vocabulary, computes their logits a second time and dW in one product over all tokens. 8NCV, and no sum is
ever kept in memory.

The piece of logits is the only large buffer; `room` bounds it. dW comes out of its products in float32, and is
rounded once. Exponents are in base 2 and never positive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels._common import LOG2E, power_of_two

LEAST = 16 * 2**20  # bytes of logits held at a time, where x is smaller
TOKENS = 2048  # of a chunk whose product adds to dW, which is read and written once a chunk
ALIGNED = 128  # rows of a chunk and columns of a slice come in multiples of this: whole tiles of a product
WHOLE = 8192  # classes up to which a row of logits stays in registers between the two looks at it
TILE = 2048  # logits of a program, where it takes several short rows
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def tile_kernel(p_l, p_targets, p_loss, p_max, p_log, stride, N, V, ignore_index, z, BN: tl.constexpr, BV: tl.constexpr,
                GRADIENT: tl.constexpr):
    """BN rows of logits -> their losses, maxima, and lse less that; if GRADIENT, d loss / d logits in their place."""
    o_n, o_v = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BV)
    m_n = o_n < N
    m_l = m_n[:, None] & (o_v < V)[None, :]
    p_l += o_n[:, None] * stride + o_v[None, :]
    target = tl.load(p_targets + o_n, mask=m_n, other=0)
    counted = target != ignore_index
    b_l = tl.load(p_l, mask=m_l, other=float("-inf")).to(tl.float32)
    b_l = tl.where(m_n[:, None], b_l, 0.0)
    b_max = tl.max(b_l, 1)
    b_exp = tl.exp2((b_l - b_max[:, None]) * LOG2E)
    b_sum = tl.sum(b_exp, 1)
    b_log = tl.log2(b_sum) * LN2
    b_lse = b_max + b_log
    b_hit = o_v[None, :] == target[:, None]
    # a target that is no class has no logit, and its loss is NaN
    b_target = tl.where((target >= 0) & (target < V), tl.sum(tl.where(b_hit, b_l, 0.0), 1), float("nan"))
    tl.store(p_max + o_n, b_max, mask=m_n)
    tl.store(p_log + o_n, b_log, mask=m_n)
    tl.store(p_loss + o_n, tl.where(counted, (b_max - b_target) + b_log + z * b_lse * b_lse, 0.0), mask=m_n)
    if GRADIENT:
        b_d = b_exp * ((1.0 + 2.0 * z * b_lse) / b_sum)[:, None] - tl.where(b_hit, 1.0, 0.0)
        tl.store(p_l, tl.where(counted[:, None], b_d, 0.0).to(p_l.dtype.element_ty), mask=m_l)


@triton.jit(do_not_specialize=["ignore_index"])
def long_kernel(p_l, p_targets, p_loss, p_max, p_log, stride, V, ignore_index, z, BV: tl.constexpr,
                GRADIENT: tl.constexpr):
    """The same for row i, BV logits at a time; each of BV lanes has a maximum and a sum of its own until the end.

    The second look begins with the logits that the first ended with, which the L2 cache still has.
    """
    i_t = tl.program_id(0).to(tl.int64)
    p_l += i_t * stride
    o_v = tl.arange(0, BV)
    target = tl.load(p_targets + i_t)
    counted = target != ignore_index
    # a target that is no class has no logit: its loss is NaN, and no memory is read for it
    b_target = tl.load(p_l + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    b_most, b_part = tl.full([BV], -1e30, tl.float32), tl.zeros([BV], tl.float32)
    for i_v in range(0, V, BV):
        b_l = tl.load(p_l + i_v + o_v, mask=i_v + o_v < V, other=float("-inf"),
                      eviction_policy="evict_last").to(tl.float32)
        b_new = tl.maximum(b_most, b_l)
        b_part = b_part * tl.exp2((b_most - b_new) * LOG2E) + tl.exp2((b_l - b_new) * LOG2E)
        b_most = b_new
    b_max = tl.max(b_most, 0)
    b_sum = tl.sum(b_part * tl.exp2((b_most - b_max) * LOG2E), 0)
    b_log = tl.log2(b_sum) * LN2
    b_lse = b_max + b_log
    tl.store(p_max + i_t, b_max)
    tl.store(p_log + i_t, b_log)
    tl.store(p_loss + i_t, tl.where(counted, (b_max - b_target) + b_log + z * b_lse * b_lse, 0.0))
    if GRADIENT:
        b_scale = (1.0 + 2.0 * z * b_lse) / b_sum
        last = (V - 1) // BV * BV
        for i_v in range(0, V, BV):
            o_l = last - i_v + o_v
            b_l = tl.load(p_l + o_l, mask=o_l < V, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            b_d = tl.exp2((b_l - b_max) * LOG2E) * b_scale - tl.where(o_l == target, 1.0, 0.0)
            tl.store(p_l + o_l, tl.where(counted, b_d, 0.0).to(p_l.dtype.element_ty), mask=o_l < V)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def reduce_kernel(p_loss, p_targets, p_sum, p_unit, N, ignore_index, MEAN: tl.constexpr, BN: tl.constexpr):
    """Losses [N] -> their sum or mean over the counted targets, and the loss's derivative by each of these."""
    o_n = tl.arange(0, BN)
    b_sum, b_count = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.int32)
    for i_n in range(0, N, BN):
        m_n = i_n + o_n < N
        b_sum += tl.load(p_loss + i_n + o_n, mask=m_n, other=0.0)
        b_count += (tl.load(p_targets + i_n + o_n, mask=m_n, other=ignore_index) != ignore_index).to(tl.int32)
    b_unit = 1.0
    if MEAN:
        b_unit = 1.0 / tl.maximum(tl.sum(b_count, 0), 1).to(tl.float32)
    tl.store(p_sum, tl.sum(b_sum, 0) * b_unit)
    tl.store(p_unit, b_unit)


@triton.jit
def scale_kernel(p_x, p_y, p_a, p_b, size, BLOCK: tl.constexpr):
    """y = a b x for scalars a and b, rounded once."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_scale = tl.load(p_a).to(tl.float32) * tl.load(p_b).to(tl.float32)
    b_x = tl.load(p_x + o, mask=o < size, other=0.0).to(tl.float32)
    tl.store(p_y + o, (b_x * b_scale).to(p_y.dtype.element_ty), mask=o < size)


@triton.jit(do_not_specialize=["first", "ignore_index"])
def slice_kernel(p_l, p_targets, p_max, p_log, p_dloss, stride, dloss_t, first, width, ignore_index, z,
                 BV: tl.constexpr):
    """Row i of the logits of classes first .. first + width - 1, overwritten by its gradient times dloss_i."""
    i_t = tl.program_id(0).to(tl.int64)
    p_l += i_t * stride
    target = tl.load(p_targets + i_t)
    counted = target != ignore_index
    b_max, b_log = tl.load(p_max + i_t), tl.load(p_log + i_t)
    b_dloss = tl.load(p_dloss + i_t * dloss_t).to(tl.float32)
    b_scale = (1.0 + 2.0 * z * (b_max + b_log)) * b_dloss
    for i_v in range(0, width, BV):
        o_v = i_v + tl.arange(0, BV)
        b_l = tl.load(p_l + o_v, mask=o_v < width, other=0.0).to(tl.float32)
        # the maximum first, as its difference to a logit is exact where it matters; and no more than 0, as this product
        # may have rounded a logit other than the one in lse
        b_d = tl.exp2(tl.minimum((b_l - b_max) - b_log, 0.0) * LOG2E) * b_scale
        b_d -= tl.where(first + o_v == target, b_dloss, 0.0)
        tl.store(p_l + o_v, tl.where(counted, b_d, 0.0).to(p_l.dtype.element_ty), mask=o_v < width)


def room(x: Tensor) -> int:
    """Bytes of logits held at a time: as many as x has, LEAST if it has fewer."""
    return max(LEAST, x.numel() * x.element_size())


def split(total: int, most: int) -> int:
    """Into equal parts of at most `most`, but no less than ALIGNED: the size of one, a multiple of ALIGNED."""
    most = max(ALIGNED, most // ALIGNED * ALIGNED)
    parts = max(1, -(-total // most))
    return -(-total // (parts * ALIGNED)) * ALIGNED


def rows(logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, ignore_index: int, z: float,
         gradient: bool) -> None:
    n, V = logits.shape
    if V > WHOLE:
        long_kernel[(n,)](logits, targets, losses, lse[0], lse[1], logits.stride(0), V, ignore_index, z, WHOLE,
                          gradient, num_warps=16)
    elif n:
        BV = max(16, power_of_two(V))
        BN = max(1, TILE // BV)
        tile_kernel[(-(-n // BN),)](logits, targets, losses, lse[0], lse[1], logits.stride(0), n, V, ignore_index, z,
                                    BN, BV, gradient, num_warps=4)


def reduced(losses: Tensor, targets: Tensor, ignore_index: int, mean: bool) -> tuple[Tensor, Tensor]:
    """-> the sum or mean [], and its derivative by the loss of a counted token [], float32."""
    loss, unit = losses.new_empty(()), losses.new_empty(())
    reduce_kernel[(1,)](losses, targets, loss, unit, len(losses), ignore_index, mean, 8192, num_warps=32)
    return loss, unit


def scaled(x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b x for scalars a and b [], in a dtype; x contiguous."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        scale_kernel[(-(-x.numel() // 4096),)](x, y, a, b, x.numel(), 4096, num_warps=8)
    return y


def buffer(x: Tensor, n: int, width: int) -> Tensor:
    """For n rows of logits, [n, width]; a row begins at a multiple of 16, as products and loads are slow elsewhere."""
    return x.new_empty(n, -(-width // 16) * 16)[:, :width]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, from the sum to the result."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    # on a CPU, for tests of half precision in the interpreter
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def small(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z: float, mean: bool,
          need: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C], weight [V, C], targets [N] -> the loss [], its derivative by each token's [], and those tokens' losses'
    by the logits [N, V], in x's dtype (no rows if not needed).
    """
    N, V = len(x), len(weight)
    losses, lse = x.new_empty(N, dtype=torch.float32), x.new_empty(2, N, dtype=torch.float32)
    logits = buffer(x, N, V)
    torch.mm(x, weight.to(x.dtype).mT, out=logits)
    rows(logits, targets, losses, lse, ignore_index, z, need)
    return *reduced(losses, targets, ignore_index, mean), logits if need else buffer(x, 0, V)


def small_backward(dloss: Tensor, unit: Tensor, x: Tensor, weight: Tensor, dlogits: Tensor, need_dx: bool,
                   need_dweight: bool) -> tuple[Tensor, Tensor]:
    """-> dx [N, C] in x's dtype, dweight [V, C] in weight's, of no rows if not needed."""
    dx, dweight = x.new_empty(len(x) if need_dx else 0, x.shape[1]), weight.new_empty(0, x.shape[1])
    if need_dx and x.dtype == torch.float16:  # which cannot hold a weight over N
        torch.mm(dlogits, weight.to(x.dtype), out=dx).mul_(dloss * unit)
    elif need_dx:
        torch.mm(dlogits, scaled(weight, dloss, unit, x.dtype), out=dx)
    if need_dweight:
        dweight = scaled(product(dlogits.mT, x), dloss, unit, weight.dtype)
    return dx, dweight


def in_units(dlosses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cotangents [N] over a unit [], and the unit: the largest of them for float16, which cannot hold p / N; else 1."""
    unit = torch.ones((), device=dlosses.device)
    if dtype == torch.float16 and len(dlosses):
        unit = torch.where(dlosses.any(), dlosses.abs().amax(), unit)
        return dlosses / unit, unit
    return dlosses, unit


def total(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z: float,
          mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, C], weight [V, C], targets [N] -> the loss [], its derivative by each token's [], and of the tokens' sum dx
    [N, C] in x's dtype, dweight [V, C] float32.

    Holds the logits of as many tokens as `room` allows, and no fewer than TOKENS.
    """
    (N, C), V = x.shape, len(weight)
    w = weight.to(x.dtype)
    dx = x.new_empty(N, C)
    losses, lse = x.new_empty(N, dtype=torch.float32), x.new_empty(2, N, dtype=torch.float32)
    size = split(N, max(TOKENS, room(x) // (V * x.element_size())))
    space = buffer(x, min(size, N), V)
    for a in range(0, N, size):
        part = slice(a, min(a + size, N))
        logits = space[:part.stop - a]
        torch.mm(x[part], w.mT, out=logits)
        rows(logits, targets[part], losses[part], lse[:, part], ignore_index, z, True)
        torch.mm(logits, w, out=dx[part])
        # with columns of x side by side the product of long rows is 7 % faster
        columns = x[part].mT.contiguous().mT if V > WHOLE else x[part]
        if a == 0:
            dweight = product(logits.mT, columns)
        else:
            add_product(dweight, logits.mT, columns)
        del columns  # before the next are made
    return *reduced(losses, targets, ignore_index, mean), dx, dweight


def forward(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z: float, need_dx: bool,
            need_dweight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> losses [N], lse in two summands [2, N], and dx [N, C] for cotangents of 1, of no rows where it is not needed.

    Where dweight is needed there will be room for it, and until then it is the logits'.
    """
    (N, C), V = x.shape, len(weight)
    w = weight.to(x.dtype)
    dx = x.new_empty(N if need_dx else 0, C)
    losses, lse = x.new_empty(N, dtype=torch.float32), x.new_empty(2, N, dtype=torch.float32)
    bytes_free = room(x) + (V * C * x.element_size() if need_dweight else 0)
    size = split(N, bytes_free // (V * x.element_size()))
    space = buffer(x, min(size, N), V)
    for a in range(0, N, size):
        part = slice(a, min(a + size, N))
        logits = space[:part.stop - a]
        torch.mm(x[part], w.mT, out=logits)
        rows(logits, targets[part], losses[part], lse[:, part], ignore_index, z, need_dx)
        if need_dx:
            torch.mm(logits, w, out=dx[part])
    return losses, lse, dx


def backward(dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore_index: int,
             z: float) -> Tensor:
    """-> dweight [V, C] in weight's dtype. dlosses [N] may have any stride."""
    (N, C), V = x.shape, len(weight)
    dweight = torch.empty(V, C, dtype=weight.dtype, device=x.device)
    dlosses, unit = in_units(dlosses, x.dtype)
    size = split(V, room(x) // max(1, N * x.element_size()))
    space = buffer(x, N, min(size, V))
    BV = min(4096, max(256, power_of_two(min(size, V))))
    for a in range(0, V, size):
        part = slice(a, min(a + size, V))
        logits = space[:, :part.stop - a]
        torch.mm(x, weight[part].to(x.dtype).mT, out=logits)
        slice_kernel[(N,)](logits, targets, lse[0], lse[1], dlosses, logits.stride(0), dlosses.stride(0), a,
                           part.stop - a, ignore_index, z, BV, num_warps=max(1, BV // 256))
        torch.mul(product(logits.mT, x), unit, out=dweight[part])
    return dweight
