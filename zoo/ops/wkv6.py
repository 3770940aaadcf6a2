"""The WKV of RWKV-6 "Finch" (2404.05892, section 4): linear attention whose state decays per channel, as the data say.

    y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)
    S_t = diag(w_t) S_{t-1} + k_t^T v_t,        w_t = exp(log_decay_t), log_decay_t <= 0

Written out, token s < t reaches y_t with weight sum_c r_tc k_sc w_{s+1,c} ... w_{t-1,c}. For a product of matrices the
decays must be split into a factor of t and a factor of s. Dividing two cumulative products (or subtracting two sums of
logs inside exp) overflows or cancels, so the split is made where it needs neither: a chunk is halved again and again,
and at one level s falls in the left and t in the right half of the same block. With the border b between the halves,

    A_ts = (r_t * w_b ... w_{t-1}) . (k_s * w_{s+1} ... w_{b-1}).

All factors lie in [0, 1]: nothing overflows, nothing cancels, a decay to nothing (log -inf) is exact. A token has one
part at each level, so the levels cost log2(C) passes over the inputs, and their decays grow from one to the next by one
product. Between chunks the state is handed on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.ops.documents import document_slices
from zoo.ops.untraced import untraced
from zoo.ops.wkv6_triton import KERNEL, OF, wkv6_triton


def wkv6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, initial_state: Tensor | None = None,
         cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """r, k, log_decay [B, T, H, K], v [B, T, H, V], u [H, K], state [B, H, K, V] -> (y [B, T, H, V], final state).

    log_decay must be <= 0; [H, K] is one for all tokens: the WKV of RWKV-5. No state means zeros. Computes in float32
    (float64 if given that), the type of the final state; y has r's. With cu_seqlens [N + 1] (int32 or int64, on the
    device), N documents stand one after the other in a row, B = 1, and states are [N, H, K, V], one a document; an
    empty document passes its state on.
    """
    dtype = torch.promote_types(r.dtype, torch.float32)
    if log_decay.shape == r.shape[2:]:
        log_decay = log_decay.to(dtype).expand(r.shape)  # and its gradient, a sum over all tokens, is of float32 parts
    if KERNEL.chosen(r, r.shape[-1], v.shape[-1]):
        return wkv6_triton(r, k, v, log_decay, u, initial_state, cu_seqlens)
    if initial_state is None:
        rows = r.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = r.new_zeros(rows, *r.shape[2:], v.shape[-1], dtype=dtype)
    state = initial_state.to(dtype)
    with torch.autocast(r.device.type, enabled=False):
        if cu_seqlens is None:
            return _wkv6(r, k, v, log_decay, u, state)
        documents = [_wkv6(r[:, i], k[:, i], v[:, i], log_decay[:, i], u, state[n : n + 1])
                     for n, i in enumerate(document_slices(r, cu_seqlens))]
    y, states = zip(*documents, strict=True)
    return torch.cat(y, dim=1), torch.cat(states)


def wkv6_of(r: Tensor, k: Tensor, v: Tensor, d: Tensor, base: Tensor, u: Tensor, initial_state: Tensor | None = None,
            cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """wkv6 of log_decay = -exp(base + d), RWKV-6's own: d [B, T, H, K] from the data, base [H, K].

    The sum and its exponential are float32 (float64 if given that), in the kernels' registers: d is read as it comes.
    With r, k, v of bf16 the kernels round the log decay to bf16, 2^-9 of itself (as wkv6 of a bf16 log_decay has it).
    With d of bf16, too, a d that is not finite makes its channel NaN for 32 tokens, those before it among them.
    """
    if OF.chosen(r, r.shape[-1], v.shape[-1]):
        return wkv6_triton(r, k, v, d, u, initial_state, cu_seqlens, base)
    d = base + d
    return wkv6(r, k, v, -torch.exp(d.to(torch.promote_types(d.dtype, torch.float32))), u, initial_state, cu_seqlens)


def _wkv6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """wkv6 of a batch, in the state's type."""
    if r.shape[1] == 0:
        return r.new_empty(*r.shape[:3], v.shape[-1]), state.clone()
    if r.shape[1] == 1:
        r1, k1, v1, w1 = (x[:, 0].to(state.dtype) for x in (r, k, v, log_decay))
        y, state = _step(r1, k1, v1, w1.exp(), u.to(state.dtype), state)
    else:
        y, state = _chunks(r, k, v, log_decay, u, state)
    return y.to(r.dtype), state


def _step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence for one token, r, k, w [B, H, K], v [B, H, V] -> (y [B, 1, H, V], next state)."""
    y = (r.unsqueeze(-2) @ state).squeeze(-2) + (r * u * k).sum(-1, keepdim=True) * v
    return y.unsqueeze(1), torch.addcmul(k.unsqueeze(-1) * v.unsqueeze(-2), w.unsqueeze(-1), state)


def _chunk_size(T: int, K: int) -> int:
    """A power of two, about K / 2 from 16 to 64: pairs cost C a token, states K V / C. A short T is one chunk."""
    return min(1 << (T - 1).bit_length(), max(16, min(64, 1 << (K.bit_length() - 2))))


def _levels(size: int) -> list[int]:
    """Tokens in half a block of each level: 1, 2, 4, ..., C / 2."""
    return [1 << level for level in range(size.bit_length() - 1)]


def _to_chunks(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, K] -> [G, C, K], G = N B H. What pads the last chunk is 0: it neither decays a state nor adds to it."""
    if x.shape[1] % size:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.to(dtype).unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).flatten(0, 2).contiguous()


def _from_chunks(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """[G, C, K] -> [B, T, H, K], B, T, H as in `shape`."""
    B, T, H, _ = shape
    return x.unflatten(0, (-1, B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T].to(dtype)


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Blocks of 2 `half` tokens, cut in the middle: [G, C, K] -> left and right views [G * blocks, half, K]."""
    blocks = x.view(-1, 2, half, x.shape[-1])
    return blocks[:, 0], blocks[:, 1]


def _pairs(A: Tensor, half: int) -> Tensor:
    """What right halves read from left ones: [G, C, C] -> view [G, blocks, half, half] of (right, left)."""
    blocks = A.shape[-1] // (2 * half)
    A = A.view(-1, blocks, 2, half, blocks, 2, half)
    return A[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


class _Chunks(torch.autograd.Function):
    """Of each chunk: Y = A V + R S, next S = diag(total) S + K^T V, with r, k decayed to its start and its end in R, K.

    The backward pass is by hand, in half of autograd's time. A decay scales rows of one factor, so the gradient of its
    log is that factor times the factor's own gradient: sums only, no division, no difference.
    """

    @staticmethod
    def forward(ctx: Any, r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor,
                state: Tensor) -> tuple[Tensor, Tensor]:
        ctx.inputs = [(x.shape, x.dtype) for x in (r, k, v, log_decay, u)]
        (B, T, H, K), dtype = r.shape, state.dtype
        size = _chunk_size(T, K)
        r, k, v, log_decay = (_to_chunks(x, size, dtype) for x in (r, k, v, log_decay))
        u = u.to(dtype).repeat(len(r) // H, 1).unsqueeze(1)  # [G, 1, K]

        A = r.new_zeros(len(r), size, size)
        A.diagonal(dim1=1, dim2=2).copy_((r * u * k).sum(-1))
        total = log_decay.exp()  # of each block, one token long at first: [G * blocks, 1, K]
        start, end = torch.ones_like(total), torch.ones_like(total)  # of its start .. t - 1, and s + 1 .. its end
        levels: list[Tensor] = []
        for half in _levels(size):
            from_border, to_border = _halves(start, half)[1], _halves(end, half)[0]
            later, earlier = _halves(r, half)[1], _halves(k, half)[0]
            if half > 1:  # neighbours have no decay between them
                later, earlier = later * from_border, earlier * to_border
                levels += from_border.clone(), to_border.clone(), later, earlier
            _pairs(A, half).copy_((later @ earlier.mT).view(len(r), -1, half, half))
            left, right = _halves(total, 1)
            from_border.mul_(left)
            to_border.mul_(right)
            total = left * right

        r_start, k_end = r * start, k * end
        added = (k_end.mT @ v).unflatten(0, (-1, B * H))  # [N, B H, K, V]
        totals = total.view(*added.shape[:3], 1)
        states = added.new_empty(len(added) + 1, *added.shape[1:])
        states[0] = state.flatten(0, 1)
        for n in range(len(added)):
            torch.addcmul(added[n], totals[n], states[n], out=states[n + 1])
        y = (A @ v).add_(r_start @ states[:-1].flatten(0, 1))
        ctx.save_for_backward(r, k, v, u, A, start, end, r_start, k_end, totals, states, *levels)
        return _from_chunks(y, ctx.inputs[2][0], dtype), states[-1].clone().view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor, ...]:
        r, k, v, u, A, start, end, r_start, k_end, totals, states, *levels = ctx.saved_tensors
        with torch.autocast(r.device.type, enabled=False):
            dy = _to_chunks(dy, r.shape[1], r.dtype)
            read = (r_start.mT @ dy).unflatten(0, totals.shape[:2])
            dstates = torch.empty_like(states)
            dstates[-1] = dstate.flatten(0, 1)
            for n in reversed(range(len(read))):
                torch.addcmul(read[n], totals[n], dstates[n + 1], out=dstates[n])
            before, after = states[:-1].flatten(0, 1), dstates[1:].flatten(0, 1)

            dA, dr, dk = dy @ v.mT, dy @ before.mT, v @ after.mT  # the latter two of r_start and k_end
            dv = (A.mT @ dy).add_(k_end @ after)
            dtotal = (before * after).sum(-1).mul_(totals.view(-1, r.shape[-1])).unsqueeze(1)  # all three: of the logs
            dstart, dend = dr * r_start, dk * k_end
            own = dA.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            du = (own * r * k).sum(1)
            dr.mul_(start).addcmul_(own * k, u)
            dk.mul_(end).addcmul_(own * r, u)
            for half in reversed(_levels(r.shape[1])):
                dfrom, dto = _halves(dstart, half)[1], _halves(dend, half)[0]
                dtotal = torch.stack([dtotal + dfrom.sum(1, keepdim=True), dtotal + dto.sum(1, keepdim=True)], dim=1)
                dtotal = dtotal.flatten(0, 1)  # each half's total was in the block's, and in the other half's way out
                dpairs = _pairs(dA, half).reshape(-1, half, half)
                dr_later, dk_earlier = _halves(dr, half)[1], _halves(dk, half)[0]
                if half > 1:
                    *levels, from_border, to_border, later, earlier = levels
                    dlater, dearlier = dpairs @ earlier, dpairs.mT @ later
                    dr_later.addcmul_(dlater, from_border)
                    dk_earlier.addcmul_(dearlier, to_border)
                    dfrom.addcmul_(dlater, later)
                    dto.addcmul_(dearlier, earlier)
                else:
                    dr_later.addcmul_(dpairs, _halves(k, 1)[0])
                    dk_earlier.addcmul_(dpairs, _halves(r, 1)[1])
            shapes, dtypes = zip(*ctx.inputs, strict=True)
            grads = [_from_chunks(x, shape, dtype) for x, shape, dtype in
                     zip((dr, dk, dv, dtotal.view_as(r)), shapes, dtypes, strict=False)]
            du = du.view(-1, *shapes[4]).sum(0).to(dtypes[4])
        return *grads, du, dstates[0].unflatten(0, (shapes[0][0], -1))


_chunks = untraced(_Chunks.apply)
