"""Exact attention with rotary positions: the Transformer that the others are measured against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.contract import SequenceMixer, State
from zoo.errors import ZooError
from zoo.layers import enlarged, filled, head_dim, rotary, small_init_, token_positions
from zoo.ops import decode
from zoo.ops.attention import attend_cache, causal_attention, rotary_attention
from zoo.ops.decode_mixers import ATTENTION, attend_token
from zoo.ops.rotary import phases


class Attention(SequenceMixer):
    """W_o softmax(rope(W_q x) rope(W_k x)^T / sqrt(K)) W_v x (1706.03762 eq. 1, 2104.09864), in H heads of K = D / H.

    kv_heads: how many key and value heads there are, each shared by H / kv_heads query heads (2305.13245); H if None.
    The cache shrinks by that factor, and at an equal parameter count the MLP gets what the projections save.
    """

    paper = "FlashAttention, 2205.14135; RoPE, 2104.09864"
    complexity = "O(T^2), O(T)"
    projects_input = True

    def __init__(self, dim: int, heads: int, seq_len: int, *, kv_heads: int | None = None):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim(dim, heads)
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads not in (divisors := [g for g in range(1, heads + 1) if heads % g == 0]):
            allowed = ", ".join(map(str, divisors))
            raise ZooError(f"kv_heads={kv_heads} does not divide heads={heads}; allowed: {allowed}")
        self.qkv = nn.Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> queries, keys and values [B, T, H + 2 kv_heads, K]."""
        return self.qkv(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        qkv = self.project(x)
        table = phases(token_positions(x, cu_seqlens), self.head_dim,
                       dtype=torch.promote_types(qkv.dtype, torch.float32))
        return self.out(rotary_attention(qkv, table, self.heads, cu_seqlens).flatten(-2))

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device | str | None = None,
                   dtype: torch.dtype = torch.float32) -> State:
        shape = batch_size, max_len, self.kv_heads, self.head_dim
        return {"k": torch.zeros(shape, device=device, dtype=dtype),
                "v": torch.zeros(shape, device=device, dtype=dtype),
                "position": torch.zeros(batch_size, device=device, dtype=torch.int64)}

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        B, t, _ = x.shape
        positions = state["position"].unsqueeze(1) + torch.arange(t, device=x.device)
        end = filled(positions, state["k"].shape[1])
        rows = torch.arange(B, device=x.device).unsqueeze(1)
        k_cache, v_cache = enlarged(state["k"], end), enlarged(state["v"], end)
        q, k, v = self.project(x).split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k = rotary(q, positions), rotary(k, positions)
        k_cache[rows, positions] = k.to(k_cache.dtype)
        v_cache[rows, positions] = v.to(v_cache.dtype)
        if end == t > 1:  # sequences from their beginning
            y = causal_attention(q, k, v)
        else:
            y = attend_cache(q, k_cache[:, :end], v_cache[:, :end], positions)
        return self.out(y.flatten(-2)), {"k": k_cache, "v": v_cache, "position": state["position"] + t}

    def extend_normed(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm,
                      state: State) -> tuple[Tensor, Tensor, State]:
        ours = self.head_dim % 2 == 0 and decode.takes(x, self.qkv.weight, self.out.weight)
        if not (ours and ATTENTION.chosen(x, self.head_dim)):
            return super().extend_normed(x, y, norm, state)
        x, qkv = decode.norm_linear(x, y, norm, self.qkv.weight)
        state = decode.dense(state)
        return x, attend_token(qkv, state, self.heads, self.out.weight), state

    def reserve(self, state: State, tokens: int) -> State:
        return state | {name: enlarged(state[name], tokens) for name in ("k", "v")}

    def flops(self, seq_len: int) -> int:
        """Counts only the T (T + 1) / 2 pairs that the causal mask leaves, 2 D each for the score and for the value."""
        projections = 2 * seq_len * (self.qkv.weight.numel() + self.out.weight.numel())
        return projections + 2 * seq_len * (seq_len + 1) * self.heads * self.head_dim

    def reset_parameters(self, layer_idx: int, num_layers: int) -> None:
        small_init_(self.qkv.weight)
        small_init_(self.out.weight, gain=(2 * num_layers) ** -0.5)


MIXER = Attention
