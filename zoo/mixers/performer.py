"""Performer: causal attention in linear time, by positive orthogonal random features (FAVOR+, 2009.14794)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from zoo.contract import SequenceMixer, State
from zoo.errors import ZooError
from zoo.layers import head_dim, small_init_, token_positions
from zoo.ops import decode
from zoo.ops.decode_mixers import FAVOR, favor_token
from zoo.ops.favor import favor_attention, orbit_frequencies, orbit_projection
from zoo.ops.rotary import turn

MAX_NORM = 3.0  # of queries and keys, whose largest logit is then 9


class Performer(SequenceMixer):
    """W_o favor(R^t q, R^t k, W_v x) in H heads of K = D / H, about softmax attention with logits q_t . R^(s-t) k_s.

    The relative variance of an estimate is (exp(|q + k|^2) - 1) / m (lemma 2): norms decide its quality far more than
    the number m of features. So they are bounded: q = z / sqrt(1 + |z|^2 / R^2) with R = `MAX_NORM` for attention's own
    z = K^(-1/4) W_q x, which is z while z is short; k likewise.

    Positions are what a fixed W spoils most, and what a language model needs first: of 1024 tokens the one before could
    get 0.10 of a head's weight with independent rows of W and rotary frequencies 100^(-2i/K), where exact attention
    with the same bound gave it 0.56. So the rotation R is by `orbit_frequencies`, in whose orbits the rows of W are,
    and estimates are relative: 0.34, as every 2 K tokens look alike. And as in kernelised attention with relative
    positions (2106.12566) the logits have a bias, here a linear one (ALiBi, 2108.12409, whose slopes these are): what
    head h = 1, ..., H holds halves every 2^(8h / H) tokens; 0.79 for 64, 1.00 for 16. Neither is in the paper, and the
    price is that nothing is held for many times 256 tokens (docs/kernels/favor.md).

    features: m, the rows of the random projection W [m, K], shared by the heads; 4 K, which are two orbits, if None.
    feature_seed: W is a pure function of (feature_seed, layer, draw) and is saved with the parameters, as a buffer.
    redraw_every: optimiser steps between draws; 0 keeps the first for good, and the model learns to use it.
    """

    paper = "Performer (FAVOR+), 2009.14794; positions ours"
    complexity = "O(T), O(1)"
    projects_input = True

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
            q, k = turn(qk, self._phases(positions, qk.dtype)).to(v.dtype).chunk(2, dim=2)
        y, sums = favor_attention(q, k, v, self.projection, sums, MAX_NORM, cu_seqlens, slopes(self.heads, x.device))
        return self.out(y.flatten(-2)), sums

    def _phases(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """cos and sin [..., 2, K // 2] of positions [...], of which none is beyond the period."""
        period = max(1, 4 * (self.head_dim // 2))
        angle = (positions % period).to(dtype).unsqueeze(-1) * orbit_frequencies(self.head_dim, dtype, positions.device)
        return torch.stack([angle.cos(), angle.sin()], dim=-2)

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device | str | None = None,
                   dtype: torch.dtype = torch.float32) -> State:
        """sums: of what is left of the key features times [value, 1], over the whole past: float32 at least."""
        shape = batch_size, self.heads, self.features, self.head_dim + 1
        return {"sums": torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)),
                "position": torch.zeros(batch_size, device=device, dtype=torch.int64)}

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        positions = state["position"].unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
        y, sums = self._attend(x, positions, state["sums"])
        return y, {"sums": sums.to(state["sums"].dtype), "position": state["position"] + x.shape[1]}

    def extend_normed(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm,
                      state: State) -> tuple[Tensor, Tensor, State]:
        ours = self.head_dim % 2 == 0 and decode.takes(x, self.qkv.weight, self.out.weight)
        if not (ours and FAVOR.chosen(x, self.head_dim, self.features)):
            return super().extend_normed(x, y, norm, state)
        x, qkv = decode.norm_linear(x, y, norm, self.qkv.weight)
        decay = _slopes_once(self.heads, x.device)
        state = decode.dense(state)
        return x, favor_token(qkv, self.projection, decay, MAX_NORM, state, self.out.weight), state

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
            self.projection.copy_(orbit_projection(self.features, self.head_dim, generator))
        self._draw = draw

    def reset_parameters(self, layer_idx: int, num_layers: int) -> None:
        small_init_(self.qkv.weight)
        small_init_(self.out.weight, gain=(2 * num_layers) ** -0.5)
        self.layer_idx, self._draw = layer_idx, None
        self._redraw(0)


def slopes(heads: int, device: torch.device) -> Tensor:
    """2^(-8 h / H) of head h = 1, ..., H (2108.12409, section 3)."""
    return torch.exp2(-8 / heads * torch.arange(1, heads + 1, device=device))


@cache
def _slopes_once(heads: int, device: torch.device) -> Tensor:
    return slopes(heads, device)


def _forget_draw(mixer: Performer, incompatible_keys: object) -> None:
    mixer._draw = None


MIXER = Performer
