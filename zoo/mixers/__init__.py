"""The sequence mixers, one a file. A file here that does not begin with an underscore is a model: `model=<file name>`.

Each file names its mixer `MIXER`; nothing else has to be registered.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any, Literal, get_args, get_origin, get_type_hints

from zoo.contract import SequenceMixer
from zoo.errors import ZooError, choose


def list_mixers() -> list[str]:
    """Names of all mixers, found by listing this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def get_mixer(name: str) -> type[SequenceMixer]:
    """The mixer class of a name; ZooError for one that is not there."""
    return importlib.import_module(f"{__name__}.{choose('model', name, list_mixers())}").MIXER


def options(name: str) -> dict[str, Any]:
    """The options a mixer takes, with their defaults: its keyword-only arguments."""
    parameters = inspect.signature(get_mixer(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def variants(name: str) -> dict[str, tuple[str, ...]]:
    """The options of a mixer that are a choice among names, with the names (its `Literal` annotations)."""
    hints = get_type_hints(get_mixer(name).__init__)
    return {key: get_args(hints[key]) for key in options(name) if get_origin(hints.get(key)) is Literal}


def check_options(name: str, given: dict[str, Any]) -> None:
    """Raise ZooError for an option that the mixer does not take, or a variant that it does not have."""
    known = options(name)
    for key, value in given.items():
        if key not in known:
            raise ZooError(f"model {name} has no option {key!r}; allowed: {', '.join(sorted(known)) or 'none'}")
        if key in variants(name):
            choose(f"{name} {key}", value, variants(name)[key])


def build_mixer(name: str, dim: int, heads: int, seq_len: int, given: dict[str, Any]) -> SequenceMixer:
    """A mixer of D = `dim` channels for training windows of `seq_len` tokens; its parameters are not drawn yet."""
    check_options(name, given)
    return get_mixer(name)(dim, heads, seq_len, **given)
