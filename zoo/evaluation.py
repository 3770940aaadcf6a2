"""`zoo eval`: one text, read by one saved model in every way that was asked for."""

from __future__ import annotations

import codecs
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.data.cache import GROUP_BYTES, prepare
from zoo.data.load import SOURCES, cache_folder, make_source
from zoo.data.sources import SPLITS, Source
from zoo.data.sources_text import WholeText
from zoo.errors import ZooError, choose
from zoo.evaluate import AT_ONCE, Evaluation, read_carried, read_windows
from zoo.files import replace
from zoo.model import LanguageModel
from zoo.tokenizers import Tokenizer


@dataclass(frozen=True)
class Excerpt:
    """A split from its beginning on: tokens [n], and the bytes and words of text that all but the first stand for.

    A word is what whitespace, or the end of a document, leaves standing together.
    """

    tokens: np.ndarray
    bytes: int
    words: int
    separator: int
    about: dict[str, Any]  # name, split and fingerprint of the corpus


@dataclass(frozen=True)
class Reading:
    """What a model made of an excerpt, read in one way. `how` says which; the bins of the positions are doublings."""

    how: str
    context: int  # tokens before the target that it has at most
    stride: int | None
    found: Evaluation
    words: int
    seconds: float

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats / words): what the perplexity of a token would be if tokens were words. None without words."""
        nats = self.found.bits_per_byte * math.log(2) * self.found.bytes
        return math.exp(min(700.0, nats / self.words)) if self.words else None

    def to_dict(self) -> dict[str, Any]:
        found = self.found
        return {"how": self.how, "context": self.context, "stride": self.stride, "bits_per_byte": found.bits_per_byte,
                "perplexity": found.perplexity, "word_perplexity": self.word_perplexity, "tokens": found.tokens,
                "bytes": found.bytes, "words": self.words, "seconds": round(self.seconds, 3),
                "positions": found.positions}


def open_excerpt(name: str, tokenizer: Tokenizer, *, path: str | None = None, split: str = "test",
                 cache: str | None = None, limit: int | None = None,
                 progress: Callable[[int, int | None], None] | None = None) -> Excerpt:
    """The split of a corpus in a model's tokens, or its first `limit` targets.

    name, path: as data.name and data.path in training; of data=text, which has no splits of its own, all of it. Raises
    ZooError for an unknown corpus or split, one without text, or a limit that it does not have.
    """
    choose("data", name, SOURCES)
    choose("split", split, SPLITS)
    folder = cache_folder(cache)
    if name == "text":
        if split != "test":
            raise ZooError(f"split {split!r} of data=text is not allowed: a file has no splits here, all of it is read")
        if path is None:
            raise ZooError("data=text needs a path: a file, a folder or a glob of text, .jsonl or .parquet files")
        source: Source = WholeText(path)
    else:
        source = make_source({"name": name} | ({} if path is None else {"path": path}), folder)
    data = prepare(source, tokenizer, folder, progress)
    tokens = data.split(split)
    if not data.bytes[split]:
        raise ZooError(f"data={name} has no text in its {split} split; allowed: "
                       f"{', '.join(kind for kind in SPLITS if data.bytes[kind])}")
    text_bytes = data.bytes[split]
    if limit is not None:
        if not 1 <= limit < len(tokens):
            raise ZooError(f"{limit} tokens are not allowed: 1 to {len(tokens) - 1}, as many as the {split} split has")
        tokens = tokens[:limit + 1]
        text_bytes = len(tokenizer.to_bytes(tokens[1:]))
    about = {"name": name, "split": split, "fingerprint": data.fingerprint, "targets": len(tokens) - 1}
    return Excerpt(tokens, text_bytes, count_words(tokens, tokenizer), tokenizer.separator, about)


def count_words(tokens: np.ndarray, tokenizer: Tokenizer) -> int:
    """Words of all documents; whitespace as Unicode has it, bytes that are no UTF-8 count as letters."""
    borders = np.flatnonzero(np.asarray(tokens) == tokenizer.separator)
    words = 0
    for start, end in zip([0, *(borders + 1).tolist()], [*borders.tolist(), len(tokens)], strict=True):
        decoder, inside = codecs.getincrementaldecoder("utf-8")("replace"), False
        for at in range(start, end, GROUP_BYTES):
            last = at + GROUP_BYTES >= end
            text = decoder.decode(tokenizer.to_bytes(tokens[at:min(end, at + GROUP_BYTES)]), final=last)
            if text:
                words += len(text.split()) - (inside and not text[0].isspace())
                inside = not text[-1].isspace()
    return words


def read(model: LanguageModel, excerpt: Excerpt, *, strides: Sequence[int] = (), lengths: Sequence[int] = (),
         carried: bool = False, batch_tokens: int | None = None, bf16: bool = False,
         progress: Callable[[str, int, int], object] | None = None) -> Iterator[Reading]:
    """Read an excerpt in windows of each length, in the first length's with each stride, and with carried state.

    lengths: in tokens, the model's own training length if none is given; a text that is shorter is one window.
    batch_tokens: through the model at once; it changes rounding alone. Everything is checked before anything is read.
    Raises ZooError for a length or document past the model's limit, a stride that is not 1 to the length, or too little
    memory.
    """
    room = len(excerpt.tokens) - 1
    wanted: list[tuple[int, int | None]] = [(min(length, room), None) for length in lengths or (model.config.seq_len,)]
    if min(length for length, _ in wanted) < 1:
        raise ZooError(f"a length of {min(lengths)} tokens is not allowed: 1 or more")
    wanted += [(wanted[0][0], stride) for stride in strides]
    for length, stride in wanted:
        model.check_length(length)
        if stride is not None and not 1 <= stride <= length:
            raise ZooError(f"a stride of {stride} tokens is not allowed: 1 to {length}, the window's length")
    if carried:
        model.check_length(longest_document(excerpt))
    for length, stride in dict.fromkeys(wanted):
        how = f"windows of {length}" + (f", stride {stride}" if stride else "")
        tell = None if progress is None else _named(progress, how)
        with enough_memory(model, batch_tokens, length):
            begun = time.perf_counter()
            tally = read_windows(model, excerpt.tokens, length, stride, batch_tokens=batch_tokens, bf16=bf16,
                                 progress=tell)
            found = tally.result(excerpt.bytes, doublings(length))
        yield Reading(how, length, stride, found, excerpt.words, time.perf_counter() - begun)
    if carried:
        with enough_memory(model, batch_tokens, 1):
            begun = time.perf_counter()
            tally = read_carried(model, excerpt.tokens, excerpt.separator, batch_tokens=batch_tokens, bf16=bf16,
                                 progress=None if progress is None else _named(progress, "carried"))
            found = tally.result(excerpt.bytes, doublings(len(tally.nats)))
        yield Reading("carried", len(tally.nats), None, found, excerpt.words, time.perf_counter() - begun)


def longest_document(excerpt: Excerpt) -> int:
    """Tokens of the longest document, its separator not counted."""
    starts = np.flatnonzero(np.asarray(excerpt.tokens) == excerpt.separator)
    return int(np.diff(starts, append=len(excerpt.tokens)).max()) - 1


def doublings(length: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the length itself: upper ends of bins of positions."""
    return (*(1 << i for i in range((length - 1).bit_length())), length)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Raises ZooError where the disk refuses."""
    try:
        replace(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror or error}") from None


def _named(progress: Callable[[str, int, int], object], how: str) -> Callable[[int, int], object]:
    return lambda done, total: progress(how, done, total)


@contextmanager
def enough_memory(model: LanguageModel, batch_tokens: int | None, least: int) -> Iterator[None]:
    """What to do where memory runs out. `least`: tokens that go through the model at once in any case."""
    device = model.head.weight.device
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, a CPU's a plain one
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        given = max(least, batch_tokens or AT_ONCE.get(device.type, AT_ONCE["cpu"]))
        allowed = f"--batch-tokens below {given}" if given > least else f"a length below {least}"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ZooError(f"too little memory on {device} for {given} tokens at once: {reason}; "
                       f"allowed: {allowed}") from None
