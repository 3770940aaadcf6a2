"""Learning-rate schedules: each a pure function (step, steps) -> multiple of the peak rate.

`step` counts from 0: it is the number of optimiser steps already taken. The rate climbs linearly over the first
`warmup * steps` steps, of which the last has 1, and the run's last step has exactly `final`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from zoo.errors import ZooError, choose

Schedule = Callable[[int, int], float]


def _warmup(step: int, steps: int, warmup: float) -> tuple[float | None, float]:
    """(the multiple while climbing or None, how far the rest is done: above 0, and 1 at the last step)."""
    climb = round(warmup * steps)
    if step < climb:
        return (step + 1) / climb, 0.0
    return None, min(1.0, (step + 1 - climb) / max(1, steps - climb))


def cosine(step: int, steps: int, *, warmup: float = 0.05, final: float = 0.1) -> float:
    """Half a cosine from 1 to `final` (1608.03983 eq. 5, without restarts)."""
    climbing, done = _warmup(step, steps, warmup)
    return climbing if climbing is not None else final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def linear(step: int, steps: int, *, warmup: float = 0.05, final: float = 0.0) -> float:
    """A straight line from 1 to `final`."""
    climbing, done = _warmup(step, steps, warmup)
    return climbing if climbing is not None else 1 + (final - 1) * done


def wsd(step: int, steps: int, *, warmup: float = 0.05, decay: float = 0.2, final: float = 0.0) -> float:
    """Warmup, stable, decay (2404.06395): 1 until the last `decay * steps` steps, then 1 - sqrt down to `final`.

    Until the decay begins, nothing depends on `steps` but the warmup: a run can be resumed with more of them.
    """
    climbing, _ = _warmup(step, steps, warmup)
    if climbing is not None:
        return climbing
    fall = round(decay * steps)
    done = (step + 1 - (steps - fall)) / fall if fall else 0.0
    return 1 + (final - 1) * math.sqrt(min(1.0, done)) if done > 0 else 1.0


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": cosine, "linear": linear, "wsd": wsd}


def get_schedule(name: str, **options: Any) -> Schedule:
    """The schedule of a name, options filled in. Raises ZooError for a name, option or value that is not allowed."""
    function = SCHEDULES[choose("schedule", name, SCHEDULES)]
    known = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in known:
            raise ZooError(f"schedule {name} has no option {key!r}; allowed: {', '.join(sorted(known))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ZooError(f"schedule.{key}={value!r} is not a fraction from 0 to 1")
    if options.get("warmup", 0) + options.get("decay", 0) > 1:
        raise ZooError("schedule.warmup and schedule.decay are fractions of the same run: together at most 1")
    return lambda step, steps: function(step, steps, **options)
