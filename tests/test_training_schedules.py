"""Learning-rate schedules: pure functions with exact values at their ends."""

from __future__ import annotations

import inspect

import pytest

from zoo.errors import ZooError
from zoo.training.schedules import SCHEDULES, cosine, get_schedule, linear, wsd


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
def test_ends_are_exact(name: str, steps: int) -> None:
    schedule = get_schedule(name, warmup=0.1, final=0.25)
    values = [schedule(step, steps) for step in range(steps)]
    climb = round(0.1 * steps)
    assert values[:climb] == [(step + 1) / climb for step in range(climb)]
    if round(0.2 * steps):  # wsd's decay, which a run of one or two steps has none of
        assert values[-1] == pytest.approx(0.25, abs=1e-12)
    assert all(0 < value <= 1 for value in values)
    after = values[climb:]
    assert after == sorted(after, reverse=True)


def test_values_in_the_middle() -> None:
    assert cosine(49, 100, warmup=0.0, final=0.0) == pytest.approx(0.5)
    assert cosine(24, 100, warmup=0.0, final=0.0) == pytest.approx(0.8535534)
    assert linear(49, 100, warmup=0.0, final=0.5) == pytest.approx(0.75)
    assert wsd(79, 100, warmup=0.1, decay=0.2, final=0.0) == 1.0
    assert wsd(84, 100, warmup=0.1, decay=0.2, final=0.0) == pytest.approx(0.5)


def test_no_schedule_remembers() -> None:
    for name in SCHEDULES:
        schedule = get_schedule(name)
        forward = [schedule(step, 50) for step in range(50)]
        assert [schedule(step, 50) for step in reversed(range(50))] == forward[::-1]


def test_wsd_does_not_depend_on_steps_while_stable() -> None:
    assert wsd(100, 200, warmup=0.0) == wsd(100, 4000, warmup=0.0) == 1.0


@pytest.mark.parametrize(("name", "options", "word"), [
    ("exponential", {}, "cosine, linear, wsd"),
    ("cosine", {"decay": 0.1}, "final, warmup"),
    ("linear", {"warmup": 2}, "fraction"),
    ("linear", {"warmup": "long"}, "fraction"),
    ("wsd", {"warmup": 0.9, "decay": 0.2}, "at most 1"),
])
def test_wrong_options_are_refused(name: str, options: dict, word: str) -> None:
    with pytest.raises(ZooError, match=word):
        get_schedule(name, **options)


def test_every_schedule_has_a_warmup_and_an_end() -> None:
    for function in SCHEDULES.values():
        assert {"warmup", "final"} <= inspect.signature(function).parameters.keys()
