"""Text to token ids and back: bytes as they are, or byte-level byte-pair encoding (BPE).

Id 0 is the document separator in both; no text encodes to it, since text holds no NUL byte. A model folder carries its
tokenizer as a small `spec` in config.json (plus a tokenizer.json for BPE), which `load_tokenizer` turns back into it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import ZooError, choose

SEPARATOR_TEXT = "<|doc|>"  # how tokenizer.json spells id 0; in a text these seven characters are ordinary characters

# GPT-2's pre-tokeniser always ends a piece at a line end between two visible characters, so cutting a text there and
# encoding the parts gives the ids of the whole.
_SAFE_CUT = re.compile(r"(?<=[!-~]\n)(?=[!-~])")
_ENCODE_CHARS = 1 << 16


class Tokenizer(ABC):
    """`encode` is lossless: `to_bytes(encode(text)) == text` for all bytes but NUL, which is refused as binary."""

    kind: str
    vocab_size: int
    separator = 0

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of each text, int64 [n_i] in 1 .. vocab_size - 1."""

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies the tokenizer, for a config.json."""
        return {"kind": self.kind}

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Put the tokenizer's files, if it has any, into `folder`; `load_tokenizer(folder, spec)` takes the result."""
        return self.spec

    @abstractmethod
    def _raw(self, ids: np.ndarray) -> bytes:
        """The bytes of ids in range, a separator as one NUL."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of one text, int64 [n]."""
        if isinstance(text, str):
            try:
                text = text.encode()
            except UnicodeEncodeError as error:
                raise ZooError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from None
        return self.encode_batch([text])[0]

    def to_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes the ids stand for; separators are left out."""
        return self._checked(ids).replace(b"\0", b"")

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of the ids; separators are left out, bytes that are no UTF-8 become U+FFFD."""
        return self._checked(ids).decode("utf-8", "replace").replace("\0", "")

    def _checked(self, ids: Iterable[int] | np.ndarray) -> bytes:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ZooError(f"token ids lie in 0 .. {self.vocab_size - 1}; got {array.min()} .. {array.max()}")
        return self._raw(array)


class ByteTokenizer(Tokenizer):
    """A byte's value is its id."""

    kind = "bytes"
    vocab_size = 256

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(_no_nul(text), dtype=np.uint8).astype(np.int64) for text in texts]

    def _raw(self, ids: np.ndarray) -> bytes:
        return ids.astype(np.uint8).tobytes()


class BPETokenizer(Tokenizer):
    """Byte-level BPE by the `tokenizers` library: GPT-2's pre-tokeniser, no normalisation, so no byte is lost."""

    kind = "bpe"
    file = "tokenizer.json"

    def __init__(self, content: bytes):
        """`content` of a tokenizer.json as `train` makes it; others (a prefix space, other special tokens) are
        refused."""
        from tokenizers import Tokenizer as Library

        try:
            facts = json.loads(content)
            vocab: dict[str, int] = facts["model"]["vocab"]
            pre = facts["pre_tokenizer"]
            fits = (facts["model"]["type"] == "BPE" and sorted(vocab.values()) == list(range(len(vocab)))
                    and vocab.get(SEPARATOR_TEXT) == 0 and all(char in vocab for char in BYTE_TO_CHAR)
                    and pre["type"] == "ByteLevel" and not pre["add_prefix_space"] and pre.get("use_regex", True)
                    and not facts.get("added_tokens") and facts.get("normalizer") is None
                    and facts.get("post_processor") is None)
            self._library = Library.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise ZooError(f"{self.file} is damaged or of another format: {_first_line(error)}") from None
        if not fits:
            raise ZooError(f"{self.file} is not a byte-level BPE with {SEPARATOR_TEXT!r} as id 0 and no other special "
                           "tokens; train one with tokenizer=bpe")
        self.content = content
        self.vocab_size = len(vocab)
        self._byte_ids = np.array([vocab[char] for char in BYTE_TO_CHAR], dtype=np.int64)
        char_to_byte = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
        self._bytes_of = [b""] * len(vocab)
        for token, index in vocab.items():
            self._bytes_of[index] = bytes(char_to_byte[char] for char in token) if index else b"\0"

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int) -> BPETokenizer:
        """Learn merges from `texts`; the vocabulary is smaller than asked where the texts hold too few pairs."""
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 257 <= vocab_size <= 1 << 20:
            raise ZooError(f"tokenizer.vocab_size={vocab_size!r}; allowed: a whole number from 257 (every byte and the "
                           "separator) to 1048576")
        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=[SEPARATOR_TEXT],
                                      initial_alphabet=BYTE_TO_CHAR, show_progress=False)
        library.train_from_iterator((text.decode("utf-8", "replace") for text in texts), trainer)
        facts = json.loads(library.to_str())
        # As an added token the library would find "<|doc|>" inside a text and emit id 0; kept in the vocabulary alone,
        # its characters are encoded like any others.
        facts["added_tokens"] = []
        return cls(json.dumps(facts, ensure_ascii=False, separators=(",", ":")).encode())

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        parts: list[str] = []
        plans: list[list[int | np.ndarray]] = []  # per text: the index of a part, or ids known already
        for text in texts:
            plan: list[int | np.ndarray] = []
            for part in _valid_and_invalid(_no_nul(text)):
                if isinstance(part, bytes):
                    plan.append(self._byte_ids[np.frombuffer(part, dtype=np.uint8)])
                    continue
                for short in _short_parts(part):
                    plan.append(len(parts))
                    parts.append(short)
            plans.append(plan)
        encoded = self._library.encode_batch_fast(parts, add_special_tokens=False)
        empty = np.empty(0, dtype=np.int64)
        return [np.concatenate([empty, *(np.array(encoded[step].ids, dtype=np.int64) if isinstance(step, int) else step
                                         for step in plan)]) for plan in plans]

    def _raw(self, ids: np.ndarray) -> bytes:
        return b"".join(map(self._bytes_of.__getitem__, ids.tolist()))

    @property
    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "file": self.file, "vocab_size": self.vocab_size,
                "sha256": hashlib.sha256(self.content).hexdigest()}

    def save(self, folder: str | Path) -> dict[str, Any]:
        Path(folder, self.file).write_bytes(self.content)
        return self.spec


class StreamDecoder:
    """Turns ids that arrive one by one into pieces of valid text, holding back an unfinished character's bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Iterable[int] | np.ndarray) -> str:
        """The text that is certain after these ids, perhaps empty. Invalid bytes become U+FFFD."""
        raw = self._tokenizer._checked([ids] if isinstance(ids, int) else ids)
        return self._utf8.decode(raw).replace("\0", "")

    def finish(self) -> str:
        """What was held back: empty, or U+FFFD for a character that never ended."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(folder: str | Path, spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `save(folder)` described as `spec`; a missing, changed or foreign file is a ZooError."""
    if not isinstance(spec, Mapping):
        raise ZooError(f"a tokenizer spec is a table with a `kind`; got {spec!r}")
    if choose("tokenizer kind", spec.get("kind"), ("bytes", "bpe")) == "bytes":
        return ByteTokenizer()
    name = spec.get("file")
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ZooError(f"the tokenizer's `file` is a plain file name in the model's folder; got {name!r}")
    path = Path(folder, name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ZooError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != spec.get("sha256"):
        raise ZooError(f"{path} is not the tokenizer it is recorded as: SHA-256 {found}, expected {spec.get('sha256')}")
    tokenizer = BPETokenizer(content)
    if tokenizer.vocab_size != spec.get("vocab_size"):
        raise ZooError(f"{path} has {tokenizer.vocab_size} tokens, its record says {spec.get('vocab_size')!r}")
    return tokenizer


def _no_nul(text: bytes) -> bytes:
    if b"\0" in text:
        raise ZooError("the text holds a NUL byte, so it is binary; allowed: text in UTF-8")
    return text


def _valid_and_invalid(text: bytes) -> Iterator[str | bytes]:
    """Split bytes into runs of UTF-8, as str, and of bytes that are none."""
    try:
        yield text.decode()
    except UnicodeDecodeError:
        for part in re.split("([\udc80-\udcff]+)", text.decode("utf-8", "surrogateescape")):
            if part:
                yield part.encode("utf-8", "surrogateescape") if "\udc80" <= part[0] <= "\udcff" else part


def _short_parts(text: str) -> Iterator[str]:
    """Cut a long text where it does not change the ids, so that the library encodes the parts in parallel."""
    start = 0
    while cut := _SAFE_CUT.search(text, start + _ENCODE_CHARS):
        yield text[start:cut.start()]
        start = cut.start()
    yield text[start:]


def _byte_to_char() -> list[str]:
    """Byte-level BPE's alphabet: visible Latin-1 bytes are their own character, the others take U+0100 onwards."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


BYTE_TO_CHAR = _byte_to_char()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
