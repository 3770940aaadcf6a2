"""Kernels that are tested by other processes while a run begins."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import config

import zoo
from zoo.ops import backend
from zoo.training import ahead
from zoo.training.config import Config

GPU = {"trainer__accelerator": "gpu", "trainer__strategy": "single", "trainer__precision": "bf16-mixed"}
OWN = {"aft": "aft_local", "linformer": "block_attention", "performer": "favor_attention", "rwkv": "wkv6",
       "transformer": "rotary_attention"}


@pytest.mark.parametrize("model", zoo.list_models())
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_what_training_asks_for_is_known_on_a_cpu(model: str, precision: str) -> None:
    made = config(Path(), Path(), model={"name": model}, trainer__precision=precision)
    run = Config.from_dict(made)
    backend.forget_decisions()
    asked = ahead.wanted(run, ahead.few_layers(run))
    assert {OWN[model], "cross_entropy"} <= {op for op, _, _ in asked}
    assert {dtype for _, dtype, _ in asked} == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}
    assert not backend.decisions()


@pytest.mark.parametrize("changes", [{"trainer__accelerator": "cpu"}, {"trainer__strategy": "ddp"},
                                     {"backend": "eager"}])
def test_other_runs_begin_nothing(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was begun"))
    ahead.begin(config(Path(), Path(), **GPU | changes))


def test_the_processes_end_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here without a GPU, where each fails at once, and nobody is told."""
    monkeypatch.setattr(ahead, "_process", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ahead.begin(config(Path(), Path(), **GPU))
    assert ahead._process is not None
    ahead.wait()
    assert ahead._process.returncode == 0
    assert not list(tmp_path.iterdir())  # nothing was found out, nor is it said that all was
    ahead.end()


def test_what_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(ahead, "_process", sleeping)
    monkeypatch.setattr(ahead, "LONGEST", 0.1)
    ahead.wait()
    assert sleeping.returncode == -signal.SIGTERM


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "self_test_file", lambda: tmp_path / "tests.json")
    monkeypatch.setattr(ahead, "wanted", lambda run, shapes: set())
    monkeypatch.setattr(ahead, "_passes", _write_passes)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    made = config(tmp_path, tmp_path, **GPU)
    for again in range(2):
        ahead.main(made)
        assert [path.name for path in tmp_path.glob("passes-*")] == ["passes-32"], again
        (tmp_path / "passes-32").write_text("once")
    assert (tmp_path / "passes-32").read_text() == "once"
    ahead.main(made | {"seq_len": 64})
    assert (tmp_path / "passes-64").exists()


def _write_passes(run: Config, shapes: object) -> None:
    path = Path(run.out or "") / f"passes-{run.seq_len}"
    path.write_text("again" if path.exists() else "first")


def test_a_result_of_another_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = backend.Kernel("cross_entropy_again", lambda *_: pytest.fail("it was tested here"), file="cross_entropy")
    monkeypatch.delitem(backend._kernels, kernel.op)
    monkeypatch.setattr(backend, "self_test_file", lambda: tmp_path / "tests.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    written = dict[str, float]()

    class Read(dict[str, float]):
        """What is in the file; another process writes the key that was asked for while this one waits."""

        def get(self, key: str, default: Any = None) -> Any:
            monkeypatch.setattr(backend, "_wait", lambda: written.update({key: 0.25}))
            return super().get(key, default)

    monkeypatch.setattr(backend, "_results", lambda path: Read(written))
    assert backend._tested(kernel, torch.device("cpu"), torch.float32, ()) == 0.25


def _write(path: Path, name: str) -> None:
    for i in range(40):
        backend._keep(path, f"{name} {i}", float(i))


def test_results_of_several_processes_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "tests.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert backend._results(path) == {f"{name} {i}": float(i) for name in "abc" for i in range(40)}
