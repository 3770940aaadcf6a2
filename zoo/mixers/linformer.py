"""Linformer (2006.04768) made causal: learned projections of the past's keys and values in place of the past itself.

The paper attends to K' = E K and V' = F V, with E, F [R, n] learned for a fixed length n (eq. 7). Every row of K' and
V' holds all n tokens, so that every output sees the future: an encoder's layer, and no mask on its [n, R] scores mends
that. Both forms here are causal, and neither is the paper's:

- `block`: exact attention inside the current block of C tokens; E and F [R, C] project only blocks that are finished,
  the same E and F for every block; all under one softmax, with rotary positions. Any length. O(T (C + R T / C)) time:
  quadratic still, by a factor C / R less.
- `prefix`: E and F [R, n] as in the paper, but as running sums, the bounded-memory reading (2110.02488 section 3):
  token t sees R slots, sum_{s<=t} E_s k_s and sum_{s<=t} F_s v_s. O(T R) time, a state of constant size, lengths to n.

As in the paper's section 4, E and F are each head's own (none of the paper's sharing).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.contract import SequenceMixer, State
from zoo.errors import ZooError
from zoo.layers import enlarged, head_dim, rotary, small_init_, token_positions, unasked
from zoo.ops import decode
from zoo.ops.attention import block_attention, masked_attention
from zoo.ops.decode_mixers import BLOCKS, attend_blocks_token
from zoo.ops.linear_attention import linear_attention
from zoo.ops.rotary import phases, turn
from zoo.ops.summary_attention import summaries, summary_attention


class Linformer(SequenceMixer):
    """block: tokens in a block, C, of variant `block`. rank: projections of a block, or of the whole past, R."""

    paper = "Linformer, 2006.04768; causal form ours"
    complexity = "O(T (C + R T / C)), O(R T / C); prefix: O(T R), O(R)"
    projects_input = True

    def __init__(self, dim: int, heads: int, seq_len: int, *, variant: Literal["block", "prefix"] = "block",
                 block: int = 64, rank: int = 16):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim(dim, heads)
        length = block if variant == "block" else seq_len
        if type(block) is not int or block < 1:
            raise ZooError(f"block={block!r} is not a positive whole number")
        if type(rank) is not int or not 1 <= rank <= length:
            raise ZooError(f"rank={rank!r} is not a whole number from 1 to {length}, the length that it projects")
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.memory = (BlockMemory if variant == "block" else PrefixMemory)(heads, self.head_dim, rank, length)
        self.out = nn.Linear(dim, dim, bias=False)
        self.max_len = None if variant == "block" else seq_len

    def project(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> queries, keys and values [B, T, 3 H, K]."""
        return self.qkv(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.out(self.memory(self.project(x), cu_seqlens).flatten(-2))

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device | str | None = None,
                   dtype: torch.dtype = torch.float32) -> State:
        return self.memory.init_state(batch_size, max_len, device, dtype)

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.memory.extend(self.project(x), state)
        return self.out(y.flatten(-2)), state

    def extend_normed(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm,
                      state: State) -> tuple[Tensor, Tensor, State]:
        blocks = self.memory
        if not (isinstance(blocks, BlockMemory) and self.head_dim % 2 == 0
                and decode.takes(x, self.qkv.weight, self.out.weight)
                and BLOCKS.chosen(x, self.head_dim, blocks.rank, blocks.block)):
            return super().extend_normed(x, y, norm, state)
        x, qkv = decode.norm_linear(x, y, norm, self.qkv.weight)
        state = decode.dense(state)
        return x, attend_blocks_token(qkv, state, blocks.E, blocks.F, self.out.weight), state

    def reserve(self, state: State, tokens: int) -> State:
        return self.memory.reserve(state, tokens) if isinstance(self.memory, BlockMemory) else state

    def flops(self, seq_len: int) -> int:
        return 2 * seq_len * (self.qkv.weight.numel() + self.out.weight.numel()) + self.memory.flops(seq_len)

    def reset_parameters(self, layer_idx: int, num_layers: int) -> None:
        """E and F with variance 1 / (n + R), as the authors' code draws them (Xavier with gain 1 / sqrt(2))."""
        small_init_(self.qkv.weight)
        small_init_(self.out.weight, gain=(2 * num_layers) ** -0.5)
        for projection in (self.memory.E, self.memory.F):
            nn.init.normal_(projection, std=(projection.shape[1] + projection.shape[2]) ** -0.5)


class BlockMemory(nn.Module):
    """softmax(q [E K_1; ..; E K_m; K]^T / sqrt(K)) [F V_1; ..; F V_m; V]: finished blocks 1..m, then the current one.

    The keys are projected first and turned (RoPE) then, each summary to a position of its own, the R of a block spread
    evenly over it; distances are relative and any length works.
    """

    def __init__(self, heads: int, head_dim: int, rank: int, block: int):
        super().__init__()
        self.heads, self.head_dim, self.rank, self.block = heads, head_dim, rank, block
        self.E = nn.Parameter(torch.empty(heads, rank, block))
        self.F = nn.Parameter(torch.empty(heads, rank, block))

    def phases_of(self, x: Tensor, starts: Tensor) -> Tensor:
        """Phases [.., M R, 2, K // 2] of the summaries of blocks that begin at `starts` [.., M]; x has their dtype."""
        spread = (torch.arange(self.rank, device=x.device).double() + 0.5) * (self.block / self.rank) - 0.5
        positions = (starts.unsqueeze(-1) + spread).flatten(-2)
        return phases(positions, self.head_dim, dtype=torch.promote_types(x.dtype, torch.float32))

    def forward(self, qkv: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        T, C = qkv.shape[1], self.block
        positions = token_positions(qkv, cu_seqlens)
        table = phases(positions, self.head_dim, dtype=torch.promote_types(qkv.dtype, torch.float32))
        if cu_seqlens is None:  # the last block, even where it is full, has nobody after it
            past_table = self.phases_of(qkv, positions[: (T - 1) // C * C : C])
            return summary_attention(qkv, self.E, self.F, table, past_table)
        q, k, v = qkv.chunk(3, dim=2)
        k_blocks, v_blocks, starts = self.document_blocks(k, v, cu_seqlens)
        past = summaries(k_blocks, v_blocks, self.E, self.F, self.phases_of(k, starts))
        return block_attention(turn(q, table), turn(k, table), v, *past, C, cu_seqlens)

    def document_blocks(self, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, v [1, T, H, K] -> their blocks [1, M, C, H, K], and where each begins in its document [M].

        In the order that `block_attention` wants: ceil(L / C) of every document of L tokens, M = T // C + N a bound on
        their number that needs no wait for the device. What stands past a document's end, or in blocks past the last,
        is 0: nobody sees those summaries.
        """
        T, C, borders = k.shape[1], self.block, cu_seqlens.to(torch.int64)
        blocks = (borders.diff() + C - 1) // C
        ends = blocks.cumsum(0)
        block = torch.arange(T // C + len(blocks), device=k.device)
        document = torch.searchsorted(ends, block, right=True).clamp(max=len(blocks) - 1)
        starts = (block - (ends - blocks)[document]) * C
        at = (borders[document] + starts).unsqueeze(1) + torch.arange(C, device=k.device)
        inside = (at < borders[document + 1].unsqueeze(1)).view(1, -1, C, 1, 1)
        at = at.clamp(max=T - 1).flatten()
        k_blocks, v_blocks = (x.index_select(1, at).unflatten(1, (-1, C)).where(inside, 0) for x in (k, v))
        return k_blocks, v_blocks, starts

    def init_state(self, batch_size: int, max_len: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        """Keys (not turned) and values of the current block [B, C, H, K], the summaries [B, M, R, H, K]."""
        tokens = batch_size, self.block, self.heads, self.head_dim
        summaries = batch_size, max_len // self.block, self.rank, self.heads, self.head_dim
        shapes = {"k": tokens, "v": tokens, "k_summary": summaries, "v_summary": summaries}
        state = {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
        return state | {"position": torch.zeros(batch_size, device=device, dtype=torch.int64)}

    def reserve(self, state: State, tokens: int) -> State:
        """`SequenceMixer.reserve`; there are summaries of whole blocks alone."""
        return state | {name: enlarged(state[name], tokens // self.block) for name in ("k_summary", "v_summary")}

    def extend(self, qkv: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v = qkv.chunk(3, dim=2)
        if unasked(state["position"], q.shape[1]):
            return self.extend_one(q, k, v, state)
        if q.shape[1] > self.block and not int(state["position"].max()):
            return self.begin(qkv, state)
        parts = []
        for a in range(0, q.shape[1], self.block):
            piece = slice(a, a + self.block)
            y, state = self.extend_piece(q[:, piece], k[:, piece], v[:, piece], state)
            parts.append(y)
        return torch.cat(parts, dim=1), state

    def extend_piece(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """At most C tokens, so that a row finishes at most one block: its window holds that block and what follows."""
        B, t, C = q.shape[0], q.shape[1], self.block
        dtype, device = state["k"].dtype, q.device
        places = state["position"].tolist()
        finishing = [row for row, place in enumerate(places) if place % C + t >= C]
        start = state["position"] // C * C  # of each row's block
        positions = state["position"].unsqueeze(1) + torch.arange(t, device=device)
        window_positions = start.unsqueeze(1) + torch.arange(C + t - 1, device=device)
        rows = torch.arange(B, device=device).unsqueeze(1)

        k_window, v_window = (F.pad(state[name], (0, 0, 0, 0, 0, t - 1)) for name in ("k", "v"))
        offsets = positions - start.unsqueeze(1)
        k_window[rows, offsets], v_window[rows, offsets] = k.to(dtype), v.to(dtype)

        room = (max(places) + t) // C  # finished blocks of the row that is furthest on
        k_summary, v_summary = enlarged(state["k_summary"], room), enlarged(state["v_summary"], room)
        if finishing:
            first = start[finishing]
            done = summaries(k_window[finishing, None, :C], v_window[finishing, None, :C], self.E, self.F,
                             self.phases_of(k_window, first.unsqueeze(1)))
            k_summary[finishing, first // C], v_summary[finishing, first // C] = (x.squeeze(1).to(dtype) for x in done)

        block_of = positions.unsqueeze(-1) // C
        earlier = torch.arange(room, device=device).repeat_interleave(self.rank) < block_of
        same = window_positions.unsqueeze(1) // C == block_of
        own = same & (window_positions.unsqueeze(1) <= positions.unsqueeze(-1))
        keys = torch.cat([k_summary[:, :room].flatten(1, 2), rotary(k_window, window_positions)], dim=1)
        values = torch.cat([v_summary[:, :room].flatten(1, 2), v_window], dim=1)
        y = masked_attention(rotary(q, positions), keys, values, torch.cat([earlier, own], dim=-1))

        if finishing:  # the next block moves to the front
            for window in (k_window, v_window):
                window[finishing, : t - 1] = window[finishing, C:]
        return y, {"k": k_window[:, :C], "v": v_window[:, :C], "k_summary": k_summary, "v_summary": v_summary,
                   "position": state["position"] + t}

    def begin(self, qkv: Tensor, state: State) -> tuple[Tensor, State]:
        """Sequences from their beginning: `forward`, and the state behind it."""
        T, C = qkv.shape[1], self.block
        M = T // C
        state = self.reserve(state, T)
        _, k, v = qkv.chunk(3, dim=2)
        starts = torch.arange(M, device=qkv.device) * C
        k_blocks, v_blocks = (x[:, : M * C].unflatten(1, (M, C)) for x in (k, v))
        done = summaries(k_blocks, v_blocks, self.E, self.F, self.phases_of(k, starts))
        for name, x, summary in zip("kv", (k, v), done, strict=True):
            state[name][:, : T - M * C] = x[:, M * C :].to(state[name].dtype)
            state[f"{name}_summary"][:, :M] = summary.to(state[name].dtype)
        return self(qkv), state | {"position": state["position"] + T}

    def extend_one(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """One token with nothing asked of the device: every row's block is summarised, and kept where it is full."""
        position, k_own, v_own, C = state["position"], state["k"], state["v"], self.block
        rows, offset, start = torch.arange(len(q), device=q.device), position % C, position // C * C
        k_own[rows, offset], v_own[rows, offset] = k[:, 0].to(k_own.dtype), v[:, 0].to(v_own.dtype)
        room = state["k_summary"].shape[1]
        if room:
            at, full = (start // C).clamp(max=room - 1), (offset == C - 1)[:, None, None, None]
            done = summaries(k_own[:, None], v_own[:, None], self.E, self.F, self.phases_of(k_own, start.unsqueeze(1)))
            for name, new in zip(("k_summary", "v_summary"), done, strict=True):
                state[name][rows, at] = torch.where(full, new[:, 0].to(k_own.dtype), state[name][rows, at])
        place = torch.arange(C, device=q.device)
        earlier = torch.arange(room, device=q.device).repeat_interleave(self.rank) < (start // C).unsqueeze(1)
        visible = torch.cat([earlier, place <= offset.unsqueeze(1)], dim=-1).unsqueeze(1)
        keys = torch.cat([state["k_summary"].flatten(1, 2), rotary(k_own, start.unsqueeze(1) + place)], dim=1)
        values = torch.cat([state["v_summary"].flatten(1, 2), v_own], dim=1)
        y = masked_attention(rotary(q, position.unsqueeze(1)), keys, values, visible)
        return y, state | {"position": position + 1}

    def flops(self, seq_len: int) -> int:
        """Pairs counted as the causal mask leaves them: of a token with its block's, and with each earlier summary."""
        full, rest = divmod(seq_len, self.block)
        pairs = (full * self.block * (self.block + 1) + rest * (rest + 1)) // 2
        pairs += self.rank * (self.block * full * (full - 1) // 2 + rest * full)
        summarising = (seq_len - 1) // self.block * self.block * self.rank
        return 4 * (pairs + summarising) * self.heads * self.head_dim


class PrefixMemory(nn.Module):
    """R slots that run along: y_t = softmax_r(q_t . sum_{s<=t} E_rs k_s / sqrt(K)) . (sum_{s<=t} F_rs v_s).

    Two causal linear attentions: the scores are q over keys k with values E_s, the output the weights over keys F_s
    with values v. No rotary positions: E and F know the position already.
    """

    def __init__(self, heads: int, head_dim: int, rank: int, seq_len: int):
        super().__init__()
        self.heads, self.head_dim, self.rank = heads, head_dim, rank
        self.E = nn.Parameter(torch.empty(heads, rank, seq_len))
        self.F = nn.Parameter(torch.empty(heads, rank, seq_len))

    def forward(self, qkv: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        B, T = qkv.shape[:2]
        q, k, v = qkv.chunk(3, dim=2)
        if cu_seqlens is None:
            E, F = (projection[:, :, :T].permute(2, 0, 1).contiguous().expand(B, -1, -1, -1)  # one copy for all rows
                    for projection in (self.E, self.F))
        else:
            positions = token_positions(q, cu_seqlens)
            E, F = (projection.permute(2, 0, 1).contiguous()[positions].unsqueeze(0) for projection in (self.E, self.F))
        return self.attend(q, k, v, E, F, cu_seqlens=cu_seqlens)[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, k_state: Tensor | None = None,
               v_state: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, t, H, K], their E and F [B, t, H, R] -> y, sum k E [B, H, K, R], sum F v [B, H, R, K]."""
        scores, k_state = linear_attention(q, k, E, k_state, cu_seqlens)
        p = (scores * self.head_dim**-0.5).softmax(dim=-1)
        y, v_state = linear_attention(p, F, v, v_state, cu_seqlens)
        return y, k_state, v_state

    def init_state(self, batch_size: int, max_len: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        shapes = {"k": (self.head_dim, self.rank), "v": (self.rank, self.head_dim)}
        wide = torch.promote_types(dtype, torch.float32)  # a sum over the whole past
        state = {name: torch.zeros(batch_size, self.heads, *shape, device=device, dtype=wide)
                 for name, shape in shapes.items()}
        return state | {"position": torch.zeros(batch_size, device=device, dtype=torch.int64)}

    def extend(self, qkv: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v = qkv.chunk(3, dim=2)
        positions = state["position"].unsqueeze(1) + torch.arange(q.shape[1], device=q.device)
        E, F = (projection.permute(2, 0, 1)[positions] for projection in (self.E, self.F))
        y, k_state, v_state = self.attend(q, k, v, E, F, state["k"], state["v"])
        return y, {"k": k_state, "v": v_state, "position": state["position"] + q.shape[1]}

    def flops(self, seq_len: int) -> int:
        """Two states of K x R a head, each updated and read once a token."""
        return 8 * seq_len * self.rank * self.heads * self.head_dim


MIXER = Linformer
