"""The start of a published model's run, once more: the same losses, or status 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import config, train, write_corpus

from zoo import ZooError
from zoo.cli import main
from zoo.export import publish_run
from zoo.reproduce import LARGEST, ON_AVERAGE, Reproduction, reproduce
from zoo.training.metrics import read_rows

EXACT = ("step", "tokens", "loss", "bits_per_byte", "lr", "grad_norm")  # of a row: what no clock is in


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def text(corpus: Path) -> dict[str, Any]:
    return {"name": "text", "path": str(corpus / "train.txt"), "cache": str(corpus / "cache")}


@pytest.fixture(scope="module")
def run(corpus: Path) -> Path:
    """Twelve steps, validated, sampled and saved on the way, and logged every other step."""
    train(config(corpus, corpus / "run", data=text(corpus), dropout=0.0, log_every=2))
    return corpus / "run"


@pytest.fixture(scope="module")
def model(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_run(run, tmp_path_factory.mktemp("checkpoints") / "transformer.tiny", limits="knows 21 words")


@pytest.fixture(autouse=True)
def home(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared text is kept in there, and not where the user's is."""
    monkeypatch.setenv("HOME", str(corpus))


def changed(model: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a published model with another card."""
    folder = shutil.copytree(model, to / model.name)
    card = json.loads((folder / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def test_a_run_that_stops_early_is_the_beginning_of_the_whole(corpus: Path, run: Path, tmp_path: Path) -> None:
    """Also where it stops in the warmup of a schedule of all its steps; no model is made of it."""
    result = train(config(corpus, tmp_path / "run", data=text(corpus), dropout=0.0, log_every=2), stop_at=6)
    assert (result["step"], result["tokens"]) == (6, 6 * 128)
    whole, start = read_rows(run / "metrics.csv"), read_rows(tmp_path / "run" / "metrics.csv")
    assert [[row[key] for key in EXACT] for row in start] == [[row[key] for key in EXACT] for row in whole[:3]]
    assert not (tmp_path / "run" / "model").exists()
    for steps in (0, 13):
        with pytest.raises(ZooError, match=f"stop_at={steps} is not allowed: 1 to 12"):
            train(config(corpus, tmp_path / "other"), stop_at=steps)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("steps", [2, 7, 12])
def test_the_same_machine_finds_the_same_losses(corpus: Path, model: Path, steps: int) -> None:
    said: list[str] = []
    found = reproduce(model, steps, data=str(corpus / "train.txt"), tell=said.append)
    assert [step for step, _, _ in found.losses] == list(range(2, steps + 1, 2))
    assert found.largest[0] == 0.0
    assert found.holds
    assert said == [f"transformer.tiny: steps 1 to {steps} of 12, trained on cpu, 1 threads, 32-true"]


def test_what_a_gpu_trained_is_repeated_in_float32_on_a_cpu(corpus: Path, model: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """In micro-batches, which round otherwise, and without compiling."""
    def on_a_gpu(card: dict[str, Any]) -> None:
        card["device"], card["training"]["backend"] = "NVIDIA X", "triton"
        card["training"]["trainer"] |= {"accelerator": "gpu", "precision": "bf16-mixed", "compile": True}

    monkeypatch.setattr("zoo.reproduce.AT_ONCE", 40)  # of a batch of 128 tokens, so 32
    said: list[str] = []
    found = reproduce(changed(model, tmp_path, on_a_gpu), 12, data=str(corpus / "train.txt"), device="cpu",
                      out=tmp_path / "again", tell=said.append)
    assert 0 < found.largest[0] < 1e-5
    assert said[0].endswith("trained on NVIDIA X, bf16-mixed; here on cpu, 1 threads, 32-true, which rounds otherwise")
    kept = json.loads((tmp_path / "again" / "config.json").read_text())
    assert kept["trainer"] == {"accelerator": "cpu", "strategy": "single", "devices": None, "precision": "32-true",
                               "micro_batch": 32, "compile": False}
    with pytest.raises(ZooError, match="draws other numbers on a CPU"):
        reproduce(changed(model, tmp_path / "dropout", lambda card: (
            on_a_gpu(card), card["training"].update(dropout=0.1))), 12, device="cpu")


@pytest.mark.parametrize(("differences", "holds"), [
    ([0.0, LARGEST - 1e-6, *[0.0] * 8], True), ([0.0, -LARGEST - 1e-6, *[0.0] * 8], False),
    ([ON_AVERAGE - 1e-6, 1e-6 - ON_AVERAGE], True), ([ON_AVERAGE + 1e-6, -1e-6 - ON_AVERAGE], False)])
def test_what_is_allowed(differences: list[float], holds: bool) -> None:
    losses = [(step, 2.0, 2.0 + by) for step, by in enumerate(differences)]
    assert Reproduction(tuple(losses), "here", "there").holds == holds


def test_a_tokenizer_comes_with_the_model(corpus: Path, tmp_path: Path) -> None:
    train(config(corpus, tmp_path / "run", data=text(corpus), steps=3, tokenizer={"name": "bpe", "vocab_size": 270}))
    folder = publish_run(tmp_path / "run", tmp_path / "transformer.bpe", limits="knows 21 words")
    shutil.rmtree(corpus / "cache" / "tokenizers")
    found = reproduce(folder, 3, data=str(corpus / "train.txt"), tell=lambda line: None)
    assert (len(found.losses), found.largest[0]) == (3, 0.0)


def ran(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str], str]:
    """Exit status of the command, the lines that it printed, and what it said on stderr."""
    with pytest.raises(SystemExit) as end:
        main(["reproduce", *map(str, words)])
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out.splitlines(), err


def test_the_command(corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = "--data", corpus / "train.txt", "--steps", 12
    status, lines, _ = ran(capsys, model, *data, "--out", tmp_path / "kept")
    assert status == 0
    assert lines[-1] == ("reproduced: losses differ by 0 nats a token on average (0.01 allowed) and by 0 at most, at "
                         "step 12 (0.05 allowed)")
    assert len(read_rows(tmp_path / "kept" / "metrics.csv")) == 6
    stored = read_rows(model / "curve.csv")[3]
    assert f"8     {float(stored['loss']):.4f}  {float(stored['loss']):.4f}  +0.00000" in lines

    for number, change in enumerate((  # another run than the one that the curve is of
            lambda card: card["training"].update(seed=4), lambda card: card["training"]["optim"].update(lr=1e-2))):
        status, lines, err = ran(capsys, changed(model, tmp_path / str(number), change), *data)
        assert (status, err) == (1, "")
        assert lines[-1].startswith("not reproduced: losses differ by ")


def test_what_cannot_be_repeated_is_refused(corpus: Path, run: Path, model: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.txt").write_text("nothing of these words is in here, but much of whales.\n" * 200)
    right = "--data", corpus / "train.txt"
    broken = changed(model, tmp_path, lambda card: card["training"].pop("trainer"))
    for words, message in (
            (("transformer.none", *right), "saved model"), ((tmp_path / "none", *right), "no such folder"),
            ((run / "model", *right), "has no curve.csv"), ((broken, *right), "is not what `zoo export --publish`"),
            ((model, *right, "--steps", 13), "steps=13 is not allowed: 2, the first that was logged, to 12"),
            ((model, *right, "--steps", 1), "steps=1 is not allowed"), ((model, *right, "--steps", 0), "1"),
            ((model, "--data", tmp_path / "other.txt", "--steps", 6), "is not what transformer.tiny was trained on"),
            ((model, "--data", tmp_path / "nowhere", "--steps", 6), "nowhere"), ((model, "--steps", 6), "data"),
            ((model, *right, "--device", "tpu"), "allowed: auto, cpu, cuda"),
            ((model, *right, "--steps", 6, "--out", run), "already holds a run")):
        status, _, err = ran(capsys, *words)
        assert status == 2, words
        assert err.startswith("error: "), words
        assert message in err, err
        assert err.count("\n") == 1, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_here_is_refused(corpus: Path, model: Path) -> None:
    with pytest.raises(ZooError, match="allowed: auto, cpu"):
        reproduce(model, 2, data=str(corpus / "train.txt"), device="cuda")
