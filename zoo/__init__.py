"""A zoo of efficient language-model architectures, trained, measured and used side by side."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.errors import ZooError
    from zoo.generation import generate
    from zoo.hf.hub import push_to_hub
    from zoo.mixers import list_mixers as list_models
    from zoo.ops.backend import set_backend, use_backend
    from zoo.pretrained import list_pretrained, load_pretrained
    from zoo.sizing import create_model

try:
    __version__ = version("zoo-lm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0"

__all__ = ["ZooError", "create_model", "generate", "list_models", "list_pretrained", "load_pretrained",
           "push_to_hub", "set_backend", "use_backend"]

# Imported at first use: PyTorch takes seconds, and `zoo --help` or a data worker needs none of it.
_PLACES = {
    "ZooError": ("zoo.errors", "ZooError"),
    "create_model": ("zoo.sizing", "create_model"),
    "generate": ("zoo.generation", "generate"),
    "list_models": ("zoo.mixers", "list_mixers"),
    "list_pretrained": ("zoo.pretrained", "list_pretrained"),
    "load_pretrained": ("zoo.pretrained", "load_pretrained"),
    "push_to_hub": ("zoo.hf.hub", "push_to_hub"),
    "set_backend": ("zoo.ops.backend", "set_backend"),
    "use_backend": ("zoo.ops.backend", "use_backend"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
