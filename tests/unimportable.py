"""Code run where packages are not to be had, as on a machine that lacks them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_without(packages: Iterable[str], code: str) -> str:
    """What it prints, in a process of its own that imports none of the packages; it has to end well."""
    hide = f"import sys\nsys.modules.update(dict.fromkeys({tuple(packages)!r}))\n"
    done = subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout
