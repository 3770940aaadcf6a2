"""Tokenizers: lossless on any text, safe against the separator, and carried by a folder."""

import json

import numpy as np
import pytest

from zoo.errors import ZooError
from zoo.tokenizers import SEPARATOR_TEXT, BPETokenizer, ByteTokenizer, StreamDecoder, load_tokenizer

CORPUS = ("The owl and the pussy-cat went to sea\nin a beautiful pea-green boat.\n\n  They took some honey,\n"
          "\tand plenty of money, wrapped up in a five-pound note. Ça va? été naïve 日本語 🦜🦜\n").encode()
TEXTS = ["", " ", "\n", "plain", "a  b\n\n\n  c\t\td ", "été 日本語 🦜 \u200d\ufeff", f"{SEPARATOR_TEXT}x",
         "\x01\x7f\x80\xa0\xad", "e\u0301 \U0010ffff", "".join(map(chr, range(1, 0x300))), CORPUS.decode() * 3]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([CORPUS * 4, CORPUS.upper()], 400)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return bpe if request.param == "bpe" else ByteTokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.shape == (len(ids),)
    assert tokenizer.decode(ids) == text
    assert not (ids == tokenizer.separator).any()  # not for "<|doc|>" either
    assert np.array_equal(ids, tokenizer.encode(text.encode()))
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(int(i)) for i in ids) + decoder.finish() == text


def test_round_trip_of_any_bytes(tokenizer):
    """A text cut in the middle of a character, as enwik8's splits may be, still has every byte in its tokens."""
    random = np.random.default_rng(0)
    samples = [bytes(range(1, 256)), b"\xff", b"ab\xc3", "日".encode()[1:] + b"x", "é".encode() * 3 + b"\x80 ok"]
    samples += [random.integers(1, 256, 300, dtype=np.uint8).tobytes() for _ in range(5)]
    for sample in samples:
        assert tokenizer.to_bytes(tokenizer.encode(sample)) == sample
        assert tokenizer.decode(tokenizer.encode(sample)) == sample.decode("utf-8", "replace")


def test_byte_ids_are_the_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("aé").tolist() == [0x61, 0xC3, 0xA9]


def test_bpe_merges_and_keeps_its_alphabet(bpe):
    assert 257 < bpe.vocab_size <= 400
    assert len(bpe.encode(CORPUS)) < len(CORPUS) / 2
    assert len(BPETokenizer.train([b"x"], 300).encode("日本")) == 6  # falls back to bytes


def test_bpe_training_is_repeatable(bpe):
    assert BPETokenizer.train([CORPUS * 4, CORPUS.upper()], 400).content == bpe.content


def test_long_texts_are_cut_without_changing_their_ids(bpe, monkeypatch):
    """Parts are encoded in parallel; the ids have to be those of the whole, also around blank lines and indents."""
    text = (CORPUS + b"x = 1\n\n\ny\n  z\n\n w\n" + "été\nà\n".encode()) * 4
    whole = bpe._library.encode(text.decode()).ids
    monkeypatch.setattr("zoo.tokenizers._ENCODE_CHARS", 1)
    assert bpe.encode(text).tolist() == whole


@pytest.mark.parametrize("split_at", range(1, 5))
def test_stream_decoder_never_shows_half_a_character(tokenizer, split_at):
    raw = "🦜é".encode()
    decoder = StreamDecoder(tokenizer)
    first = decoder.push(tokenizer.encode(raw[:split_at]))
    assert "\ufffd" not in first
    assert first + decoder.push(tokenizer.encode(raw[split_at:])) + decoder.finish() == "🦜é"


def test_stream_decoder_replaces_what_is_invalid(tokenizer):
    decoder = StreamDecoder(tokenizer)
    lead, trail = (int(i) for i in tokenizer.encode("é".encode()[:1]).tolist() + tokenizer.encode(b"\xa9").tolist())
    # a separator ends a character too: the two halves around it are no é
    assert decoder.push([lead, tokenizer.separator, trail]) == "\ufffd\ufffd"
    assert decoder.push(lead) == ""
    assert decoder.finish() == "\ufffd"


def test_separators_are_left_out_of_text(tokenizer):
    ids = [0, *tokenizer.encode("ab"), 0, *tokenizer.encode("c")]
    assert tokenizer.decode(ids) == "abc"
    assert tokenizer.to_bytes(ids) == b"abc"


def test_wrong_input_is_refused(tokenizer):
    with pytest.raises(ZooError, match="NUL"):
        tokenizer.encode("a\0b")
    with pytest.raises(ZooError, match="Unicode"):
        tokenizer.encode("\ud800")
    # numpy would wrap or count from the end
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ZooError, match=f"0 .. {tokenizer.vocab_size - 1}"):
            tokenizer.decode([wrong])


@pytest.mark.parametrize("size", [256, True, "big", 1 << 21])
def test_wrong_vocabulary_size_is_refused(size):
    with pytest.raises(ZooError, match="vocab_size"):
        BPETokenizer.train([CORPUS], size)


def test_a_folder_carries_its_tokenizer(tokenizer, tmp_path):
    spec = json.loads(json.dumps(tokenizer.save(tmp_path)))
    loaded = load_tokenizer(tmp_path, spec)
    assert spec == loaded.spec
    assert spec["kind"] == tokenizer.kind
    assert np.array_equal(loaded.encode(CORPUS), tokenizer.encode(CORPUS))


def test_damaged_or_foreign_tokenizers_are_refused(bpe, tmp_path):
    spec = bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    for change, message in [({"kind": "wordpiece"}, "allowed: bpe, bytes"),
                            ({"file": "../tokenizer.json"}, "plain file"),
                            ({"file": None}, "plain file"), ({"file": "absent.json"}, "cannot read"),
                            ({"sha256": "0" * 64}, "SHA-256"), ({"vocab_size": 999}, "999")]:
        with pytest.raises(ZooError, match=message):
            load_tokenizer(tmp_path, {**spec, **change})
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ZooError, match="SHA-256"):
        load_tokenizer(tmp_path, spec)
    with pytest.raises(ZooError, match="table"):
        load_tokenizer(tmp_path, "bytes")


@pytest.mark.parametrize("damage", [
    lambda facts: facts["added_tokens"].append({"id": 0, "content": SEPARATOR_TEXT, "special": True, "lstrip": False,
                                                "rstrip": False, "single_word": False, "normalized": False}),
    lambda facts: facts["pre_tokenizer"].update(add_prefix_space=True),
    lambda facts: facts.update(normalizer={"type": "Lowercase"}),
    lambda facts: facts["model"]["vocab"].update({"zzz": 100000}),
    lambda facts: facts.pop("model"),
])
def test_a_tokenizer_that_would_lose_text_is_refused(bpe, damage):
    facts = json.loads(bpe.content)
    damage(facts)
    with pytest.raises(ZooError, match=r"tokenizer\.json"):
        BPETokenizer(json.dumps(facts).encode())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model": 3}'])
def test_malformed_tokenizer_files_are_refused(content):
    with pytest.raises(ZooError, match="damaged"):
        BPETokenizer(content)
