"""Processes that `zoo bench ops` works in: what a library breaks, leaks or never ends there ends with one of them."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from zoo.errors import ZooError

THREADS = 4  # of PyTorch's compiler in each process; there are several processes


class FailedError(Exception):
    """The function raised; the text is its message. The process can be asked again."""


class EndedError(Exception):
    """The process came to its end, or was brought to it as it took too long; the text says which."""


class Process:
    """One that does what it is asked, one thing after the other. It starts at once, and imports the peers of `ops`."""

    def __init__(self, *ops: str) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process; closed by `end`
        self._process = subprocess.Popen([sys.executable, "-m", __name__, *ops], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=self._said, start_new_session=True)

    def ask(self, function: Callable[..., Any], *arguments: Any, limit: float = float("inf")) -> Any:
        """function(*arguments) there, all of which can be pickled. Raises FailedError, and EndedError, that too where
        `limit` seconds were not enough.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            pickle.dump((function, arguments), stdin)
            stdin.flush()
            wait = max(0.0, limit) if limit < float("inf") else None
            if not select.select([stdout], [], [], wait)[0]:
                self.end()
                raise EndedError(f"it took longer than {limit:.0f} s")
            good, result = pickle.load(stdout)
        except (EOFError, BrokenPipeError):
            raise EndedError(f"its process ended: {self._last_words()}") from None
        if not good:
            raise FailedError(result)
        return result

    def ready(self, device: torch.device) -> None:
        """Wait until all is imported, and the device set up. One that ends at it says so when it is asked."""
        with contextlib.suppress(EndedError, FailedError):
            self.ask(touch, device)

    def kill(self) -> None:
        """Bring it to its end, and with it those that it started; who waits for an answer gets EndedError."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """The same, for good; may be called again."""
        if self._said.closed:
            return
        self.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._said):
            assert file is not None
            with contextlib.suppress(BrokenPipeError):
                file.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        self._said.seek(0)
        return last_line(self._said.read().decode(errors="replace")) + f" (exit status {status})"


def touch(device: torch.device) -> None:
    """What comes with a process's first tensor on a device: on a GPU a second and more."""
    torch.zeros(1, device=device)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "without a message"


def reason(failure: Exception) -> str:
    """What a failure says, in one line."""
    if isinstance(failure, torch.OutOfMemoryError):
        return "out of memory"
    text = str(failure) if isinstance(failure, ZooError) else f"{type(failure).__name__}: {failure}"
    return " ".join(text.split())[:300]


def serve() -> None:
    """What such a process does, until nobody can ask any more. Whatever a library prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from torch._inductor import config

    import zoo.bench.ops  # noqa: F401  # all that will be asked for
    from zoo.bench.ops_peers import load

    config.compile_threads = THREADS
    for op in sys.argv[1:]:
        load(op)
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = True, function(*arguments)
        except Exception as failure:  # whatever a library raises, it is told
            reply = False, reason(failure)
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    serve()
