"""Public corpora through Hugging Face `datasets`: enwik8, WikiText-103 and -2, TinyStories, FineWeb-Edu, LAMBADA.

`data.path` names a local copy of the repository's files in their published layout, and then nothing is fetched; the
same `load_dataset` call reads both. Rows come in the files' order.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.data.sources import BLOCK, SPLITS, InterruptedReadError, Piece, hashed_split, stat_digest
from zoo.errors import ZooError

logger = logging.getLogger(__name__)


def load_rows(corpus: str, reader: str, files: str, *, local: bool, cache: Path, streaming: bool,
              **options: Any) -> Iterator[str]:
    """Column `text` of `files`, a path, address or pattern, through a reader of `datasets`; any failure is a ZooError.

    Streaming reads the files as they are; otherwise `datasets` downloads and converts them into `cache` first.
    """
    try:
        import datasets
    except ImportError:
        raise ZooError(f"data={corpus} needs the package `datasets`: pip install datasets") from None
    # It would report each use of a reader to a server, also where the files are local.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        table = datasets.load_dataset(reader, data_files={"train": files}, split="train", streaming=streaming,
                                      cache_dir=str(cache / "datasets"), **options)
        for batch in table.iter(batch_size=1000):
            yield from batch["text"]
    except Exception as error:  # it lets errors of many libraries through, which have no base of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if local:
            raise ZooError(f"data={corpus}: cannot read the local copy {files}: {reason}") from None
        advice = "without a network give data.path"
        raise InterruptedReadError(f"data={corpus}: cannot read {files}: {reason}; {advice}") from None


class _Hub:
    """A repository of files of rows: where they are, and their rows."""

    name: str
    repository: str
    reader = "parquet"  # of `datasets`
    columns: Mapping[str, Any] = {"columns": ["text"]}  # what else the reader is told
    files: Mapping[str, str]  # split: pattern of its files in the repository
    splits: tuple[str, ...] = SPLITS
    streaming = False

    def __init__(self, path: str | None, revision: str, cache: Path):
        self.revision, self.cache = revision, cache
        self.total_bytes: int | None = None
        self.folder: Path | None = None
        if path is not None:
            self.folder = Path(path).expanduser()
            missing = [pattern for pattern in self.files.values() if not any(self.folder.glob(pattern))]
            if missing:
                raise ZooError(f"data.path={path} holds no {missing[0]}; data={self.name} takes a folder with the "
                               f"files of {self.repository}: {', '.join(self.files.values())}")

    def identity(self) -> dict[str, Any]:
        if (folder := self.folder) is None:
            return {"source": self.name, "repository": self.repository, "revision": self.revision}
        found = sorted(file for pattern in self.files.values() for file in folder.glob(pattern))
        return {"source": self.name, "folder": str(folder.resolve()),
                "files": stat_digest((file.relative_to(folder).as_posix(), file) for file in found)}

    def rows(self, split: str) -> Iterator[str]:
        # By their paths, not by the repository's name: what its README declares of its files is of no concern here.
        local = self.folder is not None
        place = self.folder if local else f"hf://datasets/{self.repository}@{self.revision}"
        return load_rows(self.name, self.reader, f"{place}/{self.files[split]}", local=local, cache=self.cache,
                         streaming=local or self.streaming, **self.columns)


class Enwik8:
    """The first 100 MB of a Wikipedia dump, XML and all: 90, 5 and 5 million bytes, each one document.

    `path` is a local copy, enwik8 or enwik8.zip, or the folder of it. One of another size is cut in the same
    proportions, with a warning, as its figures compare with no published ones.
    """

    name = "enwik8"
    splits = SPLITS
    url = "https://mattmahoney.net/dc/enwik8.zip"
    size = 100_000_000
    sha256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"

    def __init__(self, path: str | None = None, *, cache: Path):
        self.cache = cache
        self.total_bytes: int | None = self.size if path is None else None
        self.file: Path | None = None
        if path is not None:
            given = Path(path).expanduser()
            self.file = next((file for file in (given, given / "enwik8", given / "enwik8.zip") if file.is_file()), None)
            if self.file is None:
                raise ZooError(f"data.path={path} is neither enwik8 or enwik8.zip nor a folder with one of them")

    def identity(self) -> dict[str, Any]:
        if self.file is None:
            return {"source": self.name, "sha256": self.sha256}
        return {"source": self.name, "file": str(self.file.resolve()),
                "stat": stat_digest([(self.file.name, self.file)])}

    def _lines(self) -> Iterator[str]:
        local = self.file is not None
        return load_rows(self.name, "text", str(self.file or self.url), local=local, cache=self.cache, streaming=local,
                         keep_linebreaks=True)

    def __iter__(self) -> Iterator[Piece]:
        place = self.file or self.url
        size = sum(len(line.encode()) for line in self._lines())
        if size != self.size:
            if self.file is None:
                raise ZooError(f"{place} is not enwik8: {size} bytes, expected {self.size}")
            logger.warning("data=enwik8: %s has %d bytes, not %d: it is cut 90/5/5 in proportion, and its figures do "
                           "not compare with published ones", place, size, self.size)
        ends = {"train": size * 90 // 100, "validation": size * 95 // 100, "test": size}
        left, done, begins, digest = list(ends), 0, True, hashlib.sha256()
        for block in _joined(self._lines()):
            digest.update(block)
            while block:
                part = block[:ends[left[0]] - done]
                if part:
                    yield Piece(left[0], self.name, part, begins)
                    begins, done, block = False, done + len(part), block[len(part):]
                if done == ends[left[0]] and len(left) > 1:
                    left.pop(0)
                    begins = True
        if size == self.size and digest.hexdigest() != self.sha256:
            raise ZooError(f"{place} is not enwik8: SHA-256 {digest.hexdigest()}, expected {self.sha256}")


class WikiText103(_Hub):
    """Verified Wikipedia articles, the raw version with its own three splits; a document is an article.

    Rows are the lines of the published wiki.*.raw files. Their empty lines, one space each, are empty rows in the
    parquet files; they become a space and a line end again, so that byte counts are those of the published files.
    """

    name = "wikitext103"
    repository = "Salesforce/wikitext"
    files: Mapping[str, str] = {split: f"wikitext-103-raw-v1/{split}-*.parquet" for split in SPLITS}

    def __init__(self, path: str | None = None, revision: str = "b08601e04326c79dfdd32d625aee71d232d685c3",
                 *, cache: Path):
        super().__init__(path, revision, cache)

    def __iter__(self) -> Iterator[Piece]:
        for split in SPLITS:
            lines: list[str] = []
            title, previous_blank = "", True
            for row in self.rows(split):
                line = row or " \n"
                # " = Title = " after an empty line begins an article; " = = Section = = " does not
                heading = line.startswith(" = ") and line.endswith(" = \n") and not line.startswith(" = = ")
                if heading and previous_blank:
                    if any(text.strip() for text in lines):
                        yield Piece(split, title, "".join(lines).encode())
                        lines = []
                    title = line.strip(" =\n")
                lines.append(line)
                previous_blank = not line.strip()
            if lines:
                yield Piece(split, title, "".join(lines).encode())


class WikiText2(WikiText103):
    """The small one: other training articles, two million words of them, and the same held-out ones."""

    name = "wikitext2"
    files: Mapping[str, str] = {split: f"wikitext-2-raw-v1/{split}-*.parquet" for split in SPLITS}


class Lambada(_Hub):
    """LAMBADA (1606.06031) as OpenAI prepared it: 5,153 passages of novels, each a document, all of them to test on."""

    name = "lambada"
    repository = "EleutherAI/lambada_openai"
    reader, columns = "json", {}
    files: Mapping[str, str] = {"test": "data/lambada_test.jsonl"}
    splits = ("test",)

    def __init__(self, path: str | None = None, revision: str = "d28e11e11bebdeb93b75d632656ef68423adca9d",
                 *, cache: Path):
        super().__init__(path, revision, cache)

    def __iter__(self) -> Iterator[Piece]:
        for name, text in _documents(self.rows("test"), self.name):
            yield Piece("test", name, text)


class TinyStories(_Hub):
    """Short stories in simple English: the published training and validation splits; the test split is the hundredth of
    the training stories that the hash of their text picks, so that no story is in both."""

    name = "tinystories"
    repository = "roneneldan/TinyStories"
    files: Mapping[str, str] = {split: f"data/{split}-*.parquet" for split in ("train", "validation")}
    held_out = 0.01

    def __init__(self, path: str | None = None, revision: str = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
                 *, cache: Path):
        super().__init__(path, revision, cache)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "held_out": self.held_out}

    def __iter__(self) -> Iterator[Piece]:
        for name, text in _documents(self.rows("train"), self.name):
            yield Piece(hashed_split(text, 0.0, self.held_out), name, text)
        for name, text in _documents(self.rows("validation"), self.name):
            yield Piece("validation", name, text)


class FineWebEdu(_Hub):
    """Educational web pages, the 10-billion-token sample, streamed up to `max_bytes` of text in all splits together.

    It has one published split; validation and test are the pages that the hash of their text picks.
    """

    name = "fineweb_edu"
    repository = "HuggingFaceFW/fineweb-edu"
    files: Mapping[str, str] = {"train": "sample/10BT/*.parquet"}
    streaming = True

    def __init__(self, path: str | None = None, revision: str = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
                 max_bytes: int = 1_000_000_000, validation_fraction: float = 0.002,
                 test_fraction: float = 0.002, *, cache: Path):
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ZooError(f"data.max_bytes={max_bytes!r}; allowed: a whole number from 1")
        for name, fraction in (("validation", validation_fraction), ("test", test_fraction)):
            if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 0.5:
                raise ZooError(f"data.{name}_fraction={fraction!r}; allowed: over 0 to less than 0.5")
        super().__init__(path, revision, cache)
        self.total_bytes = max_bytes
        self.max_bytes, self.fractions = max_bytes, (validation_fraction, test_fraction)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "max_bytes": self.max_bytes, "fractions": list(self.fractions)}

    def __iter__(self) -> Iterator[Piece]:
        taken = 0
        for name, text in _documents(self.rows("train"), self.name):
            taken += len(text)
            if taken > self.max_bytes:
                return
            yield Piece(hashed_split(text, *self.fractions), name, text)


def _documents(rows: Iterator[str], corpus: str) -> Iterator[tuple[str, bytes]]:
    """Rows as documents. Empty ones, and the few with a NUL character that crawled text has, are left out."""
    for number, row in enumerate(rows):
        text = (row or "").encode("utf-8", "replace")
        if text and b"\0" not in text:
            yield f"{corpus}:{number}", text


def _joined(rows: Iterator[str]) -> Iterator[bytes]:
    """Rows end to end, in blocks of about 1 MiB that end with a row."""
    block: list[bytes] = []
    size = 0
    for row in rows:
        block.append(row.encode())
        size += len(block[-1])
        if size >= BLOCK:
            yield b"".join(block)
            block, size = [], 0
    if block:
        yield b"".join(block)
