"""The libraries that `zoo bench ops` compares with, each called so that it does the same work as the op of the zoo.

Layouts, scales and signs are converted outside the clock. What a peer tunes at its first call, it tunes in a process of
its own with a limit (`tune`): the choices stay in Triton's cache, where the process that measures finds them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.bench.ops_cases import BLOCK, FEATURES, RANK, Case, Problem, build
from zoo.errors import ZooError


@dataclass(frozen=True)
class Side:
    """One implementation on one problem: forward() -> the op's output, with gradients for `leaves`."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]


@dataclass(frozen=True)
class Peer:
    name: str
    ops: tuple[str, ...]
    make: Callable[[Problem], Side]
    module: str = ""  # without which it is not here
    package: str = ""  # that the module comes in
    on_cpu: bool = False
    tunes: bool = False  # for minutes, at the first call of a head size
    tolerance: float = 0.05  # of the relative error to the zoo's result, in bf16
    longest: int | None = None  # T

    def missing(self, case: Case, device: torch.device) -> str:
        """Why it cannot take part, "" if it can."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"not installed (pip install {self.package})"
        if device.type == "cpu" and not self.on_cpu:
            return "runs on a GPU only"
        if self.longest and self.longest < case.T:
            return f"measured up to T={self.longest}: its memory or time grows with T squared"
        return ""


def peers(op: str) -> list[Peer]:
    """All that are known to do the work of an op, installed or not."""
    return [peer for peer in _PEERS if op in peer.ops]


def tune(peer: Peer, case: Case, device: torch.device, limit: float) -> str:
    """Let the peer tune itself, for at most `limit` seconds, on a case. -> Why it could not, "" if it did.

    A kernel's choice is kept as soon as it is made, so that another run goes on where this one was stopped.
    """
    words = json.dumps(dataclasses.asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")})
    process = subprocess.Popen([sys.executable, "-m", __name__, peer.name, words, str(device)], text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return (f"its own tuning took longer than {limit:.0f} s; what it has tuned is kept, so that another run goes "
                "on from there, and --tuning gives it longer")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "" if process.returncode == 0 else f"its first call failed: {last_line(errors)}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "without a message"


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
    with contextlib.suppress(ImportError):
        importlib.import_module("setuptools")  # brings the distutils that it imports, gone from Python 3.12
    x, K = problem.inputs, problem.case.K
    with contextlib.redirect_stdout(io.StringIO()):  # it says that its CUDA extension is not there
        attend = _public("performer_pytorch", "FastAttention")(K, nb_features=FEATURES, causal=True)
    attend.to(x["v"].device).projection_matrix.copy_(x["projection"])
    q, k = ((x[name].detach() * K**0.25).requires_grad_() for name in "qk")
    return Side(lambda: attend(q.transpose(1, 2), k.transpose(1, 2), x["v"].transpose(1, 2)).transpose(1, 2),
                [q, k, x["v"]])


def _plain_aft_full(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Equation 2 of 2105.14103 as it is written, without a maximum: right only while exp(k) and exp(w) are in range."""
    future = torch.ones(bias.shape, dtype=torch.bool, device=bias.device).triu(1)
    weights, p = bias.masked_fill(future, -torch.inf).exp().to(v.dtype), k.exp()
    return q.sigmoid() * ((weights @ (p * v)) / (weights @ p))


def _plain_aft_simple(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = k.float().exp()
    return (q.float().sigmoid() * (p * v).cumsum(1) / p.cumsum(1)).to(q.dtype)


def _plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "aft_full": _plain_aft_full, "aft_simple": _plain_aft_simple, "linear_cross_entropy": _plain_loss}


def _plain(problem: Problem) -> Side:
    return Side(lambda: _PLAIN[problem.case.op](**problem.inputs), problem.leaves)


def _compiled(problem: Problem) -> Side:
    torch.compiler.reset()  # every shape is compiled for itself, and none is too many
    call = torch.compile(_PLAIN[problem.case.op], dynamic=False, fullgraph=True)
    return Side(lambda: call(**problem.inputs), problem.leaves)


def _liger(problem: Problem) -> Side:
    loss, x = _public("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"), problem.inputs
    return Side(lambda: loss(x["x"], x["weight"], x["targets"]), problem.leaves)


def _cut(problem: Problem) -> Side:
    loss, x = _public("cut_cross_entropy", "linear_cross_entropy"), problem.inputs
    return Side(lambda: loss(x["x"], x["weight"], x["targets"]), problem.leaves)


_WITH_FORMULA = tuple(_PLAIN)
_PEERS = (
    Peer("sdpa-flash", ("causal_attention",), _sdpa("FLASH_ATTENTION")),
    Peer("sdpa-cudnn", ("causal_attention",), _sdpa("CUDNN_ATTENTION")),
    Peer("sdpa-mask", ("block_attention",), _masked, on_cpu=True, longest=8192),
    Peer("fla", ("linear_attention", "wkv6"), _fla, module="fla", package="flash-linear-attention", tunes=True),
    Peer("performer-pytorch", ("favor_attention",), _performer, module="performer_pytorch", on_cpu=True,
         package="performer-pytorch", tolerance=0.2),
    Peer("torch", _WITH_FORMULA, _plain, on_cpu=True),
    Peer("torch-compile", _WITH_FORMULA, _compiled),
    Peer("liger", ("linear_cross_entropy",), _liger, module="liger_kernel", package="liger-kernel"),
    Peer("cut-cross-entropy", ("linear_cross_entropy",), _cut, module="cut_cross_entropy", package="cut-cross-entropy"),
)


def _first_call(name: str, words: str, device: str) -> None:
    """What the process that tunes does."""
    facts = json.loads(words)
    case = Case(**facts | {"dtype": getattr(torch, facts["dtype"])})
    peer = next((peer for peer in _PEERS if peer.name == name), None)
    if peer is None:
        raise ZooError(f"unknown peer {name!r}; allowed: {', '.join(peer.name for peer in _PEERS)}")
    problem = build(case, torch.device(device))
    side = peer.make(problem)
    torch.autograd.grad(side.forward(), side.leaves, problem.dy)
    with torch.no_grad():
        side.forward()
    if problem.dy.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    _first_call(*sys.argv[1:])
