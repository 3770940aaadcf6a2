"""Speed of every op beside the libraries that people use: the same inputs, in one process, in turns.

A side is checked before it is timed: its output and gradients against the zoo's, so that equal work is compared. What
cannot be measured is named with the reason. Times are of a stream of calls, without a pause for a cold cache.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.bench import ops_peers, ops_prepare
from zoo.bench.ops_cases import DIRECTIONS, OPS, Case, Problem, build, cases
from zoo.bench.ops_peers import Peer, Side, own
from zoo.bench.timing import Timing, captured, interleave, seconds
from zoo.errors import ZooError, choose

ZOO, EAGER = ops_prepare.ZOO, "zoo-eager"
TOLERANCE = 0.05  # relative error of bf16 results; float32 ones are far closer


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, as measured: FLOP/s of a matrix product, bytes/s of a copy (read and written)."""

    flops: float
    bytes: float

    def floor(self, flops: float, traffic: float) -> float:
        """Seconds below which nothing that needs so much can be."""
        return max(flops / self.flops, traffic / self.bytes)


@dataclass(frozen=True)
class Row:
    """One implementation of a case in one direction; `error` is relative, to the first of the zoo's sides."""

    case: Case
    impl: str
    direction: str
    timing: Timing
    peak_mib: float | None
    flops: float
    bytes: float
    error: float


@dataclass
class Found:
    """What came of one op. `left_out`: (who, why) -> the cases; `launched`: (impl, why) timed with its launches."""

    op: str
    rows: list[Row] = field(default_factory=list)
    left_out: dict[tuple[str, str], list[Case]] = field(default_factory=dict)
    launched: set[tuple[str, str]] = field(default_factory=set)

    def leave_out(self, who: str, why: str, case: Case) -> None:
        cases = self.left_out.setdefault((who, " ".join(why.split())), [])
        if case not in cases:
            cases.append(case)


def measure_ceilings(device: torch.device) -> Ceilings:
    """The rates of a square product (bf16; float32 on a CPU) and of a copy, the best of several."""
    on_gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a = torch.randn(side, side, device=device).to(dtype)
    source = torch.zeros(2**30 if on_gpu else 2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(call: Callable[[], object]) -> float:
        call()
        return min(seconds(call, device, calls=10 if on_gpu else 1) for _ in range(5))

    return Ceilings(2 * side**3 / best(lambda: a @ a), 2 * source.nbytes / best(lambda: target.copy_(source)))


def bench_ops(ops: Sequence[str] | None = None, *, device: torch.device, lengths: Sequence[int] | None = None,
              peers: bool = True, budget: float = 20.0, tuning: float = 300.0, workers: int = 0,
              limit: float = float("inf"), progress: Callable[[str, float], object] = lambda op, done: None,
              ) -> Iterator[Found]:
    """Time ops one after the other, each for about `budget` seconds of measuring, first calls not counted.

    The shapes of bars come first, of all ops; then the others. Yields an op's rows as soon as they are there, so twice
    as a rule. `tuning`: the limit, in seconds, of a peer's own tuning for one head size, and of compiling beforehand in
    as many processes as `workers` says. What has not begun `limit` seconds after the call is left out, and named.
    progress(op, share of its cases done).
    """
    if workers < 0:
        raise ZooError(f"workers={workers} is not allowed: whole numbers from 0")
    end = time.monotonic() + limit
    chosen = [choose("op", name, OPS) for name in ops] if ops is not None else list(OPS)
    planned = {op: cases(op, device, lengths) for op in chosen}
    if workers and device.type == "cuda":
        progress("compiling", 0.0)
        ordered = sorted((case for op in chosen for case in planned[op]), key=lambda case: not case.first)
        ops_prepare.compile_all(ops_prepare.units(ordered, device, peers), device, workers, min(tuning, limit))
    tuned: dict[tuple[str, str, tuple[int, int, int]], str] = {}
    for first in (True, False):
        for op in chosen:
            now, found = [case for case in planned[op] if case.first == first], Found(op)
            for count, case in enumerate(now):
                progress(op, count / len(now))
                if time.monotonic() > end:
                    found.leave_out("all", f"not begun within the {limit:.0f} s allowed; --limit gives longer", case)
                    continue
                _measure(case, device, peers, budget / len(planned[op]), tuning, tuned, found)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            if now:
                yield found


def zoo_sides(problem: Problem) -> dict[str, Callable[[], Side]]:
    """The op on its kernels and on its reference; to make the first raises a ZooError where there is no kernel."""

    def kernels() -> Side:
        side = own(problem, "triton")
        if not problem.dy.is_cuda:
            raise ZooError("the kernels run on a GPU; Triton's interpreter on a CPU is for tests")
        with torch.no_grad(), _Called() as called:
            side.forward()
        if not called.ours:
            raise ZooError("no kernel of its own was called, though the kernels were asked for")
        return side

    return {ZOO: kernels, EAGER: lambda: own(problem, "eager")}


class _Called(TorchDispatchMode):
    """Notes whether any of the zoo's custom ops is called."""

    ours = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ours |= func.namespace == "zoo"
        return func(*args, **(kwargs or {}))


def _measure(case: Case, device: torch.device, with_peers: bool, budget: float, tuning: float,
             tuned: dict[tuple[str, str, tuple[int, int, int]], str], found: Found) -> None:
    """Check, then time all sides of a case that work here."""
    try:
        problem = build(case, device)
    except torch.OutOfMemoryError:
        found.leave_out("all", "its inputs do not fit into the memory", case)
        return
    makers: list[tuple[str, Callable[[], Side], float]] = []
    makers += [(name, make, TOLERANCE) for name, make in zoo_sides(problem).items()]
    for peer in ops_peers.peers(case.op) if with_peers else []:
        why = peer.missing(case, device) or _tuned(peer, case, device, tuning, tuned)
        if why:
            found.leave_out(peer.name, why, case)
        else:
            makers.append((peer.name, partial(peer.make, problem), peer.tolerance))
    sides: dict[str, Side] = {}
    errors: dict[str, float] = {}
    expected: list[Tensor] = []
    for name, make, tolerance in makers:
        try:
            side = make()
            error = _difference(side, problem, expected)
            if not error <= tolerance:
                raise ZooError(f"not the same result: a relative error of {error:.2g}, {tolerance:g} allowed")
        except Exception as failure:  # whatever a library raises, the others are measured
            found.leave_out(name, _reason(failure), case)
        else:
            sides[name], errors[name] = side, error
    del expected[:]
    for direction in DIRECTIONS if sides else ():
        calls = {name: _call(side, problem, direction) for name, side in sides.items()}
        peaks = {name: _peak_mib(call, device) for name, call in calls.items()}
        if device.type == "cuda":
            calls = {name: _without_launches(name, call, case, device, found) for name, call in calls.items()}
        timings = interleave(calls, device=device, budget=budget / len(DIRECTIONS), warmup=1, slice_seconds=0.01)
        found.rows += [Row(case, name, direction, timings[name], peaks[name], problem.flops(direction),
                           problem.bytes(direction), errors[name]) for name in calls]


def _without_launches(name: str, call: Callable[[], object], case: Case, device: torch.device,
                      found: Found) -> Callable[[], object]:
    """The call as a graph, so that all sides are measured by what the device does; as it is where that fails."""
    try:
        return captured(call, device)
    except Exception as failure:  # whatever a library does that a graph cannot hold
        torch.cuda.synchronize(device)
        found.launched.add((name, _reason(failure)[:120]))
        return call


def _tuned(peer: Peer, case: Case, device: torch.device, limit: float,
           tuned: dict[tuple[str, str, tuple[int, int, int]], str]) -> str:
    """Why the peer's tuning for a head size did not end well, "" if it did or there is none; asked once."""
    key = peer.name, case.op, case.kind
    if peer.tunes and key not in tuned:
        tuned[key] = ops_prepare.tune(peer, case, device, limit)
    return tuned.get(key, "")


def _reason(failure: Exception) -> str:
    if isinstance(failure, torch.OutOfMemoryError):
        return "out of memory"
    text = str(failure) if isinstance(failure, ZooError) else f"{type(failure).__name__}: {failure}"
    return " ".join(text.split())[:300]


def _call(side: Side, problem: Problem, direction: str) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            side.forward()

    def both() -> None:
        torch.autograd.grad(side.forward(), side.leaves, problem.dy)

    return forward if direction == DIRECTIONS[0] else both


def _difference(side: Side, problem: Problem, expected: list[Tensor]) -> float:
    """The largest relative error of output and gradients, those with respect to the problem's own leaves.

    The first side that is asked fills `expected`, and has an error of 0.
    """
    y = side.forward()
    gradients = torch.autograd.grad(y, side.leaves, problem.dy)
    results = [y.detach(), *gradients]
    if not all(bool(result.isfinite().all()) for result in results):
        raise ZooError("its result is not finite")
    if not expected:
        expected += results
        return 0.0
    same = [True, *(mine is own for mine, own in zip(side.leaves, problem.leaves, strict=True))]
    return max(_relative(mine, own) for mine, own, is_same in zip(results, expected, same, strict=True) if is_same)


def _relative(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference| of one after the other row, so that no copy in float32 of a large one is made."""
    x, reference = (z.flatten(0, -2) if z.ndim > 1 else z.reshape(1, -1) for z in (x, reference))
    missed = total = 0.0
    for a, b in zip(x.split(1 << 16), reference.split(1 << 16), strict=True):
        missed += float((a.float() - b.float()).square().sum(dtype=torch.float64))
        total += float(b.float().square().sum(dtype=torch.float64))
    return (missed / max(total, 1e-60)) ** 0.5


def _peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """The most that one call takes beside the inputs; None on a CPU, where nobody counts."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
