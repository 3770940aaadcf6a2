"""A saved model out of a training run, finished or not; and a published one out of a finished run."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo.data.load import load_data
from zoo.data.windows import num_evaluation_windows
from zoo.errors import ZooError, choose
from zoo.evaluate import evaluate
from zoo.files import replace
from zoo.model import LanguageModel
from zoo.pretrained import NAME, load_pretrained, read_json, save_pretrained
from zoo.revision import shown_command
from zoo.tokenizers import ByteTokenizer, Tokenizer
from zoo.training import checkpoint as files
from zoo.training.config import recipe

MAX_BYTES = 16 << 20  # of a published model's weights
SLICE = 32  # windows from the beginning of the validation split: seconds on a CPU
COLUMNS = ("name", "model", "size", "parameters", "data", "tokens", "learning_rate", "seed",
           "validation_bits_per_byte", "test_bits_per_byte", "slice_bits_per_byte", "training_flops_per_token",
           "seconds", "device", "dtype", "bytes", "commit")


def export_run(run: str | Path, out: str | Path, *, which: str = "last", dtype: torch.dtype | None = None,
               complain: Callable[[str], None] = print) -> Path:
    """Save the model of a run's checkpoint as a folder that `zoo.load_pretrained` reads; returns that folder.

    which: "last", the newest checkpoint that is whole (`complain` is told of those that are not), or "best" by
    validation. Raises ZooError where there is no such checkpoint, or `out` cannot be written.
    """
    return save_pretrained(out, *read_run(run, which=which, complain=complain), dtype=dtype)


def read_run(run: str | Path, *, which: str,
             complain: Callable[[str], None]) -> tuple[LanguageModel, Tokenizer, dict[str, Any]]:
    """The model of a run's checkpoint, its tokenizer, and a card of what the run has done so far."""
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
    return files.restore_model(saved), _tokenizer(training, about["data"]), card


def publish_run(run: str | Path, out: str | Path, *, limits: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a finished run's model as a published one, and renew results.csv beside it; returns its folder.

    The card is the run's own, its command without the places of one machine, with `limits` (what the architecture
    cannot do, in plain words), and with `slice`: bits per byte of the first windows of the validation split, in
    float32, of the weights as they are stored, by which a test knows them again. curve.csv is the run's metrics.
    Raises ZooError for a name that is not <model>.<tag>, a run that is not finished or whose text is no longer there,
    and weights of more than 16 MB.
    """
    folder, out = Path(run), Path(out)
    if not NAME.fullmatch(out.name):
        raise ZooError(f"{out.name!r} is no name of a published model; allowed: MODEL.TAG, as in rwkv.novels-6m")
    if not limits.strip():
        raise ZooError("limits: a published model says what its architecture cannot do, in plain words")
    model, training = load_pretrained(folder), read_json(folder / "config.json")
    if model.card.get("step") != training["steps"] or "evaluation" not in model.card:
        raise ZooError(f"{folder} is not finished: its model is of step {model.card.get('step')}, "
                       f"of {training['steps']}")
    if out.name.partition(".")[0] != model.config.model:
        raise ZooError(f"{folder} is a {model.config.model}, not what {out.name!r} says")
    size = sum(value.numel() for value in model.state_dict().values()) * dtype.itemsize
    if size > MAX_BYTES:
        raise ZooError(f"weights of {size} bytes are more than the {MAX_BYTES} of a published model")
    data = load_data(training)
    if data.fingerprint != model.card["data"]["fingerprint"]:
        raise ZooError(f"data={training['data']['name']} is not what {folder} was trained on")
    model.to(dtype).float()
    windows = min(SLICE, num_evaluation_windows(len(data.validation), model.config.seq_len))
    found = evaluate(model, data, windows=windows)
    card = model.card | {"command": shown_command(str(model.card["command"])), "limits": limits.strip(), "slice": {
        "split": "validation", "windows": windows, "seq_len": model.config.seq_len,
        "bits_per_byte": found.bits_per_byte}}
    try:
        curve = (folder / "metrics.csv").read_bytes()
    except OSError as error:
        raise ZooError(f"cannot read {folder / 'metrics.csv'}: {error.strerror}") from None
    save_pretrained(out, model, model.tokenizer, card, dtype=dtype, curve=curve)
    write_results(out.parent)
    return out


def write_results(root: Path) -> Path:
    """results.csv over all published models in a folder, the best on validation first; returns it."""
    rows = []
    for folder in root.iterdir():
        if not NAME.fullmatch(folder.name) or not (folder / "config.json").is_file():
            continue
        config, card = read_json(folder / "config.json"), read_json(folder / "card.json")
        training, weights = card["training"], config["weights"]
        rows.append({key: card.get(key) for key in COLUMNS} | {
            "name": folder.name, "model": config["model"]["model"], "size": training["size"]["name"],
            "data": card["data"]["name"], "learning_rate": training["optim"]["lr"], "seed": training["seed"],
            "slice_bits_per_byte": card["slice"]["bits_per_byte"], "dtype": weights["dtype"],
            "bytes": weights["bytes"]})
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(rows, key=lambda row: (row["validation_bits_per_byte"], row["name"])))
    replace(root / "results.csv", text.getvalue().encode())
    return root / "results.csv"


def _tokenizer(training: dict[str, Any], fingerprint: str) -> Tokenizer:
    """The tokenizer that a run was trained with, known to be the same by the data's fingerprint."""
    if training["tokenizer"]["name"] == ByteTokenizer.kind:
        return ByteTokenizer()
    data = load_data(training)
    if data.fingerprint != fingerprint:
        raise ZooError(f"data={training['data']['name']} is not what the run was trained on: no tokenizer for it")
    return data.tokenizer
