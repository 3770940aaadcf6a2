"""Tiny runs for the tests of training: seconds where a real one takes minutes, through the same code."""

from __future__ import annotations

import copy
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.model import LanguageModel
from zoo.training import checkpoint
from zoo.training.run import train

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the and of to in that was his with her for had not but which as at on have from by this you were all when"


def write_corpus(folder: Path) -> Path:
    """Two files of pseudo-English, for training and for validation."""
    random.seed(0)
    for name, words in (("train.txt", 4000), ("validation.txt", 400)):
        (folder / name).write_text(" ".join(random.choices(WORDS.split(), k=words)) + ".\n")
    return folder


def config(corpus: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run's configuration as `train` takes it; `changes` name keys with __ for dots."""
    values: dict[str, Any] = {
        "model": {"name": "transformer"},
        "size": {"name": "nano", "layers": 2, "dim": 32, "heads": 2},
        "data": {"name": "text", "path": str(corpus / "train.txt"), "validation_path": str(corpus / "validation.txt"),
                 "test_fraction": 0.0, "cache": str(corpus / "cache")},
        "tokenizer": {"name": "bytes"},
        "schedule": {"name": "cosine", "warmup": 0.2},
        "optim": {"lr": 3e-3},
        "steps": 12, "batch_tokens": 128, "seq_len": 32, "dropout": 0.1, "seed": 3, "log_every": 1,
        "validate_every": 6, "save_every": 4, "sample_every": 6, "sample_tokens": 8, "out": str(out),
    }
    for key, value in changes.items():
        *groups, last = key.split("__")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return copy.deepcopy(values)


def poison_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 5 on, a weight of block 1's channel mixer is infinite."""
    original = LanguageModel.set_step

    def set_step(self: LanguageModel, step: int) -> None:
        original(self, step)
        if step == 5:
            with torch.no_grad():
                self.blocks[1].channel_mixer.down.weight[3, 5] = math.inf

    monkeypatch.setattr(LanguageModel, "set_step", set_step)


def weights(out: Path, step: int) -> dict[str, Any]:
    """Everything in a checkpoint that decides how the run goes on: weights, optimiser, generators."""
    saved = checkpoint.load(checkpoint.step_file(out / "checkpoints", step))
    return {"weights": saved["state_dict"], "optimiser": saved["optimizer_states"], "rng": saved["zoo"]["rng"]}


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, tensors included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def words(corpus: Path, out: Path | None, **changes: Any) -> list[str]:
    """The same configuration as the words of a command line."""
    values = config(corpus, out or Path(), **changes)
    if out is None:
        del values["out"]
    given = [f"{group}={values[group].pop('name')}" for group in ("model", "size", "data", "schedule")]
    for key, value in values.items():
        for inner, single in value.items() if isinstance(value, dict) else [("", value)]:
            if inner != "name":
                given.append(f"{key}.{inner}={single}" if inner else f"{key}={single}")
    return given


def command(*words: str, **options: Any) -> subprocess.Popen[str]:
    """`python train.py ...` in a process of its own, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


__all__ = ["ROOT", "command", "config", "same", "train", "weights", "words", "write_corpus"]
