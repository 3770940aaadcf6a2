"""Training runs as a report reads them: folders into plain values, or the reason why one cannot be used."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.model import ModelConfig
from zoo.pretrained import read_json
from zoo.revision import shown_command
from zoo.training.config import Config
from zoo.training.metrics import read_rows

NUMBERS = ("step", "tokens", "seconds", "validation_bits_per_byte", "parameters", "training_flops_per_token")
NOT_RUNS = {"checkpoints", "model", "wandb", "tensorboard"}  # folders inside a run, where no run is looked for


@dataclass(frozen=True)
class Point:
    """A validation: what had been seen and spent by then, and bits per byte."""

    tokens: int
    seconds: float
    bits: float


@dataclass(frozen=True)
class Run:
    """A finished run. Bits are per byte; `positions` are (tokens of context at most, mean nats a token) on validation;
    seconds are of training alone; flops of training, a token; peak_memory in bytes, None where it was not logged."""

    name: str
    config: Config
    model: ModelConfig
    tokenizer: dict[str, Any]
    data: dict[str, Any]
    evaluated: tuple[int, str]  # length of a window, precision
    validation: float
    test: float | None
    positions: tuple[tuple[int, float], ...]
    curve: tuple[Point, ...]
    tokens: int
    seconds: float
    parameters: int
    flops: int
    peak_memory: int | None
    baselines: tuple[float, float]  # bits per byte of byte frequencies, and of gzip -9
    about: dict[str, str] = field(default_factory=dict)  # command, commit, device

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def rate(self) -> float:
        return self.config.optim.lr

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Refusal:
    """A run that may not stand among the others, and why; figures as far as it has any."""

    name: str
    reasons: tuple[str, ...]
    architecture: str = "?"
    seed: int | None = None
    validation: float | None = None
    test: float | None = None


def find_runs(given: Sequence[Path]) -> dict[str, Path]:
    """The run folders among and below the given ones, by the shortest names that tell them apart.

    Raises ZooError for a folder that is not there, or in which nothing is a run.
    """
    found: dict[Path, None] = {}
    for root in given:
        if not root.is_dir():
            raise ZooError(f"no such folder: {root}")
        below = [Path(place) for place, _, files in _walk(root) if "run.json" in files]
        if not below:
            raise ZooError(f"{root} holds no run: no run.json in it or below; allowed: the folder of a run or a sweep")
        found |= dict.fromkeys(path.resolve() for path in below)
    return dict(zip(_short_names(list(found)), found, strict=True))


def _walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_RUNS and not name.startswith("."))
        yield place, folders, files


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes for all names to differ; of the jobs of a sweep, whose folders
    are named by what they set, only what not all of them set."""
    for parts in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            words = [name.split(",") for name in names]
            differing = [",".join(word for word in mine if not all(word in other for other in words)) for mine in words]
            return differing if len(set(differing)) == len(names) and all(differing) else names
    return [str(path) for path in paths]


def read_run(name: str, folder: Path) -> Run | Refusal:
    """A run's records, or why it is none to compare: unfinished, damaged, or of a version that kept less."""
    try:
        config = Config.from_dict(read_json(folder / "config.json"))
    except ZooError as error:
        return Refusal(name, (str(error),))
    try:
        return _read_finished(name, folder, config)
    except ZooError as error:
        bits = [point.bits for point in read_curve(folder)]
        return Refusal(name, (str(error),), config.model["name"], config.seed, bits[-1] if bits else None)


def _read_finished(name: str, folder: Path, config: Config) -> Run:
    curve = read_curve(folder)
    if not (folder / "model" / "card.json").is_file():
        done = max((int(row["step"]) for row in read_rows(folder / "metrics.csv")), default=0)
        raise ZooError(f"unfinished: at step {done} of {config.steps}; the same command with resume=auto goes on")
    card, saved, about = (read_json(folder / path) for path in ("model/card.json", "model/config.json", "run.json"))
    if card.get("step") != config.steps:
        raise ZooError(f"unfinished: its model is of step {card.get('step')}, of {config.steps}; the same command with "
                       "resume=auto goes on")
    missing = [key for key in (*NUMBERS, "evaluation", "data") if key not in card]
    if missing:
        raise ZooError(f"its card has no {', '.join(missing)}: made by an earlier version; the same command with "
                       "resume=auto adds what is missing")
    try:
        if not all(_is_number(card[key]) for key in NUMBERS) or card["seconds"] <= 0:
            raise ValueError
        evaluation, positions = card["evaluation"], card["evaluation"]["validation"]["positions"]
        test = card["test_bits_per_byte"]
        if test is not None and not _is_number(test):
            raise ValueError
        return Run(
            name=name, config=config, model=ModelConfig.from_dict(saved["model"]), tokenizer=dict(saved["tokenizer"]),
            data={"name": str(card["data"]["name"]), "fingerprint": str(card["data"]["fingerprint"])},
            evaluated=(int(evaluation["seq_len"]), str(evaluation["precision"])),
            validation=float(card["validation_bits_per_byte"]), test=None if test is None else float(test),
            positions=tuple((int(upto), float(nats))
                            for upto, nats in zip(positions["upto"], positions["nats"], strict=True)),
            curve=_to_the_end(curve, card), tokens=int(card["tokens"]), seconds=float(card["seconds"]),
            parameters=int(card["parameters"]), flops=int(card["training_flops_per_token"]),
            peak_memory=None if card.get("peak_memory") is None else int(card["peak_memory"]),
            baselines=(float(card["unigram_entropy"]), float(card["gzip_bits_per_byte"])),
            about={"command": shown_command(str(about.get("command"))), "commit": str(about.get("commit") or "unknown"),
                   "device": str(about.get("device"))
                   + (f" x {about['devices']}" if about.get("devices", 1) != 1 else "")})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, ZooError) else f"{type(error).__name__}: {error}"
        raise ZooError(f"its card.json or config.json is not what a run writes ({reason})") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _to_the_end(curve: list[Point], card: dict[str, Any]) -> tuple[Point, ...]:
    """With the last model's own figure, where a signal kept it out of the table."""
    if not curve or curve[-1].tokens != card["tokens"]:
        curve = [*curve, Point(int(card["tokens"]), float(card["seconds"]), float(card["validation_bits_per_byte"]))]
    return tuple(curve)


def read_curve(folder: Path) -> list[Point]:
    """The validations of a run; a row that is no row of numbers is left out."""
    points = []
    for row in read_rows(folder / "metrics.csv"):
        try:
            points.append(Point(int(row["tokens"]), float(row["seconds"]), float(row["validation_bits_per_byte"])))
        except ValueError:  # most rows have no validation
            continue
    return [point for point in points if math.isfinite(point.bits)]
