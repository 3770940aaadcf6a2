"""Performer: causal attention in linear time, by positive orthogonal random features (FAVOR+, 2009.14794)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from zoo.contract import SequenceMixer, State
from zoo.errors import ZooError
from zoo.layers import head_dim, rotary, small_init_, token_positions
from zoo.ops.favor import favor_attention, orthogonal_projection

MAX_NORM = 3.0  # of queries and keys, whose largest logit is then 9
ROTARY_BASE = 100.0  # see Performer


class Performer(SequenceMixer):
    """W_o favor(rope(q), rope(k), W_v x) in H heads of K = D / H, about softmax attention with logits q . k.

    The relative variance of an estimate is (exp(|q + k|^2) - 1) / m (lemma 2): norms decide its quality far more than
    the number m of features. So they are bounded: q = z / sqrt(1 + |z|^2 / R^2) with R = `MAX_NORM` for attention's own
    z = K^(-1/4) W_q x, which is z while z is short; k likewise. The rotation keeps norms, and turns the slowest channel
    pairs by 1 / `ROTARY_BASE` a token, not by 10^-4: bounded logits tell neighbours apart only if most pairs turn.

    features: m, the rows of the random projection W [m, K], shared by the heads; 4 K if None.
    feature_seed: W is a pure function of (feature_seed, layer, draw) and is saved with the parameters, as a buffer.
    redraw_every: optimiser steps between draws; 0 keeps the first for good, and the model learns to use it.
    """

    paper = "Performer (FAVOR+), 2009.14794"
    complexity = "O(T), O(1)"

    def __init__(self, dim: int, heads: int, seq_len: int, *, features: int | None = None, feature_seed: int = 0,
                 redraw_every: int = 0):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim(dim, heads)
        self.features = 4 * self.head_dim if features is None else features
        for name, value, least in (("features", self.features, 1), ("feature_seed", feature_seed, 0),
                                   ("redraw_every", redraw_every, 0)):
            if type(value) is not int or value < least:
                raise ZooError(f"{name}={value!r}; allowed: whole numbers from {least}")
        self.feature_seed, self.redraw_every, self.layer_idx = feature_seed, redraw_every, 0
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.projection: Tensor
        self.register_buffer("projection", torch.empty(self.features, self.head_dim))
        self._draw: int | None = None  # the number of the draw in `projection`, None where it was loaded
        self.register_load_state_dict_post_hook(_forget_draw)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self._attend(x, token_positions(x, cu_seqlens), None, cu_seqlens)[0]

    def _attend(self, x: Tensor, positions: Tensor, sums: Tensor | None,
                cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, t, D] at positions [t] or [B, t] -> (y [B, t, D], the op's state)."""
        z = self.qkv(x).unflatten(-1, (3 * self.heads, self.head_dim))
        qk, v = z.split([2 * self.heads, self.heads], dim=2)
        with torch.autocast(x.device.type, enabled=False):
            qk = qk.to(torch.promote_types(qk.dtype, torch.float32)) * self.head_dim**-0.25
            qk = qk * torch.rsqrt(1 + qk.square().sum(-1, keepdim=True) / MAX_NORM**2)
        q, k = rotary(qk, positions, ROTARY_BASE).chunk(2, dim=2)
        y, sums = favor_attention(q, k, v, self.projection, sums, max_key_norm=MAX_NORM, cu_seqlens=cu_seqlens)
        return self.out(y.flatten(-2)), sums

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device | str | None = None,
                   dtype: torch.dtype = torch.float32) -> State:
        """sums: of the key features times [value, 1]."""
        shape = batch_size, self.heads, self.features, self.head_dim + 1
        return {"sums": torch.zeros(shape, device=device, dtype=dtype),
                "position": torch.zeros(batch_size, device=device, dtype=torch.int64)}

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        positions = state["position"].unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
        y, sums = self._attend(x, positions, state["sums"])
        return y, {"sums": sums.to(state["sums"].dtype), "position": state["position"] + x.shape[1]}

    def flops(self, seq_len: int) -> int:
        """Projections, features of queries and keys, and for each token the state's update and its readout."""
        projections = self.qkv.weight.numel() + self.out.weight.numel()
        features = 2 * self.heads * self.projection.numel()
        state = 2 * self.heads * self.features * (self.head_dim + 1)
        return 2 * seq_len * (projections + features + state)

    def set_step(self, step: int) -> None:
        if self.redraw_every:
            self._redraw(step // self.redraw_every)

    def _redraw(self, draw: int) -> None:
        if draw == self._draw:
            return
        seed = np.random.SeedSequence([self.feature_seed, self.layer_idx, draw]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0]))
        with torch.no_grad():
            self.projection.copy_(orthogonal_projection(self.features, self.head_dim, generator))
        self._draw = draw

    def reset_parameters(self, layer_idx: int, num_layers: int) -> None:
        small_init_(self.qkv.weight)
        small_init_(self.out.weight, gain=(2 * num_layers) ** -0.5)
        self.layer_idx, self._draw = layer_idx, None
        self._redraw(0)


def _forget_draw(mixer: Performer, incompatible_keys: object) -> None:
    mixer._draw = None


MIXER = Performer
