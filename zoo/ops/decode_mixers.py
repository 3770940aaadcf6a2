"""One token of each mixer, from its projection on, where kernels take the steps together. See `zoo.ops.decode`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from zoo.ops.aft import EMPTY, Cache, Sums, aft_local, slide
from zoo.ops.attention import attend_cache, masked_attention
from zoo.ops.backend import Kernel
from zoo.ops.decode import flat, worst
from zoo.ops.favor import favor_attention, orbit_frequencies
from zoo.ops.norm_gate import norm_gate
from zoo.ops.rotary import phases, turn
from zoo.ops.summary_attention import summaries
from zoo.ops.token_mix import ddlerp
from zoo.ops.wkv6 import wkv6_of

State = dict[str, Tensor]


@cache
def rotary_frequencies(width: int, device: torch.device, base: float = 10_000.0) -> Tensor:
    """Of `zoo.ops.rotary.phases`, [width // 2] float32."""
    half = width // 2
    return base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)


@cache
def _orbit_frequencies(width: int, device: torch.device) -> Tensor:
    return orbit_frequencies(width, torch.float32, device)


def attend_token(qkv: Tensor, state: State, heads: int, out: Tensor) -> Tensor:
    """The next token to the cache: qkv [B, 1, (H + 2 G) K] -> W_out y [B, 1, D].

    state: k, v [B, L, G, K] and position [B] of `zoo.mixers.transformer`, which get the token; L > position.
    """
    from zoo.kernels import decode
    from zoo.kernels.decode_attention import attention, parts

    k, v, position = state["k"], state["v"], state["position"]
    S = parts(len(k), heads, k.shape[1])
    parted = attention(flat(qkv), rotary_frequencies(k.shape[3], k.device), k, v, position, heads, S)
    if S == 1:
        return decode.linear(parted[0].view(len(k), -1), out, position=position).unsqueeze(1)
    return decode.merge_linear(*parted, out, position).unsqueeze(1)


def attend_blocks_token(qkv: Tensor, state: State, E: Tensor, F: Tensor, out: Tensor) -> Tensor:
    """The next token to its block and the summaries of those before: qkv [B, 1, 3 H K] -> W_out y [B, 1, D].

    E, F [H, R, C]; state: of `zoo.mixers.linformer`'s blocks, which gets the token, and its block's summaries if it is
    the last of it; with room for them.
    """
    from zoo.kernels import decode
    from zoo.kernels.decode_attention import attention, parts, summarise

    position, own = state["position"], (state["k"], state["v"])
    k, v = (state[name].flatten(1, 2) for name in ("k_summary", "v_summary"))
    (H, R, _), S = E.shape, parts(len(k), E.shape[0], max(1, k.shape[1]))
    frequency = rotary_frequencies(k.shape[3], k.device)
    parted = attention(flat(qkv), frequency, k, v, position, H, S, own, R)
    summarise(own, E, F, frequency, k, v, position)
    if S == 1:
        return decode.linear(parted[0].view(len(k), -1), out, position=position).unsqueeze(1)
    return decode.merge_linear(*parted, out, position).unsqueeze(1)


def favor_token(qkv: Tensor, projection: Tensor, decay: Tensor, reach: float, state: State, out: Tensor) -> Tensor:
    """The next token of `zoo.mixers.performer`: qkv [B, 1, 3 H K] -> W_out y [B, 1, D]; state: its sums, position."""
    from zoo.kernels import decode
    from zoo.kernels.decode_sums import favor, parts

    sums, position = state["sums"], state["position"]
    B, H, m, K = *sums.shape[:3], sums.shape[3] - 1
    S = parts(B, H, m)
    frequency = _orbit_frequencies(K, sums.device)
    parted = favor(flat(qkv), projection, frequency, decay, sums, position, 4 * (K // 2), reach, S)
    if S == 1:
        return decode.linear(parted[0].view(B, -1), out, position=position).unsqueeze(1)
    return decode.merge_linear(*parted, out, position).unsqueeze(1)


def aft_local_token(qkv: Tensor, row: Tensor, column: Tensor, state: State, out: Tensor) -> Tensor:
    """The next token of `zoo.mixers.aft`'s local variant: qkv [B, 1, 3 D] -> W_out y [B, 1, D]."""
    from zoo.kernels import decode
    from zoo.kernels.decode_sums import aft_local as kernel

    parts = (state[name] for name in ("keys", "values", "max", "num", "den", "position"))
    return decode.linear(kernel(flat(qkv), row, column, *parts), out, position=state["position"]).unsqueeze(1)


def time_mix_token(x: Tensor, y: Tensor | None, norm: nn.LayerNorm, state: State, *, mix_base: Tensor, mix_down: Tensor,
                   mix: Tensor, mix_up: Tensor, decay_down: Tensor, decay_up: Tensor, decay: Tensor, bonus: Tensor,
                   weights: tuple[Tensor, Tensor, Tensor, Tensor], norm_weight: Tensor, norm_bias: Tensor, eps: float,
                   output: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + y) through RWKV-6's time mix, x, y [B, 1, D] -> x + y, its output; weights: of k, v, r, g."""
    from zoo.kernels import decode, decode_rwkv

    shift, wkv = state["shift"], state["wkv"]
    summed, normed, low = decode_rwkv.shift(flat(x), None if y is None else flat(y), norm.weight, norm.bias, norm.eps,
                                            shift, mix_base, mix_down, None)
    kvrg = decode_rwkv.mixed(normed, shift, low, mix, mix_up, decay_down, weights)
    z = decode_rwkv.wkv(kvrg, decay_up, decay, bonus, norm_weight, norm_bias, eps, wkv, normed, shift)
    return summed.unsqueeze(1), decode.linear(z, output).unsqueeze(1)


def channel_mix_token(x: Tensor, y: Tensor | None, norm: nn.LayerNorm, state: State, mix: Tensor, key: Tensor,
                      receptance: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + y) through RWKV's channel mix, x, y [B, 1, D] -> x + y, its output."""
    from zoo.kernels import decode, decode_rwkv

    summed, normed, inner = decode_rwkv.shift(flat(x), None if y is None else flat(y), norm.weight, norm.bias, norm.eps,
                                              state["shift"], mix, key, receptance)
    hidden, gate = inner.split([len(key), len(receptance)], dim=1)
    return summed.unsqueeze(1), decode.linear(hidden, value, gate, (normed, state["shift"])).unsqueeze(1)


# Self-tests: a few rows at positions of their own, against the eager ops in float64


def _error(run: Callable[[State], State], exact: Callable[[State], State], given: State, device: torch.device) -> float:
    with torch.no_grad():
        truth = exact({name: x.to(device).double() if x.is_floating_point() else x.to(device)
                       for name, x in given.items()})
        ours = run({name: x.to(device).clone() for name, x in given.items()})
    return worst(ours, truth, torch.float32)


def _test_attention(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    K, H, G, L = sizes[0], 4, 2, 300
    draw = torch.Generator().manual_seed(0)
    given = {"qkv": torch.randn(3, 1, (H + 2 * G) * K, generator=draw), "k": torch.randn(3, L, G, K, generator=draw),
             "v": torch.randn(3, L, G, K, generator=draw), "position": torch.tensor([0, 70, 299]),
             "out": torch.randn(32, H * K, generator=draw)}

    def run(x: State) -> State:
        return {"y": attend_token(x["qkv"], x, H, x["out"])} | {name: x[name] for name in ("k", "v", "position")}

    def exact(x: State) -> State:
        at, rows = x["position"].unsqueeze(1), torch.arange(3, device=device).unsqueeze(1)
        q, k, v = x["qkv"].unflatten(-1, (-1, K)).split([H, G, G], dim=2)
        table = phases(at, K, dtype=torch.float64)
        x["k"][rows, at], x["v"][rows, at] = turn(k, table), v
        y = attend_cache(turn(q, table), x["k"], x["v"], at).flatten(-2) @ x["out"].T
        return {"y": y, "k": x["k"], "v": x["v"], "position": x["position"] + 1}

    return _error(run, exact, given, device)


def _test_blocks(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    (K, R, C), H, M = sizes, 2, 5
    draw = torch.Generator().manual_seed(0)
    own, past = (4, C, H, K), (4, M, R, H, K)
    given = {"qkv": torch.randn(4, 1, 3 * H * K, generator=draw), "out": torch.randn(32, H * K, generator=draw),
             "k": torch.randn(own, generator=draw), "v": torch.randn(own, generator=draw),
             "k_summary": torch.randn(past, generator=draw), "v_summary": torch.randn(past, generator=draw),
             "E": torch.randn(H, R, C, generator=draw), "F": torch.randn(H, R, C, generator=draw),
             "position": torch.tensor([0, C - 1, 3 * C + C // 2, 5 * C - 1])}
    names = ("k", "v", "k_summary", "v_summary", "position")

    def run(x: State) -> State:
        return {"y": attend_blocks_token(x["qkv"], x, x["E"], x["F"], x["out"])} | {name: x[name] for name in names}

    def exact(x: State) -> State:
        at, rows = x["position"].unsqueeze(1), torch.arange(4, device=device)
        block, offset, place = at // C, at % C, torch.arange(C, device=device)
        q, k, v = x["qkv"].unflatten(-1, (3 * H, K)).chunk(3, dim=2)
        x["k"][rows, offset[:, 0]], x["v"][rows, offset[:, 0]] = k[:, 0], v[:, 0]
        turned = turn(x["k"], phases(block * C + place, K, dtype=torch.float64))
        earlier = torch.arange(M, device=device).repeat_interleave(R) < block
        visible = torch.cat([earlier, place <= offset], dim=-1).unsqueeze(1)
        y = masked_attention(turn(q, phases(at, K, dtype=torch.float64)),
                             torch.cat([x["k_summary"].flatten(1, 2), turned], 1),
                             torch.cat([x["v_summary"].flatten(1, 2), x["v"]], 1), visible)
        spread = (torch.arange(R, device=device).double() + 0.5) * (C / R) - 0.5
        done = summaries(x["k"][:, None], x["v"][:, None], x["E"], x["F"],
                         phases(block * C + spread, K, dtype=torch.float64))
        full = torch.tensor([1, 3], device=device)
        for name, new in zip(("k_summary", "v_summary"), done, strict=True):
            x[name][full, block[full, 0]] = new[full, 0]
        return {"y": y.flatten(-2) @ x["out"].T, "position": x["position"] + 1} | {name: x[name] for name in names[:4]}

    return _error(run, exact, given, device)


def _test_favor(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    (K, m), H, reach = sizes, 2, 3.0
    draw = torch.Generator().manual_seed(0)
    given = {"qkv": torch.randn(3, 1, 3 * H * K, generator=draw), "sums": torch.rand(3, H, m, K + 1, generator=draw),
             "position": torch.tensor([0, 70, 2999]), "projection": torch.randn(m, K, generator=draw),
             "decay": torch.tensor([0.5, 0.01]), "out": torch.randn(32, H * K, generator=draw)}

    def run(x: State) -> State:
        y = favor_token(x["qkv"], x["projection"], x["decay"], reach, x, x["out"])
        return {"y": y, "sums": x["sums"], "position": x["position"]}

    def exact(x: State) -> State:
        q, k, v = x["qkv"].unflatten(-1, (3 * H, K)).split(H, dim=2)
        angle = (x["position"] % (4 * (K // 2))).double()[:, None, None] * orbit_frequencies(K, torch.float64, device)
        table = torch.stack([angle.cos(), angle.sin()], dim=-2)
        q, k = (turn(z * K**-0.25 * torch.rsqrt(1 + (z * K**-0.25).square().sum(-1, keepdim=True) / reach**2), table)
                for z in (q, k))
        y, sums = favor_attention(q, k, v, x["projection"], x["sums"], reach, None, x["decay"])
        return {"y": y.flatten(-2) @ x["out"].T, "sums": sums, "position": x["position"] + 1}

    return _error(run, exact, given, device)


def _test_aft(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    (D, W, R), T = sizes, sizes[1] + 9
    draw = torch.Generator().manual_seed(0)
    keys, top = torch.randn(2, W - 1, D, generator=draw), torch.randn(2, D, generator=draw)
    keys[0], top[0] = EMPTY, EMPTY
    given = {"qkv": torch.randn(2, 1, 3 * D, generator=draw), "keys": keys, "max": top,
             "values": torch.randn(2, W - 1, D, generator=draw), "num": torch.randn(2, D, generator=draw),
             "den": torch.rand(2, D, generator=draw), "position": torch.tensor([0, T - 1]),
             "row": torch.randn(T, R, generator=draw), "column": torch.randn(T, R, generator=draw),
             "out": torch.randn(32, D, generator=draw)}

    def run(x: State) -> State:
        y = aft_local_token(x["qkv"], x["row"], x["column"], x, x["out"])
        return {"y": y} | {name: x[name] for name in ("keys", "values", "max", "num", "den", "position")}

    def exact(x: State) -> State:
        q, k, v = x["qkv"].chunk(3, dim=-1)
        back = (x["position"][:, None] - torch.arange(W, device=device)).clamp(min=0)
        bias = (x["column"][back] @ x["row"][x["position"]].unsqueeze(-1)).mT
        sums, cache_ = Sums(x["max"], x["num"], x["den"]), Cache(x["keys"], x["values"])
        y = aft_local(q, k, v, bias, sums, cache_) @ x["out"].T
        sums, cache_ = slide(sums, cache_, k, v)
        return {"y": y, "position": x["position"] + 1} | sums._asdict() | cache_._asdict()

    return _error(run, exact, given, device)


def _test_time_mix(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    (K, R, rank), H, B = sizes, 2, 2
    D = H * K
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (B, 1, D), "y": (B, 1, D), "shift": (B, D), "wkv": (B, H, K, K), "mix_base": (D,),
              "mix_down": (D, 5 * R), "mix": (5, D), "mix_up": (5, R, D), "decay_down": (D, rank),
              "decay_up": (rank, D), "decay": (D,), "bonus": (H, K), "k": (D, D), "v": (D, D), "r": (D, D), "g": (D, D),
              "norm_weight": (D,), "norm_bias": (D,), "output": (D, D)}
    given = {name: torch.randn(shape, generator=draw) * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0)
             for name, shape in shapes.items()}
    norm = nn.LayerNorm(D, device=device)
    own = ("mix_base", "mix_down", "mix", "mix_up", "decay_down", "decay_up", "decay", "bonus", "norm_weight",
           "norm_bias", "output")

    def run(x: State) -> State:
        s, y = time_mix_token(x["x"], x["y"], norm, x, weights=(x["k"], x["v"], x["r"], x["g"]), eps=64e-5,
                              **{name: x[name] for name in own})
        return {"s": s, "out": y, "shift": x["shift"], "wkv": x["wkv"]}

    def exact(x: State) -> State:
        s = x["x"] + x["y"]
        n = nn.functional.layer_norm(s, (D,))
        xw, xk, xv, xr, xg = ddlerp(n, x["mix_base"], x["mix_down"], x["mix"], x["mix_up"], previous=x["shift"])
        d = torch.tanh(xw @ x["decay_down"]) @ x["decay_up"]
        r, k, v, d = (z.unflatten(-1, (H, K)) for z in (xr @ x["r"].T, xk @ x["k"].T, xv @ x["v"].T, d))
        y, wkv = wkv6_of(r, k, v, d, x["decay"].view(H, K), x["bonus"], x["wkv"])
        y = norm_gate(y, xg @ x["g"].T, x["norm_weight"], x["norm_bias"], 64e-5) @ x["output"].T
        return {"s": s, "out": y, "shift": n[:, 0], "wkv": wkv}

    return _error(run, exact, given, device)


def _kernel(op: str, test: Callable[[torch.device, torch.dtype, tuple[int, ...]], float], file: str) -> Kernel:
    return Kernel(op, test, dtypes=(torch.float32,), most=1024, sources=("decode",), file=file, sized="sizes")


ATTENTION = _kernel("decode_attention", _test_attention, "decode_attention")
BLOCKS = _kernel("decode_blocks", _test_blocks, "decode_attention")
FAVOR = _kernel("decode_favor", _test_favor, "decode_sums")
AFT_LOCAL = _kernel("decode_aft_local", _test_aft, "decode_sums")
RWKV = _kernel("decode_rwkv", _test_time_mix, "decode_rwkv")
