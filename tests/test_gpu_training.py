"""Training on a GPU as it is by default: the loss compiled, its passes recorded as a CUDA graph."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import config, poison_a_weight, train, write_corpus

import zoo
from zoo.errors import ZooError
from zoo.model import LanguageModel
from zoo.ops import backend
from zoo.training import ahead
from zoo.training.capture import Captured
from zoo.training.config import Config
from zoo.training.loggers import read_rows

pytestmark = pytest.mark.gpu
GPU = {"trainer__accelerator": "gpu", "trainer__precision": "bf16-mixed", "trainer__compile": True,
       "schedule": {"name": "wsd", "decay": 0.0}}


def losses(out: Path) -> list[float]:
    rows = read_rows(out / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, len(rows) + 1)]
    return [float(row["loss"]) for row in rows]


@pytest.mark.parametrize("adds", [False, True])
def test_replays_are_calls(adds: bool) -> None:
    """Outputs and gradients, with dropout, weights that change in between, and inputs of another shape."""

    def passes(model: nn.Module, given: list[Tensor], captured: bool) -> list[Tensor]:
        def call(x: Tensor) -> Tensor:
            loss = model(x).square().sum()
            loss.backward()
            return loss.detach()

        torch.cuda.manual_seed(5)
        parameters, found = list(model.parameters()), list[Tensor]()
        recorded = Captured(call, parameters, adds=adds)
        for x in given:
            found.append((recorded if captured else call)(x).clone())
            if not adds or len(found) % 2 == 0:
                found += [p.grad.clone() for p in parameters]
                with torch.no_grad():
                    for p in parameters:
                        p -= 1e-3 * p.grad
                if captured:
                    recorded.zero_grad()
                else:
                    model.zero_grad()
        return found

    torch.manual_seed(0)
    given = [torch.randn(rows, 8, device="cuda") for rows in (6, 6, 6, 6, 2, 6, 6, 6)]
    models = [nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)).cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plain, replayed = (passes(model, given, captured) for model, captured in zip(models, (False, True), strict=True))
    for one, other in zip(plain, replayed, strict=True):
        torch.testing.assert_close(other, one)


def test_recordings_share_their_memory() -> None:
    """Turn by turn each has its own gradients, and the second takes no more memory for what lies between."""

    def side(beside: Captured | None) -> Captured:
        weight = nn.Parameter(torch.randn(1 << 20, device="cuda"))

        def call(x: Tensor) -> Tensor:
            loss = (weight * x).exp().tanh().sum()
            loss.backward()
            return loss.detach()

        return Captured(call, [weight], adds=False, beside=beside)

    first = side(None)
    second = side(first)
    x = torch.randn(1 << 20, device="cuda")
    reserved = []
    for each in (first, second):
        each(x), each.zero_grad(), each(x)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] - reserved[0] < 6 * 4 << 20, reserved  # a weight, its gradient, and room that an allocator takes
    for _ in range(2):
        for each in (first, second):
            each(x)
            weight = each.parameters[0].detach()
            expected = x * (1 - (weight * x).exp().tanh().square()) * (weight * x).exp()
            torch.testing.assert_close(each.parameters[0].grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("model", ["transformer", "rwkv"])
@pytest.mark.parametrize("micro_batch", [None, 96])
def test_a_recorded_run_is_the_run(model: str, micro_batch: int | None, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and cut in the middle, against the same compiled code called each time; with dropout, and micro-batches
    of which the last is shorter."""
    corpus, changes = write_corpus(tmp_path), GPU | {"model": {"name": model}, "trainer__micro_batch": micro_batch,
                                                     "sample_tokens": 4}
    train(config(corpus, tmp_path / "whole", steps=8, **changes))
    for steps, resume in ((3, None), (8, "auto")):
        train(config(corpus, tmp_path / "cut", steps=steps, resume=resume, **changes))
    monkeypatch.setattr(Captured, "__call__", Captured._aside)
    train(config(corpus, tmp_path / "called", steps=8, **changes))
    expected = losses(tmp_path / "called")
    assert losses(tmp_path / "whole") == pytest.approx(expected, rel=1e-3)
    assert losses(tmp_path / "cut") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("model", ["transformer", "performer"])
def test_compiled_is_close_to_plain(model: str, tmp_path: Path) -> None:
    """Performer draws new features in the middle: the recording reads them."""
    corpus = write_corpus(tmp_path)
    options = {"name": model} | ({"redraw_every": 3} if model == "performer" else {})
    for compiled in (False, True):
        train(config(corpus, tmp_path / str(compiled), steps=8, dropout=0.0, sample_tokens=0,
                     **GPU | {"model": options, "trainer__compile": compiled}))
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-2)


def test_a_recorded_step_that_is_not_finite_reaches_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path)
    poison_a_weight(monkeypatch)
    with pytest.raises(ZooError, match=r"step 6: .*blocks\.1\.channel_mixer\.down; the last checkpoint is kept"):
        train(config(corpus, tmp_path / "run", log_every=50, **GPU))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000004.ckpt"]


@pytest.mark.parametrize("model", zoo.list_models())
def test_all_that_training_asks_for_is_tested_ahead(model: str, tmp_path: Path) -> None:
    run = Config.from_dict(config(tmp_path, tmp_path, model={"name": model}, size={"name": "small"}, seq_len=1024,
                                  batch_tokens=2048, **GPU))
    shapes = ahead.few_layers(run)
    backend.forget_decisions()
    tokens = torch.zeros(2, 1024, dtype=torch.int64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        LanguageModel(shapes).cuda().loss(tokens, tokens, reduction="sum").backward()
    asked = {(op, dtype, sizes) for op, _, _, dtype, sizes in backend._decisions}
    assert asked
    assert asked <= ahead.wanted(run, shapes)


def test_kernels_are_tested_and_built_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path, tmp_path, trainer__strategy="single", size={"name": "small"}, seq_len=1024,
                  batch_tokens=2048, **GPU)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ahead.begin(made)
    ahead.wait()
    run = Config.from_dict(made)
    results = json.loads((tmp_path / "zoo-self-tests.json").read_text())
    assert len(results) == len(ahead.wanted(run, ahead.few_layers(run)))
    assert all(error <= 1 for error in results.values())
    assert list(tmp_path.glob("zoo-ahead-*"))  # the pass ran, too


def test_a_profile_sees_the_kernels_of_a_replay(tmp_path: Path) -> None:
    train(config(write_corpus(tmp_path), tmp_path / "run", steps=8, validate_every=8, debug__profile=3,
                 sample_tokens=0, **GPU))
    events: list[dict[str, Any]] = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    kernels = [event["name"] for event in events if event.get("cat") == "kernel"]
    assert sum(name.startswith("triton_") for name in kernels) >= 3 * 4, collections.Counter(kernels)
    table = (tmp_path / "run" / "profile.txt").read_text()
    assert "triton_" in table, table
