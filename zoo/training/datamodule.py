"""Batches as a pure function of (seed, step): no loader state to keep, and the same global batch whatever the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import LightningDataModule

from zoo.data.cache import TokenData
from zoo.data.windows import IGNORE, TrainingOrder, evaluation_batch, num_evaluation_windows, training_batch
from zoo.errors import ZooError
from zoo.training.config import Config
from zoo.training.module import Batch


class TokenDataModule(LightningDataModule):
    """A corpus cut into batches. Sharded here, since Lightning does not shard what it did not build.

    Raises ZooError for a text too short for seq_len, or rows that do not divide among the ranks.
    """

    def __init__(self, data: TokenData, config: Config, rank: int = 0, world_size: int = 1):
        super().__init__()
        self.data, self.config, self.rank, self.world_size = data, config, rank, world_size
        self.order = TrainingOrder(len(data.train), config.seq_len, config.seed)
        rows = config.batch_tokens // config.seq_len
        if rows % world_size:
            raise ZooError(f"batch_tokens={config.batch_tokens} is {rows} rows of seq_len={config.seq_len}, which do "
                           f"not divide among {world_size} devices")
        self.rows = rows // world_size
        micro = config.trainer.micro_batch
        self.rows_at_once = self.rows if micro is None else min(self.rows, micro // config.seq_len)
        num_evaluation_windows(len(data.validation), config.seq_len)

    def batch_of(self, step: int) -> Batch:
        """This rank's rows of a step: its part of the samples that follow those of the steps before."""
        first = 0 if self.config.debug.overfit else step * self.rows * self.world_size
        inputs, targets = training_batch(self.data.train, self.order, first + self.rank * self.rows, self.rows)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def train_dataloader(self) -> _Stream:
        return _Stream(self.batch_of, self.trainer.global_step if self.trainer else 0,
                       pin=self.config.trainer.accelerator == "gpu")

    def validation_batches(self) -> Iterator[Batch]:
        """This rank's share of the validation split, every target of which some rank sees once.

        All ranks get the same number of batches (sharded models compute together), the last of some without targets.
        """
        windows = num_evaluation_windows(len(self.data.validation), self.config.seq_len)
        batches = -(-windows // self.rows_at_once)
        for index in range(self.rank, -(-batches // self.world_size) * self.world_size, self.world_size):
            first = (index if index < batches else 0) * self.rows_at_once
            inputs, targets = evaluation_batch(self.data.validation, self.config.seq_len, first, self.rows_at_once,
                                               self.data.tokenizer.separator)
            if index >= batches:
                targets.fill(IGNORE)
            yield torch.from_numpy(inputs), torch.from_numpy(targets)


class _Stream:
    """Endless: how many steps there are is the trainer's affair."""

    def __init__(self, batch_of: Callable[[int], Batch], first_step: int, pin: bool):
        self.batch_of, self.first_step, self.pin = batch_of, first_step, pin

    def __iter__(self) -> Iterator[Batch]:
        step = self.first_step
        while True:
            inputs, targets = self.batch_of(step)
            yield (inputs.pin_memory(), targets.pin_memory()) if self.pin else (inputs, targets)
            step += 1
