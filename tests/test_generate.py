"""Text out of models: whole characters, the same streamed or not, ended by the separator."""

from __future__ import annotations

import pytest
import torch
from cases import Case, tiny
from torch import Tensor

import zoo
from zoo import ZooError
from zoo.contract import State
from zoo.model import LanguageModel
from zoo.pretrained import PretrainedModel
from zoo.sampling import Continuation
from zoo.tokenizers import BPETokenizer, ByteTokenizer

PROMPTS = ["", "a", "Once upon a time", "Käse", "b"]


class Reciter(LanguageModel):
    """Says after each prompt, named by its last byte, a text byte by byte; then it ends the document."""

    def __init__(self, texts: dict[str, bytes]):
        super().__init__(tiny(Case("transformer", ()), vocab_size=256).config)
        self.texts = {key.encode()[-1]: text + b"\0" for key, text in texts.items()}

    def init_state(self, batch_size: int = 1, max_len: int | None = None, **kwargs: object) -> State:
        return {"name": torch.zeros(batch_size, dtype=torch.int64), "spoken": torch.full((batch_size,), -1)}

    def extend(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        name = torch.where(state["spoken"] < 0, tokens[:, -1], state["name"])
        spoken = state["spoken"] + 1
        said = [self.texts[int(n)][int(s)] for n, s in zip(name, spoken, strict=True)]
        logits = torch.nn.functional.one_hot(torch.tensor(said), 256).float()[:, None].expand(-1, tokens.shape[1], -1)
        return logits, {"name": name, "spoken": spoken}


def text_model() -> PretrainedModel:
    model = PretrainedModel(tiny(Case("transformer", ()), vocab_size=256).config, ByteTokenizer(), {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def test_characters_come_whole_however_their_bytes_are_split() -> None:
    text = "Grüße, 世界 🦓!"
    model, pieces = Reciter({"x": text.encode(), "y": "né".encode()}), []
    written = zoo.generate(model, ["x", "y"], temperature=0, tokenizer=ByteTokenizer(),
                           on_text=lambda row, piece: pieces.append((row, piece)))
    assert written == [text, "né"]
    assert all("�" not in piece and piece for _, piece in pieces)
    assert [piece for row, piece in pieces if row == 0] == list(text)  # each as soon as its last byte is there


def test_bytes_that_are_no_text_become_the_replacement_character() -> None:
    model = Reciter({"x": b"a\xffb", "y": "é".encode()[:1]})
    assert zoo.generate(model, ["x", "y"], temperature=0, tokenizer=ByteTokenizer()) == ["a�b", "�"]


def test_a_document_ends_at_the_separator_or_the_last_token() -> None:
    model = Reciter({"x": b"short", "y": b"a longer text"})
    assert zoo.generate(model, ["x", "y"], temperature=0, tokenizer=ByteTokenizer()) == ["short", "a longer text"]
    assert zoo.generate(model, "y", temperature=0, max_tokens=8, tokenizer=ByteTokenizer()) == "a longer"


def test_a_prompt_is_the_beginning_of_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    class Nothing(Continuation):
        def __init__(self, model: LanguageModel, prompts: list[list[int]], **how: object):
            seen.extend(prompts)
            super().__init__(model, [], max_tokens=0)

    monkeypatch.setattr("zoo.generation.Continuation", Nothing)
    zoo.generate(text_model(), ["", "ab"])
    assert seen == [[0], [0, 97, 98]]


def test_streamed_or_not_together_or_alone() -> None:
    model = text_model()
    pieces = [""] * len(PROMPTS)

    def note(row: int, piece: str) -> None:
        pieces[row] += piece

    written = zoo.generate(model, PROMPTS, max_tokens=40, seed=7, on_text=note)
    assert pieces == written == zoo.generate(model, PROMPTS, max_tokens=40, seed=7)
    assert written != zoo.generate(model, PROMPTS, max_tokens=40, seed=8)
    assert all(text.encode() for text in written)  # valid, and something was written
    greedy = zoo.generate(model, PROMPTS, max_tokens=40, temperature=0)
    assert greedy == [zoo.generate(model, prompt, max_tokens=40, temperature=0) for prompt in PROMPTS]
    assert zoo.generate(model, PROMPTS[0], max_tokens=40, seed=7) == written[0]
    assert zoo.generate(model, []) == []


def test_bpe_text() -> None:
    tokenizer = BPETokenizer.train(["straße und häuser ".encode() * 50], 280)
    config = tiny(Case("transformer", ()), vocab_size=tokenizer.vocab_size).config
    model, pieces = PretrainedModel(config, tokenizer, {}), []
    written = zoo.generate(model, "straße", max_tokens=50, on_text=lambda row, piece: pieces.append(piece))
    assert "".join(pieces) == written != ""


def test_default_length_fits_a_models_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Reciter({"x": b"z" * 300})
    assert len(zoo.generate(model, "x", temperature=0, tokenizer=ByteTokenizer())) == 256
    monkeypatch.setattr(Reciter, "max_len", 20)
    assert len(zoo.generate(model, "x", temperature=0, tokenizer=ByteTokenizer())) == 19
    with pytest.raises(ZooError, match=r"prompt of 22 tokens and 1 more are past the limit .* at most 20"):
        zoo.generate(model, "x" * 21, tokenizer=ByteTokenizer())


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ZooError, match="brings no tokenizer"):
        zoo.generate(tiny(Case("transformer", ())), "a")
    with pytest.raises(ZooError, match="NUL"):
        zoo.generate(text_model(), "a\0b")
    with pytest.raises(ZooError, match="not valid Unicode"):
        zoo.generate(text_model(), "a\udc80")
