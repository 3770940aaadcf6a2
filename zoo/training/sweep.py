"""The folder of a sweep's job, and whether the job is done."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.pretrained import read_json
from zoo.training.config import MAY_CHANGE, Config, check_resumable

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


def finished(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `train` returned of this very job when it ended, None where something of it is still to do.

    So that a sweep that is repeated passes over it at once: no text is read, no model built, and neither weights nor
    checkpoints need lie here. Raises ZooError, as resuming would, where another job's run is in its folder.
    """
    run = Config.from_dict(config)
    if run.resume != "auto" or run.out is None:
        return None
    out = Path(run.out)
    card, earlier = out / "model" / "card.json", out / "config.json"
    if not (card.is_file() and earlier.is_file()):
        return None
    about, saved = read_json(card), read_json(earlier)
    if about.get("step") != run.steps or "evaluation" not in about:  # "evaluation": earlier versions kept less
        return None
    check_resumable(saved, run.to_dict(), str(out))
    if any(saved.get(key) != run.to_dict()[key] for key in ("data", "tokenizer")):
        return None  # it may be the same text all the same: that is seen when it is read
    test, validation = about["evaluation"]["test"], about["evaluation"]["validation"]
    return {"out": str(out), "step": run.steps, "tokens": about["tokens"], "seconds": about["seconds"],
            "validation": {"step": run.steps} | validation, "test": test, "model": str(out / "model")}


def _names(override: str, keys: Sequence[str]) -> bool:
    """Whether an override sets one of the keys, or something in a group of that name."""
    key = re.split("[=@]", override.lstrip("+~"))[0]
    return any(key == own or key.startswith(f"{own}.") for own in keys)
