"""First calls in processes of their own, before `zoo bench ops` measures: what they compile and tune stays in caches.

The zoo's kernels, PyTorch's compiler and peers that compile are brought to it by several processes at once; nothing is
chosen by its speed there, as the device is not theirs alone. A peer that tunes itself gets the device to itself, and a
limit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from zoo.bench import ops_peers
from zoo.bench.ops_cases import Case, build
from zoo.bench.ops_peers import Peer
from zoo.bench.ops_process import EndedError, FailedError, Process
from zoo.errors import choose

ZOO = "zoo"
Unit = tuple[str, Case]  # who calls, on what


def units(cases: Sequence[Case], device: torch.device, peers: bool) -> list[Unit]:
    """What is worth compiling beforehand: a peer that compiles, for every case; kernels of the zoo, for the shortest
    and the longest T of a head size (rows that are cut into segments are another build). What comes first in measuring
    comes first, and of it the peers', which take longest; of the others they come last.
    """
    found: dict[Unit, None] = {}
    for case in cases:
        for peer in ops_peers.peers(case.op) if peers else ():
            if peer.compiles and not peer.missing(case, device):
                found[peer.name, case] = None
        same = [other for other in cases if (other.op, other.kind) == (case.op, case.kind)]
        if case in (min(same, key=lambda other: other.T), max(same, key=lambda other: other.T)):
            found[ZOO, case] = None
    return sorted(found, key=lambda unit: (not unit[1].first, (unit[0] == ZOO) == unit[1].first))


def compile_all(work: Sequence[Unit], device: torch.device, workers: int, limit: float) -> dict[Unit, str]:
    """Make the first calls of all units in `workers` processes, for at most `limit` seconds.

    -> Why, of those that did not end. What they have compiled is kept, so that another run goes on from there. What
    fails here is called again where it is measured, and what is wrong with it is said there.
    """
    end, waiting, unfinished = time.monotonic() + limit, deque(work), dict[Unit, str]()
    processes = [Process() for _ in range(min(workers, len(work)))]

    def work_off(index: int) -> None:
        while True:
            try:
                unit = waiting.popleft()
            except IndexError:
                return
            left = end - time.monotonic()
            try:
                if left <= 0:
                    raise EndedError(f"it had not begun within {limit:.0f} s")
                processes[index].ask(compile_one, *unit, device, limit=left)
            except FailedError:
                pass
            except EndedError as why:
                unfinished[unit] = (f"compiling beforehand: {why}; what it has compiled is kept, so that another run "
                                    "goes on from there, and --tuning gives it longer")
                processes[index].end()
                if end > time.monotonic():
                    processes[index] = Process()

    try:
        with ThreadPoolExecutor(max(1, len(processes))) as pool:
            try:
                list(pool.map(work_off, range(len(processes))))
            finally:  # an interrupt ends those who would be waited for
                waiting.clear()
                for process in processes:
                    process.kill()
    finally:
        for process in processes:
            process.end()
    return unfinished


def tune(process: Process, peer: Peer, case: Case, device: torch.device, limit: float) -> str:
    """Let the peer tune itself, for at most `limit` seconds, on a case. -> Why it could not, "" if it did.

    A kernel's choice is kept as soon as it is made, so that another run goes on where this one was stopped.
    """
    try:
        process.ask(first_call, peer.name, case, device, limit=limit)
    except FailedError as failure:
        return f"its first call failed: {failure}"
    except EndedError as why:
        return (f"its own tuning: {why}; what it has tuned is kept, so that another run goes on from there, and "
                "--tuning gives it longer")
    return ""


def compile_one(name: str, case: Case, device: torch.device) -> None:
    """A first call in a crowd: no choice by the times that are taken there."""
    from torch._inductor import config

    config.autotune_local_cache = False
    first_call(name, case, device)


def first_call(name: str, case: Case, device: torch.device) -> None:
    """Forward and backward, and forward without gradients; the memory is given back."""
    problem = build(case, device)
    if name == ZOO:
        side = ops_peers.own(problem, "triton")
    else:
        known = {peer.name: peer for peer in ops_peers.peers(case.op)}
        side = known[choose("peer", name, known)].make(problem)
    torch.autograd.grad(side.forward(), side.leaves, problem.dy)
    with torch.no_grad():
        side.forward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        del problem, side
        torch.cuda.empty_cache()
