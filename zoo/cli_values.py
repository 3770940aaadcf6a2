"""What the commands' files share: options that are lists, files read and written whole, where tables are printed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zoo.errors import ZooError

if TYPE_CHECKING:
    from rich.console import Console

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is a GPU where there is one.")]


def listed(text: str) -> list[str]:
    """The parts between commas; none of an empty text."""
    return [part.strip() for part in text.split(",")] if text else []


def whole(option: str, text: str) -> list[int]:
    """The whole numbers between commas. Raises ZooError for anything else."""
    parts = listed(text)
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise ZooError(f"{option}: {wrong[0]!r} is not allowed: whole numbers with commas between")
    return [int(part) for part in parts]


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises ZooError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror}") from None


def read_table(path: Path | None) -> str:
    """The text of a table that new rows go into; empty where there is none yet."""
    return read_bytes(path).decode(errors="replace") if path is not None and path.is_file() else ""


def write(path: Path, text: str) -> None:
    """Write a file. Raises ZooError where it cannot be."""
    try:
        path.write_text(text)
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror}") from None


def console(*, stderr: bool = False) -> Console:
    """A terminal as wide as it is; files and pipes get lines long enough for any table."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)
