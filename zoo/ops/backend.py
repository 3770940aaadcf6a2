"""Which implementation an op runs on: its Triton kernels or its eager reference, and why.

`auto` takes the kernels where they can run and have passed their self-test, and says so once where a GPU has to do
without; `triton` takes them or raises; `eager` never does.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import ZooError, choose
from zoo.files import replace

Backend = Literal["auto", "triton", "eager"]
BACKENDS = ("auto", "triton", "eager")
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)  # bf16 products, and as much shared memory as the tiles take

_asked: Backend = "auto"
_decisions: dict[tuple[str, Backend, torch.device, torch.dtype, tuple[int, ...]], str] = {}
_log = logging.getLogger("zoo")


def set_backend(backend: str) -> None:
    """Choose for all ops, from now on: "auto", "triton" or "eager"."""
    global _asked
    choose("backend", backend, BACKENDS)
    _asked = backend  # type: ignore[assignment]


def get_backend() -> Backend:
    return _asked


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """`set_backend` for the length of a `with` block."""
    before = get_backend()
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def forget_decisions() -> None:
    """Ask anew where an op is called next, so that `decisions` are those from now on. Self-tests are not run again."""
    _decisions.clear()


def self_test_file() -> Path | None:
    """Where results of self-tests are kept, beside Triton's compiled kernels; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return Path(triton.knobs.cache.dir) / "zoo-self-tests.json"


def decisions() -> list[str]:
    """What was decided so far, a line for each op, device, dtype and sizes: "wkv6 cuda:0 bfloat16 64x64: triton"."""
    return [f"{op} {device} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, sizes))}: {reason or 'triton'}"
            for (op, _, device, dtype, sizes), reason in _decisions.items()]


@dataclass(frozen=True)
class Kernel:
    """What is known of an op's kernels before they are imported, and how they are tried.

    self_test(device, dtype, sizes) runs op and reference on a small problem, forward and backward, and returns the
    largest error as a multiple of what is allowed: above 1 the combination is refused.
    """

    op: str
    self_test: Callable[[torch.device, torch.dtype, tuple[int, ...]], float]
    least: int = 1  # of every size: head widths, as a rule
    most: int = 256
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    sources: tuple[str, ...] = field(default=())  # files of zoo/kernels beside its own that a new self-test goes with
    file: str = ""  # its own in zoo/kernels, if not named like the op
    sized: str = "head sizes"  # what `sizes` are

    def __post_init__(self) -> None:
        _kernels[self.op] = self

    def chosen(self, x: Tensor, *sizes: int) -> bool:
        """Whether the kernels run on tensors like x with these head sizes. Raises ZooError under `triton` if not."""
        return not _refusal(self.op, _asked, x.device, x.dtype, sizes)


_kernels: dict[str, Kernel] = {}
_answer: Callable[[str, torch.dtype, tuple[int, ...]], str] | None = None
_wait: Callable[[], object] = bool  # for other processes, before a self-test is run in this one


@contextlib.contextmanager
def answering(answer: Callable[[str, torch.dtype, tuple[int, ...]], str]) -> Iterator[None]:
    """Within the block answer(op, dtype, sizes) alone says why an op's kernels are not taken, "" if they are."""
    global _answer
    before, _answer = _answer, answer
    try:
        yield
    finally:
        _answer = before


def wait_before_testing(wait: Callable[[], object]) -> None:
    """Call it where a self-test's result is not known, before the test is run here: others may be at it."""
    global _wait
    _wait = wait


def refusal(op: str, asked: Backend, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """Why an op's kernels are not taken, "" if they are. Raises ZooError under `triton` if not."""
    return _refusal(op, asked, device, dtype, sizes)


def _refusal(op: str, asked: Backend, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """Why the kernels are not taken, "" if they are."""
    if _answer is not None:
        return _answer(op, dtype, sizes)
    key = op, asked, device, dtype, sizes
    if key not in _decisions:
        kernel = _kernels[op]
        reason = "asked for eager" if asked == "eager" else _unable(kernel, asked, device, dtype, sizes)
        if reason and asked == "triton":
            raise ZooError(f"backend=triton cannot run {op}: {reason}; allowed: backend=auto or eager")
        _decisions[key] = f"eager ({reason})" if reason else ""
        say = _log.warning if reason and asked == "auto" and device.type == "cuda" else _log.info
        say("%s", decisions()[-1])
    return _decisions[key]


# torch.compile asks once, outside its graph. torch.compiler.assume_constant_result sets this mark too, but imports the
# compiler to do it, a second's work for who never compiles.
_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unable(kernel: Kernel, asked: Backend, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and asked == "triton" and _interpreted()):
        return f"the tensors are on {device.type}, and the kernels want a GPU"
    if dtype not in kernel.dtypes:
        names = ", ".join(str(each).removeprefix("torch.") for each in kernel.dtypes)
        return f"{str(dtype).removeprefix('torch.')} tensors; the kernels take {names}"
    if any(not kernel.least <= size <= kernel.most for size in sizes):
        return f"{kernel.sized} {', '.join(map(str, sizes))}; the kernels take {kernel.least} to {kernel.most}"
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__}; the kernels want {'.'.join(map(str, OLDEST_TRITON))} or later"
    if device.type == "cpu":
        return ""  # Triton's interpreter, for tests of the kernels themselves
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        return f"a GPU of compute capability {'.'.join(map(str, capability))}; the kernels want 8.0 or later"
    error = _tested(kernel, device, dtype, sizes)
    return "" if error <= 1 else (
        f"its self-test failed on {torch.cuda.get_device_name(device)} with triton {triton.__version__}: "
        f"{error:.3g} times the allowed error")


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _tested(kernel: Kernel, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """The self-test's result, from the file beside Triton's compiled kernels if it was run before."""
    import triton

    path = self_test_file()
    assert path is not None
    folder = Path(__file__).parent.parent / "kernels"
    sources = kernel.file or kernel.op, "_common", *kernel.sources
    code = b"".join((folder / f"{name}.py").read_bytes() for name in sources)
    key = " ".join([kernel.op, str(dtype), "x".join(map(str, sizes)), torch.cuda.get_device_name(device),
                    torch.__version__, triton.__version__, hashlib.sha256(code).hexdigest()[:16]])
    known = _results(path).get(key)
    if not isinstance(known, float):
        _wait()
        known = _results(path).get(key)
    if not isinstance(known, float):
        # the random state is the caller's, and a self-test may run in the middle of its training
        decided = dict(_decisions)
        with torch.random.fork_rng([device]), torch.inference_mode(False), torch.enable_grad(), \
                torch.autocast("cuda", enabled=False):
            try:
                known = float(kernel.self_test(device, dtype, sizes))
            except Exception as failure:  # too much shared memory for this GPU, say; a build that Triton cannot make
                known = float("inf")
                _log.warning("the self-test of %s did not run: %s", kernel.op, " ".join(str(failure).split())[:200])
        _decisions.clear()
        _decisions.update(decided)  # without what the test asked for itself
        known = known if known == known else float("inf")
        with contextlib.suppress(OSError):  # a cache that cannot be written is a test run again
            _keep(path, key, known)
    return known


def _keep(path: Path, key: str, error: float) -> None:
    """Add a result to the file, to which other processes may be adding theirs."""
    import fcntl  # where there are kernels there is Linux

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        replace(path, json.dumps(_results(path) | {key: error}, indent=1).encode())


def _results(path: Path) -> dict[str, float]:
    """The self-tests' results so far, none from a file that is missing or damaged."""
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
