"""100 English Novels: nineteenth- and early twentieth-century fiction, 78 MB, with four whole novels to validate on."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from zoo.data.sources import SPLITS, Piece
from zoo.errors import ZooError

# The longest novel has 2 MB; a larger member is no novel, and reading stops before it fills the memory.
LARGEST_FILE = 1 << 25


@dataclass(frozen=True)
class Facts:
    """What identifies the corpus: everything read is checked against it."""

    repository: str
    commit: str
    held_out: Mapping[str, tuple[str, ...]]  # split: file names without .txt; the others are for training
    bytes: Mapping[str, int]
    sha256: Mapping[str, str]  # of a split's normalised documents, one after the other in file-name order

    def split_of(self, title: str) -> str:
        return next((split for split, titles in self.held_out.items() if title in titles), "train")


FACTS = Facts(
    repository="https://github.com/computationalstylistics/100_english_novels",
    commit="143e601875d70e195f2cc5ebd8b034609271194d",
    held_out={
        "validation": ("Conrad_Rover_1923", "Forster_View_1908", "Hardy_Madding_1874", "Kipling_Kim_1901"),
        "test": ("Doyle_Lost_1912", "Gaskell_Ruth_1855", "James_Roderick_1875", "Stevenson_Treasure_1883",
                 "Woolf_Years_1937"),
    },
    bytes={"train": 72071708, "validation": 2201467, "test": 3108388},
    sha256={
        "train": "4dd5b98efb1b57bffd734d7a88f1129e05e360c6c8e92bbcd875b395b806874b",
        "validation": "191f316026530fd29bd833271dbd8f047ae47f0eb32050e65532e0d61a4c150d",
        "test": "bf9ce667a1796da66861b66083822c6fffd12f9ed5ca51aa248f16505589f7b0",
    },
)


class Novels:
    """The corpus from `path`: a folder of .txt files, a folder with corpus.tar.xz, an archive, or "fetch".

    Text is UTF-8 without its byte-order mark, with LF for CRLF, and otherwise as published. Each split is checked for
    its byte count and SHA-256 while it is read. Archives are read as streams: nothing is unpacked to disk.
    """

    name = "novels"
    splits = SPLITS

    def __init__(self, path: str | None = None, *, cache: Path, facts: Facts = FACTS):
        self.facts = facts
        self.total_bytes: int | None = sum(facts.bytes.values())
        fetched = cache / "downloads" / f"novels-{facts.commit}.tar.gz"
        if path is None or path == "fetch":
            if path is None and not fetched.is_file():
                raise ZooError("data=novels needs data.path: a folder of its .txt files, its archive, or "
                               f"data.path=fetch to download it once from {facts.repository}")
            if not fetched.is_file():
                _fetch(facts, fetched)
            self.path = fetched
            return
        self.path = Path(path).expanduser()
        if self.path.is_dir() and (self.path / "corpus.tar.xz").is_file():
            self.path /= "corpus.tar.xz"
        elif (self.path / "corpus").is_dir():  # a clone of the repository
            self.path /= "corpus"
        if not self.path.exists():
            raise ZooError(f"data.path={path} does not exist; allowed: a folder of the novels' .txt files, a folder "
                           "with corpus.tar.xz, an archive (.tar, .tar.xz, .tar.gz), or fetch")

    def identity(self) -> dict[str, Any]:
        return {"source": self.name, "commit": self.facts.commit, "sha256": dict(self.facts.sha256)}

    def __iter__(self) -> Iterator[Piece]:
        digests = {split: hashlib.sha256() for split in SPLITS}
        sizes = dict.fromkeys(SPLITS, 0)
        last = ""
        for title, data in self._files():
            if title <= last:
                raise ZooError(f"{self.path}: {title}.txt comes after {last}.txt; novels have to be in file-name order")
            last = title
            try:
                text = data.decode().removeprefix("\ufeff").replace("\r\n", "\n").encode()
            except UnicodeDecodeError:
                raise ZooError(f"{self.path}: {title}.txt is not UTF-8 text") from None
            split = self.facts.split_of(title)
            digests[split].update(text)
            sizes[split] += len(text)
            yield Piece(split, title, text)
        for split in SPLITS:
            self._check(split, "bytes", self.facts.bytes[split], sizes[split])
            self._check(split, "SHA-256", self.facts.sha256[split], digests[split].hexdigest())

    def _check(self, split: str, what: str, expected: object, found: object) -> None:
        if found != expected:
            raise ZooError(f"{self.path} is not 100 English Novels at commit {self.facts.commit[:12]}: the {split} "
                           f"split has {what} {found}, expected {expected}")

    def _files(self) -> Iterator[tuple[str, bytes]]:
        if self.path.is_dir():
            files = sorted(self.path.glob("*.txt"), key=lambda file: file.stem)
            if not files:
                raise ZooError(f"{self.path} holds neither .txt files nor corpus.tar.xz")
            for file in files:
                if file.stat().st_size > LARGEST_FILE:
                    raise ZooError(f"{file} has over {LARGEST_FILE >> 20} MiB; none of the novels does")
                yield file.stem, file.read_bytes()
            return
        try:
            with tarfile.open(self.path, "r|*") as archive:
                for member in archive:
                    # A member is only read, and named by the last part of its path: no path of the archive is followed.
                    name = PurePosixPath(member.name)
                    if not member.isreg() or name.suffix != ".txt" or name.parent.name not in ("", "corpus"):
                        continue
                    if member.size > LARGEST_FILE:
                        raise ZooError(f"{self.path}: {member.name} has {member.size} bytes; no novel has over "
                                       f"{LARGEST_FILE >> 20} MiB")
                    stream = archive.extractfile(member)
                    assert stream is not None  # a regular file has content
                    yield name.stem, stream.read()
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            raise ZooError(f"cannot read the archive {self.path}: {str(error).splitlines()[0]}") from None


def _fetch(facts: Facts, target: Path) -> None:
    """Download the commit's archive next to `target`, check all of its text, and only then give it its name."""
    url = f"{facts.repository}/archive/{facts.commit}.tar.gz"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise ZooError(f"cannot write to {target.parent}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            with urllib.request.urlopen(url, timeout=60) as response:
                shutil.copyfileobj(response, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        for _ in Novels(temporary, cache=target.parent, facts=facts):
            pass
        Path(temporary).replace(target)
    except OSError as error:  # urllib's errors are OSErrors
        reason = getattr(error, "reason", None) or error.strerror or error
        raise ZooError(f"cannot fetch {url} ({reason}); download it elsewhere and give data.path=ARCHIVE") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
