"""Packages that are installed, and not imported where nothing asks for what they do.

Lightning imports torchmetrics, and that all it finds of what some metric could use: transformers with half of PyTorch's
distributed package, scipy, matplotlib. A run has none of these metrics, and would wait for them for seconds.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import DistributionFinder
from typing import Any

OF_METRICS = frozenset({"transformers", "scipy", "matplotlib", "torchvision", "torchaudio", "onnxruntime", "librosa",
                        "nltk"})
"""What torchmetrics looks for, by the names that they are imported and installed by; the zoo's training needs none."""


class _Without:
    """A finder of modules and distributions that finds what it found before, but for some names."""

    def __init__(self, finder: Any, names: frozenset[str]) -> None:
        self.finder, self._names = finder, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, fullname: str, *place: Any) -> Any:
        return None if fullname.partition(".")[0] in self._names else self.finder.find_spec(fullname, *place)

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Any]:
        if not hasattr(self.finder, "find_distributions") or (context is not None and context.name in self._names):
            return ()
        return self.finder.find_distributions(*([context] if context is not None else []))


@contextlib.contextmanager
def hidden(names: frozenset[str] = OF_METRICS) -> Iterator[None]:
    """Within, packages that are not imported yet are not there; what does without them then does so for good."""
    sys.meta_path[:] = [_Without(finder, names) for finder in sys.meta_path]
    try:
        yield
    finally:
        sys.meta_path[:] = [each.finder if isinstance(each, _Without) else each for each in sys.meta_path]
