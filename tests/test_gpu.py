"""Every architecture and the training loop on a GPU, against the CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cases import Case, listed, tiny
from test_models import tokens_of
from training_runs import config, train, write_corpus

from zoo.errors import ZooError
from zoo.model import LanguageModel
from zoo.training.loggers import read_rows

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CASES = pytest.mark.parametrize("case", listed(), ids=str)


@CASES
def test_model_agrees_with_the_cpu(case: Case) -> None:
    """float32 logits and all gradients, at a length that is not a multiple of any chunk."""
    model, tokens = tiny(case, scramble=True), tokens_of(2, 130)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    logits = model(tokens).detach()
    model.zero_grad()
    model.to(DEVICE)
    there = tokens.to(DEVICE)
    torch.testing.assert_close(model(there).detach().cpu(), logits, rtol=1e-3, atol=1e-3)
    model.loss(there[:, :-1], there[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad.cpu() - expected[name]).norm() / expected[name].norm().clamp_min(1e-8)
        assert error < 1e-3, f"{name}: relative error {error:.1e}"


@CASES
def test_autocast_stays_close(case: Case) -> None:
    model, tokens = tiny(case, scramble=True).to(DEVICE), tokens_of(2, 160).to(DEVICE)
    exact = model(tokens).detach()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rough = model(tokens).detach()
        loss = model.loss(tokens, tokens)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (rough.float() - exact).square().mean().sqrt() < 0.06 * exact.square().mean().sqrt()


@CASES
def test_extend_equals_forward(case: Case) -> None:
    """In pieces that cross chunk borders, with rows at different positions."""
    model, tokens = tiny(case, scramble=True).to(DEVICE), tokens_of(2, 160).to(DEVICE)
    with torch.inference_mode():
        expected = model(tokens)
        states = []
        for row, length in ((0, 70), (1, 33)):
            logits, state = model.extend(tokens[row : row + 1, :length], model.init_state(max_len=160))
            torch.testing.assert_close(logits, expected[row : row + 1, :length], rtol=1e-3, atol=1e-3)
            states.append(state)
        state = {name: torch.cat([each[name] for each in states]) for name in states[0]}
        for step in (0, 1, 2):
            new = torch.stack([tokens[0, 70 + step], tokens[1, 33 + step]]).unsqueeze(1)
            logits, state = model.extend(new, state)
            there = torch.stack([expected[0, 70 + step], expected[1, 33 + step]])
            torch.testing.assert_close(logits[:, 0], there, rtol=1e-3, atol=1e-3)


@CASES
def test_trains_and_resumes(case: Case, tmp_path: Path) -> None:
    """trainer=gpu under bf16 autocast, with micro-batches, cut at step 4 and gone on from there."""
    corpus = write_corpus(tmp_path)
    changes = {"model": {"name": case.model, **dict(case.options)}, "trainer__accelerator": "gpu",
               "trainer__precision": "bf16-mixed", "trainer__micro_batch": 64,
               "schedule": {"name": "wsd", "decay": 0.0}, "sample_tokens": 4}
    train(config(corpus, tmp_path / "run", steps=4, **changes))
    result = train(config(corpus, tmp_path / "run", steps=8, resume="auto", **changes))
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 9)]
    assert all(math.isfinite(float(row["loss"])) and float(row["peak_memory"]) > 0 for row in rows)
    assert result["validation"]["bits_per_byte"] < 8


def test_a_step_that_is_not_finite_reaches_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at one step late on a GPU; the checkpoint before it is what is kept."""
    corpus, loss, calls = write_corpus(tmp_path), LanguageModel.loss, []

    def broken(self: LanguageModel, *arguments: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        value = loss(self, *arguments, reduction=reduction)
        calls.append(self.training)
        return value * math.nan if sum(calls) == 6 else value

    monkeypatch.setattr(LanguageModel, "loss", broken)
    with pytest.raises(ZooError, match="step 6: loss nan"):
        train(config(corpus, tmp_path / "run", trainer__accelerator="gpu", trainer__precision="bf16-mixed"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000004.ckpt"]
