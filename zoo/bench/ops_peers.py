"""The libraries that `zoo bench ops` compares with, each called so that it does the same work as the op of the zoo.

Layouts, scales and signs are converted outside the clock.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.bench import ops_aft, ops_plain
from zoo.bench.ops_cases import BLOCK, FEATURES, RANK, Case, Output, Problem
from zoo.ops.backend import use_backend


@dataclass(frozen=True)
class Side:
    """One implementation on one problem: forward() -> the op's output or outputs, with gradients for `leaves`."""

    forward: Callable[[], Output]
    leaves: list[Tensor]


@dataclass(frozen=True)
class Peer:
    name: str
    ops: tuple[str, ...]
    make: Callable[[Problem], Side]
    module: str = ""  # without which it is not here
    package: str = ""  # that the module comes in
    imports: tuple[str, ...] = ()  # at its first call, which takes seconds
    on_cpu: bool = False
    tunes: bool = False  # for minutes, at the first call of a head size
    compiles: bool = False  # for seconds, at the first call of a shape
    tolerance: float = 0.05  # of the relative error to the zoo's result, in bf16
    longest: int | None = None  # T
    first_only: bool = False  # at the shapes that come first, as it takes a minute to compile at each

    def missing(self, case: Case, device: torch.device) -> str:
        """Why it cannot take part, "" if it can."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"not installed (pip install {self.package})"
        if device.type == "cpu" and not self.on_cpu:
            return "runs on a GPU only"
        if self.longest and self.longest < case.T:
            return f"measured up to T={self.longest}: its memory or time grows with T squared"
        if self.first_only and not case.first:
            return "measured at the shapes of bars only: each takes it a minute to compile"
        return ""


def own(problem: Problem, backend: str) -> Side:
    """The op of the zoo on one of its backends."""
    def forward() -> Output:
        with use_backend(backend):
            return problem.zoo()

    return Side(forward, problem.leaves)


def peers(op: str) -> list[Peer]:
    """All that are known to do the work of an op, installed or not."""
    return [peer for peer in _PEERS if op in peer.ops]


def load(op: str) -> None:
    """Import what an op's peers import, those that are here. What fails at it fails where it is called, and is told."""
    for peer in peers(op):
        if not peer.module or importlib.util.find_spec(peer.module) is not None:
            for name in peer.imports:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)


def _public(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _sdpa(backend: str) -> Callable[[Problem], Side]:
    def make(problem: Problem) -> Side:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = getattr(SDPBackend, backend)

        def forward() -> Tensor:
            q, k, v = (problem.inputs[name].transpose(1, 2) for name in "qkv")
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return Side(forward, problem.leaves)

    return make


def _masked(problem: Problem) -> Side:
    """One softmax over the row [summaries, tokens] under a mask, which is made outside the clock."""
    x, T = problem.inputs, problem.case.T
    token = torch.arange(T, device=x["q"].device)
    block = token // BLOCK
    own = (block.unsqueeze(1) == block) & (token.unsqueeze(1) >= token)
    summary = torch.arange(x["k_past"].shape[1], device=token.device).repeat_interleave(RANK)
    mask = torch.cat([block.unsqueeze(1) > summary, own], 1)

    def forward() -> Tensor:
        k, v = (torch.cat([x[f"{name}_past"].flatten(1, 2), x[name]], 1).transpose(1, 2) for name in "kv")
        return F.scaled_dot_product_attention(x["q"].transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)

    return Side(forward, problem.leaves)


def _fla(problem: Problem) -> Side:
    x = problem.inputs
    if problem.case.op == "wkv6":
        chunk_rwkv6 = _public("fla.ops.rwkv6", "chunk_rwkv6")
        return Side(lambda: chunk_rwkv6(x["r"], x["k"], x["v"], x["log_decay"], x["u"], scale=1.0,
                                        output_final_state=True)[0], problem.leaves)
    chunk_linear_attn = _public("fla.ops.linear_attn", "chunk_linear_attn")
    return Side(lambda: chunk_linear_attn(x["q"], x["k"], x["v"], scale=1.0, normalize=False,
                                          output_final_state=True)[0], problem.leaves)


def _performer(problem: Problem) -> Side:
    """Its causal path in PyTorch. It scales queries and keys itself, and takes [B, H, T, K]."""
    load("favor_attention")
    x, K = problem.inputs, problem.case.K
    with contextlib.redirect_stdout(io.StringIO()):  # it says that its CUDA extension is not there
        attend = _public("performer_pytorch", "FastAttention")(K, nb_features=FEATURES, causal=True)
    attend.to(x["v"].device).projection_matrix.copy_(x["projection"])
    q, k = ((x[name].detach() * K**0.25).requires_grad_() for name in "qk")
    return Side(lambda: attend(q.transpose(1, 2), k.transpose(1, 2), x["v"].transpose(1, 2)).transpose(1, 2),
                [q, k, x["v"]])


_PLAIN: dict[str, Callable[..., Output]] = {
    "aft_full": ops_aft.full, "aft_simple": ops_aft.simple, "linear_cross_entropy": ops_plain.loss,
    "rotary_attention": ops_plain.rotary_attention, "add_norm": ops_plain.add_norm, "norm_gate": ops_plain.norm_gate,
    "token_mix": ops_plain.token_mix, "ddlerp": ops_plain.ddlerp, "squared_relu": ops_plain.squared_relu,
    "linears": ops_plain.linears}
_SAFE: dict[str, Callable[..., Output]] = {"aft_full": ops_aft.safe_full}


def _plain(problem: Problem) -> Side:
    return Side(lambda: _PLAIN[problem.case.op](**problem.inputs), problem.leaves)


def _compiled(formulas: dict[str, Callable[..., Output]]) -> Callable[[Problem], Side]:
    def make(problem: Problem) -> Side:
        torch.compiler.reset()  # every shape is compiled for itself, and none is too many
        call = torch.compile(formulas[problem.case.op], dynamic=False, fullgraph=True)
        return Side(lambda: call(**problem.inputs), problem.leaves)

    return make


def _liger(**options: Any) -> Callable[[Problem], Side]:
    def make(problem: Problem) -> Side:
        loss, x = _public(_LIGER, "liger_fused_linear_cross_entropy"), problem.inputs
        return Side(lambda: loss(x["x"], x["weight"], x["targets"], **options), problem.leaves)

    return make


def _cut(problem: Problem) -> Side:
    loss, x = _public("cut_cross_entropy", "linear_cross_entropy"), problem.inputs
    return Side(lambda: loss(x["x"], x["weight"], x["targets"]), problem.leaves)


_WITH_FORMULA = tuple(_PLAIN)
_COMPILER = ("torch._inductor.compile_fx",)
_LIGER = "liger_kernel.transformers.functional"
_PEERS = (
    Peer("sdpa-flash", ("causal_attention",), _sdpa("FLASH_ATTENTION")),
    Peer("sdpa-cudnn", ("causal_attention",), _sdpa("CUDNN_ATTENTION")),
    Peer("sdpa-mask", ("block_attention",), _masked, on_cpu=True, longest=8192),
    Peer("fla", ("linear_attention", "wkv6"), _fla, module="fla", package="flash-linear-attention", tunes=True,
         imports=("fla.ops.rwkv6", "fla.ops.linear_attn")),
    Peer("performer-pytorch", ("favor_attention",), _performer, module="performer_pytorch", on_cpu=True,
         package="performer-pytorch", tolerance=0.2,
         imports=("setuptools", "performer_pytorch")),  # the first brings distutils, gone from Python 3.12
    Peer("torch", _WITH_FORMULA, _plain, on_cpu=True),
    Peer("torch-compile", _WITH_FORMULA, _compiled(_PLAIN), compiles=True, imports=_COMPILER),
    Peer("torch-compile-safe", ("aft_full",), _compiled(_SAFE), compiles=True, imports=_COMPILER, longest=1024,
         first_only=True),
    Peer("liger", ("linear_cross_entropy",), _liger(), module="liger_kernel", package="liger-kernel", compiles=True,
         imports=(_LIGER,)),
    Peer("liger-float32", ("linear_cross_entropy",), _liger(accum_dtype=torch.float32), module="liger_kernel",
         package="liger-kernel", compiles=True, imports=(_LIGER,)),
    Peer("cut-cross-entropy", ("linear_cross_entropy",), _cut, module="cut_cross_entropy", package="cut-cross-entropy",
         compiles=True, imports=("cut_cross_entropy",)),
)
