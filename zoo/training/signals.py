"""SIGTERM and Ctrl-C: the first asks the run to stop after the step under way, a second ends it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """As a context, catches both. Outside of `begin` .. `end` there is nothing to save, and the process exits at once.

    The exit status is 128 + the signal, as a shell has it: 143 for SIGTERM, 130 for Ctrl-C.
    """

    caught = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self.training = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.getsignal(number) for number in self.caught}
            self._install()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def begin(self) -> None:
        """Training begins. Lightning has put a handler of its own over ours, which would broadcast from inside it."""
        self.training = True
        if self.before:
            self._install()

    def end(self) -> None:
        self.training = False

    def exit(self) -> SystemExit:
        return SystemExit(128 + (self.received or signal.SIGTERM))

    def _install(self) -> None:
        for number in self.caught:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, number
        if again or not self.training:
            raise self.exit()
