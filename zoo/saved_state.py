"""A model's state in a file: safetensors, with what it belongs to as plain JSON in the header. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from zoo.contract import State
from zoo.errors import ZooError
from zoo.files import replace
from zoo.model import LanguageModel
from zoo.sampling import resize
from zoo.tokenizers import Tokenizer

FORMAT = 1
HEADER = "zoo_state"  # the key of the JSON in the file's metadata
KEYS = {"format", "model", "tokenizer", "position", "tokens", "sha256"}


def save_state(path: str | Path, model: LanguageModel, tokenizer: Tokenizer, tokens: list[int], state: State) -> None:
    """Write the state [1, ...] of a model that has read all of `tokens` but the last. The file is old or new, whole."""
    position = len(tokens) - 1
    tensors = {name: value.cpu().contiguous() for name, value in resize(model, state, position).items()}
    about = {"format": FORMAT, "model": _identity(model), "tokenizer": tokenizer.spec, "position": position,
             "tokens": tokens, "sha256": digest(tensors)}
    path = Path(path)
    try:
        replace(path, serialise(tensors, metadata={HEADER: json.dumps(about, separators=(",", ":"))}))
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror or error}") from None


def load_state(path: str | Path, model: LanguageModel, tokenizer: Tokenizer) -> tuple[list[int], State]:
    """-> (tokens, the state behind all of them but the last, on the model's device).

    Raises ZooError for a file that is no saved state, is damaged, or is not of this very model and tokenizer.
    """
    path = Path(path)
    try:
        with path.open("rb"):
            pass
        with safe_open(path, framework="pt") as file:
            about = _read_about(path, file.metadata() or {})
            _check_owner(path, about, model, tokenizer)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ZooError(f"{path} is not a whole safetensors file: {' '.join(str(error).split())[:200]}") from None
    wanted = model.init_state(1, max(1, about["position"]), device="meta")
    if ({name: (value.shape, value.dtype) for name, value in tensors.items()}
            != {name: (value.shape, value.dtype) for name, value in wanted.items()}):
        raise ZooError(f"{path} holds other tensors than a state of this {model.config.model}: of another version of "
                       "it, or changed")
    if digest(tensors) != about["sha256"] or tensors["position"].tolist() != [about["position"]]:
        raise ZooError(f"{path} is damaged: its tensors are not those that were saved")
    device = model.head.weight.device
    return about["tokens"], {name: value.to(device) for name, value in tensors.items()}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _identity(model: LanguageModel) -> dict[str, str]:
    """Which model it is: architecture, dtype of the weights, and a hash of its configuration and weights."""
    shape = json.dumps(model.config.to_dict(), sort_keys=True)
    return {"name": model.config.model, "dtype": str(model.head.weight.dtype).removeprefix("torch."),
            "sha256": hashlib.sha256((shape + digest(model.state_dict())).encode()).hexdigest()}


def _read_about(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON of the header, its types checked."""
    if HEADER not in metadata:
        raise ZooError(f"{path} is not a saved state: its header has no {HEADER}")
    try:
        about = json.loads(metadata[HEADER])
    except (ValueError, RecursionError):
        about = None
    form = about.get("format") if isinstance(about, dict) else None
    if type(form) is not int or form != FORMAT:
        raise ZooError(f"{path} is a saved state of format {form!r}; this version reads: {FORMAT}")
    tokens, position = about.get("tokens"), about.get("position")
    if (about.keys() != KEYS or type(position) is not int or not isinstance(tokens, list) or not tokens
            or not all(type(token) is int for token in tokens) or position != len(tokens) - 1):
        raise ZooError(f"{path} is a saved state whose header is damaged; needed: {', '.join(sorted(KEYS))}, and one "
                       "token more than the position says")
    return about


def _check_owner(path: Path, about: dict[str, Any], model: LanguageModel, tokenizer: Tokenizer) -> None:
    own = _identity(model)
    if about["model"] != own:
        theirs = about["model"] if isinstance(about["model"], dict) else {}
        raise ZooError(f"{path} belongs to another model: {_named(theirs)}; this one is {_named(own)}")
    if about["tokenizer"] != tokenizer.spec:
        raise ZooError(f"{path} was read with another tokenizer than this model's {tokenizer.kind}")
    if not 0 <= min(about["tokens"]) <= max(about["tokens"]) < model.config.vocab_size:
        raise ZooError(f"{path} holds tokens outside the vocabulary of 0 .. {model.config.vocab_size - 1}")


def _named(identity: Mapping[str, Any]) -> str:
    return f"{identity.get('name')}, {identity.get('dtype')}, weights {str(identity.get('sha256'))[:12]}"
