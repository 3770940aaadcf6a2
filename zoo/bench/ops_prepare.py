"""First calls in processes of their own, before `zoo bench ops` measures: what they compile and tune stays in caches.

The zoo's kernels and PyTorch's compiler are brought to it by several processes at once; nothing is chosen by its speed
there, as the device is not theirs alone. A peer that tunes itself gets the device to itself, and a limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from zoo.bench import ops_peers
from zoo.bench.ops_cases import Case, build
from zoo.bench.ops_peers import Peer
from zoo.errors import choose

ZOO = "zoo"
Unit = tuple[str, Case]  # who calls, on what


def units(cases: Sequence[Case], device: torch.device, peers: bool) -> list[Unit]:
    """What is worth a process: kernels of the zoo, for the shortest and the longest T of a head size (rows that are cut
    into segments are another build); a peer that compiles, for every case.
    """
    found: dict[Unit, None] = {}
    for case in cases:
        same = [other for other in cases if (other.op, other.kind) == (case.op, case.kind)]
        if case in (min(same, key=lambda other: other.T), max(same, key=lambda other: other.T)):
            found[ZOO, case] = None
        for peer in ops_peers.peers(case.op) if peers else ():
            if peer.compiles and not peer.missing(case, device):
                found[peer.name, case] = None
    return list(found)


def compile_all(work: Sequence[Unit], device: torch.device, workers: int, limit: float) -> int:
    """Share units between `workers` processes, for at most `limit` seconds. -> How many of them did not end well.

    What fails or is cut off here is compiled where it is measured, and what is wrong with it is said there.
    """
    shares = [work[i::workers] for i in range(min(workers, len(work)))]
    processes = [_start("compile", share, device, stderr=subprocess.DEVNULL) for share in shares]
    end = time.monotonic() + limit
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        return sum(process.poll() != 0 for process in processes)
    finally:
        for process in processes:
            _end(process)


def tune(peer: Peer, case: Case, device: torch.device, limit: float) -> str:
    """Let the peer tune itself, for at most `limit` seconds, on a case. -> Why it could not, "" if it did.

    A kernel's choice is kept as soon as it is made, so that another run goes on where this one was stopped.
    """
    process = _start("tune", [(peer.name, case)], device, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return (f"its own tuning took longer than {limit:.0f} s; what it has tuned is kept, so that another run goes "
                "on from there, and --tuning gives it longer")
    finally:
        _end(process)
    return "" if process.returncode == 0 else f"its first call failed: {last_line(errors)}"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "without a message"


def _start(task: str, work: Sequence[Unit], device: torch.device, stderr: int) -> subprocess.Popen[str]:
    words = json.dumps([[name, dataclasses.asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")}]
                        for name, case in work])
    return subprocess.Popen([sys.executable, "-m", __name__, task, words, str(device)], text=True,
                            stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def first_calls(task: str, words: str, device: str) -> None:
    """What such a process does: forward and backward of every unit. "tune" has one, whose failure is told."""
    work = [(name, Case(**facts | {"dtype": getattr(torch, facts["dtype"])})) for name, facts in json.loads(words)]
    if task == "compile":
        from torch._inductor import config

        config.compile_threads = 1  # there are processes enough
        config.autotune_local_cache = False  # no choice by times that were taken in a crowd
    failed = 0
    for name, case in work:
        try:
            _first_call(name, case, torch.device(device))
        except Exception:
            if task == "tune":
                raise
            failed += 1
    if failed:
        sys.exit(1)


def _first_call(name: str, case: Case, device: torch.device) -> None:
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


if __name__ == "__main__":
    first_calls(*sys.argv[1:])
