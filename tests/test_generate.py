"""Text out of models: whole characters, the same streamed or not, ended by a separator or a stop string."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, listed, tiny
from torch import Tensor

import zoo
from zoo import ZooError
from zoo.contract import State
from zoo.generation import Context, _Text
from zoo.model import LanguageModel
from zoo.pretrained import PretrainedModel
from zoo.sampling import Continuation
from zoo.tokenizers import BPETokenizer, ByteTokenizer

PROMPTS = ["", "a", "Once upon a time", "Käse", "b"]
CASES = pytest.mark.parametrize("case", listed(), ids=str)
LIMITED = Case("aft", ())  # whose biases are of absolute positions


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


class Chain(LanguageModel):
    """Says after each byte of a text the next one, then ends the document."""

    def __init__(self, text: bytes):
        super().__init__(tiny(Case("transformer", ()), vocab_size=256).config)
        self.following = torch.zeros(256, dtype=torch.int64)
        self.following[list(text[:-1])] = torch.tensor(list(text[1:]))

    def init_state(self, batch_size: int = 1, max_len: int | None = None, **kwargs: object) -> State:
        return {"position": torch.zeros(batch_size, dtype=torch.int64)}

    def extend(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        logits = torch.nn.functional.one_hot(self.following[tokens], 256).float()
        return logits, {"position": state["position"] + tokens.shape[1]}


def text_model(case: Case = Case("transformer", ()), **shape: int) -> PretrainedModel:  # noqa: B008
    scrambled = tiny(case, vocab_size=256, scramble=True, **shape)
    model = PretrainedModel(scrambled.config, ByteTokenizer(), {})
    model.load_state_dict(scrambled.state_dict())
    return model.eval()


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


@CASES
def test_together_is_the_same_text_as_one_by_one(case: Case) -> None:
    model = text_model(case)
    alone = [zoo.generate(model, prompt, max_tokens=30, temperature=0) for prompt in PROMPTS]
    assert zoo.generate(model, PROMPTS, max_tokens=30, temperature=0) == alone
    stop = alone[0][2:4]  # ends the first row early, and perhaps others
    assert zoo.generate(model, PROMPTS, max_tokens=30, temperature=0, stop=stop) == [
        text.partition(stop)[0] for text in alone]
    assert len(set(alone)) > 1


@pytest.mark.gpu
@CASES
def test_a_gpu_writes_the_same_text(case: Case, tmp_path: Path) -> None:
    """In float32, greedy: as the CPU, together as one by one, and in two goes with the state in a file between them."""
    model, how = text_model(case), {"max_tokens": 24, "temperature": 0}
    expected = zoo.generate(model, PROMPTS, **how)
    on_gpu = text_model(case)
    on_gpu.load_state_dict(model.state_dict())
    on_gpu.cuda()
    assert [zoo.generate(on_gpu, prompt, **how) for prompt in PROMPTS] == expected
    assert zoo.generate(on_gpu, PROMPTS, **how) == expected
    context = Context(on_gpu)
    context.write(PROMPTS[2], max_tokens=10, temperature=0)
    context.save(tmp_path / "half.state")
    for place in (on_gpu, model):
        half = Context.load(tmp_path / "half.state", place)
        half.write(max_tokens=14, temperature=0)
        assert ByteTokenizer().decode(half.tokens) == PROMPTS[2] + expected[2]


# Stop strings


def test_a_stop_string_ends_the_text_before_it() -> None:
    said = {"x": b"one, two; three", "y": "né; and".encode(), "z": b"none"}
    how: dict[str, Any] = {"temperature": 0, "tokenizer": ByteTokenizer()}
    assert zoo.generate(Reciter(said), ["x", "y", "z"], stop=";", **how) == ["one, two", "né", "none"]
    assert zoo.generate(Reciter(said), ["x", "y", "z"], stop=[", t", "é", "on"], **how) == ["", "n", "n"]
    assert zoo.generate(Reciter(said), "x", stop="three?", **how) == "one, two; three"  # what was held back is text


def test_a_row_costs_nothing_after_its_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    extend = Reciter.extend
    monkeypatch.setattr(Reciter, "extend", lambda self, tokens, state: (
        rows.append(len(tokens)), extend(self, tokens, state))[1])
    zoo.generate(Reciter({"x": b"ab;cdefgh", "y": b"abcdefgh;"}), ["x", "y"], temperature=0, stop=";",
                 tokenizer=ByteTokenizer())
    assert rows == [2, 2, 2, *[1] * 6]  # the two prompts, of one length, are read together


def pieces_of(tokenizer: ByteTokenizer | BPETokenizer, tokens: list[int], stops: tuple[str, ...]) -> tuple[_Text, str]:
    """A row that these tokens are written into, and all it handed out."""
    text, shown = _Text(tokenizer, stops, []), ""
    for token in tokens:
        shown += text.push(token)
        assert shown == text.text
        if text.stopped:
            return text, shown
        assert not text.held or any(stop.startswith(text.held) for stop in stops)  # no more than it must
    return text, shown + text.finish()


@pytest.mark.parametrize("trial", range(40))
def test_stop_strings_are_found_however_tokens_cut_them(trial: int) -> None:
    pick = random.Random(trial)
    sample = "".join(pick.choice("ab\n") for _ in range(2000)) + "é世" * 20
    tokenizers = ByteTokenizer(), BPETokenizer.train([sample.encode()], 290)
    stops = tuple("".join(pick.choice("ab\né") for _ in range(pick.randint(1, 4))) for _ in range(pick.randint(1, 3)))
    written = "".join(pick.choice("ab\né世") for _ in range(pick.randint(0, 40)))
    ends = [written.find(stop) + len(stop) for stop in stops if stop in written]
    expected = written
    if ends:  # the shortest beginning that ends with a stop string, without the longest one it ends with
        whole = written[: min(ends)]
        expected = whole[: -max(len(stop) for stop in stops if whole.endswith(stop))]
    for tokenizer in tokenizers:
        text, shown = pieces_of(tokenizer, tokenizer.encode(written).tolist(), stops)
        assert (text.stopped, text.text, shown) == (bool(ends), expected, expected)
        assert tokenizer.decode(text.kept()) == expected


def test_the_stop_string_that_is_complete_first_counts_within_a_token_too() -> None:
    tokenizer = BPETokenizer.train([b"abcd " * 99], 270)
    tokens = tokenizer.encode("abcd").tolist()
    assert len(tokens) == 1
    text, shown = pieces_of(tokenizer, tokens, ("abcd", "bc"))  # as letter by letter
    assert (shown, tokenizer.decode(text.kept())) == ("a", "a")


def test_bytes_that_are_no_text_beside_a_stop_string() -> None:
    text, shown = pieces_of(ByteTokenizer(), list(b"a\xc3\xffend."), ("end",))
    assert shown == "a��"
    assert text.kept() == list(b"a\xc3\xff")
    text, shown = pieces_of(ByteTokenizer(), list(b"a\xc3end."), ("end",))  # both characters come with the e
    assert shown == "a�"
    assert text.kept() == list("a�".encode())


# Contexts


@CASES
def test_a_prefix_that_was_read_once_gives_the_text_of_the_whole(case: Case) -> None:
    model, prefix = text_model(case), "A context, "
    context = Context(model)
    context.read(prefix[:4])
    context.read("")
    context.read(prefix[4:])
    whole = zoo.generate(model, [prefix + prompt for prompt in PROMPTS], max_tokens=20, temperature=0)
    for _ in range(2):  # it is left as it is
        assert zoo.generate(model, PROMPTS, max_tokens=20, temperature=0, context=context) == whole
    assert context.tokens == [0, *prefix.encode()]
    assert zoo.generate(model, "", max_tokens=20, temperature=0, context=Context(model)) == zoo.generate(
        model, "", max_tokens=20, temperature=0)


@CASES
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_writing_in_two_goes_is_writing_in_one(case: Case, temperature: float) -> None:
    """Sampled, too: a token's random number is a function of its position. And with a penalty on all that was there."""
    model, how = text_model(case), {"temperature": temperature, "repetition_penalty": 1.2, "seed": 5}
    whole, halves = Context(model), Context(model)
    whole.write("go", max_tokens=40, **how)
    halves.write("go", max_tokens=17, **how)
    halves.write(max_tokens=23, **how)
    assert halves.tokens == whole.tokens
    assert len(whole.tokens) == 43 or 0 in whole.tokens
    for name, value in whole.state.items():
        torch.testing.assert_close(halves.state[name], value, rtol=1e-4, atol=1e-5)


def test_a_character_that_two_goes_share_is_whole() -> None:
    context, pieces = Context(Chain("xé!".encode()), ByteTokenizer()), []
    assert context.write("x", max_tokens=1, temperature=0) == "�"  # all there is of it
    assert context.write(temperature=0, on_text=lambda row, piece: pieces.append(piece)) == "é!"
    assert pieces == ["é", "!"]
    assert context.tokens == [0, *"xé!".encode()]


def test_a_context_goes_on_from_the_text_without_its_stop_string() -> None:
    model = text_model()
    context, cut = Context(model), Context(model)
    text = context.write("go", max_tokens=40, temperature=0)
    stop = text[9:12]
    assert cut.write("go", max_tokens=40, temperature=0, stop=stop) == text.partition(stop)[0]
    assert context.tokens[: len(cut.tokens)] == cut.tokens
    assert ByteTokenizer().decode(cut.tokens) == "go" + text.partition(stop)[0]


def test_an_interrupted_or_refused_go_leaves_a_context_as_it_was() -> None:
    def interrupt(row: int, piece: str) -> None:
        raise KeyboardInterrupt

    model = text_model(LIMITED, seq_len=40)
    context = Context(model)
    context.read("before")
    tokens, state = list(context.tokens), {name: value.clone() for name, value in context.state.items()}
    with pytest.raises(KeyboardInterrupt):
        context.write("more", max_tokens=9, on_text=interrupt)
    for action in (context.read, context.write):
        with pytest.raises(ZooError, match="past the limit of this aft: at most 40"):
            action("x" * 40)
    assert context.tokens == tokens
    assert all(torch.equal(context.state[name], value) for name, value in state.items())
    with pytest.raises(ZooError, match="the context is of another model"):
        zoo.generate(text_model(), "a", context=context)


# A model's limit


def test_a_window_keeps_the_last_tokens_that_fit() -> None:
    model, said = text_model(LIMITED, seq_len=40), []
    text, how = "0123456789" * 5, {"temperature": 0, "max_tokens": 11}
    with pytest.raises(ZooError, match="a prompt of 51 tokens and 11 more are past the limit of this aft: at most 40"):
        zoo.generate(model, text, **how)
    written = zoo.generate(model, ["ab", text], window=True, complain=said.append, **how)
    assert said == ["prompt 2: the first 21 of 51 tokens are left out; this aft reads 40, 11 are for what it writes"]
    assert written[0] == zoo.generate(model, "ab", **how)
    tokens = [token for _, token in zoo.sampling.stream(
        model, [list(text[-30:].encode())], max_tokens=11, sampling=zoo.sampling.Sampling(temperature=0))]
    assert written[1] == ByteTokenizer().decode(tokens)
    assert len(zoo.generate(model, text, window=True, temperature=0).encode()) >= 20  # half the limit, if nobody says
    with pytest.raises(ZooError, match="max_tokens=41 is past the limit of this aft: at most 40"):
        zoo.generate(model, "a", window=True, max_tokens=41)
    assert zoo.generate(text_model(), text * 9, window=True, complain=said.append, **how)
    assert len(said) == 1  # what has no limit reads everything


def test_a_context_slides_on_in_its_window() -> None:
    model, said = text_model(LIMITED, seq_len=40), []
    context = Context(model)
    for number in range(5):
        context.write(f"line {number}, ", max_tokens=10, temperature=0, window=True, complain=said.append)
        assert len(context.tokens) <= 41
    assert len(said) >= 2
    again = Context(model)
    again._become(list(context.tokens))
    for name, value in again.state.items():
        torch.testing.assert_close(context.state[name], value, rtol=1e-4, atol=1e-5)
    context.read("x" * 100, window=True)
    assert context.tokens == [ord("x")] * 40


# What is refused


@pytest.mark.parametrize(("how", "message"), [
    ({"stop": ""}, "a stop string is empty; allowed: one or more characters"), ({"stop": ["a", ""]}, "string is empty"),
    ({"stop": "a\0"}, "NUL"), ({"stop": "\udc80"}, "not valid Unicode"), ({"min_p": 2.0}, "min_p=2.0 is not allowed"),
    ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0 is not allowed"), ({"max_tokens": -1}, "max_tokens=-1"),
])
def test_options_without_a_meaning_are_refused(how: dict[str, Any], message: str) -> None:
    for prompts in ("a", []):  # whether there is something to write or not
        with pytest.raises(ZooError, match=message):
            zoo.generate(text_model(), prompts, **how)
    with pytest.raises(TypeError, match="top_q"):
        zoo.generate(text_model(), "a", top_q=1)


def test_what_does_not_fit_into_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"2 x 10000000000003 tokens do not fit into the memory of cpu; fewer prompts or tokens at a time may"
    with pytest.raises(ZooError, match=message):
        zoo.generate(text_model(), ["a", "ab"], max_tokens=10**13)

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LanguageModel, "extend", full)
    with pytest.raises(ZooError, match="1 x 7 tokens do not fit"):
        zoo.generate(text_model(), "a", max_tokens=5)
    with pytest.raises(ZooError, match="1 x 4 tokens do not fit"):
        Context(text_model()).read("abc")
