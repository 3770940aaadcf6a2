"""One training run, from a configuration to a saved model."""

from __future__ import annotations

import atexit
import json
import logging
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from zoo.data.baselines import gzip_bits, unigram_entropy
from zoo.data.cache import TokenData
from zoo.data.load import load_data
from zoo.errors import ZooError
from zoo.evaluate import evaluate
from zoo.model import LanguageModel, ModelConfig
from zoo.ops.backend import decisions, forget_decisions, get_backend, use_backend, wait_before_testing
from zoo.pretrained import save_pretrained
from zoo.revision import source_commit
from zoo.training import ahead
from zoo.training import checkpoint as files
from zoo.training.callbacks import Checkpoints, Monitor, Profile, StopAt, sample_text
from zoo.training.config import Config, check_resumable, recipe
from zoo.training.datamodule import TokenDataModule
from zoo.training.hardware import device_name
from zoo.training.loggers import finish_loggers, make_loggers, read_rows
from zoo.training.module import TrainingModule, seed_everything
from zoo.training.progress import Reporter, count, duration, warn
from zoo.training.signals import Signals
from zoo.training.trainer import Place, find_place, make_trainer


def train(config: Mapping[str, Any], *, stop_at: int | None = None) -> dict[str, Any]:
    """Train as `conf/train.yaml` and its groups describe, in plain values; returns a summary of what came out.

    stop_at: leave after that step of a run whose schedule is of all its steps, with no model saved for the end's sake.
    Everything that can be refused is refused before the run's folder is made. Raises ZooError for a wrong
    configuration, text, checkpoint or disk, and SystemExit(143 or 130) after a checkpoint on SIGTERM or Ctrl-C.
    """
    run = Config.from_dict(config)
    if stop_at is not None and not 1 <= stop_at <= run.steps:
        raise ZooError(f"stop_at={stop_at} is not allowed: 1 to {run.steps}, the steps of the run")
    _quieten()
    with Signals() as signals, use_backend(run.backend):
        wait_before_testing(ahead.wait)
        forget_decisions()
        place = find_place(run.trainer)
        run.lr_schedule()
        out = Path(run.out or run.default_out())
        start = _find_start(run, out) if place.rank == 0 or run.resume else None
        run.model_config(256)  # names, options and heads, before a large text is prepared for nothing
        reporter = Reporter(stop_at or run.steps, quiet=place.rank > 0)
        data = load_data({"data": run.data, "tokenizer": run.tokenizer}, _Preparation(reporter))
        shapes = run.model_config(data.tokenizer.vocab_size)
        batches = TokenDataModule(data, run, place.rank, place.world_size)
        step = _check_start(start, run, data, shapes) if start else 0
        seed_everything(run.seed)
        model = LanguageModel(shapes)
        _check_prompt(run, model, data)
        if place.rank == 0:
            about = _make_folder(out, run, start, place)
            reporter.say(_headline(run, model, data, place, out, start, step))
        else:
            about = {}
        return _fit(run, out, place, data, batches, model, start, step, reporter, signals, about, stop_at)


def _fit(run: Config, out: Path, place: Place, data: TokenData, batches: TokenDataModule, model: LanguageModel,
         start: Path | None, step: int, reporter: Reporter, signals: Signals, about: dict[str, Any],
         stop_at: int | None) -> dict[str, Any]:
    module = TrainingModule(model, run, data.fingerprint, batches.batch_of)
    monitor = Monitor(run, batches, reporter, signals)
    checkpoints = Checkpoints(run, out / "checkpoints", monitor, start)
    callbacks: list[Callback] = [monitor, checkpoints]
    if place.rank == 0:
        callbacks.append(Backends(out, reporter, about))
    if stop_at is not None:
        callbacks.append(StopAt(stop_at))
    if run.debug.profile:
        callbacks.append(Profile(run.debug.profile, stop_at or run.steps, out))
    loggers = make_loggers(run.logger, out, step, about.get("id", ""), run.to_dict()) if place.rank == 0 else []
    trainer = make_trainer(run, place, out, callbacks, loggers)
    if place.world_size > 1:
        atexit.register(_leave_group)
    try:
        trainer.fit(module, datamodule=batches, ckpt_path=start, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ZooError(f"too little memory on {device_name(place.device)}: {str(error).splitlines()[0]}; allowed: a "
                       f"smaller trainer.micro_batch than {batches.rows_at_once * run.seq_len} tokens") from None
    finally:
        reporter.stop()
        if place.rank == 0:
            finish_loggers(run.logger)
    if checkpoints.stopped or signals.received is not None:
        reporter.say(f"stopped by a signal and saved at step {trainer.global_step}; resume=auto goes on from there")
        raise signals.exit()
    if stop_at is not None:
        return {"out": str(out), "step": trainer.global_step, "tokens": trainer.global_step * run.batch_tokens,
                "seconds": monitor.clock.total}
    newest = checkpoints.newest or start
    assert newest is not None
    result = {"out": str(out), "step": run.steps, "tokens": run.steps * run.batch_tokens,
              "seconds": monitor.clock.total, "checkpoint": str(newest), "validation": monitor.validation}
    return result | _finish(run, out, place, batches, newest, result, about, reporter) if place.rank == 0 else result


def _leave_group() -> None:
    """At the end of the process, whose next run (of a sweep) has use for it: threads left over would abort the exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _find_start(run: Config, out: Path) -> Path | None:
    """The checkpoint to go on from, None for a fresh start."""
    folder = out / "checkpoints"
    if run.resume is None:
        if (out / "metrics.csv").exists() or (out / "model").exists() or files.list_steps(folder):
            raise ZooError(f"{out} already holds a run; allowed: resume=auto to go on with it, or another out=FOLDER")
    elif run.resume != "auto":
        path = Path(run.resume)
        if path.is_dir():
            raise ZooError(f"resume={run.resume} is a folder; allowed: auto, or a checkpoint file in RUN/checkpoints")
        if files.list_steps(folder) and path.resolve().parent != folder.resolve():
            raise ZooError(f"{out} already holds another run than {path}; choose another out=FOLDER")
        return path
    if out.exists() and not out.is_dir():
        raise ZooError(f"out={out} is a file; allowed: a folder, which is made if need be")
    return files.newest_good(folder, warn) if run.resume else None


def _check_start(path: Path, run: Config, data: TokenData, shapes: ModelConfig) -> int:
    """The step that a checkpoint stands at. Raises ZooError where it is damaged or of another run than this one."""
    saved = files.load(path)["zoo"]
    check_resumable(saved["config"], run.to_dict(), str(path))
    derived = {key: value for key, value in shapes.to_dict().items() if key != "options"}  # those are compared as given
    for key, here in ({"data fingerprint": data.fingerprint} | derived).items():
        there = saved["data"] if key == "data fingerprint" else saved["model"].get(key)
        if there != here:
            raise ZooError(f"cannot resume {path}: {key} is {there!r} there and {here!r} here")
    if saved["step"] > run.steps:
        raise ZooError(f"cannot resume {path}: it is at step {saved['step']}, past steps={run.steps}")
    return int(saved["step"])


def _check_prompt(run: Config, model: LanguageModel, data: TokenData) -> None:
    if run.sample_tokens:
        model.check_length(1 + len(data.tokenizer.encode(run.prompt)))


def _make_folder(out: Path, run: Config, start: Path | None, place: Place) -> dict[str, Any]:
    """Make the run's folder and write what it is; returns what run.json holds."""
    about = {
        "id": f"{time.time_ns():x}",
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "resumed_from": None if start is None else str(start),
        "commit": source_commit(),
        "versions": {name: _version(name) for name in ("zoo-lm", "torch", "lightning", "triton", "numpy")}
        | {"python": platform.python_version()},
        "device": device_name(place.device),
        "devices": place.world_size,
    }
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        earlier = out / "run.json"
        if run.resume and earlier.is_file():
            about["id"] = json.loads(earlier.read_bytes())["id"]
    except OSError as error:
        raise ZooError(f"cannot make {out}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        pass  # cut off by a kill: a new id then
    _write_json(out / "config.json", run.to_dict())
    _write_json(out / "run.json", about)
    return about


def _finish(run: Config, out: Path, place: Place, batches: TokenDataModule, newest: Path, result: dict[str, Any],
            about: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Measure the last model, compare with what the text costs without one, write a sample, save the model."""
    data, model = batches.data, files.restore_model(files.load(newest))
    evaluation = _evaluate(run, place, batches, model, result["validation"])
    validation, test = evaluation["validation"], evaluation["test"]
    bits, unigram, gzip = validation["bits_per_byte"], unigram_entropy(data), gzip_bits(data)
    reporter.say(f"validation: {bits:.4f} bits/byte, perplexity {validation['perplexity']:.3f} a token; the same text "
                 f"has byte-unigram entropy {unigram:.4f} ({unigram - bits:+.4f}), gzip -9 {gzip:.4f} "
                 f"({gzip - bits:+.4f})")
    if test is not None:
        reporter.say(f"test: {test['bits_per_byte']:.4f} bits/byte, perplexity {test['perplexity']:.3f} a token")
    if run.sample_tokens:
        reporter.say("a sample:\n" + sample_text(model, data.tokenizer, run.prompt, run.sample_tokens, run.seed))
    card = {
        "data": {"name": run.data["name"], "fingerprint": data.fingerprint, "bytes": dict(data.bytes)},
        "step": result["step"], "tokens": result["tokens"], "seconds": round(result["seconds"], 3),
        "validation_bits_per_byte": bits, "test_bits_per_byte": None if test is None else test["bits_per_byte"],
        "unigram_entropy": unigram, "gzip_bits_per_byte": gzip, "parameters": model.num_parameters(),
        "training_flops_per_token": round(3 * model.flops(run.seq_len) / run.seq_len),
        "peak_memory": max((int(row["peak_memory"]) for row in read_rows(out / "metrics.csv")), default=None),
        "evaluation": evaluation, "training": recipe(run.to_dict()),
    } | {key: about[key] for key in ("command", "commit", "versions", "device", "devices")}
    folder = save_pretrained(out / "model", model, data.tokenizer, card)
    reporter.say(f"{count(result['tokens'])} tokens in {duration(result['seconds'])}; everything is in {out}\n"
                 f"model: {folder}; go on writing with: zoo generate {out} --prompt \"...\"")
    return {"validation": {"step": run.steps} | validation, "test": test, "unigram_entropy": unigram,
            "gzip_bits_per_byte": gzip, "model": str(folder)}


def _evaluate(run: Config, place: Place, batches: TokenDataModule, model: LanguageModel,
              validation: Mapping[str, Any]) -> dict[str, Any]:
    """The last model's figures on both held-out splits; `validation` are those that the loop found at its last step.

    In the precision of training, on its device. "test" is None for a corpus without such a split, or with one shorter
    than a window.
    """
    # On a GPU what memory allowed in training; a CPU has room for more than a small batch, and is faster with it.
    rows = batches.rows_at_once if place.device.type == "cuda" else None

    def measure(split: str) -> dict[str, Any]:
        found = evaluate(model, batches.data, split, run.seq_len, rows=rows,
                         bf16=run.trainer.precision == "bf16-mixed")
        return {"bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity, "positions": found.positions}

    model.to(place.device)
    if validation.get("step") != run.steps or "positions" not in validation:  # a signal cut it short
        validation = measure("validation")
    test = measure("test") if len(batches.data.test) > run.seq_len else None
    model.cpu()
    return {"seq_len": run.seq_len, "precision": run.trainer.precision,
            "validation": {key: value for key, value in validation.items() if key != "step"}, "test": test}


def _headline(run: Config, model: LanguageModel, data: TokenData, place: Place, out: Path, start: Path | None,
              step: int) -> str:
    shapes = f"{model.config.layers} layers x {model.config.dim}, {count(model.num_parameters())} parameters"
    begin = f"resumed from {start} at step {step}" if start else \
        "no checkpoint to resume from: starting at step 0" if run.resume else "fresh"
    return (f"{run.model['name']} {run.size.name} ({shapes}) on {run.data['name']}, {count(len(data.train))} training "
            f"tokens; {run.steps} steps of {count(run.batch_tokens)} tokens at T={run.seq_len}; "
            f"{place.world_size} x {device_name(place.device)}, {run.trainer.precision}; {begin}; into {out}")


class Backends(Callback):
    """After the first step: what the ops run on, and why, said once and kept in run.json."""

    def __init__(self, out: Path, reporter: Reporter, about: dict[str, Any]):
        self.out, self.reporter, self.about = out, reporter, about

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "backends" in self.about:
            return
        self.about["backends"] = decisions()
        _write_json(self.out / "run.json", self.about)
        outcomes: dict[str, list[str]] = {}
        for line in self.about["backends"]:
            what, _, outcome = line.partition(": ")
            outcomes.setdefault(outcome, []).append(what)
        if outcomes and (pl_module.device.type != "cpu" or get_backend() != "auto"):
            said = "; ".join(f"{outcome}: {', '.join(ops)}" for outcome, ops in outcomes.items())
            self.reporter.say(f"backend {get_backend()}: {said}")


class _Preparation:
    """Reports on a text that is being tokenised: every few seconds, so that a small one says nothing."""

    def __init__(self, reporter: Reporter):
        self.reporter, self.said = reporter, time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        if time.monotonic() - self.said > 3:
            self.said = time.monotonic()
            self.reporter.say(f"preparing text: {count(done)}B" + (f" of {count(total)}B" if total else ""))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    files.write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _quieten() -> None:
    """Lightning tells of devices it found, tips and guesses about loaders; what matters is said by the run itself."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
