"""Which commit of the project this code is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

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
