"""Several processes under torchrun: the same run as one process makes, under DDP, FSDP and one after the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, config, train, weights, write_corpus

from zoo.training.loggers import read_rows

# Model, and what its run begins under and goes on under. RWKV has a parameter group with a rate of its own.
RUNS = ("transformer", "ddp", "ddp"), ("transformer", "fsdp", "fsdp"), ("rwkv", "ddp", "fsdp"), ("rwkv", "fsdp", "ddp")
SCRIPT = f"""
import functools, sys
from pathlib import Path
import torch
from training_runs import config, train
torch.set_num_threads(1)
torch.compile = functools.partial(torch.compile, backend="eager")  # traced, without code that takes minutes
corpus, out = map(Path, sys.argv[1:])
for model, *strategies in {RUNS}:
    for strategy, steps, resume in zip(strategies, (6, 12), (None, "auto")):
        train(config(corpus, out / "-".join([model, *strategies]), model={{"name": model}}, dropout=0.0, steps=steps,
                     resume=resume, schedule={{"name": "wsd"}},
                     trainer={{"strategy": strategy, "micro_batch": 32, "compile": resume is not None}}))
"""


def test_distributed_is_the_same_run(tmp_path: Path) -> None:
    """Two processes, micro-batches and a resume, then compiled, against one process."""
    corpus = write_corpus(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "script.py"), str(corpus), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True, text=True, timeout=200)
    assert launched.returncode == 0, launched.stderr[-3000:]
    for model in ("transformer", "rwkv"):
        for steps, resume in ((6, None), (12, "auto")):
            train(config(corpus, tmp_path / model, model={"name": model}, dropout=0.0, steps=steps, resume=resume,
                         schedule={"name": "wsd"}))
    for model, *strategies in RUNS:
        out, alone = tmp_path / "-".join([model, *strategies]), tmp_path / model
        theirs = weights(out, 12)["weights"]
        for key, value in weights(alone, 12)["weights"].items():
            torch.testing.assert_close(theirs[key], value, rtol=2e-4, atol=2e-6, msg=f"{out.name}: {key}")
        for mine, row in zip(read_rows(alone / "metrics.csv"), read_rows(out / "metrics.csv"), strict=True):
            assert row["step"] == mine["step"]
            for key in ("loss", "validation_bits_per_byte"):
                assert (row[key] == "") == (mine[key] == "")
                assert not row[key] or float(row[key]) == pytest.approx(float(mine[key]), rel=1e-4)
