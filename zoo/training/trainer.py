"""What a run computes on, and Lightning's trainer for it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from zoo.errors import ZooError
from zoo.training.checkpoint import CheckpointFile
from zoo.training.config import Config, Hardware


@dataclass(frozen=True)
class Place:
    """This process among those that share the run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def find_place(hardware: Hardware) -> Place:
    """Raises ZooError where the configuration names what is not here."""
    gpu = hardware.accelerator == "gpu"
    if gpu and not torch.cuda.is_available():
        raise ZooError("trainer.accelerator=gpu, and torch finds no CUDA GPU here; allowed: trainer=cpu")
    if gpu and hardware.precision == "bf16-mixed" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ZooError(f"{torch.cuda.get_device_name()} has no bf16; allowed: trainer.precision=32-true")
    if gpu and hardware.compile and importlib.util.find_spec("triton") is None:
        raise ZooError("trainer.compile=true generates code for Triton, which is not installed; allowed: "
                       "trainer.compile=false")
    launched = TorchElasticEnvironment.detect()
    if hardware.strategy == "single":
        if (hardware.devices or 1) > 1 or (launched and TorchElasticEnvironment().world_size() > 1):
            raise ZooError("trainer.strategy=single is one process; allowed for more: torchrun ... trainer=ddp or fsdp")
        return Place(torch.device("cuda", 0) if gpu else torch.device("cpu"))
    if not launched:
        raise ZooError(f"trainer.strategy={hardware.strategy} is started by torchrun: "
                       f"torchrun --nproc-per-node {hardware.devices or 'N'} train.py ...")
    environment = TorchElasticEnvironment()
    world, local = environment.world_size(), environment.local_rank()
    local_world = int(os.environ["LOCAL_WORLD_SIZE"])  # torchrun's word; Lightning has no name for this one
    if hardware.devices not in (None, world):
        raise ZooError(f"trainer.devices={hardware.devices}, and torchrun started {world}; allowed: {world}, or null")
    if gpu and local_world > torch.cuda.device_count():
        raise ZooError(f"torchrun started {local_world} processes here, for {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    return Place(device, environment.global_rank(), world, local_world)


def make_trainer(run: Config, place: Place, out: Path, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """Lightning's trainer with all that we do ourselves turned off: its validation counts batches, its checkpoints are
    written elsewhere and moved, its bar counts micro-batches, and it would guess a cluster from the machine."""
    strategy: Strategy | str = "auto"
    environment: ClusterEnvironment = LightningEnvironment()
    if run.trainer.strategy != "single":
        environment = TorchElasticEnvironment()
        strategy = DDPStrategy(gradient_as_bucket_view=True) if run.trainer.strategy == "ddp" else \
            ModelParallelStrategy(place.world_size, 1, save_distributed_checkpoint=False)
    plugins: list[Any] = [CheckpointFile(), environment]
    return Trainer(
        accelerator="cuda" if run.trainer.accelerator == "gpu" else "cpu",
        devices=place.local_world_size,
        num_nodes=place.world_size // place.local_world_size,
        strategy=strategy,
        precision=run.trainer.precision,
        plugins=plugins,
        max_steps=run.steps,
        max_epochs=-1,  # with a finite number Lightning drops what it knows of the loader on resume
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=loggers or False,
        callbacks=callbacks,
        default_root_dir=out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
