"""Small layers that several mixers share: rotary positions, caches, the SwiGLU MLP, initialisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.contract import SequenceMixer, State
from zoo.errors import ZooError
from zoo.ops import decode
from zoo.ops.rotary import phases, turn


def head_dim(dim: int, heads: int) -> int:
    """Channels per head. Raises ZooError where `heads` does not divide `dim`."""
    if heads < 1 or dim % heads:
        divisors = [h for h in range(1, dim + 1) if dim % h == 0]
        raise ZooError(f"heads={heads} does not divide dim={dim}; allowed: {', '.join(map(str, divisors))}")
    return dim // heads


def rotary(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotate channel pairs (i, i + K/2) of x [B, T, H, K] by positions * base^(-2i/K) (RoPE, 2104.09864 eq. 15, 34).

    positions [T] or [B, T]. The phases are float32, float64 for an x of that.
    """
    return turn(x, phases(positions, x.shape[-1], base, torch.promote_types(x.dtype, torch.float32)))


def token_positions(x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """How many tokens of its sequence, or of its document, stand before each of x [B, T, ...]: [T] int64.

    Computed on x's device, with no wait for it.
    """
    place = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return place
    borders = cu_seqlens.to(place.dtype)
    return place - borders[torch.searchsorted(borders, place, right=True) - 1]


def enlarged(cache: Tensor, length: int) -> Tensor:
    """A cache [B, L, ...] with room for `length` entries: itself, or a copy at least twice as long, zeros behind."""
    if length <= cache.shape[1]:
        return cache
    larger = cache.new_zeros(len(cache), max(length, 2 * cache.shape[1]), *cache.shape[2:])
    larger[:, : cache.shape[1]] = cache
    return larger


def unasked(position: Tensor, tokens: int) -> bool:
    """Whether the device may not be asked for a position: of one token on a GPU (`SequenceMixer.extend`)."""
    return position.is_cuda and tokens == 1


def filled(positions: Tensor, room: int) -> int:
    """How many entries of a cache with so much room positions [B, t] reach; all of it where nobody may ask."""
    return room if unasked(positions, positions.shape[1]) else int(positions.max()) + 1


def small_init_(weight: Tensor, gain: float = 1.0) -> None:
    """N(0, 2 / 5D) times `gain`, the "small init" of Nguyen and Salazar (1910.05895), D the weight's input width."""
    nn.init.normal_(weight, std=gain * (2 / (5 * weight.shape[1])) ** 0.5)


class SwiGLU(SequenceMixer):
    """y = W_2 (silu(W_1 x) * W_3 x) (2002.05202 eq. 6); the channel slot of every block whose mixer brings none."""

    projects_input = True

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device | str | None = None,
                   dtype: torch.dtype = torch.float32) -> State:
        return {}

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self(x), state

    def extend_normed(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm,
                      state: State) -> tuple[Tensor, Tensor, State]:
        if not decode.takes(x, self.gate_up.weight, self.down.weight):
            return super().extend_normed(x, y, norm, state)
        x, hidden = decode.norm_linear(x, y, norm, self.gate_up.weight, glu=True)
        return x, decode.linear(hidden, self.down.weight), state

    def flops(self, seq_len: int) -> int:
        return 2 * seq_len * (self.gate_up.weight.numel() + self.down.weight.numel())

    def reset_parameters(self, layer_idx: int, num_layers: int) -> None:
        small_init_(self.gate_up.weight)
        small_init_(self.down.weight, gain=(2 * num_layers) ** -0.5)
