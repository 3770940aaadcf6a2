"""The start of a published model's run once more, by the recipe in its card, against the curve that was stored."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.data.load import load_data
from zoo.errors import ZooError, choose
from zoo.pretrained import find_device, find_saved, list_pretrained, read_json
from zoo.tokenizers import BPETokenizer
from zoo.training.config import Config
from zoo.training.hardware import device_name
from zoo.training.metrics import read_rows
from zoo.training.run import train

# What the losses of steps may differ by, in nats a token; docs/pretrained.md says what was measured for it.
LARGEST, ON_AVERAGE = 0.05, 0.01
AT_ONCE = 4096  # tokens that a CPU sees at a time in place of a GPU


@dataclass(frozen=True)
class Reproduction:
    """Losses of the steps that both have, as (step, stored, found): nats a token, of that step's batch."""

    losses: tuple[tuple[int, float, float], ...]
    stored_on: str
    found_on: str

    @property
    def largest(self) -> tuple[float, int]:
        """The largest difference, and its step."""
        return max((abs(found - stored), step) for step, stored, found in self.losses)

    @property
    def mean(self) -> float:
        """Of the differences without their signs."""
        return math.fsum(abs(found - stored) for _, stored, found in self.losses) / len(self.losses)

    @property
    def holds(self) -> bool:
        return self.largest[0] <= LARGEST and self.mean <= ON_AVERAGE

    def verdict(self) -> str:
        largest, step = self.largest
        return (f"{'reproduced' if self.holds else 'not reproduced'}: losses differ by {self.mean:.2g} nats a token on "
                f"average ({ON_AVERAGE:g} allowed) and by {largest:.2g} at most, at step {step} ({LARGEST:g} allowed)")


def reproduce(name: str | Path, steps: int = 200, *, data: str | None = None, out: str | Path | None = None,
              device: str = "auto", tell: Callable[[str], object] = print) -> Reproduction:
    """Train the first `steps` steps of a published model's run again, on its whole schedule, and compare the losses.

    data: where the text lies on this machine, as data.path. out: a new folder for the run, None for one that is
    removed. device: cpu, cuda, or auto, which is what the model was trained on where there is one. A GPU trains as the
    card says; a CPU in place of one in float32, without compiling, in small micro-batches. `tell` hears what is done.
    Raises ZooError for what is no published model, more steps than its run or fewer than the first that was logged,
    other text, and dropout on another kind of device, where it draws other numbers.
    """
    folder = find_saved(name)
    card, stored = read_json(folder / "card.json"), read_rows(folder / "curve.csv")
    if not stored or "training" not in card:
        raise ZooError(f"{folder} has no curve.csv with a recipe in its card, to be compared with; allowed: "
                       f"{', '.join(list_pretrained()) or 'a published model, of which this copy has none'}")
    choose("device", device, ("auto", "cpu", "cuda"))
    with _folder(out) as place:
        try:
            where = find_device("cpu" if device == "auto" and _accelerator(card) == "cpu" else device)
            config = _config(card, folder, data, place, where.type)
            fingerprint = card["data"]["fingerprint"]
            there = f"{card['device']}, {card['training']['trainer']['precision']}"
        except (KeyError, TypeError, AttributeError) as error:
            raise ZooError(f"{folder / 'card.json'} is not what `zoo export --publish` writes ({error!r})") from None
        run = Config.from_dict(config)
        logged = {int(row["step"]): float(row["loss"]) for row in stored}
        if not min(logged) <= steps <= run.steps:
            raise ZooError(f"steps={steps} is not allowed: {min(logged)}, the first that was logged, to {run.steps}")
        if load_data(config).fingerprint != fingerprint:
            raise ZooError(f"data={run.data['name']} at {data} is not what {folder.name} was trained on")
        here = f"{device_name(where)}, {run.trainer.precision}"
        tell(f"{folder.name}: steps 1 to {steps} of {run.steps}, trained on {there}"
             + ("" if here == there else f"; here on {here}, which rounds otherwise"))
        train(config, stop_at=steps)
        found = {int(row["step"]): float(row["loss"]) for row in read_rows(Path(place) / "metrics.csv")}
    return Reproduction(tuple((step, loss, found[step]) for step, loss in logged.items() if step <= steps), there, here)


def _accelerator(card: dict[str, Any]) -> Any:
    return card["training"]["trainer"]["accelerator"]


def _folder(out: str | Path | None) -> AbstractContextManager[str]:
    return nullcontext(str(out)) if out is not None else tempfile.TemporaryDirectory(prefix="zoo-reproduce-")


def _config(card: dict[str, Any], folder: Path, path: str | None, out: str, kind: str) -> dict[str, Any]:
    """The run's configuration with this machine's places, and nothing measured, shown or saved on the way."""
    recipe = card["training"]
    trainer = recipe["trainer"] | {"accelerator": "gpu" if kind == "cuda" else "cpu", "strategy": "single",
                                   "devices": None}
    if kind == "cpu" and _accelerator(card) == "gpu":
        if recipe["dropout"]:
            raise ZooError(f"{folder.name} was trained on a GPU with dropout={recipe['dropout']}, which draws other "
                           "numbers on a CPU; allowed: device=cuda, on a machine that has one")
        trainer |= {"precision": "32-true", "compile": False,
                    "micro_batch": max(1, AT_ONCE // recipe["seq_len"]) * recipe["seq_len"]}
    elif trainer["micro_batch"] is None and card.get("devices", 1) > 1:  # as much at a time as one of several had
        trainer["micro_batch"] = recipe["batch_tokens"] // card["devices"]
    never = dict.fromkeys(("validate_every", "save_every", "sample_every"), recipe["steps"])
    places: dict[str, Any] = {"data": recipe["data"] | ({} if path is None else {"path": path}), "out": out}
    if recipe["tokenizer"]["name"] == BPETokenizer.kind:
        places["tokenizer"] = recipe["tokenizer"] | {"path": str(folder / BPETokenizer.file)}
    return recipe | never | places | {
        "trainer": trainer, "logger": {"name": "csv"}, "debug": recipe["debug"] | {"profile": 0}, "sample_tokens": 0,
        "backend": "auto" if kind == "cpu" else recipe["backend"]}
