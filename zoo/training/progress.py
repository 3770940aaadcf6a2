"""What a run says of itself while it runs."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column


class Reporter:
    """Counts optimiser steps: one line that changes on a terminal, a line for each report elsewhere (a log, a pipe).

    `quiet` (the ranks beside the first) says nothing.
    """

    def __init__(self, steps: int, quiet: bool = False):
        self.steps, self.quiet = steps, quiet
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None

    def start(self, step: int) -> None:
        if self.console.is_terminal and not self.quiet:
            text = TextColumn("{task.description}", table_column=Column(overflow="fold"))  # two lines of a narrow one
            wide = [BarColumn(bar_width=20)] if self.console.width >= 140 else []
            self.bar = Progress(*wide, text, console=self.console)
            self.task = self.bar.add_task("", total=self.steps, completed=step)
            self.bar.start()

    def step(self, step: int, row: dict[str, Any], seconds_left: float) -> None:
        """Report a row of metrics."""
        width = len(str(self.steps))
        text = (f"step {step:>{width}}/{self.steps}  {count(row['tokens'])} tokens  "
                f"{row['bits_per_byte']:.4f} bits/byte  lr {row['lr']:.2e}  |grad| {row['grad_norm']:.2f}  "
                f"{count(row['tokens_per_second'])} tokens/s  ")
        if row.get("mfu") is not None:
            text += f"MFU {row['mfu']:.1%}  "
        text += f"{duration(seconds_left)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Clock:
    """Seconds spent training: stopped while the run validates, samples or saves."""

    def __init__(self) -> None:
        self.total, self.since = 0.0, time.perf_counter()

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self) -> None:
        self.total += time.perf_counter() - self.since


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def count(number: float) -> str:
    """Three digits and a unit: 999, 12.3k, 4.56M."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000
    return f"{number:.0f}" if not unit and float(number).is_integer() else f"{number:.3g}{unit}"


def duration(seconds: float) -> str:
    if math.isnan(seconds):  # not known yet
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
