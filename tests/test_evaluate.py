"""What a model makes of a text: against one window at a time in float64, and what a run keeps of it."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, tiny
from training_runs import config, train, write_corpus

import zoo
from zoo.data.cache import TokenData
from zoo.data.load import load_data
from zoo.errors import ZooError
from zoo.evaluate import BINS, Tally, evaluate, position_bins
from zoo.model import LanguageModel
from zoo.training.callbacks import Monitor

T = 24
EXACT = {"abs": 1e-6, "rel": 1e-6}


def texts(folder: Path, **tokenizer: Any) -> TokenData:
    """A corpus of several documents a split, so that separators stand inside windows; the last window is short."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pages in (("train", 40), ("validation", 7), ("test", 5)):
        lines = [json.dumps({"text": f"Page {page} of {name}: " + "a tale of old, é and 世. " * (1 + page % 3)})
                 for page in range(pages)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    given = {f"{name}_path".removeprefix("train_"): str(folder / f"{name}.jsonl")
             for name in ("train", "validation", "test")}
    return load_data({"data": {"name": "text", "cache": str(folder / "cache"), **given},
                      "tokenizer": {"name": "bytes", **tokenizer}})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(1)
    return tiny(Case("transformer", ()), vocab_size=256, seq_len=T, scramble=True)


def by_hand(model: LanguageModel, tokens: np.ndarray, seq_len: int) -> tuple[float, int, dict[int, list[float]]]:
    """Nats, targets, and the nats of the targets with 1, 2, ... tokens before them: a window at a time, in float64."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    places: dict[int, list[float]] = {}
    with torch.no_grad():
        for start in range(0, len(ids) - 1, seq_len):
            window = ids[start:start + seq_len + 1]
            logs = model(window[None, :-1])[0].double().log_softmax(-1)
            for place, target in enumerate(window[1:].tolist()):
                if target != 0:
                    places.setdefault(place + 1, []).append(-float(logs[place, target]))
    return sum(map(sum, places.values())), sum(map(len, places.values())), places


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("seq_len", [T, 7])
def test_every_byte_once(data: TokenData, model: LanguageModel, split: str, seq_len: int) -> None:
    nats, targets, places = by_hand(model, data.split(split), seq_len)
    assert targets == data.bytes[split]
    found = evaluate(model, data, split, seq_len)
    assert found.tokens == found.bytes == targets
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / data.bytes[split], **EXACT)
    assert found.perplexity == pytest.approx(math.exp(nats / targets), **EXACT)
    assert found.upto == position_bins(seq_len)
    before = 0
    for upto, mean in zip(found.upto, found.nats, strict=True):
        inside = [value for place in range(before + 1, upto + 1) for value in places[place]]
        assert mean == pytest.approx(sum(inside) / len(inside), **EXACT)
        before = upto


def test_how_it_is_batched_does_not_show(data: TokenData, model: LanguageModel) -> None:
    one = evaluate(model, data, rows=1)
    for rows in (2, 5, 1000):
        other = evaluate(model, data, rows=rows)
        assert other.bits_per_byte == pytest.approx(one.bits_per_byte, rel=1e-6)
        assert other.nats == pytest.approx(one.nats, rel=1e-5)


def test_a_slice_of_a_split(data: TokenData, model: LanguageModel) -> None:
    nats, targets, _ = by_hand(model, data.validation[:3 * T + 1], T)
    assert targets < 3 * T  # a separator lies inside
    found = evaluate(model, data, windows=3)
    assert found.bytes == targets
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / targets, **EXACT)
    whole = -(-(len(data.validation) - 1) // T)
    assert evaluate(model, data, windows=whole) == evaluate(model, data)


def test_bits_are_of_bytes_and_perplexity_of_tokens(tmp_path: Path) -> None:
    data = texts(tmp_path, name="bpe", vocab_size=300)
    model = tiny(Case("transformer", ()), vocab_size=300, seq_len=T, scramble=True)
    nats, targets, _ = by_hand(model, data.validation, T)
    assert targets < data.bytes["validation"]
    found = evaluate(model, data)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / data.bytes["validation"], **EXACT)
    assert found.perplexity == pytest.approx(math.exp(nats / targets), **EXACT)


def test_the_model_is_left_as_it_was_and_measured_without_dropout(data: TokenData, model: LanguageModel) -> None:
    wet = LanguageModel(type(model.config).from_dict(model.config.to_dict() | {"dropout": 0.5}))
    wet.load_state_dict(model.state_dict())
    wet.train()
    assert evaluate(wet, data) == evaluate(model, data)
    assert wet.training
    assert not model.training
    assert all(parameter.grad is None for parameter in wet.parameters())


def test_bf16_is_autocast(data: TokenData, model: LanguageModel) -> None:
    exact, rounded = evaluate(model, data), evaluate(model, data, bf16=True)
    assert rounded.bits_per_byte != exact.bits_per_byte
    assert rounded.bits_per_byte == pytest.approx(exact.bits_per_byte, abs=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("name", zoo.list_models())
def test_on_a_gpu_as_on_a_cpu(data: TokenData, name: str) -> None:
    torch.manual_seed(1)
    model = tiny(Case(name, ()), vocab_size=256, seq_len=64, scramble=True)
    on_cpu = evaluate(model, data)
    on_gpu, rounded = (evaluate(model.cuda(), data, bf16=bf16) for bf16 in (False, True))
    assert on_gpu.bits_per_byte == pytest.approx(on_cpu.bits_per_byte, abs=1e-3)  # TF32 is allowed in its kernels
    assert on_gpu.nats == pytest.approx(on_cpu.nats, abs=0.01)
    assert rounded.bits_per_byte == pytest.approx(on_cpu.bits_per_byte, abs=0.02)


def test_shares_add_up() -> None:
    torch.manual_seed(0)
    nats, targets = torch.rand(6, 5), torch.ones(6, 5, dtype=torch.int64)
    targets[4:] = -100
    nats[4:] = 0
    whole, shares = Tally(5, nats.device), [Tally(5, nats.device) for _ in range(2)]
    whole.add(nats, targets)
    for share, rows in zip(shares, (slice(0, 1), slice(1, 6)), strict=True):
        share.add(nats[rows], targets[rows])
    rest = iter((shares[1].nats, shares[1].targets))
    shares[0].reduce(lambda value: value + next(rest))
    assert shares[0].result(20) == whole.result(20)
    with pytest.raises(ZooError, match="no text"):
        Tally(5, nats.device).result(20)


@pytest.mark.parametrize("seq_len", [1, 2, 3, 63, 64, 65, 256, 1000, 1024, 32768])
def test_bins_cover_every_position(seq_len: int) -> None:
    bins = position_bins(seq_len)
    assert len(bins) <= BINS
    assert bins[0] == 1
    assert bins[-1] == seq_len
    assert sorted(set(bins)) == list(bins)
    if seq_len >= 256:
        assert len(bins) >= 40


@pytest.mark.parametrize(("arguments", "message"), [
    ({"split": "dev"}, "unknown split 'dev'; allowed: test, train, validation"),
    ({"seq_len": 10**6}, "too short for seq_len=1000000"),
    ({"seq_len": 0}, "seq_len=0"),
    ({"windows": 0}, "windows=0 is not allowed: 1 to "),
    ({"windows": 10**6}, "windows=1000000 is not allowed: 1 to "),
])
def test_what_cannot_be_measured(data: TokenData, model: LanguageModel, arguments: dict[str, Any],
                                 message: str) -> None:
    with pytest.raises(ZooError, match=message):
        evaluate(model, data, **arguments)


def test_past_the_models_limit(data: TokenData) -> None:
    limited = tiny(Case("aft", (("variant", "full"),)), vocab_size=256, seq_len=T)
    with pytest.raises(ZooError, match=f"past the limit of this aft: at most {T}"):
        evaluate(limited, data, seq_len=T + 1)


# What a run keeps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    (folder / "test.txt").write_text("This is the text that nobody looks at until the very end. " * 4)
    return folder


def test_a_run_ends_with_an_evaluation(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = config(corpus, tmp_path / "run", data__test_path=str(corpus / "test.txt"))
    result = train(given)
    model = zoo.load_pretrained(tmp_path / "run")
    data, card, kept = load_data(given), model.card, model.card["evaluation"]
    assert (kept["seq_len"], kept["precision"]) == (32, "32-true")
    for split in ("validation", "test"):
        again = evaluate(model, data, split)
        assert kept[split]["bits_per_byte"] == card[f"{split}_bits_per_byte"] == result[split]["bits_per_byte"]
        assert kept[split]["bits_per_byte"] == pytest.approx(again.bits_per_byte, rel=1e-6)
        assert kept[split]["perplexity"] == pytest.approx(again.perplexity, rel=1e-6)
        assert kept[split]["positions"]["upto"] == list(again.upto)
        assert kept[split]["positions"]["nats"] == pytest.approx(again.nats, rel=1e-5)
    assert f"test: {card['test_bits_per_byte']:.4f} bits/byte" in capsys.readouterr().out
    assert card["parameters"] == model.num_parameters()
    assert card["training_flops_per_token"] == round(3 * model.flops(32) / 32)
    assert card["peak_memory"] > 1 << 20


@pytest.mark.parametrize("test", [None, "short"])
def test_a_corpus_without_a_test_split(corpus: Path, tmp_path: Path, test: str | None) -> None:
    (tmp_path / "test.txt").write_text("Too short.")
    path = {} if test is None else {"data__test_path": str(tmp_path / "test.txt")}
    result = train(config(corpus, tmp_path / "run", steps=2, **path))
    card = zoo.load_pretrained(tmp_path / "run").card
    assert result["test"] is card["test_bits_per_byte"] is card["evaluation"]["test"] is None


def test_a_signal_in_the_last_validation(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no step left in which to make up for it: the end of the run does."""
    whole = train(config(corpus, tmp_path / "whole"))
    original = Monitor._validate

    def interrupted(self: Monitor, trainer: Any, module: Any) -> Any:
        if trainer.global_step == 12:
            signal.raise_signal(signal.SIGTERM)
        return original(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "_validate", interrupted)
        with pytest.raises(SystemExit):
            train(config(corpus, tmp_path / "run"))
    result = train(config(corpus, tmp_path / "run", resume="auto"))
    assert result["validation"]["step"] == 12
    assert result["validation"]["bits_per_byte"] == pytest.approx(whole["validation"]["bits_per_byte"], rel=1e-6)
