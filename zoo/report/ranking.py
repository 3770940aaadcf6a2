"""Runs put together: seeds into spreads, learning rates into the best one, architectures into an order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from zoo.report.runs import Point, Run

REFERENCE = "transformer"  # what the others are compared with, where it is among them
Colours = Mapping[str, int]
"""An architecture's label -> its place in the palette, the same on every chart."""


@dataclass(frozen=True)
class Spread:
    """Mean, least and greatest of the values that seeds gave."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(math.fsum(found) / len(found), min(found), max(found), len(found))

    def times(self, factor: float) -> Spread:
        return Spread(self.mean * factor, self.low * factor, self.high * factor, self.count)

    def overlaps(self, other: Spread) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Entry:
    """An architecture, with the runs of its best learning rate; `rates`: validation by rate, ascending."""

    label: str
    runs: tuple[Run, ...]
    rates: dict[float, Spread]

    @property
    def validation(self) -> Spread:
        return Spread.of(run.validation for run in self.runs)

    @property
    def test(self) -> Spread | None:
        found = [run.test for run in self.runs if run.test is not None]
        return Spread.of(found) if found else None

    @property
    def rate(self) -> float:
        return self.runs[0].rate

    @property
    def at_an_edge(self) -> bool:
        """Whether the best rate is the least or the greatest of several that were tried."""
        return len(self.rates) > 1 and self.rate in (min(self.rates), max(self.rates))

    @property
    def tokens_per_second(self) -> float:
        return sorted(run.tokens_per_second for run in self.runs)[len(self.runs) // 2]

    @property
    def peak_memory(self) -> int | None:
        return max((run.peak_memory for run in self.runs if run.peak_memory is not None), default=None)


def rank(runs: Sequence[Run]) -> list[Entry]:
    """Architectures, best first by mean validation at their best rate: test figures decide nothing."""
    entries = []
    for label, mine in labelled(runs).items():
        by_rate: dict[float, list[Run]] = {}
        for run in sorted(mine, key=lambda run: (run.rate, run.seed)):
            by_rate.setdefault(run.rate, []).append(run)
        rates = {rate: Spread.of(run.validation for run in group) for rate, group in by_rate.items()}
        best = min(rates, key=lambda rate: rates[rate].mean)
        entries.append(Entry(label, tuple(by_rate[best]), rates))
    return sorted(entries, key=lambda entry: entry.validation.mean)


def labelled(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by architecture. Where one has several options or shapes, what differs among them is part of the label."""
    facts = {run.name: run.config.model | {key: getattr(run.model, key) for key in ("layers", "dim", "heads")}
             for run in runs}
    found: dict[str, list[Run]] = {}
    for run in runs:
        mine = facts[run.name]
        others = [facts[other.name] for other in runs if other.config.model["name"] == mine["name"]]
        differing = [key for key in sorted(mine) if any(other.get(key) != mine[key] for other in others)]
        found.setdefault(" ".join([mine["name"], *(f"{key}={mine[key]}" for key in differing)]), []).append(run)
    return found


def curve(runs: Sequence[Run], along: Callable[[Run, Point], float]) -> list[tuple[float, Spread]]:
    """Validation against a cost, seeds together: at each validation the mean cost, and the spread of bits."""
    together = zip(*(run.curve for run in runs), strict=False)
    return [(math.fsum(along(run, point) for run, point in zip(runs, points, strict=True)) / len(runs),
             Spread.of(point.bits for point in points)) for points in together]


def at_cost(runs: Sequence[Run], along: Callable[[Run, Point], float], cost: float) -> Spread | None:
    """Bits at a cost, between validations linear in its logarithm. None where a run did not get there or began later.
    """
    found = []
    for run in runs:
        points = [(along(run, point), point.bits) for point in run.curve]
        if not points or not points[0][0] <= cost <= points[-1][0]:
            return None
        value = points[-1][1]
        for (x, bits), (after, bits_after) in pairwise(points):
            if x <= cost < after:
                value = bits + (bits_after - bits) * math.log(cost / x) / math.log(after / x)
                break
        found.append(value)
    return Spread.of(found)


def by_position(runs: Sequence[Run]) -> list[tuple[int, Spread]]:
    """Mean nats a token by the most tokens of context of each bin; bins that all runs have."""
    places = [dict(run.positions) for run in runs]
    return [(upto, Spread.of(place[upto] for place in places)) for upto in sorted(places[0])
            if all(upto in place for place in places)]
