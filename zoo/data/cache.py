"""Tokens on disk: a text is tokenised once, then memory-mapped by everyone who reads it.

A prepared corpus is a folder: one file of tokens per split, the tokenizer, and manifest.json, which is written last,
so a folder with a manifest is whole. Until then a journal says how much of each file is good; after `kill -9` at any
moment the files are cut back to it, the source is read past the pieces it covers, and the result is byte for byte
that of an uninterrupted run. A token stream is: separator, document, separator, document, ...
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.sources import SPLITS, InterruptedReadError, Piece, Source
from zoo.errors import ZooError
from zoo.files import replace
from zoo.tokenizers import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

FORMAT = 1
GROUP_BYTES = 1 << 20  # text tokenised at a time
JOURNAL_BYTES = 1 << 25  # text between two entries of the journal: what a kill can cost
Progress = Callable[[int, int | None], None]
"""Called with the bytes of text done so far, and their total where it is known."""


@dataclass(frozen=True)
class TokenData:
    """A prepared corpus. The token arrays are memory-mapped and open on first use, so it is cheap to pickle or fork."""

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer

    @cached_property
    def train(self) -> np.ndarray:
        return self.split("train")

    @cached_property
    def validation(self) -> np.ndarray:
        return self.split("validation")

    @cached_property
    def test(self) -> np.ndarray:
        return self.split("test")

    @property
    def fingerprint(self) -> str:
        """Identifies all tokens of all splits and what they mean; does not depend on where the text was read from."""
        return str(self.manifest["fingerprint"])

    def split(self, split: str) -> np.ndarray:
        """The tokens of a split, [n], read-only; n = 0 where the corpus has no such split."""
        entry = self.manifest["splits"][split]
        if not entry["tokens"]:  # an empty file cannot be mapped
            return np.empty(0, dtype=entry["dtype"])
        return np.memmap(self.folder / entry["file"], dtype=entry["dtype"], mode="r", shape=(entry["tokens"],))

    def text(self, split: str) -> Iterator[bytes]:
        """The text of a split in blocks, without separators."""
        tokens = self.split(split)
        for start in range(0, len(tokens), GROUP_BYTES):
            yield self.tokenizer.to_bytes(tokens[start:start + GROUP_BYTES])

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of text in each split; separators are none."""
        return {split: entry["bytes"] for split, entry in self.manifest["splits"].items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cache, (self.folder,)  # a memory map would be pickled by value


def open_cache(folder: str | Path, verify: bool = False) -> TokenData:
    """Open a prepared corpus. Sizes are always checked, with `verify` the SHA-256 of each file too."""
    folder = Path(folder)
    rebuild = f"delete the folder {folder} and run again to prepare it anew"
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            raise ZooError(f"{folder} has cache format {manifest['format']!r}, this version reads {FORMAT}: {rebuild}")
        for split in SPLITS:
            entry = manifest["splits"][split]
            file = folder / entry["file"]
            expected, found = entry["tokens"] * np.dtype(entry["dtype"]).itemsize, file.stat().st_size
            if found != expected:
                raise ZooError(f"{file} is damaged ({found} bytes, expected {expected}): {rebuild}")
            if verify and (found_hash := _sha256(file)) != entry["sha256"]:
                raise ZooError(f"{file} is damaged (SHA-256 {found_hash}, expected {entry['sha256']}): {rebuild}")
        return TokenData(folder, manifest, load_tokenizer(folder, manifest["tokenizer"]))
    except ZooError:
        raise
    except OSError as error:
        raise ZooError(f"cannot read {error.filename or folder} ({error.strerror}): {rebuild}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ZooError(f"{folder / 'manifest.json'} is damaged ({type(error).__name__}: {error}): {rebuild}") from None


def prepare(source: Source, tokenizer: Tokenizer, cache: str | Path, progress: Progress | None = None) -> TokenData:
    """Tokenise a source into a folder of `cache`, or open the one that an earlier call made.

    Memory does not grow with the text. Of two processes that prepare the same corpus the second waits for the first.
    An interrupted preparation goes on where it stopped; one that meets bad text or a full disk leaves nothing behind.
    """
    identity = {"format": FORMAT, "source": source.identity(), "tokenizer": tokenizer.spec}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = Path(cache).expanduser() / f"{source.name}-{tokenizer.kind}-{key[:12]}"
    if not (folder / "manifest.json").exists():
        with locked(folder):
            if not (folder / "manifest.json").exists():  # the process we waited for may have made it
                try:
                    _write(source, tokenizer, folder, identity, progress)
                except InterruptedReadError:
                    raise
                except Exception:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
    return open_cache(folder)


def _write(source: Source, tokenizer: Tokenizer, folder: Path, identity: dict[str, Any],
           progress: Progress | None) -> None:
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        with writing(folder):
            folder.mkdir(exist_ok=True)
            entry = _journaled(folder, dtype)
            splits = {name: _Split(folder / f"{name}.bin", dtype, *entry["splits"][name]) for name in SPLITS}
        for split in splits.values():
            stack.callback(split.stream.close)
        noted = 0
        for pieces, read, group in _groups(source, entry["pieces"]):
            encoded = tokenizer.encode_batch([piece.text for piece in group])
            with writing(folder):
                for piece, ids in zip(group, encoded, strict=True):
                    splits[piece.split].add(piece, ids, tokenizer)
                for split in splits.values():
                    split.flush()
                if read - noted >= JOURNAL_BYTES:
                    noted = read
                    for split in splits.values():
                        os.fsync(split.stream.fileno())
                    counts = {name: (split.tokens, split.bytes, split.documents) for name, split in splits.items()}
                    replace(folder / "journal.json", json.dumps({"pieces": pieces, "splits": counts}).encode())
            if progress is not None:
                progress(read, source.total_bytes)
        for name in source.splits:
            if not splits[name].bytes:
                raise ZooError(f"data={source.name} is too short, it leaves no text for {name}; allowed: a longer "
                               "text, or one of more documents")
        entries = {name: {"file": f"{name}.bin", "dtype": dtype.name, "tokens": split.tokens, "bytes": split.bytes,
                          "documents": split.documents, "sha256": split.digest.hexdigest()}
                   for name, split in splits.items()}
        content = {"tokenizer": tokenizer.spec, "splits": {name: entry["sha256"] for name, entry in entries.items()}}
        manifest = {"format": FORMAT, "source": identity["source"], "tokenizer": tokenizer.spec,
                    "fingerprint": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16],
                    "splits": entries}
        with writing(folder):
            for split in splits.values():
                os.fsync(split.stream.fileno())
            tokenizer.save(folder)
            replace(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
            (folder / "journal.json").unlink(missing_ok=True)


class _Split:
    """The growing token file of a split, its hash and its counts."""

    def __init__(self, file: Path, dtype: np.dtype, tokens: int, text_bytes: int, documents: int):
        self.dtype, self.tokens, self.bytes, self.documents = dtype, tokens, text_bytes, documents
        self.digest = hashlib.sha256()
        self.stream = file.open("ab", buffering=0)
        self.stream.truncate(tokens * dtype.itemsize)  # what came after the journal's last entry
        with file.open("rb") as good:
            for block in iter(lambda: good.read(1 << 20), b""):
                self.digest.update(block)
        self._pending: list[np.ndarray] = []

    def add(self, piece: Piece, ids: np.ndarray, tokenizer: Tokenizer) -> None:
        if piece.begins:
            self._pending.append(np.full(1, tokenizer.separator, dtype=self.dtype))
            self.documents += 1
        self._pending.append(narrow(ids, self.dtype, tokenizer))
        self.bytes += len(piece.text)

    def flush(self) -> None:
        if not self._pending:
            return
        data = memoryview(np.concatenate(self._pending).tobytes())
        self._pending.clear()
        self.digest.update(data)
        self.tokens += len(data) // self.dtype.itemsize
        while data:  # an unbuffered write may be partial
            data = data[self.stream.write(data):]


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest unsigned type that holds ids 0 .. vocab_size - 1."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def narrow(ids: np.ndarray, dtype: np.dtype, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a text in the file's type. numpy would wrap an id that does not fit, without a word."""
    if ids.size and not (ids.min() > tokenizer.separator and ids.max() < tokenizer.vocab_size):
        raise ZooError(f"the tokenizer gave ids {ids.min()} .. {ids.max()} for text; allowed: "
                       f"{tokenizer.separator + 1} .. {tokenizer.vocab_size - 1}")
    return ids.astype(dtype)


def _groups(source: Source, skip: int) -> Iterator[tuple[int, int, list[Piece]]]:
    """Pieces after the first `skip`, about a MiB at a time, with the counts of pieces and of bytes read so far."""
    pieces, read, group, size = 0, 0, [], 0
    for piece in source:
        pieces, read = pieces + 1, read + len(piece.text)
        if pieces > skip:
            group.append(piece)
            size += len(piece.text)
        if size >= GROUP_BYTES:
            yield pieces, read, group
            group, size = [], 0
    yield pieces, read, group


def _journaled(folder: Path, dtype: np.dtype) -> dict[str, Any]:
    """What an interrupted preparation left that is good; nothing where there was none, or its files are gone."""
    try:
        entry: dict[str, Any] = json.loads((folder / "journal.json").read_bytes())
        whole = all((folder / f"{name}.bin").stat().st_size >= entry["splits"][name][0] * dtype.itemsize
                    for name in SPLITS)
    except (FileNotFoundError, ValueError, KeyError):
        whole = False
    if not whole:
        return {"pieces": 0, "splits": dict.fromkeys(SPLITS, (0, 0, 0))}
    logger.info("going on with the preparation in %s after %d pieces", folder, entry["pieces"])
    return entry


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock named `path`.lock; wait while another process holds it. Released by the system if we are killed."""
    import fcntl  # not on Windows, where reading a prepared corpus still works

    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.with_name(f"{path.name}.lock").open("wb")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is preparing %s; waiting for it", path)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """A full disk, or one that cannot be written to, as a ZooError."""
    try:
        yield
    except OSError as error:
        raise ZooError(f"cannot write to {error.filename or place}: {error.strerror}; free some space or set "
                       "data.cache to a folder elsewhere") from None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
