"""A model for `transformers`, out of a run or of what is saved already; into a folder or up to the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from zoo.errors import choose
from zoo.hf.folder import save_hf
from zoo.hf.hub import parse, push_to_hub
from zoo.pretrained import DTYPES, find_saved, load_pretrained, read_config
from zoo.revision import shown_command


def export_hf(source: str | Path, out: str | Path, *, which: str = "last", dtype: torch.dtype | None = None,
              complain: Callable[[str], None] = print) -> Path:
    """Save a model as a folder for `transformers`, which `zoo.load_pretrained` reads, too; returns that folder.

    source: a published name, a saved model's folder, or a run's folder, finished or not; `which` is of runs alone.
    dtype: what weights are stored as, None: what they are now. The card's command loses the places of one machine.
    Raises ZooError for what is no model, and where `out` cannot be written.
    """
    folder = Path(source)
    choose("checkpoint", which, ("best", "last"))
    if (folder / "checkpoints").is_dir() and (which == "best" or not (folder / "model").is_dir()):
        from zoo.export import read_run  # and with it Lightning, which a saved model does without

        model, tokenizer, card = read_run(folder, which=which, complain=complain)
    else:
        saved = find_saved(source)
        loaded = load_pretrained(saved)
        model, tokenizer, card = loaded, loaded.tokenizer, loaded.card
        dtype = dtype or DTYPES[read_config(saved)[0]["weights"]["dtype"]]
    if "command" in card:
        card = card | {"command": shown_command(str(card["command"]))}
    return save_hf(out, model, tokenizer, card, name=folder.resolve().name, dtype=dtype)


def upload(source: str | Path, address: str, *, private: bool = True, which: str = "last",
           dtype: torch.dtype | None = None, complain: Callable[[str], None] = print) -> str:
    """`export_hf` and `zoo.push_to_hub` in one: a model to "hf://owner/name"; returns its page."""
    parse(address)  # before anything is read for it
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_hf(source, Path(scratch) / "model", which=which, dtype=dtype, complain=complain)
        return push_to_hub(folder, address, private=private)
