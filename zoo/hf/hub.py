"""Models on the Hugging Face hub, "hf://owner/name" or "hf://owner/name@revision", by `huggingface_hub`.

Nothing here runs, and no socket is opened, unless a user wrote such an address. What the hub sends is believed as
little as any other folder: only the files of a saved model are fetched, none of them code, and `load_pretrained` checks
them. A revision is a branch, a tag or a commit; a commit's hash pins what is fetched.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.pretrained import FILES, HF_FILES, REMOTE, find_saved, load_pretrained

_PART = r"[a-z0-9](?:[\w.-]*\w)?"  # neither hidden nor a way upwards
_ADDRESS = re.compile(rf"{REMOTE}({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?", re.ASCII | re.IGNORECASE)
_FETCHED = sorted((FILES | HF_FILES) - {"modeling_zoo.py", "README.md"})


def download(address: str, *, endpoint: str | None = None, cache: str | Path | None = None) -> Path:
    """The folder, in the hub's cache on this machine, of a model at "hf://owner/name[@revision]".

    What the cache holds of a commit is not fetched again; without a network, or with HF_HUB_OFFLINE, there is nothing
    else. endpoint, cache: another server and another folder than the hub's own. Raises ZooError for an address that is
    none, and for whatever the hub says no to.
    """
    repository, revision = parse(address)
    library = _library()
    try:
        folder = library.snapshot_download(repository, revision=revision, allow_patterns=_FETCHED, endpoint=endpoint,
                                           cache_dir=cache)
    except Exception as error:  # it lets errors of many libraries through, which have no base of their own
        raise ZooError(f"cannot fetch {address}: {_reason(error)}") from None
    if not (Path(folder) / "config.json").is_file():
        raise ZooError(f"{address} holds no saved model: no config.json in it")
    return Path(folder)


def push_to_hub(model: str | Path, address: str, *, private: bool = True, endpoint: str | None = None) -> str:
    """Upload a saved model to "hf://owner/name[@branch]", by the token that `hf auth login` stored; returns its page.

    model: a folder or a published name, of which the files of a saved model go up and nothing else; it is loaded first,
    so that nothing damaged is published. private: whether only its owner sees the repository, if this makes it.
    """
    repository, revision = parse(address)
    folder = find_saved(model)
    load_pretrained(folder)
    api = _library().HfApi(endpoint=endpoint)
    try:
        page = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message="Model",
                          allow_patterns=sorted(FILES | HF_FILES))
    except Exception as error:
        raise ZooError(f"cannot upload to {address}: {_reason(error)}") from None
    return str(page)


def parse(address: str) -> tuple[str, str | None]:
    """"hf://owner/name@revision" -> ("owner/name", "revision" or None). ZooError for anything else, paths above all."""
    found = _ADDRESS.fullmatch(address)
    if not found or ".." in address or "--" in found[1] or found[1].endswith(".git"):
        raise ZooError(f"{address!r} is no address of a model; allowed: hf://OWNER/NAME or hf://OWNER/NAME@REVISION, "
                       "of letters, digits, '-', '_' and '.'")
    return found[1], found[2]


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ZooError(f"{REMOTE} needs the package `huggingface_hub`: pip install huggingface_hub") from None
    return huggingface_hub


def _reason(error: BaseException) -> str:
    """The error's words on one line: of several lines the one that says what happened, not where to read on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
