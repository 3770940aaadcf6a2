"""trainer.compile: the same mathematics, and checkpoints that do not show it.

The loss is traced and run by dynamo here; no code is generated, which would take minutes. tests/test_gpu_training.py
has the rest.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, listed, tiny
from test_models import tokens_of
from training_runs import config, train, weights, write_corpus

from zoo.errors import ZooError
from zoo.training import compiling
from zoo.training.config import Hardware
from zoo.training.metrics import read_rows
from zoo.training.trainer import find_place


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """torch.compile without code generation; the graphs are added to the list."""
    graphs = list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(compiling, "generate", backend)
    return graphs


@pytest.mark.parametrize("case", listed(), ids=str)
def test_a_compiled_loss_has_the_same_gradients(case: Case, traced: list[torch.fx.GraphModule]) -> None:
    """And more layers need no more graphs."""
    model, tokens = tiny(case, scramble=True).train(), tokens_of(2, 71)
    compiled = copy.deepcopy(model)
    model.loss(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
    compiling.compiled_loss(compiled)(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
    graphs = len(traced)
    compiling.compiled_loss(tiny(case, layers=4).train())(tokens[:, :-1], tokens[:, 1:], reduction="sum").backward()
    assert len(traced) == 2 * graphs >= 8
    for (name, plain), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, plain.grad, rtol=1e-4, atol=1e-4, msg=name)


class Code:
    """What a backend makes of a graph."""

    def __init__(self, graph: torch.fx.GraphModule, inputs: Any) -> None:
        self.call = graph.forward

    def __call__(self, *inputs: Any) -> Any:
        return self.call(*inputs)


def test_code_lives_as_long_as_the_loss_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded pass replays its kernels, which go with it; dynamo forgets it where another model is compiled."""
    made = list[weakref.ref[Code]]()

    def generate(*given: Any) -> Code:
        code = Code(*given)
        made.append(weakref.ref(code))
        return code

    monkeypatch.setattr(compiling, "generate", generate)
    tokens = tokens_of(2, 9)
    first, second = (compiling.compiled_loss(tiny(Case(name, ()))) for name in ("transformer", "rwkv"))
    first(tokens[:, :-1], tokens[:, 1:]).backward()
    count = len(made)
    torch._dynamo.reset()
    second(tokens[:, :-1], tokens[:, 1:]).backward()
    gc.collect()
    assert len(made) > count >= 4
    assert all(each() is not None for each in made)
    del first
    torch._dynamo.reset()
    gc.collect()
    assert [each() is None for each in made] == [True] * count + [False] * (len(made) - count)


@pytest.mark.parametrize("in_place", [False, True])
def test_no_model_of_a_sweep_runs_uncompiled(in_place: bool, traced: list[torch.fx.GraphModule]) -> None:
    """dynamo gives up on a function after 8 variants, without an error."""
    tokens = tokens_of(2, 9)
    for heads in range(1, 11):
        model = tiny(Case("transformer", ()), layers=1, dim=16 * heads, heads=heads)
        if in_place:
            compiling.compile_in_place(model)
        (model.loss if in_place else compiling.compiled_loss(model))(tokens[:, :-1], tokens[:, 1:]).backward()
        assert len(traced) == heads * (1 if in_place else 3)  # of one layer, which is the first


def test_a_compiled_run(tmp_path: Path, traced: list[torch.fx.GraphModule]) -> None:
    """The same figures and keys, with micro-batches of which the last is shorter; it goes on plain."""
    made = functools.partial(config, write_corpus(tmp_path), dropout=0.0, sample_tokens=4, trainer__micro_batch=96)
    plain = train(made(tmp_path / "plain", steps=4))
    assert not traced
    result = train(made(tmp_path / "compiled", steps=4, trainer__compile=True))
    assert len(traced) == 2 * 4  # of the whole micro-batch, and of the shorter
    expected, found = (weights(tmp_path / name, 4)["weights"] for name in ("plain", "compiled"))
    assert expected.keys() == found.keys()
    assert result["validation"]["bits_per_byte"] == pytest.approx(plain["validation"]["bits_per_byte"], abs=1e-3)
    for mine, theirs in zip(*(read_rows(tmp_path / name / "metrics.csv") for name in ("plain", "compiled")),
                            strict=True):
        assert float(theirs["loss"]) == pytest.approx(float(mine["loss"]), rel=1e-4)
        assert float(theirs["grad_norm"]) == pytest.approx(float(mine["grad_norm"]), rel=1e-3)
    train(made(tmp_path / "compiled", steps=6, resume="auto"))


def test_each_run_says_what_its_ops_ran_on(tmp_path: Path, traced: list[torch.fx.GraphModule]) -> None:
    """That is asked while a run is traced; code of the run before, which is as good, would ask nothing."""
    corpus, said = write_corpus(tmp_path), []
    for backend in ("auto", "auto", "eager"):
        out = tmp_path / str(len(said))
        train(config(corpus, out, steps=2, sample_tokens=0, backend=backend, trainer__compile=True))
        said.append(json.loads((out / "run.json").read_text())["backends"])
    assert said[0] == said[1]
    assert any("on cpu" in line for line in said[0])
    assert said[2]
    assert all("asked for eager" in line for line in said[2])


def test_without_triton_it_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ZooError, match=r"Triton, which is not installed; allowed: trainer\.compile=false"):
        find_place(Hardware("gpu", compile=True))
    assert find_place(Hardware("gpu")).device.type == "cuda"
