"""RWKV-6 "Finch" (2404.05892): a linear recurrence with data-dependent decay; both slots look one token back.

Time mix (the paper's section 4; x' is the token before x):
    ddlerp_z(x) = x + (x' - x) * lora_z(x + (x' - x) * mu_x)          for z in w, k, v, r, g
    lora_z(x)   = mu_z + tanh(x A_z) B_z                              A [D, rank], B [rank, D]
    k, v, r, g  = W_z ddlerp_z(x)
    w           = exp(-exp(d)),  d = mu_d + tanh(ddlerp_w(x) A_d) B_d
    y           = W_o (silu(g) * GroupNorm(wkv6(r, k, v, log w, u)))  one group a head
Channel mix (as in RWKV-4, 2305.13048; the paper keeps it):
    y           = sigmoid(W_r lerp_r(x)) * W_v relu(W_k lerp_k(x))^2

Initial values, learning-rate and weight-decay groups follow RWKV-LM's trainer for v6 (`RWKV-v5/src/model.py`: the
constructors of time mix and channel mix, `generate_init_weight`, `configure_optimizers`); the paper only sketches them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.contract import SequenceMixer, State
from zoo.errors import ZooError
from zoo.layers import head_dim
from zoo.ops import decode
from zoo.ops.decode_mixers import RWKV, channel_mix_token, time_mix_token
from zoo.ops.linears import linears
from zoo.ops.norm_gate import norm_gate
from zoo.ops.squared_relu import squared_relu
from zoo.ops.token_mix import ddlerp, token_mix
from zoo.ops.wkv6 import wkv6_of

NORM_EPS = 64e-5  # of the heads' norm


def _last(x: Tensor, state: State) -> State:
    """What the next token shift needs of x [B, T, D]: a copy, since a view would keep all of x alive."""
    return {"shift": x[:, -1].to(state["shift"].dtype, copy=True)}


def _before(x: Tensor, state: State) -> Tensor | None:
    """The token before x [B, T, D]; None where there is none in any row, which a sequence's kernels take."""
    shift = state["shift"]
    return shift if x.shape[1] == 1 or bool(shift.any()) else None


def _ramp(dim: int) -> Tensor:
    """0, 1/D, ..., (D-1)/D: channels differ from the start, some take the token before, some do not."""
    return torch.arange(dim) / dim


class ChannelMix(SequenceMixer):
    """The channel slot: squared ReLU, gated, both on mixtures of a token and the one before."""

    projects_input = True

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.mix = nn.Parameter(torch.empty(2, dim))  # k, r
        self.key = nn.Linear(dim, hidden_dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self._mixed(*token_mix(x, self.mix, cu_seqlens=cu_seqlens))

    def _mixed(self, xk: Tensor, xr: Tensor) -> Tensor:
        return self.receptance(xr).sigmoid() * squared_relu(xk, self.key.weight, self.value.weight)

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device | str | None = None,
                   dtype: torch.dtype = torch.float32) -> State:
        return {"shift": torch.zeros(batch_size, self.mix.shape[1], device=device, dtype=dtype)}

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._mixed(*token_mix(x, self.mix, previous=_before(x, state))), _last(x, state)

    def extend_normed(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm,
                      state: State) -> tuple[Tensor, Tensor, State]:
        weights = self.key.weight, self.receptance.weight, self.value.weight
        if not decode.takes(x, *weights):
            return super().extend_normed(x, y, norm, state)
        state = decode.dense(state)
        return *channel_mix_token(x, y, norm, state, self.mix, *weights), state

    def flops(self, seq_len: int) -> int:
        return 2 * seq_len * sum(linear.weight.numel() for linear in (self.key, self.receptance, self.value))

    def reset_parameters(self, layer_idx: int, num_layers: int) -> None:
        with torch.no_grad():
            self.mix.copy_(1 - _ramp(self.mix.shape[1]) ** (1 - layer_idx / num_layers))
        nn.init.orthogonal_(self.key.weight, 1.0)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def no_weight_decay(self) -> set[str]:
        return {"mix"}


class TimeMix(SequenceMixer):
    """The sequence slot. `mix_rank`, `decay_rank`: RWKV-LM's 32 and 64 from D = 512 on, by default less below."""

    channel_mixer = ChannelMix
    paper = "RWKV-6 (Finch), 2404.05892"
    complexity = "O(T), O(1)"
    projects_input = True

    def __init__(self, dim: int, heads: int, seq_len: int, *, mix_rank: int | None = None,
                 decay_rank: int | None = None):
        super().__init__()
        for name, given in (("mix_rank", mix_rank), ("decay_rank", decay_rank)):
            if given is not None and (type(given) is not int or given < 1):
                raise ZooError(f"{name}={given!r} is not a positive whole number, nor null for the default")
        rank = mix_rank or min(32, max(4, dim // 16))
        decay_rank = decay_rank or min(64, max(8, dim // 8))
        self.mix_base = nn.Parameter(torch.empty(dim))
        self.mix = nn.Parameter(torch.empty(5, dim))  # w, k, v, r, g
        self.mix_down = nn.Parameter(torch.empty(dim, 5 * rank))
        self.mix_up = nn.Parameter(torch.empty(5, rank, dim))
        self.decay = nn.Parameter(torch.empty(dim))
        self.decay_down = nn.Parameter(torch.empty(dim, decay_rank))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, dim))
        self.bonus = nn.Parameter(torch.empty(heads, head_dim(dim, heads)))
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(dim))
        self.norm_bias = nn.Parameter(torch.empty(dim))
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self._mixed(x, None, None, cu_seqlens)[0]

    def _mixed(self, x: Tensor, previous: Tensor | None, wkv: Tensor | None,
               cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, D], the token before it and the wkv state (zeros if None) -> (y [B, T, D], wkv state after)."""
        xw, xk, xv, xr, xg = ddlerp(x, self.mix_base, self.mix_down, self.mix, self.mix_up, previous=previous,
                                    cu_seqlens=cu_seqlens)
        d = torch.tanh(xw @ self.decay_down) @ self.decay_up
        r, k, v, g = linears((xr, xk, xv, xg), (self.receptance.weight, self.key.weight, self.value.weight,
                                                self.gate.weight))
        r, k, v, d = (z.unflatten(-1, self.bonus.shape) for z in (r, k, v, d))
        y, wkv = wkv6_of(r, k, v, d, self.decay.view_as(self.bonus), self.bonus, wkv, cu_seqlens)
        return self.output(norm_gate(y, g, self.norm_weight, self.norm_bias, eps=NORM_EPS)), wkv

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device | str | None = None,
                   dtype: torch.dtype = torch.float32) -> State:
        heads, size = self.bonus.shape
        return {"shift": torch.zeros(batch_size, heads * size, device=device, dtype=dtype),
                "wkv": torch.zeros(batch_size, heads, size, size, device=device)}

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, wkv = self._mixed(x, _before(x, state), state["wkv"], None)
        return y, _last(x, state) | {"wkv": wkv}

    def extend_normed(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm,
                      state: State) -> tuple[Tensor, Tensor, State]:
        weights = self.key.weight, self.value.weight, self.receptance.weight, self.gate.weight
        sizes = self.bonus.shape[1], self.mix_up.shape[1], self.decay_up.shape[0]
        if not (decode.takes(x, *weights, self.output.weight) and RWKV.chosen(x, *sizes)):
            return super().extend_normed(x, y, norm, state)
        state = decode.dense(state)
        x, y = time_mix_token(
            x, y, norm, state, mix_base=self.mix_base, mix_down=self.mix_down, mix=self.mix, mix_up=self.mix_up,
            decay_down=self.decay_down, decay_up=self.decay_up, decay=self.decay, bonus=self.bonus, weights=weights,
            norm_weight=self.norm_weight, norm_bias=self.norm_bias, eps=NORM_EPS, output=self.output.weight)
        return x, y, state

    def flops(self, seq_len: int) -> int:
        linears = (self.key, self.value, self.receptance, self.gate, self.output)
        matrices = [self.mix_down, self.mix_up, self.decay_down, self.decay_up, *(each.weight for each in linears)]
        state = self.bonus.numel() * self.bonus.shape[1]  # written and read at every token
        return 2 * seq_len * (sum(matrix.numel() for matrix in matrices) + 2 * state)

    @torch.no_grad()
    def reset_parameters(self, layer_idx: int, num_layers: int) -> None:
        """With depth (0 to 1) decays slow down, a token's own bonus grows, less of the token before is mixed in."""
        dim = len(self.decay)
        depth = layer_idx / max(1, num_layers - 1)
        bend = 1 - layer_idx / num_layers
        ramp = _ramp(dim)
        self.mix_base.copy_(1 - ramp**bend)
        self.mix.copy_(torch.stack([1 - ramp**power for power in (bend, bend, bend, bend / 2, bend / 2)]))
        self.mix[2] -= 0.3 * depth
        nn.init.zeros_(self.mix_down)
        nn.init.uniform_(self.mix_up, -0.01, 0.01)
        spread = torch.linspace(0, 1, dim)
        self.decay.copy_(-6 + 5 * spread ** (0.7 + 1.3 * depth))
        nn.init.zeros_(self.decay_down)
        nn.init.uniform_(self.decay_up, -0.01, 0.01)
        zigzag = 0.1 * ((torch.arange(dim) + 1) % 3 - 1)
        self.bonus.copy_((depth * (1 - spread) + zigzag).view_as(self.bonus))
        nn.init.orthogonal_(self.receptance.weight, 1.0)
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.orthogonal_(self.key.weight, 0.1)
        nn.init.orthogonal_(self.gate.weight, 0.1)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.norm_weight, ((1 + layer_idx) / num_layers) ** 0.7)
        nn.init.zeros_(self.norm_bias)

    def no_weight_decay(self) -> set[str]:
        return {"mix", "mix_down", "mix_up", "decay_down", "decay_up", "bonus"}

    def matrices(self) -> set[str]:
        return super().matrices() | {"mix_down", "mix_up", "decay_down", "decay_up"}

    def lr_multipliers(self) -> dict[str, float]:
        return {"decay": 2.0}


MIXER = TimeMix
