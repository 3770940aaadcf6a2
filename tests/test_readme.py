"""The README is a promise: what it says runs, in the order it says it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# An audit hook sees every socket of a process, whichever library asks for it, and cannot be taken off again.
REFUSING = """
import runpy, sys

def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":  # which is asked of this machine alone
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
sys.argv = sys.argv[1:]
if sys.argv[0] == "zoo":
    from zoo.cli import main
    main(sys.argv[1:])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
GROUPS = "model", "size", "data", "tokenizer", "optim", "schedule", "trainer", "logger", "debug", "experiment"
# The same commands in seconds: two small steps, on a text whose validation split is small too.
SHORTER = "batch_tokens=128", "seq_len=64", "size=nano", "sample_tokens=8", "data=text", "data.path=README.md"


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = (line.split(" #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A script, or `zoo`, in a process that may open no socket."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.run([sys.executable, "-c", REFUSING, *command], cwd=folder, env=environment, text=True,
                          capture_output=True)


def test_a_socket_would_be_caught(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')\n")
    done = run(tmp_path, "asks.py")
    assert done.returncode == 1
    assert done.stderr.startswith("socket.getaddrinfo"), done.stderr


def test_readme_promises_what_exists() -> None:
    """Every file it links to is there; its tables name every model, size, corpus and option group there is."""
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for group in GROUPS:
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert f"`{path.stem}`" in README, f"{group}={path.stem} is not in the README"
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {line.split()[1] for line in commands() if line.startswith("make ")} <= targets


@pytest.mark.timeout(600)
def test_readme_commands_run(tmp_path: Path) -> None:
    """Every shell command but `make` itself, then the Python block, in one folder, trainings cut to two steps; and none
    of them opens a socket."""
    shutil.copy(ROOT / "README.md", tmp_path)
    resumed = 2
    for line in commands():
        words = shlex.split(line)
        if words[0] in ("make", "source"):
            continue
        if words[:2] == ["python", "train.py"]:
            resumed += "resume=auto" in words  # goes on by a step
            kept = [word for word in words[2:] if word.partition("=")[0] not in ("data", "data.path", "size")]
            words = [str(ROOT / "train.py"), *kept, *SHORTER, f"steps={resumed}"]
        words += ["--seconds", "1"] if words[:3] == ["zoo", "bench", "train"] else []
        done = run(tmp_path, *words)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    (tmp_path / "block.py").write_text(code)
    done = run(tmp_path, "block.py")
    assert done.returncode == 0, done.stderr
