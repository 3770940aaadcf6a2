"""What `zoo bench ops` measures: shapes, inputs, and the arithmetic and bytes that each op cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.ops import aft, attention, cross_entropy, favor, linear_attention, wkv6

FEATURES = 256  # of FAVOR+
WINDOW = 32  # of AFT-local and AFT-conv
BLOCK, RANK = 64, 16  # tokens of a block, and summaries of one
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CPU_LENGTHS = (256, 512)
FIRST_LENGTH = 1024
DIRECTIONS = "forward", "forward+backward"


@dataclass(frozen=True)
class Case:
    """One op at one shape. AFT without heads has H = 1 and its channels as K = V; linear + cross-entropy takes B T
    tokens of width K to a vocabulary of V.
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
    """A case with its inputs, those that get gradients in `leaves`, and the gradient dy of its output."""

    case: Case
    inputs: Mapping[str, Tensor]
    dy: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self.inputs.values() if x.requires_grad]

    def zoo(self) -> Tensor:
        """The op by its public function, on whichever backend is asked for."""
        return _OPS[self.case.op].call(self.inputs)

    def flops(self, direction: str) -> float:
        """Of the products that the op cannot do without; exact attention goes forward again in its backward pass."""
        spec, case = _OPS[self.case.op], self.case
        once = 2.0 * case.B * case.H * spec.products(case)
        return once if direction == DIRECTIONS[0] else (1 + spec.backward) * once

    def bytes(self, direction: str) -> float:
        """Least traffic: inputs read and the output written; backward, both read but the output, gradients written."""
        inputs = sum(x.nbytes for x in self.inputs.values())
        if self.case.op == "aft_full":
            inputs -= self.inputs["bias"].nbytes // 2  # the future's biases are nobody's
        if direction == DIRECTIONS[0]:
            return inputs + self.dy.nbytes
        return 2 * inputs + 2 * self.dy.nbytes + sum(x.nbytes for x in self.leaves)


@dataclass(frozen=True)
class _Op:
    inputs: Callable[[Case, Callable[..., Tensor]], dict[str, Tensor]]
    call: Callable[[Mapping[str, Tensor]], Tensor]
    products: Callable[[Case], float]  # multiplications with an addition of one sequence and head, forward
    backward: float = 2.0  # FLOPs of the backward pass, in forward passes
    trained: tuple[str, ...] = ()  # float32 parameters among the inputs


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
        lambda case: 1.0 * case.T * case.K * case.V),
}
OPS = tuple(_OPS)

# Heads and widths along all lengths, at 32,768 tokens; then single shapes that others have published figures for.
_SWEPT = {"causal_attention": [(16, 64, 64), (8, 128, 128)], "aft_full": [(1, 512, 512)], "aft_simple": [(1, 512, 512)],
          "aft_local": [(1, 512, 512)], "linear_cross_entropy": []}
_SINGLE = {
    "causal_attention": [(16384 // T, T, *kind) for kind in ((16, 64, 64), (8, 128, 128)) for T in (1024, 4096, 16384)],
    "linear_attention": [(32, 1024, 8, 256, 64)],
    "favor_attention": [(8, 4096, 16, 64, 64)],
    "aft_full": [(8, 4096, 1, 1024, 1024)],
    "linear_cross_entropy": [(32, 1024, 1, 768, 8192), (16, 1024, 1, 768, 50304), (32, 1024, 1, 512, 256)],
}
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
        swept = [(1, 64, 64) if op.startswith("aft_") and op != "aft_conv" else (2, 32, 32)] if swept else []
        single = [(1, 256, 1, 32, 256), (1, 256, 1, 32, 2048)] if op == "linear_cross_entropy" else []
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
        if name in ("projection", "targets"):
            inputs[name] = x
        else:
            inputs[name] = x.to(torch.float32 if name in spec.trained else case.dtype).requires_grad_()
    shape = () if case.op == "linear_cross_entropy" else inputs["v"].shape
    dy = randn(*shape).to(case.dtype) if shape else torch.ones((), device=device)
    return Problem(case, inputs, dy)
