"""A saved model out of a training run, finished or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo.data.load import load_data
from zoo.errors import ZooError, choose
from zoo.pretrained import read_json, save_pretrained
from zoo.tokenizers import ByteTokenizer, Tokenizer
from zoo.training import checkpoint as files
from zoo.training.config import recipe


def export_run(run: str | Path, out: str | Path, *, which: str = "last", dtype: torch.dtype | None = None,
               complain: Callable[[str], None] = print) -> Path:
    """Save the model of a run's checkpoint as a folder that `zoo.load_pretrained` reads; returns that folder.

    which: "last", the newest checkpoint that is whole (`complain` is told of those that are not), or "best" by
    validation. Raises ZooError where there is no such checkpoint, or `out` cannot be written.
    """
    folder = Path(run)
    choose("checkpoint", which, ("best", "last"))
    if not folder.is_dir():
        raise ZooError(f"no such folder: {folder}")
    path = folder / "checkpoints" / files.BEST
    if which == "last":
        newest = files.newest_good(path.parent, complain)
        if newest is None:
            raise ZooError(f"{folder} is no run's folder, or has saved nothing yet: no checkpoint in {path.parent}")
        path = newest
    saved = files.load(path)
    about, monitor = saved["zoo"], saved["callbacks"]["monitor"]
    training = about["config"]
    card: dict[str, Any] = {
        "data": {"name": training["data"]["name"], "fingerprint": about["data"]},
        "step": about["step"], "steps": training["steps"], "tokens": about["step"] * training["batch_tokens"],
        "seconds": round(monitor["seconds"], 3), "training": recipe(training),
    }
    if monitor["validation"].get("step") == about["step"]:
        card["validation_bits_per_byte"] = monitor["validation"]["bits_per_byte"]
    if (folder / "run.json").is_file():
        facts = read_json(folder / "run.json")
        card |= {key: facts[key] for key in ("command", "commit", "versions", "device", "devices") if key in facts}
    return save_pretrained(out, files.restore_model(saved), _tokenizer(training, about["data"]), card, dtype=dtype)


def _tokenizer(training: dict[str, Any], fingerprint: str) -> Tokenizer:
    """The tokenizer that a run was trained with, known to be the same by the data's fingerprint."""
    if training["tokenizer"]["name"] == ByteTokenizer.kind:
        return ByteTokenizer()
    data = load_data(training)
    if data.fingerprint != fingerprint:
        raise ZooError(f"data={training['data']['name']} is not what the run was trained on: no tokenizer for it")
    return data.tokenizer
