"""Timing several sides against each other: interleaved in one process, warmed up outside the clock, as quantiles."""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, and the quantiles at 20 % and 80 %, over `samples` measurements."""

    p50: float
    p20: float
    p80: float
    samples: int


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """How long `calls` calls in a row take, on average: by the device's own clock where it has one."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / calls
    before = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - before) / calls


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`call` as a CUDA graph: its replay takes the device's time alone, where Python's launches would take longer.

    Raises what CUDA raises where a call cannot be captured: it waits for the device, or reads a figure from it.
    """
    aside = _aside(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside), _no_waiting():  # what a first call on a stream sets up stays out of the graph
        call()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        call()
    return graph.replay


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise where a call waits for the device, before a capture does: one that fails keeps its memory for good."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def interleave(sides: Mapping[str, Callable[[], object]], *, device: torch.device, budget: float = 60.0,
               warmup: int = 3, least: int = 3, most: int = 100, slice_seconds: float = 0.05,
               progress: Callable[[float], object] = lambda done: None) -> dict[str, Timing]:
    """Time every side in rounds, all in a random order in each, so that whatever slows the machine slows all alike.

    A measurement is as many calls as take about `slice_seconds` (one at least), so that a call of microseconds is
    not lost in the clock's own cost. Rounds go on for `budget` seconds, the warm-up included, but there are at least
    `least` and at most `most`. progress(share of the way, 0 to 1) is told after each round.
    """
    start = time.perf_counter()
    calls = {}
    for name, call in sides.items():
        for _ in range(warmup):
            call()
        calls[name] = max(1, round(slice_seconds / max(seconds(call, device), 1e-9)))
    order, shuffled = list(sides), random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for count in range(1, most + 1):
        began = time.perf_counter()
        shuffled.shuffle(order)
        for name in order:
            taken[name].append(seconds(sides[name], device, calls[name]))
        now = time.perf_counter()
        progress(min(1.0, max(count / most, (now - start) / budget)) if budget else 1.0)
        if count >= least and now + (now - began) > start + budget:
            break
    quantiles = {name: np.quantile(values, (0.5, 0.2, 0.8)) for name, values in taken.items()}
    return {name: Timing(float(q[0]), float(q[1]), float(q[2]), len(taken[name])) for name, q in quantiles.items()}
