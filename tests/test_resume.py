"""Exact resume: N steps = k steps, a kill, the rest, to the last bit of weights, optimiser and generators."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import command, config, same, train, weights, words, write_corpus

import zoo
from zoo.errors import ZooError
from zoo.mixers import options
from zoo.training import checkpoint
from zoo.training.callbacks import Monitor
from zoo.training.loggers import read_rows

# A rate that does not depend on the number of steps.
CONSTANT = {"schedule": {"name": "wsd", "warmup": 0.0, "decay": 0.0, "final": 1.0}}


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(corpus: Path) -> Path:
    """A run of 12 steps that nothing disturbed, with dropout."""
    torch.set_num_threads(1)
    train(config(corpus, corpus / "whole", **CONSTANT))
    return corpus / "whole"


@pytest.fixture
def half(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be spoiled."""
    return Path(shutil.copytree(whole, tmp_path / "half"))


def die_after(step: int, monkeypatch: pytest.MonkeyPatch, act: Any = None) -> None:
    """After a step's metrics are logged and before it could be saved."""
    original = Monitor.on_train_batch_end

    def dying(self: Monitor, trainer: Any, *rest: Any) -> None:
        original(self, trainer, *rest)
        if trainer.global_step == step:
            if act is None:
                raise KilledError
            act()

    monkeypatch.setattr(Monitor, "on_train_batch_end", dying)


def start(corpus: Path, out: Path, **options: str) -> Any:
    """The real command, in a process of its own, with far more steps than it will get to do."""
    given = words(corpus, out, **CONSTANT, steps=100_000, save_every=3, validate_every=6)
    return command(*given, *(f"{key}={value}" for key, value in options.items()))


def wait_for_steps(out: Path, steps: int, process: Any) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(step >= steps for step, _ in checkpoint.list_steps(out / "checkpoints")):
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"no checkpoint at step {steps}: {process.communicate()}")


def steps_of(out: Path) -> list[int]:
    return [int(row["step"]) for row in read_rows(out / "metrics.csv")]


def losses(out: Path) -> list[tuple[str, ...]]:
    return [tuple(row[key] for key in ("step", "loss", "grad_norm", "lr", "validation_bits_per_byte"))
            for row in read_rows(out / "metrics.csv")]


def test_two_runs_are_equal(corpus: Path, whole: Path, tmp_path: Path) -> None:
    train(config(corpus, tmp_path / "again", **CONSTANT))
    assert same(weights(whole, 12), weights(tmp_path / "again", 12))


def test_resumed_twice_is_bit_equal(corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    for step, resume in ((5, None), (11, "auto")):  # the second starts from a resumed run's checkpoint
        with monkeypatch.context() as patch:
            die_after(step, patch)
            with pytest.raises(KilledError):
                train(config(corpus, out, **CONSTANT, resume=resume))
    assert steps_of(out)[-1] == 11
    result = train(config(corpus, out, **CONSTANT, resume="auto"))
    assert same(weights(whole, 12), weights(out, 12))
    assert losses(out) == losses(whole)
    assert steps_of(out) == list(range(1, 13))
    assert result["step"] == 12


@pytest.mark.parametrize("model", zoo.list_models())
def test_every_model_resumes(corpus: Path, tmp_path: Path, model: str) -> None:
    redraws = {"redraw_every": 4} if "redraw_every" in options(model) else {}  # a draw in the middle of a part
    changes = {"schedule": CONSTANT["schedule"], "model": {"name": model} | redraws, "sample_tokens": 0,
               "validate_every": 100}
    train(config(corpus, tmp_path / "whole", **changes, steps=6))
    for steps in (2, 4, 6):
        train(config(corpus, tmp_path / "parts", **changes, steps=steps, resume="auto"))
    assert same(weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6))


def test_a_mutant_that_forgets_the_generators_is_caught(corpus: Path, whole: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        die_after(5, patch)
        with pytest.raises(KilledError):
            train(config(corpus, tmp_path / "run", **CONSTANT))
    monkeypatch.setattr("zoo.training.module.set_rng_state", lambda *_: None)
    train(config(corpus, tmp_path / "run", **CONSTANT, resume="auto"))
    assert not same(weights(whole, 12)["weights"], weights(tmp_path / "run", 12)["weights"])


def test_kill_9_at_a_random_moment(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(corpus, out)
    wait_for_steps(out, 6, process)
    time.sleep(random.SystemRandom().uniform(0, 0.3))
    process.kill()
    process.communicate()
    newest = checkpoint.list_steps(out / "checkpoints")[0][0]
    steps = newest + 7
    train(config(corpus, out, **CONSTANT, steps=steps, resume="auto", save_every=3))
    train(config(corpus, tmp_path / "whole", **CONSTANT, steps=steps, save_every=3))
    assert same(weights(out, steps), weights(tmp_path / "whole", steps))
    assert steps_of(out) == list(range(1, steps + 1))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit(corpus: Path, tmp_path: Path, number: int, status: int) -> None:
    out = tmp_path / "run"
    process = start(corpus, out, save_every="100000", validate_every="100000", log_every="100000")
    deadline = time.monotonic() + 120
    while not (out / "run.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(number)
    said, complaints = process.communicate(timeout=60)
    assert process.returncode == status, complaints
    assert complaints == ""
    saved = checkpoint.list_steps(out / "checkpoints")
    if saved:  # the signal came after the first step began
        assert f"saved at step {saved[0][0]}; resume=auto goes on" in said
        train(config(corpus, out, **CONSTANT, steps=saved[0][0] + 2, resume="auto"))


def test_a_signal_in_this_process(corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a step that is due for validation, which is then cut short and made up for by the resumed run."""
    out, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    original = Monitor._validate

    def interrupted(self: Monitor, *rest: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "_validate", interrupted)
        with pytest.raises(SystemExit) as caught:
            train(config(corpus, out, **CONSTANT))
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.list_steps(out / "checkpoints")[0][0] == 6
    assert steps_of(out) == [1, 2, 3, 4, 5]
    train(config(corpus, out, **CONSTANT, resume="auto"))
    assert losses(out) == losses(whole)
    assert same(weights(whole, 12), weights(out, 12))


def test_a_finished_run_can_be_finished_again_and_extended(corpus: Path, half: Path, tmp_path: Path) -> None:
    shutil.rmtree(half / "model")
    assert train(config(corpus, half, **CONSTANT, resume="auto"))["step"] == 12
    assert (half / "model" / "card.json").is_file()
    train(config(corpus, half, **CONSTANT, steps=20, resume="auto"))
    train(config(corpus, tmp_path / "long", **CONSTANT, steps=20))
    assert same(weights(half, 20), weights(tmp_path / "long", 20))


def test_a_path_resumes_into_another_folder(corpus: Path, whole: Path, tmp_path: Path) -> None:
    source = checkpoint.step_file(whole / "checkpoints", 8)
    train(config(corpus, tmp_path / "fork", **CONSTANT, resume=str(source)))
    assert same(weights(whole, 12), weights(tmp_path / "fork", 12))
    assert steps_of(tmp_path / "fork") == [9, 10, 11, 12]


def test_damage_on_auto_goes_back_loudly(corpus: Path, whole: Path, half: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    newest = checkpoint.step_file(half / "checkpoints", 12)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    train(config(corpus, half, **CONSTANT, resume="auto"))
    out, err = capsys.readouterr()
    assert "warning: " in err
    assert "step-00000012.ckpt is damaged" in err
    assert "at step 8" in out
    assert same(weights(whole, 12), weights(half, 12))


@pytest.mark.parametrize("spoil", ["cut", "flipped", "foreign", "missing"])
def test_damage_by_name_is_an_error(corpus: Path, half: Path, spoil: str) -> None:
    file = checkpoint.step_file(half / "checkpoints", 12)
    data = bytearray(file.read_bytes())
    if spoil == "cut":
        file.write_bytes(data[:1000])
    elif spoil == "flipped":
        data[3000] ^= 1
        file.write_bytes(data)
    elif spoil == "foreign":
        torch.save({"weights": torch.zeros(3)}, file)
    else:
        file.unlink()
    before = sorted(path.name for path in half.rglob("*"))
    with pytest.raises(ZooError, match=r"step-00000012\.ckpt") as caught:
        train(config(corpus, half, **CONSTANT, resume=str(file)))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in half.rglob("*")) == before


@pytest.mark.parametrize(("change", "value", "key"), [
    ("model__name", "linformer", "model"), ("size__dim", 64, "size.dim"), ("seq_len", 64, "seq_len"),
    ("batch_tokens", 64, "batch_tokens"), ("seed", 4, "seed"), ("optim__lr", 1e-4, "optim.lr"),
    ("dropout", 0.0, "dropout"), ("schedule__name", "linear", "schedule"), ("steps", 5, "past steps=5"),
    ("data__path", "other.txt", "data fingerprint"), ("tokenizer__name", "bpe", "data fingerprint"),
])
def test_contradictions_are_refused(corpus: Path, whole: Path, tmp_path: Path, change: str, value: Any,
                                    key: str) -> None:
    values = config(corpus, whole, **CONSTANT, resume="auto")
    if change == "data__path":
        value = str(tmp_path / "other.txt")
        Path(value).write_text("Other words. " * 100)
    group, _, key_inside = change.partition("__")
    if key_inside:
        values[group] = values[group] | {key_inside: value}
    else:
        values[group] = value
    if value == "linear":
        values["schedule"].pop("decay")
    if value == "bpe":
        values["tokenizer"]["vocab_size"] = 260
    about = (whole / "run.json").read_bytes()
    with pytest.raises(ZooError, match="cannot resume") as caught:
        train(values)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (whole / "run.json").read_bytes() == about


def test_a_folder_with_a_run_is_not_overwritten(corpus: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="already holds a run; allowed: resume=auto"):
        train(config(corpus, whole, **CONSTANT))
    train(config(corpus, tmp_path / "other", **CONSTANT, steps=1))
    file = checkpoint.step_file(whole / "checkpoints", 12)
    with pytest.raises(ZooError, match="already holds another run"):
        train(config(corpus, tmp_path / "other", **CONSTANT, resume=str(file)))
    with pytest.raises(ZooError, match="is a folder; allowed: auto"):
        train(config(corpus, whole, **CONSTANT, resume=str(whole)))


def test_auto_without_a_checkpoint_starts_afresh(corpus: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    train(config(corpus, tmp_path / "new", **CONSTANT, steps=1, resume="auto"))
    assert "no checkpoint to resume from: starting at step 0" in capsys.readouterr().out


def test_checkpoints_hold_plain_types_and_few_are_kept(whole: Path) -> None:
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["best.ckpt", "step-00000008.ckpt", "step-00000012.ckpt"]
    saved = torch.load(whole / "checkpoints" / "step-00000012.ckpt", weights_only=True)

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(plain(key) and plain(part) for key, part in value.items())
        return all(map(plain, value)) if isinstance(value, list | tuple) else \
            value is None or isinstance(value, str | int | float | bool | torch.Tensor)

    assert plain(saved)
    assert all("_orig_mod" not in key for key in saved["state_dict"])
