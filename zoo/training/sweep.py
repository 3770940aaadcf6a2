"""The folder of a sweep's job."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from zoo.training.config import MAY_CHANGE

LONGEST = 120  # characters; file systems allow 255, and paths go on from here
NOT_OURS = (*MAY_CHANGE - {"data", "tokenizer"}, "data.cache", "swept")


def job_folder(root: str, overrides: Sequence[str], swept: Sequence[str] = ()) -> str:
    """A folder under `root` named by what the job sets, so that no two jobs share one and resume=auto finds it again.

    What a resumed run may set anew is not part of the name, unless the sweep varies it.
    """
    kept = sorted(o.lstrip("+~") for o in overrides if _names(o, swept) or not _names(o, NOT_OURS))
    whole = ",".join(kept) or "default"
    name = re.sub(r"[^\w.,=+-]", "_", ",".join(o for o in kept if "/" not in o))  # without paths, which are long
    if name != whole or len(name) > LONGEST:  # told apart by what the name no longer shows
        name = f"{name[:LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return str(Path(root) / name)


def _names(override: str, keys: Sequence[str]) -> bool:
    """Whether an override sets one of the keys, or something in a group of that name."""
    key = re.split("[=@]", override.lstrip("+~"))[0]
    return any(key == own or key.startswith(f"{own}.") for own in keys)
