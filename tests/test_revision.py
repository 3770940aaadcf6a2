"""The commit that runs and tables name: of git, of a source archive, and of nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def said(folder: Path, digits: int = 40) -> str:
    """By the copy in `folder`, alone in a fresh process."""
    code = f"import runpy; print(runpy.run_path('revision.py')['source_commit']({digits}))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True,
                          text=True).stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of the module alone."""
    tree = tmp_path / "tree"
    (tree / "zoo").mkdir(parents=True)
    shutil.copy(ROOT / ".gitattributes", tree)
    shutil.copy(ROOT / "zoo" / "revision.py", tree / "zoo")
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "one")
    return tree


def test_a_repository_names_its_commit_and_that_it_was_edited(tree: Path) -> None:
    head = git(tree, "rev-parse", "HEAD")
    assert said(tree / "zoo") == head
    assert said(tree / "zoo", 12) == head[:12]
    with (tree / "zoo" / "revision.py").open("a") as file:
        file.write("\n")
    assert said(tree / "zoo") == f"{head}+changes"


def test_an_archive_names_its_commit_wherever_it_lies(tree: Path, tmp_path: Path) -> None:
    head = git(tree, "rev-parse", "HEAD")
    for place in (tmp_path, tree / "unpacked"):  # outside of git, and inside a repository that it is no part of
        git(tree, "archive", "-o", str(tmp_path / "it.tar"), "HEAD")
        (place / "copy").mkdir(parents=True)
        shutil.unpack_archive(tmp_path / "it.tar", place / "copy")
        assert said(place / "copy" / "zoo") == head
        assert said(place / "copy" / "zoo", 12) == head[:12]


def test_another_repository_around_an_installed_copy_is_not_taken_for_it(tree: Path, tmp_path: Path) -> None:
    installed = tree / "site-packages" / "zoo"
    shutil.copytree(tree / "zoo", installed)
    assert said(installed) == "None"
    shutil.copytree(installed, tmp_path / "elsewhere")
    assert said(tmp_path / "elsewhere") == "None"
