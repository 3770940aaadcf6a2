"""Files that are either old or new, never half-written: whatever happens while they are replaced."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Give `path` new content, or what a function writes: under another name in its folder, synced, then renamed.

    That name is `.NAME.` and eight hexadecimal digits; only a kill leaves it behind. An OSError, from a full disk say,
    leaves `path` as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()
