"""A model's kernels, built and tested by processes of their own while its run still imports what it needs.

On a machine that has none yet, the self-tests of half a dozen ops compile some dozens of kernels, and training as many
again: half a minute, one after the other, and next to nothing where they are compiled. What the processes find and
build lies where the run looks first: in the file of self-tests, in Triton's cache.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `begin` is called before torch is imported, whose seconds it uses
    import torch

    from zoo.model import ModelConfig
    from zoo.training.config import Config

ALONE = """
import json, sys
sys.path[:], config = json.loads(sys.argv[1])
from zoo.training import ahead
ahead.main(config)
"""
LONGEST = 120  # seconds that a run waits
_process: subprocess.Popen[bytes] | None = None


def begin(config: Mapping[str, Any]) -> None:
    """Start for a run that may want kernels on one GPU; does nothing for any other."""
    global _process
    hardware = config.get("trainer") or {}
    if hardware.get("accelerator") != "gpu" or hardware.get("strategy") != "single" or config.get("backend") == "eager":
        return
    end()
    _process = subprocess.Popen([sys.executable, "-c", ALONE, json.dumps([sys.path, config])],
                                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait() -> None:
    """Until all that was begun is done, however it ended: what was not found out, the run finds out by itself."""
    if _process is not None:
        try:
            _process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            end()


@atexit.register
def end() -> None:
    """Of the processes, where they still run."""
    if _process is not None:
        _process.terminate()
        _process.wait()


def main(config: Mapping[str, Any]) -> None:
    """In the process that was begun, which takes no part in CUDA: a process for each test, and one for the passes."""
    import multiprocessing
    import signal

    import torch

    from zoo.training.config import Config

    run = Config.from_dict(config)
    shapes = few_layers(run)
    if (mark := done_before(run, shapes)) is None or mark.exists():
        return
    torch.set_num_threads(1)  # threads that computed would not be there in a fork
    fork = multiprocessing.get_context("fork")
    work = [fork.Process(target=_test, args=each, daemon=True) for each in sorted(wanted(run, shapes), key=str)]
    work.append(fork.Process(target=_passes, args=(run, shapes), daemon=True))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # which ends the daemons
    for process in work:
        process.start()
    for process in work:
        process.join()
    if not any(process.exitcode for process in work):
        mark.touch()


def done_before(run: Config, shapes: ModelConfig) -> Path | None:
    """The file that says that nothing is left to do, beside what was done; None without Triton."""
    from zoo.ops.backend import self_test_file

    if (results := self_test_file()) is None:
        return None
    kernels = Path(__file__).parent.parent / "kernels"
    what = [shapes, run.seq_len, run.trainer.precision, version("torch"), version("triton"),
            *(path.read_bytes() for path in sorted(kernels.glob("*.py")))]
    return results.with_name(f"zoo-ahead-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}")


def few_layers(run: Config) -> ModelConfig:
    """The run's model as far as its kernels go: a first block, and one after it."""
    from dataclasses import replace

    return replace(run.model_config(run.tokenizer.get("vocab_size", 256)), layers=2)


def wanted(run: Config, shapes: ModelConfig) -> set[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Op, dtype and sizes of the kernels that training asks for, seen on a CPU that answers no to all of them."""
    import torch

    from zoo.model import LanguageModel
    from zoo.ops.backend import answering

    asked = set[tuple[str, torch.dtype, tuple[int, ...]]]()

    def note(op: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
        asked.add((op, dtype, sizes))
        return "only asked"

    tokens = torch.zeros(1, min(16, run.seq_len), dtype=torch.int64)
    with answering(note), torch.no_grad(), torch.autocast("cpu", enabled=run.trainer.precision == "bf16-mixed"):
        LanguageModel(shapes).loss(tokens, tokens)
    return asked


def _test(op: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    import torch

    from zoo.ops.backend import refusal

    refusal(op, "auto", torch.device("cuda", 0), dtype, sizes)


def _passes(run: Config, shapes: ModelConfig) -> None:
    """A pass forward and back on kernels that nobody has tested yet, for what it builds."""
    import torch

    from zoo.model import LanguageModel
    from zoo.ops.backend import answering

    model, tokens = LanguageModel(shapes).cuda(), torch.zeros(2, run.seq_len, dtype=torch.int64, device="cuda")
    with answering(lambda *_: ""), torch.autocast("cuda", torch.bfloat16, run.trainer.precision == "bf16-mixed"):
        model.loss(tokens, tokens, reduction="sum").backward()
    torch.cuda.synchronize()
