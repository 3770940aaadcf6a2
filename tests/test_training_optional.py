"""What is installed beside the zoo costs a run nothing."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from zoo.training.optional import OF_METRICS, hidden

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder of packages as torchmetrics looks for them, each of which ends the process that imports it."""
    for name in OF_METRICS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} was imported')\n")
        (tmp_path / f"{name}-99.0.dist-info").mkdir()
        (tmp_path / f"{name}-99.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    return tmp_path


def test_the_command_does_not_import_what_metrics_would_use(planted: Path) -> None:
    """As far as a wrong option that is found by what Lightning has been imported for."""
    environment = os.environ | {"PYTHONPATH": str(planted)}
    words = "model=rwkv", "size=nano", "data=text", f"data.path={planted / 'nowhere'}", "trainer=cpu"
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, env=environment, capture_output=True,
                          text=True)
    assert "nowhere" in done.stderr
    assert "was imported" not in done.stdout + done.stderr
    assert done.returncode == 2


def test_packages_are_hidden_and_come_back(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(planted)
    before = list(sys.meta_path)
    with hidden(frozenset({"librosa"})):
        assert find_spec("librosa") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("librosa")
        with pytest.raises(PackageNotFoundError):
            version("librosa")
        assert find_spec("nltk") is not None
        assert version("nltk") == "99.0"
        assert find_spec("zoo.model") is not None
    with contextlib.suppress(ZeroDivisionError), hidden():
        1 / 0  # noqa: B018
    assert sys.meta_path == before
    assert find_spec("librosa") is not None
    assert version("librosa") == "99.0"
