"""trainer.compile: the same mathematics, and checkpoints that do not show it.

Blocks are traced and run by dynamo here; no code is generated, which would take minutes.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from cases import Case, listed, tiny
from test_models import tokens_of
from training_runs import config, train, weights, write_corpus


@pytest.mark.parametrize("case", listed(), ids=str)
def test_compiled_blocks_have_the_same_gradients(case: Case) -> None:
    model, tokens = tiny(case, scramble=True).train(), tokens_of(2, 71)
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.compile(backend="eager")
    for each in (model, compiled):
        each.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for (name, plain), other in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, plain.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_compiled_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys stay, and a run that was compiled goes on plain."""
    compile_, compiled = torch.nn.Module.compile, []

    def traced(self: torch.nn.Module) -> None:
        compiled.append(self)
        compile_(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    made = functools.partial(config, write_corpus(tmp_path), dropout=0.0, sample_tokens=0)
    plain = train(made(tmp_path / "plain", steps=4))
    assert not compiled
    result = train(made(tmp_path / "compiled", steps=4, trainer__compile=True))
    assert len(compiled) == 2
    expected, found = (weights(tmp_path / name, 4)["weights"] for name in ("plain", "compiled"))
    assert expected.keys() == found.keys()
    assert result["validation"]["bits_per_byte"] == pytest.approx(plain["validation"]["bits_per_byte"], abs=1e-3)
    train(made(tmp_path / "compiled", steps=6, resume="auto"))
