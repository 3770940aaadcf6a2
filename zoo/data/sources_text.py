"""A user's own files: plain text, JSON lines and parquet, each also compressed."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from zoo.data.sources import SPLITS, Piece, blocks, files_below, hashed_split, stat_digest
from zoo.errors import ZooError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_RECORDS = (".jsonl", ".ndjson", ".parquet")


class Text:
    """`path` is a file, a folder (every file below it that is not hidden) or a glob.

    A document is a file, or a record's `field` in .jsonl and .parquet. Splits not given by a path of their own are
    held out of `path` by whole documents: records by the hash of their text (equal texts stay together), files in the
    order of the hash of their names until the fraction of the bytes is reached. One or two plain files are held out
    in part instead: the last stretches of each, cut at a line.
    """

    name = "text"

    def __init__(self, path: str | None = None, validation_path: str | None = None, test_path: str | None = None,
                 field: str = "text", validation_fraction: float = 0.05, test_fraction: float = 0.05):
        if path is None:
            raise ZooError("data=text needs data.path: a file, a folder or a glob of text, .jsonl or .parquet files")
        given = {"validation": validation_path, "test": test_path}
        fractions = {"validation": validation_fraction, "test": test_fraction}
        for split, fraction in fractions.items():
            if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 0.5:
                raise ZooError(f"data.{split}_fraction={fraction!r}; allowed: 0 to less than 0.5")
        if validation_path is None and not validation_fraction:
            raise ZooError("data=text needs text to validate on: a data.validation_path, or a data.validation_fraction "
                           "over 0")
        self.field = field
        self._fractions = {split: 0.0 if given[split] else fractions[split] for split in given}
        held_out = {split: _find(where, f"data.{split}_path") for split, where in given.items() if where is not None}
        apart = {file.resolve() for files in held_out.values() for _, file in files}
        found = [(name, file) for name, file in _find(path, "data.path") if file.resolve() not in apart]
        self._files = {"train": found, **held_out}
        if not self._files["train"]:
            raise ZooError(f"data.path={path} names no file that is not in the validation or test path too")
        self.splits = tuple(split for split in SPLITS if split == "train" or given[split] or fractions[split])
        every = [file for files in self._files.values() for _, file in files]
        known = all(file.suffix not in COMPRESSED and _kind(file) == ".txt" for file in every)
        self.total_bytes: int | None = sum(file.stat().st_size for file in every) if known else None

    def identity(self) -> dict[str, Any]:
        return {"source": self.name, "field": self.field, "fractions": self._fractions,
                "files": {split: [stat_digest(files), *(str(file.resolve()) for _, file in files[:1]), len(files)]
                          for split, files in self._files.items()}}

    def __iter__(self) -> Iterator[Piece]:
        plain = [(name, file) for name, file in self._files["train"] if _kind(file) == ".txt"]
        by_part = len(plain) == len(self._files["train"]) <= 2
        split_of = {} if by_part else self._whole_files(plain)
        for name, file in self._files["train"]:
            if _kind(file) != ".txt":
                yield from self._records(name, file, None)
            elif by_part:
                yield from self._parts(name, file)
            else:
                yield from _whole(split_of.get(name, "train"), name, file)
        for split in ("validation", "test"):
            for name, file in self._files.get(split, ()):
                yield from self._records(name, file, split) if _kind(file) != ".txt" else _whole(split, name, file)

    def _whole_files(self, files: list[tuple[str, Path]]) -> dict[str, str]:
        """Which plain files are held out. File sizes, compressed or not, stand for their bytes of text."""
        sizes = {name: file.stat().st_size for name, file in files}
        left = sorted(sizes, key=_hashed)
        chosen: dict[str, str] = {}
        for split, fraction in self._fractions.items():
            wanted, taken = fraction * sum(sizes.values()), 0
            if not wanted or len(left) < 2:
                continue
            for name in list(left[:-1]):  # one file at least is for training
                # A file much larger than what is wanted stays in training, unless all are.
                if taken < wanted and taken + sizes[name] <= 2 * wanted:
                    taken += sizes[name]
                    chosen[name] = split
                    left.remove(name)
            if not taken:
                smallest = min(left, key=lambda name: sizes[name])
                chosen[smallest] = split
                left.remove(smallest)
        return chosen

    def _parts(self, name: str, file: Path) -> Iterator[Piece]:
        """One file in up to three stretches: training, then validation, then test."""
        size = file.stat().st_size
        if file.suffix in COMPRESSED:
            with _opened(file) as stream:
                size = sum(map(len, iter(lambda: stream.read(1 << 20), b"")))
        starts: list[tuple[str, int, int]] = []
        end = size
        for split in ("test", "validation"):
            length = int(size * self._fractions[split])
            end -= length
            if length:
                starts.insert(0, (split, end, length))
        split, begins, place = "train", True, 0
        with _opened(file) as stream:
            for block in blocks(stream, str(file), "data=text"):
                while starts and place + len(block) > starts[0][1]:
                    following, at, length = starts.pop(0)
                    cut = _line_or_character(block, max(0, at - place), length // 2)
                    if cut:
                        yield Piece(split, name, block[:cut], begins)
                    split, begins, place, block = following, True, place + cut, block[cut:]
                if block:
                    yield Piece(split, name, block, begins)
                    begins, place = False, place + len(block)

    def _records(self, name: str, file: Path, split: str | None) -> Iterator[Piece]:
        read = _parquet if _kind(file) == ".parquet" else _json_lines
        with _opened(file) as stream:
            for where, value in read(stream, file, self.field):
                if not isinstance(value, str):
                    raise ZooError(f"data=text: {file}, {where}: field {self.field!r} is {type(value).__name__}, "
                                   "not text")
                try:
                    text = value.encode()
                except UnicodeEncodeError:
                    raise ZooError(f"data=text: {file}, {where}: the text is not valid Unicode") from None
                if b"\0" in text:
                    raise ZooError(f"data=text: {file}, {where}: the text holds a NUL character; allowed: text without")
                if text:
                    yield Piece(split or hashed_split(text, *self._fractions.values()), f"{name}:{where}", text)


class WholeText:
    """The same files, nothing held out: all of their documents are one test split, for a model to be measured on."""

    name = "text"
    splits: tuple[str, ...] = ("test",)

    def __init__(self, path: str, field: str = "text"):
        self._text = Text(path, field=field)
        self.total_bytes = self._text.total_bytes

    def identity(self) -> dict[str, Any]:
        return self._text.identity() | {"fractions": {"test": 1.0}}

    def __iter__(self) -> Iterator[Piece]:
        for name, file in self._text._files["train"]:
            yield from _whole("test", name, file) if _kind(file) == ".txt" else self._text._records(name, file, "test")


def _hashed(name: str) -> bytes:
    """Where a name comes in an order that does not depend on the alphabet."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _find(path: str, option: str) -> list[tuple[str, Path]]:
    """The files a path means, as (name, file) in the order of their names; names are relative to the folder given."""
    root = Path(path).expanduser()
    if root.is_file():
        files = [(root.name, root)]
    elif root.is_dir():
        files = files_below(root, lambda name: name.startswith("."))
    else:
        anchor = root.anchor  # pathlib globs relative to a folder
        pattern = str(root.relative_to(anchor)) if anchor else str(root)
        files = [(str(file), file) for file in Path(anchor or ".").glob(pattern) if file.is_file()]
    if not files:
        raise ZooError(f"{option}={path} names no file; allowed: a file, a folder with files, or a glob")
    for _, file in files:
        if not file.stat().st_size:
            raise ZooError(f"{option}: {file} is empty")
    return sorted(files)


def _kind(file: Path) -> str:
    """.jsonl, .ndjson, .parquet, or .txt for everything else; what it is compressed with does not matter."""
    inner = Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
    return inner if inner in _RECORDS else ".txt"


def _line_or_character(block: bytes, at: int, reach: int) -> int:
    """The first line's beginning after `at` that is within reach, or else the first character's."""
    cut = block.find(b"\n", at, at + reach) + 1
    if not cut:
        cut = at
        while cut < len(block) and block[cut] & 0xC0 == 0x80:
            cut += 1
    return cut


def _whole(split: str, name: str, file: Path) -> Iterator[Piece]:
    with _opened(file) as stream:
        for index, block in enumerate(blocks(stream, str(file), "data=text")):
            yield Piece(split, name, block, begins=index == 0)


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The file's content, decompressed while it is read; damage is a ZooError."""
    openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
    damage: list[type[BaseException]] = [OSError, EOFError, zlib.error, lzma.LZMAError]
    if file.suffix == ".zst":
        import zstandard

        damage.append(zstandard.ZstdError)
    try:
        with openers.get(file.suffix, lambda file: file.open("rb"))(file) as stream:
            yield stream
    except tuple(damage) as error:
        raise ZooError(f"cannot read {file}: {(str(error) or 'it ends too early').splitlines()[0]}") from None


def _zstd(file: Path) -> BinaryIO:
    import zstandard

    reader = zstandard.ZstdDecompressor().stream_reader(file.open("rb"), read_across_frames=True, closefd=True)
    return io.BufferedReader(cast(io.RawIOBase, reader))


def _json_lines(stream: BinaryIO, file: Path, field: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one too
            raise ZooError(f"data=text: {file}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or field not in record:
            has = ", ".join(map(str, record)) if isinstance(record, dict) else "no object"
            raise ZooError(f"data=text: {file}, line {number} has no field {field!r} but {has}; set data.field")
        yield f"line {number}", record[field]


def _parquet(stream: BinaryIO, file: Path, field: str) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:  # parquet is read from its end
        if file.suffix in COMPRESSED:
            shutil.copyfileobj(stream, unpacked)
        try:
            table = pyarrow.parquet.ParquetFile(unpacked if file.suffix in COMPRESSED else stream)
            if field not in table.schema_arrow.names:
                raise ZooError(f"data=text: {file} has no column {field!r} but {', '.join(table.schema_arrow.names)}; "
                               "set data.field")
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f"row {row}", value
        except pyarrow.ArrowException as error:
            raise ZooError(f"cannot read {file}: {str(error).splitlines()[0]}") from None
