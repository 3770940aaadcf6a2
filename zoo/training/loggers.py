"""Where metrics are written: metrics.csv always, TensorBoard or wandb by choice."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from zoo.errors import ZooError
from zoo.training.checkpoint import write_file
from zoo.training.config import Logging
from zoo.training.metrics import COLUMNS, read_rows


class CSVLogger(Logger):
    """One row a step in one file, which goes on after a resume. Lightning's own begins a new folder each time."""

    def __init__(self, file: Path, first_step: int):
        """Rows past `first_step`, of a process that got further than its last checkpoint, are removed."""
        super().__init__()
        self.file, self.first_step = file, first_step
        self.stream: io.TextIOBase | None = None

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> int:
        return 0

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.json has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        try:
            if self.stream is None:
                self._begin()
            assert self.stream is not None
            row = {"step": step, **metrics}
            self.stream.write(",".join(_cell(row.get(column)) for column in COLUMNS) + "\n")
            self.stream.flush()
        except OSError as error:
            raise ZooError(f"cannot write {self.file}: {error.strerror or error}") from None

    def _begin(self) -> None:
        rows = [row for row in read_rows(self.file) if int(row["step"]) <= self.first_step]
        lines = [",".join(COLUMNS), *(",".join(row[column] for column in COLUMNS) for row in rows)]
        write_file(self.file, ("\n".join(lines) + "\n").encode())
        self.stream = self.file.open("a", encoding="utf-8")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


def _cell(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.8g}"


def make_loggers(chosen: Logging, out: Path, first_step: int, run_id: str, config: dict[str, Any]) -> list[Logger]:
    """run_id: the same for a run and its resumptions, by which wandb knows them for one."""
    loggers: list[Logger] = [CSVLogger(out / "metrics.csv", first_step)]
    if chosen.name == "tensorboard":
        loggers.append(TensorBoardLogger(out, name="tensorboard", version="", purge_step=first_step + 1))
    elif chosen.name == "wandb":
        import wandb  # seconds, for those who asked for it

        try:
            # Begun here and not by Lightning, which would set WANDB_MODE for the rest of the process: a later job that
            # asks for online would stay offline without a word.
            begun = wandb.init(
                project=chosen.project, entity=chosen.entity, name=out.name, dir=out, id=run_id, mode=chosen.mode,
                # An offline run cannot resume; `wandb sync` joins its parts by their id.
                resume=None if chosen.mode == "offline" else "allow", config=config,
                settings=wandb.Settings(silent=True, console="off"))
        except wandb.errors.Error as error:  # no login, or no network
            reason = " ".join(str(error).split())
            raise ZooError(f"wandb: {reason}; allowed without it: logger.mode=offline") from None
        begun.define_metric("trainer/global_step")  # which Lightning logs beside each row
        begun.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        loggers.append(WandbLogger(save_dir=out, experiment=begun))
    return loggers


def finish_loggers(chosen: Logging) -> None:
    """Close what outlives a run, so that the next one of a sweep gets its own."""
    if chosen.name == "wandb":
        import wandb

        wandb.finish()
