"""Where text comes from. A source yields documents lazily, in one fixed order and in constant memory.

One pass over a source gives all its splits, so that a corpus that must be downloaded or unpacked is read once. A
document comes as one or more pieces: what matters is that pieces and their order are the same on every pass, which is
what lets an interrupted preparation go on where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from zoo.errors import ZooError

SPLITS = ("train", "validation", "test")
BLOCK = 1 << 20


class Piece(NamedTuple):
    """A part of a document: `text` belongs to `split`, and `begins` says that a new document starts with it."""

    split: str
    name: str
    text: bytes
    begins: bool = True


class InterruptedReadError(ZooError):
    """A source that broke off through no fault of its text (a lost connection): what was read stays good."""


class Source(Protocol):
    """Iterating yields every piece of every split."""

    name: str
    splits: tuple[str, ...]
    """The splits that have to hold text."""
    total_bytes: int | None
    """Bytes of text in all splits, where known before reading; only for showing progress."""

    def identity(self) -> dict[str, Any]:
        """Plain values that name the text: sources of equal identity yield equal pieces."""

    def __iter__(self) -> Iterator[Piece]: ...


class Stdlib:
    """The running interpreter's standard library as Python source, without its tests: real text on every machine.

    The documents are files. A top-level module or package goes to one split as a whole, chosen by the hash of its
    name, so that it stays there from one Python version to the next. Validation and test are about 3 % of the 12 MB
    each.
    """

    name = "stdlib"
    splits = SPLITS
    held_out = 0.06  # of the modules; large packages are few, so less of the bytes
    _left_out = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

    def __init__(self, *, root: Path | None = None):
        self.root = root or Path(sysconfig.get_path("stdlib"))
        # _sysconfigdata_* records how this interpreter was built, which is no library source
        self._files = [(name, file) for name, file in files_below(self.root, self._left_out.__contains__)
                       if file.suffix == ".py" and not file.name.startswith("_sysconfigdata")]
        if not self._files:
            raise ZooError(f"data=stdlib: {self.root} holds no Python sources; use data=text data.path=FILE instead")
        self.total_bytes: int | None = sum(file.stat().st_size for _, file in self._files)

    def identity(self) -> dict[str, Any]:
        return {"source": self.name, "held_out": self.held_out, "files": stat_digest(self._files)}

    def __iter__(self) -> Iterator[Piece]:
        for name, file in self._files:
            text = file.read_bytes()
            if text and is_text(text):
                yield Piece(self.split_of(name.split("/")[0].removesuffix(".py")), name, text)

    @classmethod
    def split_of(cls, module: str) -> str:
        return hashed_split(f"stdlib/{module}".encode(), cls.held_out, cls.held_out)


def hashed_split(key: bytes, validation: float, test: float) -> str:
    """The split of a document by the hash of what identifies it: the same on every machine and every run."""
    place = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
    return "validation" if place < validation else "test" if place < validation + test else "train"


def files_below(root: Path, left_out: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """All files below a folder as (name, file) in the order of their names, which are relative to it; files and folders
    whose own name is `left_out` are passed over."""
    files = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not left_out(name)]
        files += [Path(place, name) for name in names if not left_out(name)]
    return sorted((file.relative_to(root).as_posix(), file) for file in files if file.is_file())


def stat_digest(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of names, sizes and times of modification: changes when a file does, without reading it."""
    digest = hashlib.sha256()
    for name, file in files:
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def is_text(data: bytes) -> bool:
    """UTF-8 without NUL."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def blocks(stream: BinaryIO, name: str, what: str) -> Iterator[bytes]:
    """A stream's text in blocks of about 1 MiB that end between characters, and between lines where there are lines.

    A byte-order mark at its start is dropped. Raises a ZooError where the stream is no UTF-8 text; `what` names it
    there.
    """
    rest = stream.read(3).removeprefix(b"\xef\xbb\xbf")
    while block := rest + stream.read(BLOCK):
        rest = b""
        if len(block) >= BLOCK:
            cut = _cut(block)
            block, rest = block[:cut], block[cut:]
        if not is_text(block):
            raise ZooError(f"{what}: {name} is binary or not UTF-8; allowed: text in UTF-8 without NUL bytes")
        yield block


def _cut(block: bytes) -> int:
    """Where to end a block: between two visible characters with a line end in between, where BPE cuts too; else after a
    line; else before an unfinished character."""
    tail = len(block) - BLOCK // 16
    for match in re.finditer(rb"[!-~]\n(?=[!-~])", block[tail:]):
        cut = tail + match.end()
        break
    else:
        cut = block.rfind(b"\n") + 1
    if cut:
        return cut
    cut = len(block)
    while cut > len(block) - 4 and block[cut - 1] & 0xC0 == 0x80:  # continuation bytes of the last character
        cut -= 1
    return cut - 1 if block[cut - 1] >= 0xC0 else len(block)
