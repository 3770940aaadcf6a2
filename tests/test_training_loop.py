"""The loop: what a step computes, what is measured and written, and how a run ends."""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_runs import config, poison_a_weight, same, train, weights, write_corpus

import zoo
from zoo.data.load import load_data
from zoo.errors import ZooError
from zoo.model import LanguageModel
from zoo.ops.backend import get_backend
from zoo.training import checkpoint
from zoo.training.config import Config
from zoo.training.datamodule import TokenDataModule
from zoo.training.hardware import BF16_TFLOPS, peak_flops
from zoo.training.loggers import COLUMNS, CSVLogger, read_rows
from zoo.training.module import TrainingModule
from zoo.training.progress import count, duration


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(corpus: Path) -> dict[str, Any]:
    return train(config(corpus, corpus / "run"))


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=2e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


# What a step computes


def test_batches_are_a_function_of_seed_and_step(corpus: Path) -> None:
    made = Config.from_dict(config(corpus, corpus / "none"))
    data = load_data(made.to_dict())
    one = TokenDataModule(data, made)
    alone = [one.batch_of(step) for step in range(5)]
    for order in ([4, 0, 3], [2, 2, 1]):
        for step in order:
            assert same(one.batch_of(step), alone[step])
    ranks = [TokenDataModule(data, made, rank, 2) for rank in range(2)]
    for step in range(5):
        joined = [torch.cat(parts) for parts in zip(*(rank.batch_of(step) for rank in ranks), strict=True)]
        assert same(joined, list(alone[step]))
    assert all(torch.equal(inputs[:, 1:], targets[:, :-1]) for inputs, targets in alone)
    with pytest.raises(ZooError, match="4 rows of seq_len=32, which do not divide among 3 devices"):
        TokenDataModule(data, made, 0, 3)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_validation_sees_every_byte_once(corpus: Path, world: int, rows: int) -> None:
    made = Config.from_dict(config(corpus, corpus / "none", batch_tokens=32 * 6 * rows, trainer__micro_batch=32 * rows))
    data = load_data(made.to_dict())
    shares = [list(TokenDataModule(data, made, rank, world).validation_batches()) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    seen = torch.cat([targets[targets != -100] for share in shares for _, targets in share])
    assert len(seen) == data.bytes["validation"]
    assert sorted(seen.tolist()) == sorted(t for t in data.validation.tolist() if t != data.tokenizer.separator)


def test_accumulation_changes_rounding_only(corpus: Path, tmp_path: Path) -> None:
    """Also where the parts are uneven: 4 rows as 3 + 1."""
    for name, micro in (("one", None), ("four", 32), ("uneven", 96)):
        train(config(corpus, tmp_path / name, dropout=0.0, trainer__micro_batch=micro, sample_tokens=0))
    one = weights(tmp_path / "one", 12)["weights"]
    for name in ("four", "uneven"):
        close(weights(tmp_path / name, 12)["weights"], one)
    bits = [float(read_rows(tmp_path / name / "metrics.csv")[-1]["validation_bits_per_byte"])
            for name in ("one", "four", "uneven")]
    assert max(bits) - min(bits) < 1e-4


def test_a_mean_of_means_would_be_caught(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above must be able to fail: with uneven parts, averaging their means gives other weights."""
    train(config(corpus, tmp_path / "right", dropout=0.0, trainer__micro_batch=96, sample_tokens=0))
    original = LanguageModel.loss

    def mean_of_means(self: LanguageModel, tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        if reduction == "sum":
            return original(self, tokens, targets, "mean") * 64  # 128 targets over two parts
        return original(self, tokens, targets, reduction)

    monkeypatch.setattr(LanguageModel, "loss", mean_of_means)
    train(config(corpus, tmp_path / "wrong", dropout=0.0, trainer__micro_batch=96, sample_tokens=0))
    with pytest.raises(AssertionError):
        close(weights(tmp_path / "wrong", 12)["weights"], weights(tmp_path / "right", 12)["weights"])


def test_the_loop_is_the_loop_one_would_write(corpus: Path, tmp_path: Path) -> None:
    """Against a bare PyTorch loop: same order, mean loss, clipping, AdamW groups and rates."""
    values = config(corpus, tmp_path / "run", dropout=0.0, sample_tokens=0, optim__clip=5.0)
    train(values)
    made = Config.from_dict(values)
    data = load_data(made.to_dict())
    batches, schedule = TokenDataModule(data, made), made.lr_schedule()
    torch.manual_seed(int(np.random.SeedSequence((made.seed,)).generate_state(3)[2]))
    model = LanguageModel(made.model_config(256))
    groups = model.parameter_groups(made.optim.lr, made.optim.weight_decay)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=made.optim.betas, eps=made.optim.eps)
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    for step in range(made.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, made.steps)
        loss = model.loss(*batches.batch_of(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        assert float(rows[step]["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
        assert float(rows[step]["grad_norm"]) == pytest.approx(float(norm), rel=1e-3)
        assert float(rows[step]["lr"]) == pytest.approx(made.optim.lr * schedule(step, made.steps))
    close({key.removeprefix("model."): value for key, value in weights(tmp_path / "run", 12)["weights"].items()},
          model.state_dict())


def test_overfit_learns_one_batch(corpus: Path, tmp_path: Path) -> None:
    train(config(corpus, tmp_path / "run", debug__overfit=True, steps=150, dropout=0.0, log_every=50, sample_tokens=0,
                 validate_every=150, save_every=150, optim__lr=1e-2, optim__weight_decay=0.0))
    assert float(read_rows(tmp_path / "run" / "metrics.csv")[-1]["loss"]) < 0.1


# What is measured and written


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_backend_is_the_runs_own_and_said_once(corpus: Path, tmp_path: Path, backend: str,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    zoo.set_backend("auto")
    train(config(corpus, tmp_path / "run", steps=3, backend=backend))
    assert get_backend() == "auto"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("backend ")]
    decided = json.loads((tmp_path / "run" / "run.json").read_text())["backends"]
    if backend == "eager":
        assert all(line.endswith(": eager (asked for eager)") for line in decided)
        assert len(lines) == bool(decided)
    else:  # on a CPU there was no choice, and nobody asked
        assert not lines
    train(config(corpus, tmp_path / "run", steps=3, resume="auto", backend="auto"))


def test_a_run_leaves_what_it_says(corpus: Path, run: dict[str, Any]) -> None:
    out = Path(run["out"])
    left = sorted(path.name for path in out.iterdir())
    assert left == ["checkpoints", "config.json", "metrics.csv", "model", "run.json"]
    assert Config.from_dict(json.loads((out / "config.json").read_text())) == Config.from_dict(config(corpus, out))
    about = json.loads((out / "run.json").read_text())
    assert about.keys() == {"id", "command", "resumed_from", "commit", "versions", "device", "devices", "backends"}
    rows = read_rows(out / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row["validation_bits_per_byte"]] == ["6", "12"]
    for row in rows:
        assert int(row["tokens"]) == 128 * int(row["step"])
        # One separator in this text, which is a target and no byte.
        assert float(row["bits_per_byte"]) == pytest.approx(float(row["loss"]) / math.log(2), rel=1e-3)
        assert float(row["tokens_per_second"]) > 0
        assert int(row["peak_memory"]) > 1 << 20
    model = zoo.load_pretrained(out)
    assert model.card["validation_bits_per_byte"] == run["validation"]["bits_per_byte"]
    assert model.card["tokens"] == run["tokens"] == 12 * 128
    assert {"command", "commit", "device", "seconds", "data"} <= model.card.keys()
    assert len(model.card["data"]["fingerprint"]) >= 16
    assert str(corpus) not in json.dumps(model.card)  # a card may be published: no places of this machine


def test_the_saved_model_reproduces_its_validation(corpus: Path, run: dict[str, Any]) -> None:
    """One window at a time, from logits in float64."""
    model = zoo.load_pretrained(run["out"])
    tokens = np.fromfile(next((corpus / "cache").glob("text-bytes-*/validation.bin")), dtype=np.uint8).astype(np.int64)
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            window = torch.from_numpy(tokens[start:start + 33])
            logits = model(window[None, :-1]).double().log_softmax(-1)[0]
            nats -= float(logits.gather(1, window[1:, None])[window[1:] != 0].sum())
    assert nats / math.log(2) / (tokens != 0).sum() == pytest.approx(run["validation"]["bits_per_byte"], rel=1e-5)


def test_results_stand_beside_what_needs_no_model(corpus: Path, tmp_path: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    train(config(corpus, tmp_path / "run", steps=2, prompt="the "))
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("step 2/2", "tokens/s", "left", "byte-unigram entropy", "gzip -9", "a sample:\nthe ",
                  f"is in {tmp_path / 'run'}", "zoo generate"):
        assert words in out, words
    for chatter in ("GPU available", "💡", "Lightning", "warn", "`Trainer"):
        assert chatter not in out


def test_csv_logger_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    logger = CSVLogger(file, first_step=0)
    for step in range(1, 6):
        logger.log_metrics({"tokens": step, "loss": 0.5}, step)
    logger.finalize("killed")
    with file.open("a") as stream:
        stream.write("6,6,0.")  # cut off by a kill
    logger = CSVLogger(file, first_step=3)
    for step in (4, 5, 6):
        logger.log_metrics({"tokens": step, "loss": 0.25}, step)
    logger.finalize("finished")
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [row["loss"] for row in rows] == ["0.5"] * 3 + ["0.25"] * 3


def test_nothing_opens_a_socket(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: Any) -> None:
        raise AssertionError(f"a socket to {address}")

    for method in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, method, refuse)
    train(config(corpus, tmp_path / "run", steps=2, logger__name="tensorboard"))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_wandb_offline(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                       capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    import wandb

    for steps, resume in ((2, None), (4, "auto")):
        train(config(corpus, tmp_path / "run", steps=steps, resume=resume, sample_tokens=0, logger__name="wandb",
                     schedule={"name": "wsd"}))
        assert wandb.run is None  # finished: a sweep's next job gets its own
        assert "WANDB_MODE" not in os.environ  # nor does the next one inherit how this one was logged
    assert capfd.readouterr().err == ""
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    kept = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert kept
    assert all(about["id"] in path.name for path in kept)  # runs of one second get a suffix
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.csv")] == ["1", "2", "3", "4"]


def test_wandb_online_without_a_login_is_one_line(corpus: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ZooError, match=r"wandb: .*; allowed without it: logger\.mode=offline") as caught:
        train(config(corpus, tmp_path / "run", steps=1, logger__name="wandb", logger__mode="online"))
    assert "\n" not in str(caught.value)
    assert not checkpoint.list_steps(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("log_every", [1, 3])
def test_rows_that_are_logged_a_step_later_are_the_same(log_every: int, corpus: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: with saves, samples, a validation, and a stop between a row's step and its logging."""
    changes = {"log_every": log_every, "sample_tokens": 4, "sample_every": 3, "schedule": {"name": "wsd"}}
    train(config(corpus, tmp_path / "at once", **changes))
    begin, logged = TrainingModule.on_train_start, list[tuple[int, int]]()
    log = CSVLogger.log_metrics

    def look_later(self: TrainingModule) -> None:
        begin(self)
        self.look_later = True

    def note(self: CSVLogger, metrics: dict[str, float], step: int | None = None) -> None:
        logged.append((step or 0, trained[-1]))
        log(self, metrics, step)

    trained, step_of = [0], TrainingModule.training_step

    def training_step(self: TrainingModule, *batch: Any) -> None:
        step_of(self, *batch)
        trained.append(self.global_step)

    monkeypatch.setattr(TrainingModule, "on_train_start", look_later)
    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    monkeypatch.setattr(CSVLogger, "log_metrics", note)
    train(config(corpus, tmp_path / "later", **changes), stop_at=5)
    train(config(corpus, tmp_path / "later", resume="auto", **changes))
    first, second = (read_rows(tmp_path / name / "metrics.csv") for name in ("at once", "later"))
    measured = ("step", "tokens", "loss", "bits_per_byte", "lr", "grad_norm", "validation_bits_per_byte")
    assert [[row[key] for key in measured] for row in second] == [[row[key] for key in measured] for row in first]
    later = {step for step, at in logged if at > step}
    assert later == ({1, 2, 3, 5, 7, 9, 10, 11} if log_every == 1 else {3, 9})  # no save or validation at these
    assert ((5, 5) in logged) == (log_every == 1)  # where the first run stopped


@pytest.mark.parametrize(("steps", "stop_at"), [(2, None), (9, 5)])  # of 9 asked for, 2 until it stops
def test_profile_writes_a_table_and_a_trace(steps: int, stop_at: int | None, corpus: Path, tmp_path: Path) -> None:
    train(config(corpus, tmp_path / "run", debug__profile=steps, steps=6, sample_tokens=0), stop_at=stop_at)
    table = (tmp_path / "run" / "profile.txt").read_text()
    assert "aten::" in table
    assert "Self CPU" in table
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    steps = [event for event in events if event.get("name", "").startswith("Optimizer.step#AdamW.step")]
    assert len(steps) == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"profile.txt", "trace.json", "metrics.csv"}


# How a run ends badly


def test_a_loss_that_is_not_finite_names_layer_and_step(corpus: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    poison_a_weight(monkeypatch)
    where = r"step 6: .*blocks\.1\.channel_mixer\.down; the last checkpoint is kept"
    with pytest.raises(ZooError, match=where) as caught:
        train(config(corpus, tmp_path / "run", save_every=2))
    assert "\n" not in str(caught.value)
    assert [step for step, _ in checkpoint.list_steps(tmp_path / "run" / "checkpoints")] == [4, 2]
    assert checkpoint.damage(checkpoint.step_file(tmp_path / "run" / "checkpoints", 4)) is None


@pytest.mark.parametrize("look_later", [False, True])
def test_a_gradient_that_is_not_finite_names_the_parameter(corpus: Path, tmp_path: Path, look_later: bool,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is looked at a step later, as on a GPU: by then the update must have left the weights alone."""
    begin, original = TrainingModule.on_train_start, LanguageModel.loss

    def choose(self: TrainingModule) -> None:
        begin(self)
        self.look_later = look_later

    def poison(self: LanguageModel, *batch: Tensor, reduction: str = "mean") -> Tensor:
        loss = original(self, *batch, reduction=reduction)
        # 0 in the forward pass, and a gradient of 0 * inf in the backward pass of one weight
        return loss + (self.blocks[0].channel_mixer.down.weight[0, 0] * 0).sqrt() if loss.requires_grad else loss

    monkeypatch.setattr(TrainingModule, "on_train_start", choose)
    monkeypatch.setattr(LanguageModel, "loss", poison)
    with pytest.raises(ZooError, match=r"step 1: .*the gradient of blocks\.0\.channel_mixer\.down\.weight"):
        train(config(corpus, tmp_path / "run", log_every=5))


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate"), torch.OutOfMemoryError("CUDA out of memory.\nT")])
def test_too_little_memory_is_one_line(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(LanguageModel, "loss", fail)
    with pytest.raises(ZooError, match=r"too little memory .*allowed: a smaller trainer\.micro_batch .*128") as caught:
        train(config(corpus, tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_a_full_disk_stops_the_run_in_one_line(corpus: Path, tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    train(config(corpus, tmp_path / "run", steps=4, schedule={"name": "wsd"}))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(ZooError, match=r"cannot write .*intact"):
            train(config(corpus, tmp_path / "run", resume="auto", schedule={"name": "wsd"}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert train(config(corpus, tmp_path / "run", resume="auto", schedule={"name": "wsd"}))["step"] == 12
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.csv")] == [str(step) for step in range(1, 13)]


# Small things


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA H200", 989.4), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10G", 70), ("NVIDIA A10", 125), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA GB200", 2500),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None), ("Tesla V100-SXM2-16GB", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("AMD Instinct MI300X", None),
])
def test_peak_flops_by_name(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)
    assert all(value > 0 for value in BF16_TFLOPS.values())


def test_numbers_for_people() -> None:
    assert [count(n) for n in (0, 999, 1000, 12_345, 999_600, 4_560_000, 7.5)] == \
        ["0", "999", "1k", "12.3k", "1M", "4.56M", "7.5"]
    assert [duration(s) for s in (0, 59.4, 60, 3599, 3600, 90_000, math.nan)] == \
        ["0s", "59s", "1m00s", "59m59s", "1h00m", "25h00m", "?"]
