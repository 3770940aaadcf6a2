"""Attention Free Transformer (2105.14103), causal; `local` is what its character-level language models use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.contract import SequenceMixer, State
from zoo.errors import ZooError, choose
from zoo.layers import filled, head_dim, small_init_, unasked
from zoo.ops import decode
from zoo.ops.aft import EMPTY, Cache, Sums, absorb, aft_conv, aft_full, aft_local, aft_local_in_row, aft_simple, slide
from zoo.ops.decode_mixers import AFT_LOCAL, aft_local_token

Device = torch.device | str | None
BIAS_STD = 0.1  # factors of the position biases are drawn from N(0, 10^-2), section 5.1


def _empty_cache(keys: tuple[int, ...], values: tuple[int, ...], device: Device, dtype: torch.dtype) -> State:
    empty = max(EMPTY, torch.finfo(dtype).min / 2)  # float16 does not reach EMPTY
    return {"keys": torch.full(keys, empty, device=device, dtype=dtype),
            "values": torch.zeros(values, device=device, dtype=dtype)}


def _empty_sums(keys: tuple[int, ...], values: tuple[int, ...], device: Device) -> State:
    return {"max": torch.full(keys, EMPTY, device=device), "num": torch.zeros(values, device=device),
            "den": torch.zeros(keys, device=device)}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the parameters' precision under autocast too: what stands in an exponent is not rounded to bf16."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _sums(state: State) -> Sums:
    return Sums(state["max"], state["num"], state["den"])


def _cache(state: State) -> Cache:
    return Cache(state["keys"], state["values"])


class Variant(nn.Module, ABC):
    """What the variants differ in: position biases and state. q, v [B, T, D], k [B, T, key_dim] -> y [B, T, D]."""

    max_len: int | None = None

    def __init__(self, dim: int, key_dim: int):
        super().__init__()
        self.dim, self.key_dim = dim, key_dim

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor: ...

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projection [B, T, 2 D + key_dim] -> q, k, v."""
        q, k, v = qkv.split([self.dim, self.key_dim, self.dim], dim=-1)
        return q, k, v

    def mix(self, qkv: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """`forward` of the projection's parts."""
        return self(*self.split(qkv), cu_seqlens)

    @abstractmethod
    def init_state(self, batch_size: int, max_len: int, device: Device, dtype: torch.dtype) -> State: ...

    @abstractmethod
    def extend(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]: ...

    def reserve(self, state: State, tokens: int) -> State:
        """`SequenceMixer.reserve`."""
        return state

    @abstractmethod
    def pairs(self, seq_len: int) -> int:
        """How many (row, key) pairs have a bias; each costs two multiply-adds a channel, for num and den."""

    def reset_parameters(self) -> None:
        for bias in self.parameters():
            nn.init.normal_(bias, std=BIAS_STD)


class Simple(Variant):
    """No biases: the order of the past is invisible but for what lower layers make of it."""

    def __init__(self, dim: int):
        super().__init__(dim, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return aft_simple(q, k, v, cu_seqlens=cu_seqlens)

    def init_state(self, batch_size: int, max_len: int, device: Device, dtype: torch.dtype) -> State:
        return _empty_sums((batch_size, self.dim), (batch_size, self.dim), device)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        sums = _sums(state)
        return aft_simple(q, k, v, sums), absorb(sums, k, v)._asdict()

    def pairs(self, seq_len: int) -> int:
        return seq_len


class Factored(Variant):
    """w_ts = u_t . v_s (section 3.2, "Parameterization"): the position is absolute, so the length has a limit."""

    def __init__(self, dim: int, seq_len: int, rank: int):
        super().__init__(dim, dim)
        self.max_len = seq_len
        self.row = nn.Parameter(torch.empty(seq_len, rank))
        self.column = nn.Parameter(torch.empty(seq_len, rank))

    def places(self, x: Tensor, cu_seqlens: Tensor | None) -> int:
        """How many positions there are in x [B, T, ...]: T, if T may be one sequence."""
        return x.shape[1] if cu_seqlens is None else min(x.shape[1], len(self.row))


class Full(Factored):
    """A bias for every pair. The state is a cache of all keys and values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        length = self.places(q, cu_seqlens)
        return aft_full(q, k, v, _product(self.row[:length], self.column[:length].T), cu_seqlens=cu_seqlens)

    def init_state(self, batch_size: int, max_len: int, device: Device, dtype: torch.dtype) -> State:
        shape = (batch_size, max_len, self.dim)
        return {"position": torch.zeros(batch_size, dtype=torch.int64, device=device),
                **_empty_cache(shape, shape, device, dtype)}

    def extend(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        position, (batch, length, _) = state["position"], k.shape
        at = position.unsqueeze(1) + torch.arange(length, device=position.device)
        end = filled(at, state["keys"].shape[1])
        state = self.reserve(state, end)
        keys, values = state["keys"], state["values"]
        past = end if unasked(position, length) else end - length  # the row that is furthest on has so many
        row, column = self.row[at], self.column[at]
        seen = torch.arange(past, device=position.device) < position[:, None, None]
        earlier = _product(row, self.column[:past].T).masked_fill(~seen, -torch.inf)
        bias = torch.cat([earlier, _product(row, column.mT)], -1)
        y = aft_full(q, k, v, bias, Cache(keys[:, :past], values[:, :past]) if past else None)
        of = torch.arange(batch, device=position.device).unsqueeze(1)
        keys[of, at], values[of, at] = k.to(keys.dtype), v.to(values.dtype)
        return y, {"position": position + length, "keys": keys, "values": values}

    def reserve(self, state: State, tokens: int) -> State:
        keys, values = state["keys"], state["values"]
        if (missing := tokens - keys.shape[1]) <= 0:
            return state
        more = len(keys), max(missing, keys.shape[1]), self.dim
        room = _empty_cache(more, more, keys.device, keys.dtype)
        return state | {"keys": torch.cat([keys, room["keys"]], 1), "values": torch.cat([values, room["values"]], 1)}

    def pairs(self, seq_len: int) -> int:
        return seq_len * (seq_len + 1) // 2


class Local(Factored):
    """A bias for the last `window` tokens; older ones are seen without. The state is a window and sums of the rest."""

    def __init__(self, dim: int, seq_len: int, window: int, rank: int):
        super().__init__(dim, seq_len, rank)
        self.window = min(window, seq_len)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return aft_local(q, k, v, self.band(self.places(q, cu_seqlens)), cu_seqlens=cu_seqlens)

    def mix(self, qkv: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return aft_local_in_row(qkv, self.band(self.places(qkv, cu_seqlens)), cu_seqlens)

    def band(self, length: int) -> Tensor:
        """w_ts at [t, t - s] for t - s < window, t < length; linear in length. 0 before the first token."""
        window = self.window
        blocks = -(-length // window)
        pad = blocks * window - length
        row = F.pad(self.row[:length], (0, 0, 0, pad)).unflatten(0, (blocks, window))
        column = F.pad(self.column[:length], (0, 0, window, pad)).unflatten(0, (blocks + 1, window))
        w = _product(row, torch.cat([column[:-1], column[1:]], 1).mT)  # at [c, x]: t - s = c + window - x
        w = F.pad(w.flatten(1)[:, 1:], (0, window + 1)).unflatten(1, (window, 2 * window + 1))  # row c moves c + 1 left
        return w[:, :, :window].flip(2).flatten(0, 1)[:length]

    def band_at(self, position: Tensor) -> Tensor:
        """The same for the rows at position [B, t] -> [B, t, window]; before the first token anything."""
        if position.shape[1] >= self.window:
            return self.band(self.row.shape[0])[position]
        back = torch.arange(self.window, device=position.device)
        column = self.column[(position.unsqueeze(-1) - back).clamp(min=0)]
        return _product(column, self.row[position].unsqueeze(-1)).squeeze(-1)

    def init_state(self, batch_size: int, max_len: int, device: Device, dtype: torch.dtype) -> State:
        one, window = (batch_size, self.dim), (batch_size, self.window - 1, self.dim)
        return {"position": torch.zeros(batch_size, dtype=torch.int64, device=device),
                **_empty_sums(one, one, device), **_empty_cache(window, window, device, dtype)}

    def extend(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        sums, cache, position = _sums(state), _cache(state), state["position"]
        if q.shape[1] > 1 and not int(position.max()):  # sequences from their beginning
            y = aft_local(q, k, v, self.band(q.shape[1]))
        else:
            at = position.unsqueeze(1) + torch.arange(q.shape[1], device=position.device)
            y = aft_local(q, k, v, self.band_at(at), sums, cache)
        sums, cache = slide(sums, cache, k, v)
        return y, {"position": position + q.shape[1], **sums._asdict(), **cache._asdict()}

    def pairs(self, seq_len: int) -> int:
        return sum(min(t + 1, self.window) for t in range(seq_len))


class Conv(Variant):
    """Biases of the distance alone, one set and one key a head: gain (w - mean) / std + offset, gain and offset 0 at
    first (section 3.2). The state is that of `Local`, without a position, so the length has no limit.
    """

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__(dim, heads)
        self.heads, self.head_dim, self.window = heads, head_dim(dim, heads), window
        self.weight = nn.Parameter(torch.empty(heads, window))
        self.gain = nn.Parameter(torch.empty(heads, 1))
        self.offset = nn.Parameter(torch.empty(heads, 1))

    def bias(self) -> Tensor:
        centred = self.weight - self.weight.mean(1, keepdim=True)
        return self.gain * centred * (centred.square().mean(1, keepdim=True) + 1e-12).rsqrt() + self.offset

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return aft_conv(self._split(q), k, self._split(v), self.bias(), cu_seqlens=cu_seqlens).flatten(-2)

    def init_state(self, batch_size: int, max_len: int, device: Device, dtype: torch.dtype) -> State:
        keys, values = (batch_size, self.heads), (batch_size, self.heads, self.head_dim)
        window = (batch_size, self.window - 1)
        return _empty_sums(keys, values, device) | _empty_cache(window + keys[1:], window + values[1:], device, dtype)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        sums, cache, v = _sums(state), _cache(state), self._split(v)
        y = aft_conv(self._split(q), k, v, self.bias(), sums, cache).flatten(-2)
        sums, cache = slide(sums, cache, k, v)
        return y, {**sums._asdict(), **cache._asdict()}

    def pairs(self, seq_len: int) -> int:
        return sum(min(t + 1, self.window) for t in range(seq_len))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=BIAS_STD)
        nn.init.zeros_(self.gain)
        nn.init.zeros_(self.offset)


class AFT(SequenceMixer):
    """y = W_o (sigmoid(q) * mean_w(v; k)), the mean that of the variant.

    variant: "local" (learned biases within `window`, the past beyond it without), "full" (biases everywhere), "simple"
    (none), "conv" (biases of the distance, per head). The biases of local and full are factored by absolute positions,
    as the paper's are for either, hence `max_len` = seq_len; simple and conv take any length.
    rank: of those factors; None: the paper's 128, or less where they would outgrow the four projections.
    """

    paper = "AFT, 2105.14103"
    complexity = "O(T W), O(W); full: O(T^2), O(T)"
    projects_input = True

    def __init__(self, dim: int, heads: int, seq_len: int, *,
                 variant: Literal["local", "full", "simple", "conv"] = "local", window: int = 32,
                 rank: int | None = None):
        super().__init__()
        choose("aft variant", variant, ("local", "full", "simple", "conv"))
        rank = max(1, min(128, 2 * dim * dim // seq_len)) if rank is None else rank
        for name, value in (("window", window), ("rank", rank)):
            if type(value) is not int or value < 1:
                raise ZooError(f"aft {name}={value!r} is not a positive whole number")
        self.variant: Variant
        if variant == "local":
            self.variant = Local(dim, seq_len, window, rank)
        elif variant == "full":
            self.variant = Full(dim, seq_len, rank)
        elif variant == "conv":
            self.variant = Conv(dim, heads, window)
        else:
            self.variant = Simple(dim)
        self.max_len = self.variant.max_len
        self.qkv = nn.Linear(dim, 2 * dim + self.variant.key_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.out(self.variant.mix(self.qkv(x), cu_seqlens))

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device | str | None = None,
                   dtype: torch.dtype = torch.float32) -> State:
        return self.variant.init_state(batch_size, max_len, device, dtype)

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.variant.extend(*self.variant.split(self.qkv(x)), state=state)
        return self.out(y), state

    def extend_normed(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm,
                      state: State) -> tuple[Tensor, Tensor, State]:
        local = self.variant
        if not (isinstance(local, Local) and local.window > 1 and decode.takes(x, self.qkv.weight, self.out.weight)
                and AFT_LOCAL.chosen(x, local.dim, local.window, local.row.shape[1])):
            return super().extend_normed(x, y, norm, state)
        x, qkv = decode.norm_linear(x, y, norm, self.qkv.weight)
        state = decode.dense(state)
        return x, aft_local_token(qkv, local.row, local.column, state, self.out.weight), state

    def reserve(self, state: State, tokens: int) -> State:
        return self.variant.reserve(state, tokens)

    def flops(self, seq_len: int) -> int:
        projections = 2 * seq_len * (self.qkv.weight.numel() + self.out.weight.numel())
        return projections + 4 * self.variant.pairs(seq_len) * self.out.weight.shape[0]

    def reset_parameters(self, layer_idx: int, num_layers: int) -> None:
        small_init_(self.qkv.weight)
        small_init_(self.out.weight, gain=(2 * num_layers) ** -0.5)
        self.variant.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        return {f"variant.{name}" for name, _ in self.variant.named_parameters()}


MIXER = AFT
