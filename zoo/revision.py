"""Where a figure comes from: which commit of the project this code is of, and a command that may be shown."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path, PurePosixPath

# `git archive` writes the commit here (.gitattributes), by which a source archive is known.
ARCHIVED = "$Format:%H$"


def source_commit(digits: int = 40) -> str | None:
    """The commit, with "+changes" where files were edited since; None where neither git nor an archive tells.

    An archive's files are taken to be as they were packed.
    """
    if not ARCHIVED.startswith("$"):
        return ARCHIVED[:digits]
    here = Path(__file__)
    try:
        # The first: this file is the repository's own, and not a package installed somewhere inside another one.
        _, commit, changes = (
            subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True,
                           timeout=10).stdout.strip()
            for words in (("ls-files", "--error-unmatch", here.name), ("rev-parse", "HEAD"),
                          ("status", "--porcelain", "-uno")))
    except (OSError, subprocess.SubprocessError):
        return None
    return commit[:digits] + ("+changes" if changes else "")


def shown_command(command: str) -> str:
    """A command line without the places of the machine it ran on: of an absolute path the last part is kept."""
    def shown(part: str) -> str:
        return f".../{PurePosixPath(part).name}" if part.startswith("/") else part

    return shlex.join("".join(map(shown, re.split(r"([=,\[\]'\"])", word))) for word in shlex.split(command))
