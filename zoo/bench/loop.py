"""What the training loop costs beside its arithmetic: `python -m zoo.bench.loop rwkv transformer`.

The same model, batch size and compiled code twice in one process: in the bare loop of `zoo bench train`, and in a whole
run of `zoo.training.run.train`, with its data, hooks, metrics and log. No validation, samples or saves are timed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.bench.timing import synchronize
from zoo.bench.train import Step, zoo_side
from zoo.training.metrics import read_rows
from zoo.training.run import train

LOG_EVERY = 10  # steps, as in the experiments


def run_config(model: str, size: str, seq_len: int, batch_tokens: int, steps: int, gpu: bool,
               out: Path) -> dict[str, Any]:
    """A run of so many steps on the standard library's source, as trainer=gpu or trainer=cpu has it."""
    hardware = {"accelerator": "gpu", "precision": "bf16-mixed", "compile": True} if gpu else {}
    often = dict.fromkeys(("validate_every", "save_every", "sample_every"), steps)
    names = {"model": model, "size": size, "data": "stdlib", "tokenizer": "bytes", "schedule": "wsd"}
    return {key: {"name": name} for key, name in names.items()} | often | {
        "trainer": hardware, "steps": steps, "seq_len": seq_len, "batch_tokens": batch_tokens, "log_every": LOG_EVERY,
        "sample_tokens": 0, "out": str(out)}


def bare(model: str, size: str, seq_len: int, batch_tokens: int, steps: int, device: torch.device) -> list[float]:
    """Seconds a step of the bare loop, of each LOG_EVERY steps."""
    tokens = torch.randint(256, (batch_tokens // seq_len, seq_len + 1)).to(device)
    step, found = Step(zoo_side(model, size, seq_len, device, compiled=device.type == "cuda"), tokens), []
    for _ in range(LOG_EVERY):
        step()
    for _ in range(steps // LOG_EVERY - 1):
        synchronize(device)
        before = time.perf_counter()
        for _ in range(LOG_EVERY):
            step()
        synchronize(device)
        found.append((time.perf_counter() - before) / LOG_EVERY)
    return found


def whole(model: str, size: str, seq_len: int, batch_tokens: int, steps: int, device: torch.device) -> list[float]:
    """Seconds a step of a run, of each LOG_EVERY steps: by its own clock, without the first and the last of them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(run_config(model, size, seq_len, batch_tokens, steps, device.type == "cuda", out))
        seconds = [float(row["seconds"]) for row in read_rows(out / "metrics.csv")]
    return list(np.diff(seconds) / LOG_EVERY)


def main(names: list[str], size: str = "small", seq_len: int = 1024, batch_tokens: int = 65536,
         steps: int = 100) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        shape = name, size, seq_len, batch_tokens, steps, device
        before, run, after = bare(*shape), whole(*shape), bare(*shape)
        loop, alone = float(np.median(run)), float(np.median(before + after))
        print(f"{name} {size}, T={seq_len}, {batch_tokens} tokens a step: bare {alone * 1e3:.2f} ms a step "
              f"({np.median(before) * 1e3:.2f} before, {np.median(after) * 1e3:.2f} after), run {loop * 1e3:.2f} ms: "
              f"{loop / alone - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
