"""The ways to read a text: windows that overlap, state carried through documents, words; and `zoo eval` around them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, tiny
from test_evaluate import texts

import zoo
import zoo.evaluation as evaluation
from zoo.cli import main
from zoo.data.cache import TokenData
from zoo.data.sources_text import WholeText
from zoo.errors import ZooError
from zoo.evaluate import evaluate, position_bins, read_carried, read_windows
from zoo.evaluation import Excerpt, count_words, doublings, open_excerpt, read
from zoo.model import LanguageModel
from zoo.pretrained import save_pretrained
from zoo.tokenizers import BPETokenizer, ByteTokenizer

T = 24
CLOSE = {"rel": 2e-5}  # of float32 losses, whatever split or batch of a text they come from
ENDLESS = [name for name in zoo.list_models() if tiny(Case(name, ()), seq_len=T).max_len is None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return texts(tmp_path_factory.mktemp("texts"))


def build(name: str, **shape: int) -> LanguageModel:
    torch.manual_seed(1)
    return tiny(Case(name, ()), scramble=True, **{"vocab_size": 256, "seq_len": T, **shape})


def losses(model: LanguageModel, window: np.ndarray) -> list[float]:
    """Of window[1:], each from all of the window before it, in float64."""
    ids = torch.from_numpy(window.astype(np.int64))
    with torch.no_grad():
        logs = model(ids[None, :-1])[0].double().log_softmax(-1)
    return [-float(logs[place, target]) for place, target in enumerate(ids[1:])]


def excerpt(data: TokenData, split: str = "test") -> Excerpt:
    tokens = data.split(split)
    return Excerpt(tokens, data.bytes[split], count_words(tokens, data.tokenizer), 0, {})


@pytest.mark.parametrize("stride", [1, 5, 23, 24])
def test_overlapping_windows(data: TokenData, stride: int) -> None:
    """Every byte once, with at least T - stride tokens before it but for the first window's."""
    model, tokens = build("transformer"), data.test[:201]
    nats = dict(enumerate(losses(model, tokens[:T + 1]), 1))  # of target i
    places = {i: i for i in nats}
    for start in range(stride, len(tokens) - 1, stride):
        for i, loss in enumerate(losses(model, tokens[start:start + T + 1]), start + 1):
            if i not in nats:
                nats[i], places[i] = loss, i - start
    assert sorted(nats) == list(range(1, len(tokens)))
    assert min(place for i, place in places.items() if i > T) == T - stride + 1
    text = [i for i in nats if tokens[i] != 0]
    found = read_windows(model, tokens, T, stride).result(len(text), upto=range(1, T + 1))
    assert found.tokens == found.bytes == len(text)
    assert found.bits_per_byte == pytest.approx(sum(nats[i] for i in text) / math.log(2) / len(text), **CLOSE)
    for place, mean in zip(found.upto, found.nats, strict=True):
        assert mean == pytest.approx(np.mean([nats[i] for i in text if places[i] == place]), **CLOSE)


def test_a_stride_as_long_as_the_window_is_no_overlap(data: TokenData) -> None:
    model = build("transformer")
    assert read_windows(model, data.test, T, T).result(1) == read_windows(model, data.test, T).result(1)
    for stride in (0, T + 1):
        with pytest.raises(ZooError, match=f"stride={stride} is not allowed: 1 to {T}, the window's length"):
            read_windows(model, data.test, T, stride)


@pytest.mark.parametrize("name", ENDLESS)
def test_carried_state_is_one_pass_over_each_document(data: TokenData, name: str) -> None:
    model, tokens = build(name), data.test
    places: dict[int, list[float]] = {}
    borders = [*np.flatnonzero(tokens == 0), len(tokens)]
    for start, end in pairwise(borders):
        for place, loss in enumerate(losses(model, tokens[start:end]), 1):
            places.setdefault(place, []).append(loss)
    longest = max(places)
    assert longest > 3 * T  # far past the training length
    for how in ({}, {"piece": 7}, {"batch_tokens": 1, "piece": 50}, {"batch_tokens": 60, "piece": 20}):
        tally = read_carried(model, tokens, **how)
        found = tally.result(data.bytes["test"], upto=range(1, longest + 1))
        assert found.tokens == found.bytes == data.bytes["test"] == sum(map(len, places.values()))
        total = sum(map(sum, places.values()))
        assert found.bits_per_byte == pytest.approx(total / math.log(2) / found.bytes, rel=1e-4)
        assert list(found.nats) == pytest.approx([np.mean(places[place]) for place in found.upto], rel=1e-3)


def test_carried_state_stops_at_a_models_limit(data: TokenData) -> None:
    limited = build("aft")
    longest = evaluation.longest_document(excerpt(data))
    with pytest.raises(ZooError, match=f"{longest} tokens are past the limit of this aft: at most {T}"):
        read_carried(limited, data.test)
    short = np.array([0, 65, 66, 0, 67, 68, 69], dtype=np.uint8)
    by_hand = losses(limited, short[:3]) + losses(limited, short[3:])
    assert read_carried(limited, short).result(5).bits_per_byte == pytest.approx(
        sum(by_hand) / math.log(2) / 5, **CLOSE)
    for empty in (short[:1], short[1:3]):
        with pytest.raises(ZooError, match="there is no text to evaluate"):
            read_carried(limited, empty)


@pytest.mark.parametrize("name", ["rwkv", "transformer"])
def test_how_it_is_batched_does_not_show(data: TokenData, name: str) -> None:
    """Windows, strides and carried state: sums are float64, so rounding of the losses themselves is all there is."""
    model = build(name)
    every = [[reading.found for reading in read(model, excerpt(data), strides=[5], lengths=[T, 16 * T], carried=True,
                                                batch_tokens=batch)] for batch in (1, 50, 130, 100_000)]
    for found in every[1:]:
        for other, first in zip(found, every[0], strict=True):
            assert other.bits_per_byte == pytest.approx(first.bits_per_byte, rel=1e-6)
            assert (other.tokens, other.bytes, other.upto) == (first.tokens, first.bytes, first.upto)
            assert other.nats == pytest.approx(first.nats, rel=1e-5)


def test_readings(data: TokenData) -> None:
    model, text = build("linformer"), excerpt(data)
    found = list(read(model, text, strides=[4, 8], lengths=[T, 2 * T, 4 * T, 2 * T], carried=True))
    assert [reading.how for reading in found] == [
        f"windows of {T}", f"windows of {2 * T}", f"windows of {4 * T}", f"windows of {T}, stride 4",
        f"windows of {T}, stride 8", "carried"]
    assert found[0].found.bits_per_byte == evaluate(model, data, "test").bits_per_byte
    for reading in found:
        assert reading.found.bytes == text.bytes
        nats = reading.found.bits_per_byte * text.bytes * math.log(2)
        assert reading.word_perplexity == pytest.approx(math.exp(nats / text.words))
        assert reading.found.upto == doublings(reading.context)
        assert json.loads(json.dumps(reading.to_dict()))["bits_per_byte"] == reading.found.bits_per_byte
    (only,) = read(model, text, lengths=[10**6])  # a text that is shorter than the window is one window
    assert only.how == f"windows of {len(text.tokens) - 1}"
    assert doublings(1) == (1,)
    assert doublings(24) == (1, 2, 4, 8, 16, 24)
    assert doublings(1024)[-2:] == (512, 1024)


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["Of old, é and\u00a0世 .\n", "a", "  two  words", "", " \n", "end\u3000here"]
    expected = sum(len(document.split()) for document in documents)
    tokens = np.concatenate([[0, *document.encode()] for document in documents]).astype(np.uint8)
    bpe = BPETokenizer.train([document.encode() for document in documents] * 9, 280)
    merged = np.concatenate([[0, *bpe.encode(document)] for document in documents])
    for size in (1 << 20, 7, 1):
        monkeypatch.setattr(evaluation, "GROUP_BYTES", size)
        assert count_words(tokens, ByteTokenizer()) == expected == count_words(merged, bpe)


def test_a_file_of_ones_own_is_read_whole(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    (tmp_path / "a.txt").write_text("one line\n" * 500)
    alone = open_excerpt("text", ByteTokenizer(), path=str(tmp_path / "a.txt"), cache=cache)
    assert (alone.bytes, alone.words, len(alone.tokens)) == (4500, 1000, 4501)
    assert list(alone.tokens).count(0) == 1
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"record {i}"}) + "\n" for i in range(30)))
    (tmp_path / "c.txt").write_text("the last")
    both = open_excerpt("text", ByteTokenizer(), path=str(tmp_path / "*.*"), cache=cache)
    assert list(both.tokens).count(0) == 32
    assert bytes(both.tokens).split(b"\0")[1:] == [piece.text for piece in WholeText(str(tmp_path / "*.*"))]
    assert both.words == 1000 + 60 + 2
    first = open_excerpt("text", ByteTokenizer(), path=str(tmp_path / "a.txt"), cache=cache, limit=12)
    assert (first.bytes, first.words, bytes(first.tokens[1:])) == (12, 3, b"one line\none")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENDLESS)
def test_on_a_gpu_as_on_a_cpu(data: TokenData, name: str) -> None:
    model, text = build(name), excerpt(data)
    how = {"strides": [5], "lengths": [T, 16 * T], "carried": True}
    on_cpu = list(read(model, text, **how))
    for bf16, bound in ((False, 1e-3), (True, 0.02)):  # TF32 is allowed in float32 kernels
        for here, there in zip(read(model.cuda(), text, bf16=bf16, **how), on_cpu, strict=True):
            assert here.found.bits_per_byte == pytest.approx(there.found.bits_per_byte, abs=bound), here.how


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name in ("rwkv", "aft"):
        save_pretrained(folder / name, build(name), ByteTokenizer(), {})
    (folder / "book.txt").write_text("Of old there was a tale, and it was told.\n" * 12)
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n \n")
    return folder


def call(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["eval", *(word.replace("@", f"{folder}/") for word in words), "--cache", str(folder / "cache")])
    return stop.value.code, *capsys.readouterr()


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(capsys, folder, "@rwkv", "--data", "text", "--path", "@book.txt", "--stride", "6,12",
                            "--lengths", "24,96,384", "--carried", "--json", "@found.json", "--device", "cpu")
    assert (status, err) == (0, "")
    found = json.loads((folder / "found.json").read_text())
    assert [reading["how"] for reading in found["readings"]] == [
        "windows of 24", "windows of 96", "windows of 384", "windows of 24, stride 6", "windows of 24, stride 12",
        "carried"]
    model = zoo.load_pretrained(folder / "rwkv")
    tokens = np.frombuffer(b"\0" + (folder / "book.txt").read_bytes(), dtype=np.uint8)
    again = read_windows(model, tokens, 24).result(len(tokens) - 1)
    first = found["readings"][0]
    assert first["bits_per_byte"] == again.bits_per_byte
    assert (first["tokens"], first["bytes"], first["words"]) == (504, 504, 120)
    assert f"{again.bits_per_byte:.4f} " in out
    assert f"{first['word_perplexity']:.2f} " in out
    assert "504 bytes, 120 words" in out
    status, out, _ = call(capsys, folder, "@rwkv", "--data", "text", "--path", "@blank.txt")
    assert status == 0
    assert "no words" in out


@pytest.mark.parametrize(("words", "message"), [
    (["no.such", "--data", "text", "--path", "@book.txt"], "unknown saved model"),
    (["@nowhere", "--data", "text", "--path", "@book.txt"], "no such folder"),
    (["@rwkv", "--data", "text", "--path", "@nothing.txt"], "names no file; allowed: a file, a folder"),
    (["@rwkv", "--data", "text", "--path", "@empty.txt"], "empty.txt is empty"),
    (["@rwkv", "--data", "text"], "data=text needs a path"),
    (["@rwkv", "--data", "pile"], "unknown data 'pile'; allowed: enwik8, fineweb_edu, lambada, novels, stdlib"),
    (["@rwkv", "--data", "novels", "--path", "@nowhere"], "does not exist"),
    (["@rwkv", "--data", "lambada", "--path", "@"], "holds no data/lambada_test.jsonl"),
    (["@rwkv"], "nothing to measure on is given; allowed: --data NAME, --tasks NAMES"),
    (["@rwkv", "--data", "text", "--path", "@book.txt", "--split", "dev"], "unknown split 'dev'; allowed: test, train"),
    (["@rwkv", "--data", "text", "--path", "@book.txt", "--split", "train"], "a file has no splits here"),
    (["@rwkv", "--data", "text", "--path", "@book.txt", "--stride", "0"], "a stride of 0 tokens is not allowed: 1 to"),
    (["@rwkv", "--data", "text", "--path", "@book.txt", "--stride", "25"], "a stride of 25 tokens is not allowed: 1"),
    (["@rwkv", "--data", "text", "--path", "@book.txt", "--stride", "x"], "--stride: 'x' is not allowed: whole"),
    (["@rwkv", "--data", "text", "--path", "@book.txt", "--lengths", "0"], "a length of 0 tokens is not allowed: 1"),
    (["@rwkv", "--data", "text", "--path", "@book.txt", "--tokens", "505"], "505 tokens are not allowed: 1 to 504"),
    (["@rwkv", "--data", "text", "--path", "@book.txt", "--json", "@no/x.json"], "x.json: no such folder"),
    (["@rwkv", "--data", "text", "--path", "@book.txt", "--device", "tpu"], "unknown device 'tpu'"),
    (["@aft", "--data", "text", "--path", "@book.txt", "--lengths", "24,48"], "48 tokens are past the limit of this"),
    (["@aft", "--data", "text", "--path", "@book.txt", "--carried"], "504 tokens are past the limit of this aft"),
])
def test_mistakes_are_one_line_and_status_2(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str],
                                            message: str) -> None:
    status, out, err = call(capsys, folder, *words)
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(("error", "words", "message"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), ["--batch-tokens", "600"],
     "too little memory on cpu for 600 tokens at once: CUDA out of memory. Tried to allocate 2 GiB.; allowed: "
     "--batch-tokens below 600"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), [],
     "allowed: --batch-tokens below 4096"),
    (MemoryError(), ["--batch-tokens", "5"], "for 24 tokens at once: MemoryError; allowed: a length below 24"),
    (torch.OutOfMemoryError("full"), ["--carried", "--batch-tokens", "700"], "allowed: --batch-tokens below 700"),
])
def test_too_little_memory_says_what_to_lower(folder: Path, capsys: pytest.CaptureFixture[str], error: Exception,
                                              words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(LanguageModel, "extend" if "--carried" in words else "loss", fail)
    status, _, err = call(capsys, folder, "@rwkv", "--data", "text", "--path", "@book.txt", "--device", "cpu", *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_tasks_want_a_package(folder: Path, capsys: pytest.CaptureFixture[str],
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "zoo.harness", raising=False)
    status, _, err = call(capsys, folder, "@rwkv", "--tasks", "lambada_openai")
    assert status == 2
    assert err.startswith("error: tasks need the package lm_eval: pip install 'zoo-lm[eval]' (")
    assert err.count("\n") == 1


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_the_gpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "long.txt").write_text("Of old there was a tale, and it was told.\n" * 40_000)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        status, _, err = call(capsys, folder, "@rwkv", "--data", "text", "--path", "@long.txt", "--device", "cuda",
                              "--batch-tokens", "2000000")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert status == 2
    assert "allowed: --batch-tokens below 2000000" in err
    assert err.count("\n") == 1


def test_nothing_of_it_is_imported_for_a_word_of_help() -> None:
    code = "import sys; import zoo.cli; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'zoo.evaluation')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bins_of_training_are_unchanged() -> None:
    assert position_bins(1024)[:3] == (1, 2, 3)
