"""What `zoo bench ops` measures: shapes, inputs, and the arithmetic and bytes that each op cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zoo.bench import ops_aft
from zoo.errors import ZooError
from zoo.ops import (
    add_norm,
    aft,
    attention,
    cross_entropy,
    favor,
    linear_attention,
    linears,
    norm_gate,
    rotary,
    squared_relu,
    summary_attention,
    token_mix,
    wkv6,
)

FEATURES = 256  # of FAVOR+
WINDOW = 32  # of AFT-local and AFT-conv
BLOCK, RANK = 64, 16  # tokens of a block, and summaries of one
MIXTURES, MIX_RANK = 5, 32  # of ddlerp; token_mix has two, as RWKV's channel mix
EPS = 64e-5  # of RWKV's norm of a head
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CPU_LENGTHS = (256, 512)
FIRST_LENGTH = 1024
DIRECTIONS = "forward", "forward+backward"
Output = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape. AFT without heads has H = 1 and its channels as K = V; linear + cross-entropy takes B T
    tokens of width K to a vocabulary of V, squared_relu of width K through V, linears four times of width K to V.
    """

    op: str
    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: torch.dtype

    @property
    def first(self) -> bool:
        """Whether it is measured before all others: the shapes that a bar or somebody's published figure is for."""
        return self.T == FIRST_LENGTH or (self.B, self.T, *self.kind) in _SINGLE.get(self.op, [])

    @property
    def kind(self) -> tuple[int, int, int]:
        """What stays the same along T, and what a peer's tuning goes by: H, K, V."""
        return self.H, self.K, self.V

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} H{self.H} K{self.K} V{self.V}"


@dataclass(frozen=True)
class Problem:
    """A case with its inputs, those that get gradients in `leaves`, and the gradient dy of each of its outputs."""

    case: Case
    inputs: Mapping[str, Tensor]
    dy: tuple[Tensor, ...]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self.inputs.values() if x.requires_grad]

    def zoo(self) -> Output:
        """The op by its public function, on whichever backend is asked for, under autocast where models call it so."""
        spec, dtype = _OPS[self.case.op], self.case.dtype
        with torch.autocast(self.dy[0].device.type, dtype, enabled=spec.autocast and dtype != torch.float32):
            return spec.call(self.inputs)

    def flops(self, direction: str) -> float:
        """Of the products that the op cannot do without; exact attention goes forward again in its backward pass."""
        spec, case = _OPS[self.case.op], self.case
        once = 2.0 * case.B * case.H * spec.products(case)
        return once if direction == DIRECTIONS[0] else (1 + spec.backward) * once

    def bytes(self, direction: str) -> float:
        """Least traffic: inputs read and the output written; backward, both read but the output, gradients written."""
        inputs = sum(x.nbytes for x in self.inputs.values())
        if self.case.op.startswith("aft_full"):
            inputs -= self.inputs["bias"].nbytes // 2  # the future's biases are nobody's
        outputs = sum(y.nbytes for y in self.dy)
        if direction == DIRECTIONS[0]:
            return inputs + outputs
        return 2 * inputs + 2 * outputs + sum(x.nbytes for x in self.leaves)


@dataclass(frozen=True)
class _Op:
    inputs: Callable[[Case, Callable[..., Tensor]], dict[str, Tensor]]
    call: Callable[[Mapping[str, Tensor]], Output]
    products: Callable[[Case], float]  # multiplications with an addition of one sequence and head, forward
    backward: float = 2.0  # FLOPs of the backward pass, in forward passes
    trained: tuple[str, ...] = ()  # float32 parameters among the inputs
    like: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]] = lambda x: (x["v"],)  # what its outputs look like
    autocast: bool = False


def _heads(case: Case, randn: Callable[..., Tensor], *names: str) -> dict[str, Tensor]:
    return {name: randn(case.B, case.T, case.H, case.V if name == "v" else case.K) for name in names}


def _channels(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {name: randn(case.B, case.T, case.K) for name in "qkv"}


def _block_inputs(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    past = case.B, -(-case.T // BLOCK) - 1, RANK, case.H, case.K
    return _heads(case, randn, "q", "k", "v") | {"k_past": randn(*past), "v_past": randn(*past)}


def _favor_inputs(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Queries and keys of norm 1, attention's scale included: FAVOR+ is meant for scores of about 1."""
    found = {name: x if name == "v" else torch.nn.functional.normalize(x, dim=-1)
             for name, x in _heads(case, randn, "q", "k", "v").items()}
    generator = torch.Generator().manual_seed(0)
    return found | {"projection": favor.orthogonal_projection(FEATURES, case.K, generator)}


def _conv_inputs(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    return _heads(case, randn, "q", "v") | {"k": randn(case.B, case.T, case.H), "bias": randn(case.H, WINDOW) / 10}


def _wkv_inputs(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    found = _heads(case, randn, "r", "k", "v", "log_decay")
    return found | {"log_decay": -(found["log_decay"] - 3).exp(), "u": randn(case.H, case.K) / 2}


def _head_inputs(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": randn(case.B * case.T, case.K), "weight": randn(case.V, case.K) / case.K**0.5,
            "targets": torch.randint(case.V, (case.B * case.T,), generator=generator)}


def _qkv(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"qkv": randn(case.B, case.T, 3 * case.H, case.K), "table": rotary.phases(torch.arange(case.T), case.K)}


def _summary_inputs(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    firsts = torch.arange(0, case.T - 1, BLOCK)[: -(-case.T // BLOCK) - 1]  # of the blocks before the last one
    project = {name: randn(case.H, RANK, BLOCK) / BLOCK**0.5 for name in "EF"}
    return _qkv(case, randn) | project | {"past_table": rotary.phases(firsts.repeat_interleave(RANK), case.K)}


def _norm_inputs(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    stream = {name: randn(case.B, case.T, case.K) for name in "xy"}
    return stream | {"weight": 1 + randn(case.K) / 10, "bias": randn(case.K) / 10}


def _gate_inputs(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    width = case.H * case.K
    return _heads(case, randn, "y") | {"gate": randn(case.B, case.T, width), "weight": 1 + randn(width) / 10,
                                       "bias": randn(width) / 10}


def _ddlerp_inputs(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
    Z, R, C = MIXTURES, MIX_RANK, case.K
    return {"x": randn(case.B, case.T, C), "base": randn(C), "down": randn(C, Z * R) / C**0.5, "mix": randn(Z, C),
            "up": randn(Z, R, C) / R**0.5}


def _add_norm(x: Mapping[str, Tensor]) -> Output:
    """By a norm whose parameters are the case's own leaves."""
    norm = torch.nn.LayerNorm(x["x"].shape[-1], device="meta")
    for name in ("weight", "bias"):
        delattr(norm, name)
        setattr(norm, name, x[name])
    s, n = add_norm.add_norm(x["x"], x["y"], norm, narrow=True)
    return s, n.to(x["y"].dtype)


def _pairs(case: Case) -> float:
    """Tokens that see each other, the future left out."""
    return case.T * (case.T + 1) / 2


def _seen(case: Case) -> float:
    """Keys and summaries that all queries of a block-causal sequence see."""
    blocks, rest = divmod(case.T, BLOCK)
    own = blocks * BLOCK * (BLOCK + 1) / 2 + rest * (rest + 1) / 2
    return own + RANK * (BLOCK * blocks * (blocks - 1) / 2 + rest * blocks)


_OPS = {
    "causal_attention": _Op(
        lambda case, randn: _heads(case, randn, "q", "k", "v"),
        lambda x: attention.causal_attention(x["q"], x["k"], x["v"]),
        lambda case: (case.K + case.V) * _pairs(case), backward=2.5),
    "block_attention": _Op(
        _block_inputs,
        lambda x: attention.block_attention(x["q"], x["k"], x["v"], x["k_past"], x["v_past"], BLOCK),
        lambda case: (case.K + case.V) * _seen(case), backward=2.5),
    "linear_attention": _Op(
        lambda case, randn: _heads(case, randn, "q", "k", "v"),
        lambda x: linear_attention.linear_attention(x["q"], x["k"], x["v"])[0],
        lambda case: 2.0 * case.T * case.K * case.V),
    "favor_attention": _Op(
        _favor_inputs,
        lambda x: favor.favor_attention(x["q"], x["k"], x["v"], x["projection"])[0],
        lambda case: 2.0 * case.T * FEATURES * (case.K + case.V + 1)),
    "aft_full": _Op(
        lambda case, randn: _channels(case, randn) | {"bias": randn(case.T, case.T) / 10},
        lambda x: aft.aft_full(x["q"], x["k"], x["v"], x["bias"]),
        lambda case: 2.0 * _pairs(case) * case.K, trained=("bias",)),
    "aft_simple": _Op(
        _channels, lambda x: aft.aft_simple(x["q"], x["k"], x["v"]), lambda case: 0.0),
    "aft_local": _Op(
        lambda case, randn: _channels(case, randn) | {"bias": randn(case.T, WINDOW) / 10},
        lambda x: aft.aft_local(x["q"], x["k"], x["v"], x["bias"]),
        lambda case: 2.0 * case.T * WINDOW * case.K, trained=("bias",)),
    "aft_conv": _Op(
        _conv_inputs, lambda x: aft.aft_conv(x["q"], x["k"], x["v"], x["bias"]),
        lambda case: 1.0 * case.T * WINDOW * (case.V + 1), trained=("bias",)),
    "wkv6": _Op(
        _wkv_inputs, lambda x: wkv6.wkv6(x["r"], x["k"], x["v"], x["log_decay"], x["u"])[0],
        lambda case: 2.0 * case.T * case.K * case.V, trained=("u",)),
    "linear_cross_entropy": _Op(
        _head_inputs, lambda x: cross_entropy.linear_cross_entropy(x["x"], x["weight"], x["targets"]),
        lambda case: 1.0 * case.T * case.K * case.V, like=lambda x: ()),
    "rotary_attention": _Op(
        _qkv, lambda x: attention.rotary_attention(x["qkv"], x["table"], x["qkv"].shape[2] // 3),
        lambda case: 2 * case.K * _pairs(case), backward=2.5, like=lambda x: (x["qkv"].chunk(3, 2)[0],)),
    "summary_attention": _Op(
        _summary_inputs,
        lambda x: summary_attention.summary_attention(*(x[name] for name in ("qkv", "E", "F", "table", "past_table"))),
        lambda case: 2 * case.K * (_seen(case) + RANK * case.T), backward=2.5, trained=("E", "F"),
        like=lambda x: (x["qkv"].chunk(3, 2)[0],)),
    "add_norm": _Op(
        _norm_inputs, _add_norm, lambda case: 0.0, trained=("x", "weight", "bias"), like=lambda x: (x["x"], x["y"]),
        autocast=True),
    "norm_gate": _Op(
        _gate_inputs, lambda x: norm_gate.norm_gate(x["y"], x["gate"], x["weight"], x["bias"], EPS).to(x["y"].dtype),
        lambda case: 0.0, trained=("weight", "bias"), like=lambda x: (x["gate"],), autocast=True),
    "token_mix": _Op(
        lambda case, randn: {"x": randn(case.B, case.T, case.K), "mix": randn(2, case.K)},
        lambda x: tuple(y.to(x["x"].dtype) for y in token_mix.token_mix(x["x"], x["mix"])),
        lambda case: 0.0, trained=("mix",), like=lambda x: (x["x"],) * 2, autocast=True),
    "ddlerp": _Op(
        _ddlerp_inputs,
        lambda x: tuple(y.to(x["x"].dtype)
                        for y in token_mix.ddlerp(*(x[name] for name in ("x", "base", "down", "mix", "up")))),
        lambda case: 2.0 * case.T * case.K * MIXTURES * MIX_RANK, trained=("base", "down", "mix", "up"),
        like=lambda x: (x["x"],) * MIXTURES, autocast=True),
    "squared_relu": _Op(
        lambda case, randn: {"x": randn(case.B, case.T, case.K), "inner": randn(case.V, case.K) / case.K**0.5,
                             "outer": randn(case.K, case.V) / case.V**0.5},
        lambda x: squared_relu.squared_relu(x["x"], x["inner"], x["outer"]),
        lambda case: 2.0 * case.T * case.K * case.V,
        trained=("inner", "outer"), like=lambda x: (x["x"],), autocast=True),
    "linears": _Op(
        lambda case, randn: {f"x{i}": randn(case.B, case.T, case.K) for i in range(4)} | {
            f"w{i}": randn(case.V, case.K) / case.K**0.5 for i in range(4)},
        lambda x: linears.linears([x[f"x{i}"] for i in range(4)], [x[f"w{i}"] for i in range(4)]),
        lambda case: 4.0 * case.T * case.K * case.V, trained=("w0", "w1", "w2", "w3"),
        like=lambda x: tuple(x[f"x{i}"].new_empty(*x["x0"].shape[:-1], len(x["w0"])) for i in range(4)),
        autocast=True),
}


def _learnt(op: _Op) -> _Op:
    """The same with keys as training leaves them: what its kernels do may depend on them."""
    def inputs(case: Case, randn: Callable[..., Tensor]) -> dict[str, Tensor]:
        found = op.inputs(case, randn)
        return found | {"k": ops_aft.learnt(found["k"])}

    return replace(op, inputs=inputs)


_OPS |= {f"{op}_learnt": _learnt(_OPS[op]) for op in ("aft_full", "aft_local")}
OPS = tuple(_OPS)

# Heads and widths along all lengths, at 32,768 tokens; then single shapes: those that others have published figures
# for, and those of ops that are measured at no other.
_LEARNT = "aft_full_learnt", "aft_local_learnt"
_SWEPT = {"causal_attention": [(16, 64, 64), (8, 128, 128)], "squared_relu": [(1, 512, 1792)],
          **{op: [(1, 512, 512)] for op in ("aft_full", "aft_simple", "aft_local", "add_norm", "token_mix", "ddlerp",
                                         "linears")},
          **{op: [] for op in ("linear_cross_entropy", *_LEARNT)}}
_SINGLE = {
    "causal_attention": [(16384 // T, T, *kind) for kind in ((16, 64, 64), (8, 128, 128)) for T in (1024, 4096, 16384)],
    "linear_attention": [(32, 1024, 8, 256, 64)],
    "favor_attention": [(8, 4096, 16, 64, 64)],
    "aft_full": [(8, 4096, 1, 1024, 1024)],
    "linear_cross_entropy": [(32, 1024, 1, 768, 8192), (16, 1024, 1, 768, 50304), (32, 1024, 1, 512, 256)],
    **{op: [(32, 1024, 1, 512, 512)] for op in _LEARNT},
}
_CHANNELS = ("aft_full", "aft_simple", "aft_local", "add_norm", "token_mix", "ddlerp", "squared_relu", "linears",
             *_LEARNT)
TOKENS, CPU_TOKENS = 32768, 512


def cases(op: str, device: torch.device, lengths: Sequence[int] | None = None) -> list[Case]:
    """Of one op: all lengths at a constant number of tokens (one sequence where it is longer), then the single shapes
    of these lengths. A CPU gets small ones, in float32. The loss does not know of lengths, and has its own shapes.
    """
    if lengths is not None and (not lengths or min(lengths) < 1):
        raise ZooError(f"lengths={list(lengths)} are not allowed: one or more whole numbers from 1")
    on_gpu = device.type == "cuda"
    dtype, tokens = (torch.bfloat16, TOKENS) if on_gpu else (torch.float32, CPU_TOKENS)
    lengths = lengths or (LENGTHS if on_gpu else CPU_LENGTHS)
    swept, single = _SWEPT.get(op, [(8, 64, 64)]), _SINGLE.get(op, [])
    if not on_gpu:
        swept = [(1, 64, 64) if op in _CHANNELS else (2, 32, 32)]
        single = []
        if op == "linear_cross_entropy":
            swept, single = [], [(1, 256, 1, 32, 256), (1, 256, 1, 32, 2048)]
    found = [Case(op, max(1, tokens // T), T, *kind, dtype) for kind in swept for T in lengths]
    found += [Case(op, *shape, dtype) for shape in single if op == "linear_cross_entropy" or shape[1] in lengths]
    return list(dict.fromkeys(found))


def build(case: Case, device: torch.device) -> Problem:
    """The case's inputs, the same at every call: drawn on the device, in its dtype but for trained parameters."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    spec, inputs = _OPS[case.op], {}
    for name, x in spec.inputs(case, randn).items():
        x = x.to(device)
        if name in ("projection", "targets", "table", "past_table"):
            inputs[name] = x
        else:
            inputs[name] = x.to(torch.float32 if name in spec.trained else case.dtype).requires_grad_()
    like = spec.like(inputs)  # of a loss, nothing
    dy = tuple(randn(*y.shape).to(y.dtype) for y in like) or (torch.ones((), device=device),)
    return Problem(case, inputs, dy)
