"""What happens between steps: metrics, validation, samples, checkpoints, stopping. All counted in optimiser steps."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer

from zoo.evaluate import Tally
from zoo.model import LanguageModel
from zoo.sampling import Sampling, stream
from zoo.tokenizers import Tokenizer
from zoo.training import checkpoint as files
from zoo.training.config import Config
from zoo.training.datamodule import TokenDataModule
from zoo.training.hardware import peak_flops, peak_memory
from zoo.training.module import TrainingModule
from zoo.training.progress import Clock, Reporter
from zoo.training.signals import Signals

TEMPERATURE = 0.8  # of samples


class Monitor(Callback):
    """Measures, shows and logs; validates and samples when it is time.

    Its state is in every checkpoint, so that a resumed run goes on with the same best value and clock.
    """

    def __init__(self, config: Config, data: TokenDataModule, reporter: Reporter, signals: Signals):
        self.config, self.data, self.reporter, self.signals = config, data, reporter, signals
        self.clock = Clock()
        self.best = math.inf
        self.improved = False
        self.validation: dict[str, Any] = {}  # the last: step, bits_per_byte, perplexity, positions
        self.pending: dict[str, Any] | None = None  # a step's row whose validation a signal cut short
        self.due: tuple[int, float] | None = None  # step and rate of a row that is not logged yet
        self.seen = (0, 0.0)  # step and seconds at the last row
        self.seconds_per_step = math.nan
        self.peak: float | None = None

    @property
    def state_key(self) -> str:
        return "monitor"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "validation": dict(self.validation), "pending": self.pending,
                "seconds": self.clock.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.validation, self.pending = state["best"], state["validation"], state["pending"]
        self.clock.total = state["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.signals.begin()
        if pl_module.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(pl_module.device))
            self.peak = None if peak is None else peak * trainer.world_size
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self.reporter.start(trainer.global_step)
        if self.pending is not None:
            row, self.pending = self.pending, None
            if (measured := self._validate(trainer, pl_module)) is not None:
                self._log(trainer, row | measured)
            else:
                self.pending = row
        self.seen = (trainer.global_step, self.clock.total)
        self.clock.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        config, step = self.config, trainer.global_step
        self.improved = False
        last = step == config.steps
        validate = last or step % config.validate_every == 0
        self.settle(trainer, pl_module)
        if validate:
            pl_module.check_finite()
            row = self._measure(pl_module, step, pl_module.lr, *pl_module.looked_at)
            with self.paused(pl_module):
                measured = self._validate(trainer, pl_module)
            if measured is None:
                self.pending = row
                return
            self._log(trainer, row | measured)
        elif step % config.log_every == 0:
            self.due = step, pl_module.lr
            if not pl_module.look_later:
                self.settle(trainer, pl_module)
        if step % config.sample_every == 0 and not last and config.sample_tokens and config.trainer.strategy != "fsdp":
            with self.paused(pl_module):
                self._sample(pl_module, step)

    def settle(self, trainer: Trainer, module: TrainingModule) -> None:
        """Log the row that is due: on a GPU when the next step is under way, so that the device has something to do."""
        if self.due is not None:
            (step, lr), self.due = self.due, None
            self._log(trainer, self._measure(module, step, lr, *module.looked_at))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.settle(trainer, pl_module)
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        self.signals.end()
        self.reporter.stop()

    @contextmanager
    def paused(self, module: TrainingModule) -> Iterator[None]:
        """Leave what happens inside out of the training time."""
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self.clock.stop()
        yield
        self.clock.start()

    def _measure(self, module: TrainingModule, step: int, lr: float, loss: float, norm: float) -> dict[str, Any]:
        """A row of metrics, at the moment when the step's figures are there."""
        config, data = self.config, self.data.data
        self.clock.stop()
        self.clock.start()
        steps, seconds = step - self.seen[0], self.clock.total - self.seen[1]
        self.seen = (step, self.clock.total)
        rate = steps * config.batch_tokens / seconds
        # For the time left: steady against the odd slow step, soon there after a change.
        recent = seconds / steps
        before = recent if math.isnan(self.seconds_per_step) else self.seconds_per_step
        self.seconds_per_step = 0.7 * before + 0.3 * recent
        flops = 3 * module.model.flops(config.seq_len) / config.seq_len  # a token's, forward and twice that backward
        return {
            "step": step,
            "tokens": step * config.batch_tokens,
            "loss": loss,
            "bits_per_byte": loss / math.log(2) * len(data.train) / data.bytes["train"],
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": rate,
            "mfu": None if self.peak is None else flops * rate / self.peak,
            "peak_memory": peak_memory(module.device),
            "seconds": self.clock.total,
        }

    def _log(self, trainer: Trainer, row: dict[str, Any]) -> None:
        step = row["step"]
        self.reporter.step(step, row, (self.reporter.steps - step) * self.seconds_per_step)
        if (bits := row.get("validation_bits_per_byte")) is not None:
            perplexity, praise = row["validation_perplexity"], ", the best so far" if self.improved else ""
            self.reporter.say(f"step {step}: validation {bits:.4f} bits/byte, perplexity {perplexity:.3f}{praise}")
        metrics = {key: value for key, value in row.items() if key != "step" and value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def _validate(self, trainer: Trainer, module: TrainingModule) -> dict[str, float] | None:
        """Bits per byte and perplexity per token over the validation split, every byte once. None if a signal came."""
        strategy, step = trainer.strategy, trainer.global_step
        tally = Tally(self.config.seq_len, module.device)
        module.eval()
        try:
            with torch.no_grad():
                for index, batch in enumerate(self.data.validation_batches()):
                    if strategy.reduce_boolean_decision(self.signals.received is not None, all=False):
                        return None
                    batch = strategy.batch_to_device(batch)
                    tally.add(cast(torch.Tensor, strategy.validation_step(batch, index)), batch[1])
        finally:
            module.train()
        if trainer.world_size > 1:
            tally.reduce(lambda value: cast(torch.Tensor, strategy.reduce(value, reduce_op="sum")))
        measured = tally.result(self.data.data.bytes["validation"])
        bits = measured.bits_per_byte
        self.validation = {"step": step, "bits_per_byte": bits, "perplexity": measured.perplexity,
                           "positions": measured.positions}
        self.improved = bits < self.best
        self.best = min(bits, self.best)
        return {"validation_bits_per_byte": bits, "validation_perplexity": measured.perplexity}

    def _sample(self, module: TrainingModule, step: int) -> None:
        config = self.config
        module.eval()
        text = sample_text(module.model, self.data.data.tokenizer, config.prompt, config.sample_tokens, config.seed)
        module.train()
        self.reporter.say(f"step {step}, a sample: {text!r}")


def sample_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int) -> str:
    """The prompt, as the beginning of a document, and its continuation. Draws nothing from torch's own generator."""
    read = [tokenizer.separator, *tokenizer.encode(prompt).tolist()]
    room = tokens if model.max_len is None else min(tokens, model.max_len - len(read) + 1)
    drawn = stream(model, [read], max_tokens=room, sampling=Sampling(temperature=TEMPERATURE), seed=seed,
                   stop=tokenizer.separator)
    return prompt + tokenizer.decode([token for _, token in drawn])


class Checkpoints(Callback):
    """Saves every `save_every` steps, at the last, after a better validation, and when a signal asks for the end.

    The two newest are kept, and the best. Comes after the monitor, whose state of the same step is saved with it.
    """

    def __init__(self, config: Config, folder: Path, monitor: Monitor, resumed_from: Path | None):
        self.config, self.folder, self.monitor, self.signals = config, folder, monitor, monitor.signals
        self.newest = resumed_from if resumed_from is not None and resumed_from.parent == folder else None
        self.stopped = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(self.signals.received is not None, all=False)
        if stop or self.monitor.improved or step % self.config.save_every == 0 or step == self.config.steps:
            with self.monitor.paused(pl_module):
                self._save(trainer, cast(TrainingModule, pl_module), step)
        if stop:
            self.stopped = True
            trainer.should_stop = True

    def _save(self, trainer: Trainer, module: TrainingModule, step: int) -> None:
        module.check_finite()
        self.monitor.settle(trainer, module)
        path = files.step_file(self.folder, step)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            if self.monitor.improved:
                files.mark_best(path)
            files.prune(self.folder, keep={path} if self.newest is None else {path, self.newest})
        self.newest = path


class StopAt(Callback):
    """Ends training after a step, as a signal would; whether anything is saved then is the checkpoints' affair."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.step:
            pl_module.check_finite()
            trainer.should_stop = True


class Profile(Callback):
    """Some steps as they ran: OUT/trace.json for a trace viewer, OUT/profile.txt the operators by the time they took.

    Of a pass that is replayed as a CUDA graph, only the kernels are seen; trainer.compile=false shows whose they are.
    """

    warmup = 3  # the first compiles, the second is recorded

    def __init__(self, steps: int, last_step: int, out: Path):
        self.steps, self.last_step, self.out, self.seen = steps, last_step, out, 0
        self.profiler: torch.profiler.profile | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.seen == self.warmup and trainer.is_global_zero:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        self.seen += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.profiler is None or (self.seen < self.warmup + self.steps and trainer.global_step < self.last_step):
            return
        profiler, self.profiler = self.profiler, None
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        profiler.stop()
        order = f"self_{pl_module.device.type}_time_total"
        table = profiler.key_averages().table(order, row_limit=40, max_name_column_width=80)
        files.write_file(self.out / "profile.txt", table.encode())
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            written = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(written))
            written.replace(self.out / "trace.json")
