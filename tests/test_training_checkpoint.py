"""Checkpoint files: whole, or known not to be."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.errors import ZooError
from zoo.training import checkpoint
from zoo.training.checkpoint import BEST, damage, list_steps, load, mark_best, newest_good, prune, save, step_file


def payload(step: int, size: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((size,), float(step))}, "zoo": {"format": 1, "step": step}}


def test_round_trip_with_plain_torch_load(tmp_path: Path) -> None:
    file = step_file(tmp_path, 7)
    save(file, payload(7))
    assert damage(file) is None
    assert load(file)["zoo"]["step"] == 7
    assert torch.equal(torch.load(file, weights_only=True)["state_dict"]["w"], torch.full((1000,), 7.0))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    save(file, payload(1, size=8))
    data = file.read_bytes()
    for place in range(0, len(data), 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
        assert damage(file), place
    file.write_bytes(data)
    assert damage(file) is None


@pytest.mark.parametrize("keep", [0, 1, 50, -1, -2, -90])
def test_every_cut_is_seen(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "a.ckpt"
    save(file, payload(1))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ZooError, match=r"a\.ckpt is cut off, or is no checkpoint"):
        load(file)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.ckpt"
    torch.save(payload(1), foreign)  # the same content without the digest
    with pytest.raises(ZooError, match="no checkpoint of this program"):
        load(foreign)
    save(foreign, {"state_dict": {}, "zoo": {"format": 99}})
    with pytest.raises(ZooError, match="format"):
        load(foreign)
    with pytest.raises(ZooError, match="no checkpoint at"):
        load(tmp_path / "nothing.ckpt")


def test_newest_good_goes_back_and_says_so(tmp_path: Path) -> None:
    assert newest_good(tmp_path, pytest.fail) is None
    for step in (9, 10, 100):
        save(step_file(tmp_path, step), payload(step))
    assert [step for step, _ in list_steps(tmp_path)] == [100, 10, 9]
    assert newest_good(tmp_path, pytest.fail) == step_file(tmp_path, 100)
    step_file(tmp_path, 100).write_bytes(b"half")
    said: list[str] = []
    assert newest_good(tmp_path, said.append) == step_file(tmp_path, 10)
    assert len(said) == 1
    assert "step-00000100.ckpt" in said[0]
    for step in (9, 10):
        step_file(tmp_path, step).write_bytes(b"")
    with pytest.raises(ZooError, match=r"no checkpoint in .* is whole"):
        newest_good(tmp_path, said.append)


def test_best_is_a_name_of_its_own(tmp_path: Path) -> None:
    for step in (1, 2):
        save(step_file(tmp_path, step), payload(step))
    mark_best(step_file(tmp_path, 1))
    prune(tmp_path, keep={step_file(tmp_path, 2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, "step-00000002.ckpt"]
    assert load(tmp_path / BEST)["zoo"]["step"] == 1
    mark_best(step_file(tmp_path, 2))
    assert load(tmp_path / BEST)["zoo"]["step"] == 2


def test_best_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    save(step_file(tmp_path, 1), payload(1))
    mark_best(step_file(tmp_path, 1))
    assert load(tmp_path / BEST)["zoo"]["step"] == 1


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    save(step_file(tmp_path, 1), payload(1))
    (tmp_path / ".step-00000002.ckpt.0a1b2c3d").write_bytes(b"half")
    prune(tmp_path, keep={step_file(tmp_path, 1)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.ckpt"]


def test_a_full_disk_leaves_the_previous_one(tmp_path: Path) -> None:
    """RLIMIT_FSIZE refuses to let a file grow, as a full disk does."""
    file = step_file(tmp_path, 1)
    save(file, payload(1))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (100, 5_000, 100_000):  # refused in the middle of a tensor, and at the archive's end
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
            with pytest.raises(ZooError, match=r"cannot write .*File too large; what was saved before is intact"):
                save(file, payload(2, size=50_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert load(file)["zoo"]["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_kill_before_the_rename_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = step_file(tmp_path, 1)
    save(file, payload(1))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    synced: list[int] = []
    monkeypatch.setattr(checkpoint.os, "fsync", synced.append)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(file, payload(2))
    monkeypatch.undo()
    assert len(synced) == 1  # the content, before it gets its name
    assert load(file)["zoo"]["step"] == 1
