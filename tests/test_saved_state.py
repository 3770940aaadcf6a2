"""Contexts in files: taken up again as they were, by the same model, and nothing believed that was not checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, listed
from safetensors.torch import load_file, save_file
from test_generate import text_model

from zoo import ZooError
from zoo.generation import Context
from zoo.saved_state import digest
from zoo.tokenizers import BPETokenizer, ByteTokenizer

CASES = pytest.mark.parametrize("case", listed(), ids=str)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The state of `text_model()` behind a few words, the generator being at its seed."""
    torch.manual_seed(0)
    context = Context(text_model())
    context.read("a few words")
    context.save(tmp_path / "words.state")
    return tmp_path / "words.state"


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return text_model()


@CASES
def test_a_state_is_taken_up_as_it_was(case: Case, tmp_path: Path) -> None:
    model, how = text_model(case), {"temperature": 0.8, "repetition_penalty": 1.1, "max_tokens": 20}
    context = Context(model)
    context.write("Once upon", **how)
    context.save(tmp_path / "a.state")
    again = Context.load(tmp_path / "a.state", model)
    assert again.tokens == context.tokens
    assert again.write(" a time", **how) == context.write(" a time", **how)
    again.save(tmp_path / "b.state")
    context.save(tmp_path / "c.state")
    assert (tmp_path / "b.state").read_bytes() == (tmp_path / "c.state").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.state", "b.state", "c.state"]


def test_the_file_is_what_its_page_says(saved: Path, model: Any) -> None:
    tensors, about = load_file(saved), header(saved)
    assert about["format"] == 1
    assert about["model"].keys() == {"name", "dtype", "sha256"}
    assert (about["model"]["name"], about["model"]["dtype"]) == ("transformer", "float32")
    assert about["tokenizer"] == {"kind": "bytes"}
    assert (about["position"], about["tokens"]) == (11, [0, *b"a few words"])
    assert about["sha256"] == digest(tensors)
    assert tensors["position"].tolist() == [11]
    assert tensors["blocks.0.sequence_mixer.k"].shape == (1, 11, 2, 16)  # no more room than what was read takes


def header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["zoo_state"])


def test_an_untouched_context_can_be_saved(tmp_path: Path, model: Any) -> None:
    Context(model).save(tmp_path / "new.state")
    context = Context.load(tmp_path / "new.state", model)
    assert context.write("ab", max_tokens=9, temperature=0) == Context(model).write("ab", max_tokens=9, temperature=0)


def test_another_models_state_is_refused(saved: Path, model: Any) -> None:
    assert Context.load(saved, model).tokens
    one_line = r"^\S+words.state belongs to another model: transformer, float32, weights [0-9a-f]{12}; this one is "
    with pytest.raises(ZooError, match=one_line + r"rwkv, float32, weights [0-9a-f]{12}$"):
        Context.load(saved, text_model(Case("rwkv", ())))
    with pytest.raises(ZooError, match=one_line + r"transformer, bfloat16, weights [0-9a-f]{12}$"):
        Context.load(saved, model.to(torch.bfloat16))
    model.float()
    with torch.no_grad():
        model.blocks[0].sequence_mixer.out.weight[0, 0] += 1
    with pytest.raises(ZooError, match=one_line + "transformer, float32"):
        Context.load(saved, model)


def test_another_tokenizers_state_is_refused(saved: Path, model: Any) -> None:
    other = BPETokenizer.train([b"some words, some more words " * 9], 260)
    with pytest.raises(ZooError, match=r"was read with another tokenizer than this model's bpe"):
        Context.load(saved, model, other)
    assert Context.load(saved, model, ByteTokenizer()).tokens


def changed(**keys: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda about: about | keys


@pytest.mark.parametrize(("change", "message"), [
    (changed(format=2), "is a saved state of format 2; this version reads: 1"), (changed(format=True), "format True"),
    (changed(extra=1), "header is damaged"), (changed(tokens=[]), "header is damaged"),
    (changed(tokens="0"), "header is damaged"), (changed(tokens=[0, 1.5]), "header is damaged"),
    (changed(position=3), "header is damaged"), (changed(position=None), "header is damaged"),
    (changed(tokens=[300] * 12), "tokens outside the vocabulary of 0 .. 255"),
    (changed(tokens=[-1] * 12), "tokens outside the vocabulary"),
    (changed(tokens=[0] * 9, position=8), "holds other tensors than a state of this transformer"),
    (changed(model=None), "belongs to another model: None"), (changed(sha256="0"), "is damaged: its tensors"),
    (lambda about: [about], "format None"), (lambda about: {}, "format None"),
])
def test_a_header_that_is_wrong_is_refused(saved: Path, model: Any, change: Any, message: str) -> None:
    save_file(load_file(saved), saved, {"zoo_state": json.dumps(change(header(saved)))})
    with pytest.raises(ZooError, match=message) as refused:
        Context.load(saved, model)
    assert "\n" not in str(refused.value)


def test_tensors_that_are_wrong_are_refused(saved: Path, model: Any) -> None:
    tensors, about = load_file(saved), header(saved)
    key = "blocks.1.sequence_mixer.k"
    others = [{name: value for name, value in tensors.items() if name != key}, tensors | {"more": torch.ones(1)},
              tensors | {key: tensors[key][:, :-1].contiguous()}, tensors | {key: tensors[key].double()}]
    for other in others:
        save_file(other, saved, {"zoo_state": json.dumps(about | {"sha256": digest(other)})})
        with pytest.raises(ZooError, match="holds other tensors than a state of this transformer"):
            Context.load(saved, model)
    moved = tensors | {"position": torch.tensor([10])}
    save_file(moved, saved, {"zoo_state": json.dumps(about | {"sha256": digest(moved)})})
    with pytest.raises(ZooError, match="is damaged"):
        Context.load(saved, model)


def test_a_damaged_or_foreign_file_is_refused(saved: Path, model: Any, tmp_path: Path) -> None:
    raw = saved.read_bytes()
    for content, message in ((raw[:-5], "is not a whole safetensors file"), (b"", "is not a whole safetensors file"),
                             (b"\x80\x04K\x01.", "is not a whole safetensors file"),  # a pickle
                             (raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:], "is damaged: its tensors are not those")):
        saved.write_bytes(content)
        with pytest.raises(ZooError, match=message):
            Context.load(saved, model)
    save_file({"a": torch.ones(1)}, saved)
    with pytest.raises(ZooError, match="is not a saved state: its header has no zoo_state"):
        Context.load(saved, model)
    for path in (tmp_path / "none.state", tmp_path):
        with pytest.raises(ZooError, match=f"^cannot read {path}: "):
            Context.load(path, model)
    save_file({"a": torch.ones(1)}, saved, {"zoo_state": "{"})
    with pytest.raises(ZooError, match="format None"):
        Context.load(saved, model)


def test_a_file_that_cannot_be_written_is_left(saved: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZooError, match=r"^cannot write \S+/none/x: No such file or directory$"):
        Context(model).save(saved.parent / "none" / "x")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ZooError, match=r"^cannot write \S+words.state: No space left on device$"):
        Context(model).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["words.state"]
