"""One optimiser step as Lightning calls it: micro-batches, one global loss, clipping, AdamW, the schedule."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from zoo.model import LanguageModel
from zoo.training import finite
from zoo.training.capture import Captured
from zoo.training.checkpoint import FORMAT
from zoo.training.compiling import compile_in_place, compiled_loss
from zoo.training.config import Config

Batch = tuple[Tensor, Tensor]
"""A device's part of a batch: tokens [B, T] and targets [B, T], int64, -100 where there is no target."""


class TrainingModule(LightningModule):
    """A language model in training. A batch of Lightning's is one optimiser step.

    Lightning's own accumulation would average the means of micro-batches; here each micro-batch contributes its summed
    nats over the count of targets in the whole step, over all micro-batches and ranks, so that how a batch is split
    changes nothing but rounding.
    """

    def __init__(self, model: LanguageModel, config: Config, fingerprint: str, batch_of: Callable[[int], Batch]):
        """fingerprint: of the data, kept in checkpoints. batch_of: this rank's batch of a step, for a failed one."""
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.run = config
        self.fingerprint = fingerprint
        self.batch_of = batch_of
        self.schedule = config.lr_schedule()
        self.peak_rates: list[float] = []
        self.loss = self.grad_norm = torch.zeros(())  # of the last step, on its device
        self.lr = 0.0
        self.look_later = config.trainer.accelerator == "gpu"
        self.unchecked: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self.looked_at = math.nan, math.nan  # loss and gradient norm of the last step that was
        self.spoilt: Tensor | None = None  # whether a step so far was not finite
        self.restored_rng: list[dict[str, Any]] | None = None
        hardware, self.compiled, self.captured = config.trainer, None, None
        if hardware.compile and hardware.strategy == "fsdp":  # it gathers a block's weights outside of what is compiled
            compile_in_place(model)
        elif hardware.compile:
            self.compiled = compiled_loss(model)
            if hardware.accelerator == "gpu" and hardware.strategy == "single":
                parts = hardware.micro_batch is not None and hardware.micro_batch < config.batch_tokens
                self.captured = Captured(self._pass, list(model.parameters()), adds=parts)

    def configure_model(self) -> None:
        if self.run.trainer.strategy != "fsdp" or isinstance(self.model, FSDPModule):
            return
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        register_fsdp_forward_method(self.model, "loss")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.run.optim
        groups = self.model.parameter_groups(optim.lr, optim.weight_decay)
        self.peak_rates = [group["lr"] for group in groups]
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step, optimizer = self.global_step, cast(LightningOptimizer, self.optimizers())
        self.lr = self.run.optim.lr * self._set_rates(optimizer.param_groups, step)
        self.model.set_step(step)
        tokens, targets = batch
        count = self._sum((targets != -100).sum())
        rows = len(tokens) if self.run.trainer.micro_batch is None else self.run.trainer.micro_batch // self.run.seq_len
        parts = list(zip(tokens.split(rows), targets.split(rows), strict=True))
        nats, scale = torch.zeros((), device=tokens.device), self.trainer.world_size / count
        for index, part in enumerate(parts):
            with self._gradients_stay_here(index + 1 < len(parts)):
                nats += (self.captured or self._pass)(*part, scale)
        self.loss = self._sum(nats) / count
        self._update(optimizer, step)

    def _pass(self, tokens: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        """Forward and back: the nats of a micro-batch, whose gradients times `scale` are added to the parameters'.

        scale: of ranks, whose gradients are averaged, over the targets of the whole step.
        """
        nats = (self.compiled or self.model.loss)(tokens, targets, reduction="sum")
        self.manual_backward(nats * scale)
        return nats.detach()

    def _update(self, optimizer: LightningOptimizer, step: int) -> None:
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all shards
        if self.run.optim.clip is not None:
            clip_grads_with_norm_(self.model.parameters(), self.run.optim.clip, self.grad_norm)
        bad = ~(self.loss + self.grad_norm).isfinite()
        if self.look_later:
            # Looked at when the next step has been given to the device, so that it never waits for the host; until then
            # the fused update itself leaves the weights alone (as it does for a gradient scaler), also in that step.
            self.spoilt = bad if self.spoilt is None else self.spoilt | bad
            optimizer.optimizer.found_inf = self.spoilt.float()  # type: ignore[attr-defined]
        else:
            self.looked_at = float(self.loss), float(self.grad_norm)
            if bad:
                raise finite.report(self, step, *self.looked_at)
        optimizer.step()
        if self.captured is not None:
            self.captured.zero_grad()
        else:
            optimizer.zero_grad()
        if self.look_later:
            on_its_way = self._brought_over()
            self.check_finite()
            self.unchecked = step, *on_its_way

    def _brought_over(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The step's loss and gradient norm on the host, and what to wait for before they are read."""
        figures = torch.stack((self.loss, self.grad_norm)).to("cpu", non_blocking=True)
        if self.device.type != "cuda":
            return figures, None
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()
        return figures, arrived

    def check_finite(self) -> None:
        """Raise ZooError if the last step that was not looked at yet had a loss or gradient that is not finite."""
        if self.unchecked is not None:
            (step, figures, arrived), self.unchecked = self.unchecked, None
            if arrived is not None:
                arrived.synchronize()
            loss, norm = figures.tolist()
            self.looked_at = loss, norm
            if not math.isfinite(loss + norm):
                raise finite.report(self, step, loss, norm)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Nats of this device's targets [B, T], 0 where there is none."""
        return self.model.loss(*batch, reduction="none")

    def _set_rates(self, groups: list[dict[str, Any]], step: int) -> float:
        multiple = self.schedule(step, self.run.steps)
        for group, peak in zip(groups, self.peak_rates, strict=True):
            group["lr"] = peak * multiple
        return multiple

    def _sum(self, value: Tensor) -> Tensor:
        """Over ranks."""
        return self.trainer.strategy.reduce(value, reduce_op="sum") if self.trainer.world_size > 1 else value

    def _gradients_stay_here(self, hold: bool) -> Any:
        """For all micro-batches but the last: gradients are exchanged once a step."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(not hold)
        elif hold and isinstance(strategy := self.trainer.strategy, DDPStrategy):
            return strategy.block_backward_sync()
        return nullcontext()

    def teardown(self, stage: str) -> None:
        """The recording's memory is wanted for what comes after training, and for a sweep's next job."""
        self.captured = None
        self.model.zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not isinstance(self.model, FSDPModule):
            optimizer = cast(LightningOptimizer, self.optimizers())
            checkpoint["optimizer_states"] = [in_models_order(checkpoint["optimizer_states"][0],
                                                              optimizer.param_groups, self.model)]
        mine = rng_state(self.device)
        ranks = [mine]
        if self.trainer.world_size > 1:
            ranks = [{} for _ in range(self.trainer.world_size)]
            dist.all_gather_object(ranks, mine)
        checkpoint["zoo"] = {"format": FORMAT, "step": self.global_step, "config": self.run.to_dict(),
                             "model": self.model.config.to_dict(), "data": self.fingerprint, "rng": ranks}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restored_rng = checkpoint["zoo"]["rng"]

    def on_train_start(self) -> None:
        # Only now: what Lightning sets up after loading may draw numbers of its own.
        rank = self.global_rank
        if self.restored_rng is not None and rank < len(self.restored_rng):
            set_rng_state(self.restored_rng[rank], self.device)
        else:
            seed_everything(self.run.seed, 1 + rank, self.global_step)
        self.restored_rng = None


def in_models_order(state: dict[str, Any], groups: list[dict[str, Any]], model: LanguageModel) -> dict[str, Any]:
    """An optimiser's state with the parameters numbered as the model has them, and not group by group.

    That is how Lightning writes and reads the numbers under FSDP; other optimisers take any. With the groups' own
    numbers a run that went on under FSDP would get one parameter's moments for another's.
    """
    place = {parameter: number for number, parameter in enumerate(model.parameters())}
    new = {old: place[parameter] for saved, group in zip(state["param_groups"], groups, strict=True)
           for old, parameter in zip(saved["params"], group["params"], strict=True)}
    return {"state": {new[old]: moments for old, moments in state["state"].items()},
            "param_groups": [saved | {"params": [new[old] for old in saved["params"]]}
                             for saved in state["param_groups"]]}


def seed_everything(*key: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices) from whole numbers."""
    for_python, for_numpy, for_torch = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(for_python))
    np.random.seed(int(for_numpy))
    torch.manual_seed(int(for_torch))


def rng_state(device: torch.device) -> dict[str, Any]:
    """Where this process's generators stand, in plain types and tensors."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
