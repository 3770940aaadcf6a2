"""Checkpoint files: written whole or not at all, and known to be whole when read.

A file is what `torch.save` writes (plain types and tensors only, so that it loads with `weights_only=True`), with a
SHA-256 of itself as the comment of that zip archive: one file, one rename, and nothing beside it to lose. `torch.load`
alone would take a file with flipped bits for good.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from zoo.errors import ZooError
from zoo.files import replace
from zoo.model import LanguageModel, ModelConfig

FORMAT = 1
MARK = b"zoo checkpoint, sha256 "
TAIL = len(MARK) + 64  # the comment: the mark, and the digest of everything before the comment's length
STEP_FILE = re.compile(r"step-(\d+)\.ckpt")
BEST = "best.ckpt"


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.ckpt"


class _Digesting:
    """A file to write to that digests all but the last two bytes, where a zip archive has the length of its comment."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest, self.held = file, hashlib.sha256(), b""
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        size = len(data)
        if size >= 2:
            body, last = self.held, bytes(data[-2:])
            self._put(body)
            self._put(data[:-2])
            self.held = last
        else:
            joined = self.held + bytes(data)
            self._put(joined[:-2])
            self.held = joined[-2:]
        return size

    def _put(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        try:
            self.file.write(data)
        except OSError as error:  # torch's writer would turn it into a RuntimeError without the reason
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()

    def finish(self) -> None:
        if self.held != b"\0\0":
            raise RuntimeError("torch.save no longer ends its archive with an empty comment")
        self.file.write(TAIL.to_bytes(2, "little") + MARK + self.digest.hexdigest().encode())


def write_file(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """`zoo.files.replace`, with a ZooError in one line for a disk that refuses."""
    try:
        replace(path, content)
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror or error}; what was saved before is intact") from None


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write a checkpoint of plain types and tensors."""

    def fill(file: IO[bytes]) -> None:
        writer = _Digesting(file)
        try:
            torch.save(payload, writer)  # type: ignore[arg-type]  # all that it needs of a file
            writer.finish()
        except (RuntimeError, OSError):
            if writer.error is not None:
                raise writer.error from None
            raise

    write_file(path, fill)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, None if nothing: its every byte is read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            comment = file.read()
            if not comment.startswith(MARK) or size <= TAIL + 2:
                return "is cut off, or is no checkpoint of this program"
            file.seek(0)
            digest, left = hashlib.sha256(), size - TAIL - 2
            while left:
                block = file.read(min(left, 1 << 22))
                if not block:
                    return "changed while it was read"
                digest.update(block)
                left -= len(block)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    whole = digest.hexdigest().encode() == comment[len(MARK):]
    return None if whole else "is damaged: its SHA-256 is not the one it carries"


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors mapped from the file. Raises ZooError for a file that is damaged or foreign."""
    if not path.is_file():
        raise ZooError(f"no checkpoint at {path}")
    if wrong := damage(path):
        raise ZooError(f"{path} {wrong}")
    payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(payload.get("zoo"), dict) or payload["zoo"].get("format") != FORMAT:
        raise ZooError(f"{path} has a format that this version does not read; it reads: {FORMAT}")
    return payload


def restore_model(saved: dict[str, Any]) -> LanguageModel:
    """The model of a checkpoint that was loaded, in eval mode."""
    model = LanguageModel(ModelConfig.from_dict(saved["zoo"]["model"]))
    model.load_state_dict({key.removeprefix("model."): value for key, value in saved["state_dict"].items()})
    return model.eval()


def list_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the checkpoints in a folder, newest first."""
    found = ((STEP_FILE.fullmatch(path.name), path) for path in folder.glob("step-*.ckpt"))
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def newest_good(folder: Path, complain: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; `complain` is told of each newer one that is not. None where there is none.

    Raises ZooError where there are checkpoints and none is whole: starting anew is then not ours to decide.
    """
    files = [path for _, path in list_steps(folder)]
    if (folder / BEST).is_file():
        files.append(folder / BEST)
    for path in files:
        wrong = damage(path)
        if wrong is None:
            return path
        complain(f"{path} {wrong}; going back to the one before")
    if files:
        raise ZooError(f"no checkpoint in {folder} is whole; remove the folder to start anew")
    return None


def prune(folder: Path, keep: set[Path]) -> None:
    """Remove the step checkpoints that are not in `keep`, and what a killed process left half-written."""
    for path in [*(path for _, path in list_steps(folder)), *folder.glob(".*.ckpt.*")]:
        if path not in keep:
            with suppress(OSError):
                path.unlink()


def mark_best(path: Path) -> None:
    """Give a checkpoint the second name best.ckpt: a hard link, or a copy where the file system has none."""
    best = path.with_name(BEST)
    temporary = path.with_name(f".{BEST}.{secrets.token_hex(4)}")
    try:
        os.link(path, temporary)
        temporary.replace(best)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        with path.open("rb") as source:
            write_file(best, lambda file: shutil.copyfileobj(source, file))


class CheckpointFile(CheckpointIO):
    """Lightning's door to these files: whatever the strategy gathered, rank 0 writes here."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save(Path(path), checkpoint)

    def load_checkpoint(self, path: str | Path, map_location: Any = None,
                        weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
