"""Speed of every op beside the libraries that people use: the same inputs, in one process, in turns.

A side is checked before it is timed: its output and gradients against the zoo's, so that equal work is compared. What
cannot be measured is named with the reason. Times are of a stream of calls, without a pause for a cold cache. On a GPU
every op has a process of its own, so that what a library breaks or leaks there is no other op's loss.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.bench import ops_peers, ops_prepare
from zoo.bench.ops_cases import DIRECTIONS, OPS, Case, Problem, build, cases
from zoo.bench.ops_peers import Side, own
from zoo.bench.ops_process import EndedError, FailedError, Process, reason
from zoo.bench.timing import Timing, captured, interleave, seconds
from zoo.errors import ZooError, choose

ZOO, EAGER = ops_prepare.ZOO, "zoo-eager"
TOLERANCE = 0.05  # relative error of bf16 results; float32 ones are far closer
CASE_LIMIT = 300.0  # seconds, after which a case is given up
LEAK = 2**30  # bytes that a case leaves in use, from which on its process is not used again


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

    def add(self, other: Found) -> None:
        """What came of another case."""
        self.rows += other.rows
        self.launched |= other.launched
        for (who, why), left in other.left_out.items():
            for case in left:
                self.leave_out(who, why, case)


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
              limit: float = float("inf"), apart: bool | None = None,
              keep: Callable[[list[Row]], object] = lambda rows: None,
              progress: Callable[[str, float], object] = lambda op, done: None) -> Iterator[Found]:
    """Time ops one after the other, each for about `budget` seconds of measuring, first calls not counted.

    The shapes of bars come first, of all ops; then the others. Yields an op when it is done with, so twice as a rule;
    keep(rows) is told after each case. `tuning`: the limit, in seconds, of a peer's own tuning for one head size, and
    of compiling beforehand in as many processes as `workers` says. What is not measured `limit` seconds after the call
    is left out, and named. `apart`: every op in a process of its own; None: on a GPU. progress(op, share of its cases
    done).
    """
    if workers < 0:
        raise ZooError(f"workers={workers} is not allowed: whole numbers from 0")
    end = time.monotonic() + limit
    chosen = [choose("op", name, OPS) for name in ops] if ops is not None else list(OPS)
    planned = {op: cases(op, device, lengths) for op in chosen}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the memory is the processes' that measure
    rooms = _Rooms(chosen if apart or (apart is None and device.type == "cuda") else (), device, peers)
    try:
        refused: dict[ops_prepare.Unit, str] = {}
        if workers and device.type == "cuda":
            progress("compiling", 0.0)
            units = ops_prepare.units([case for op in chosen for case in planned[op]], device, peers)
            refused = ops_prepare.compile_all(units, device, workers, min(tuning, limit))
        progress("importing", 0.0)
        rooms.ready()
        for first in (True, False):
            for op in chosen:
                now, found = [case for case in planned[op] if case.first == first], Found(op)
                for count, case in enumerate(now):
                    progress(op, count / len(now))
                    why = {name: why for (name, of), why in refused.items() if of == case and name != ZOO}
                    if time.monotonic() < end:
                        why |= rooms.tuned(case, min(tuning, end - time.monotonic()))
                    left = end - time.monotonic()
                    if left > 0:
                        one = rooms.measure(case, budget / len(planned[op]), why, limit=left)
                        found.add(one)
                        keep(one.rows)
                    else:
                        late = f"not begun within the {limit:.0f} s allowed; --limit gives longer"
                        found.leave_out("all", late, case)
                if now:
                    yield found
    finally:
        rooms.end()


class _Rooms:
    """A process for every op, and one for all tuning. They start at once, and stay idle while another one measures."""

    def __init__(self, ops: Sequence[str], device: torch.device, peers: bool) -> None:
        self._device, self._peers = device, peers
        self._of = {op: self._start(op) for op in ops}
        tuning = [op for op in ops if peers and any(peer.tunes for peer in ops_peers.peers(op))]
        self._tuner = Process(*tuning) if tuning else None
        self._tuned: dict[tuple[str, str, tuple[int, int, int]], str] = {}

    def _start(self, op: str) -> Process:
        return Process(*[op] if self._peers else [])

    def ready(self) -> None:
        """Wait until all are."""
        if processes := self._all():
            with ThreadPoolExecutor(len(processes)) as pool:
                list(pool.map(lambda process: process.ready(self._device), processes))

    def measure(self, case: Case, budget: float, refused: Mapping[str, str], limit: float) -> Found:
        """`measure_case` in the op's process, or here where it has none."""
        arguments = case, self._device, self._peers, budget, refused
        if case.op not in self._of:
            return measure_case(*arguments)[0]
        found, sound = Found(case.op), False
        try:
            found, sound = self._of[case.op].ask(measure_case, *arguments, limit=min(CASE_LIMIT, limit))
        except (FailedError, EndedError) as why:
            found.leave_out("all", str(why), case)
        if not sound:
            self._of[case.op].end()
            self._of[case.op] = self._start(case.op)
        return found

    def tuned(self, case: Case, limit: float) -> dict[str, str]:
        """Why the tuning of a head size did not end well, by peer; it is asked for once, where it is first needed."""
        found = {}
        for peer in ops_peers.peers(case.op) if self._peers else ():
            if peer.tunes and not peer.missing(case, self._device):
                key = peer.name, case.op, case.kind
                if key not in self._tuned:
                    self._tuner = self._tuner or Process(case.op)
                    self._tuned[key] = ops_prepare.tune(self._tuner, peer, case, self._device, limit)
                    if self._tuned[key]:
                        self._tuner.end()
                        self._tuner = None
                found[peer.name] = self._tuned[key]
        return {name: why for name, why in found.items() if why}

    def end(self) -> None:
        for process in self._all():
            process.end()

    def _all(self) -> list[Process]:
        return [*self._of.values(), *([self._tuner] if self._tuner else [])]


def zoo_sides(problem: Problem) -> dict[str, Callable[[], Side]]:
    """The op on its kernels and on its reference; to make the first raises a ZooError where there is no kernel."""

    def kernels() -> Side:
        side = own(problem, "triton")
        if not problem.dy[0].is_cuda:
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


def measure_case(case: Case, device: torch.device, with_peers: bool, budget: float,
                 refused: Mapping[str, str]) -> tuple[Found, bool]:
    """-> What came of a case, and whether this process is as good as before. `refused`: sides to leave out, and why."""
    found = Found(case.op)
    _measure(case, device, with_peers, budget, refused, found)
    gc.collect()
    if device.type != "cuda":
        return found, True
    try:
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()  # each may stand in what was a large block, and keep it from the others
        torch.cuda.empty_cache()
    except RuntimeError:  # a fault of an earlier call, after which this process can call nothing
        return found, False
    return found, torch.cuda.memory_reserved(device) < LEAK


def _measure(case: Case, device: torch.device, with_peers: bool, budget: float, refused: Mapping[str, str],
             found: Found) -> None:
    """Check, then time all sides of a case that work here."""
    try:
        problem = build(case, device)
    except torch.OutOfMemoryError:
        found.leave_out("all", "its inputs do not fit into the memory", case)
        return
    makers: list[tuple[str, Callable[[], Side], float]] = []
    makers += [(name, make, TOLERANCE) for name, make in zoo_sides(problem).items()]
    for peer in ops_peers.peers(case.op) if with_peers else []:
        why = peer.missing(case, device) or refused.get(peer.name, "")
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
            found.leave_out(name, reason(failure), case)
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
        calls.clear()  # and the memory of their graphs


def _without_launches(name: str, call: Callable[[], object], case: Case, device: torch.device,
                      found: Found) -> Callable[[], object]:
    """The call as a graph, so that all sides are measured by what the device does; as it is where that fails."""
    try:
        return captured(call, device)
    except Exception as failure:  # whatever a library does that a graph cannot hold
        torch.cuda.synchronize(device)
        found.launched.add((name, reason(failure)[:120]))
        return call


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
    outputs = [y] if isinstance(y, Tensor) else list(y)
    gradients = torch.autograd.grad(outputs, side.leaves, problem.dy)
    results = [*(x.detach() for x in outputs), *gradients]
    if not all(bool(result.isfinite().all()) for result in results):
        raise ZooError("its result is not finite")
    if not expected:
        expected += results
        return 0.0
    same = [True for _ in outputs] + [mine is own for mine, own in zip(side.leaves, problem.leaves, strict=True)]
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
    time.sleep(0.01)  # a backward pass has threads, which hold the last tensors of the call before a moment longer
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
