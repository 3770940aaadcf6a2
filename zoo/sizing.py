"""Sizes, and the channel width at which every architecture has the same parameter count at a size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from zoo.errors import ZooError, choose
from zoo.model import LanguageModel, ModelConfig


@dataclass(frozen=True)
class Size:
    """`layers` blocks of `dim` channels in `heads` heads."""

    layers: int
    dim: int
    heads: int

    def budget(self, vocab_size: int) -> int:
        """Parameters that every architecture gets: 12 D^2 a block (4 mixing, 8 channels), embedding and head."""
        return 12 * self.layers * self.dim**2 + 2 * vocab_size * self.dim


SIZES = {
    "nano": Size(4, 128, 4),
    "small": Size(8, 256, 4),
    "base": Size(12, 512, 8),
    "medium": Size(12, 768, 12),
}

TOLERANCE = 0.02  # how far an architecture's parameter count may be from the budget
STEPS = (64, 32, 16, 8)  # channel widths are multiples of the largest of these that meets half the tolerance


@lru_cache(maxsize=256)
def _count(config_items: tuple, channel_dim: int) -> int:
    config = dict(config_items) | {"channel_dim": channel_dim}
    config["options"] = dict(config["options"])
    with torch.device("meta"):
        return LanguageModel(ModelConfig(**config)).num_parameters()


def solve_channel_dim(model: str, size: Size, vocab_size: int, seq_len: int, options: dict[str, Any]) -> int:
    """The channel width whose parameter count is nearest the size's budget.

    Raises ZooError if the mixer alone (a large T x T bias, say) leaves no room within 2 %.
    """
    items = (("model", model), ("vocab_size", vocab_size), ("seq_len", seq_len), ("layers", size.layers),
             ("dim", size.dim), ("heads", size.heads), ("options", tuple(sorted(options.items()))))
    at_8, at_16 = _count(items, 8), _count(items, 16)  # the count is affine in the width
    slope = (at_16 - at_8) / 8
    budget = size.budget(vocab_size)
    exact = 8 + (budget - at_8) / slope
    for step in STEPS:
        width = max(step, round(exact / step) * step)
        if abs(at_8 + slope * (width - 8) - budget) <= (TOLERANCE if step == STEPS[-1] else TOLERANCE / 2) * budget:
            return width
    raise ZooError(f"{model} at seq_len={seq_len} cannot have the {budget:,} parameters of this size: its mixers alone "
                   f"take {round(at_8 - 8 * slope):,}; choose a shorter seq_len, other options or a larger size")


def model_config(model: str, size: str | Size = "small", vocab_size: int = 256, seq_len: int = 1024,
                 dropout: float = 0.0, **options: Any) -> ModelConfig:
    """The configuration of an architecture at a size (a name, or a Size of one's own), its channel width solved."""
    shape = size if isinstance(size, Size) else SIZES[choose("size", size, SIZES)]
    shared: dict[str, Any] = {"vocab_size": vocab_size, "seq_len": seq_len, "layers": shape.layers, "dim": shape.dim,
                              "heads": shape.heads, "dropout": dropout, "options": options}
    ModelConfig(model, channel_dim=8, **shared)  # refuses wrong values before anything is built from them
    return ModelConfig(model, channel_dim=solve_channel_dim(model, shape, vocab_size, seq_len, options), **shared)


def create_model(model: str, size: str | Size = "small", vocab_size: int = 256, seq_len: int = 1024,
                 dropout: float = 0.0, **options: Any) -> LanguageModel:
    """A model with fresh weights, drawn from torch's generator.

    model: a name of `zoo.list_models()`. size: "nano", "small", "base", "medium", or a `Size`. seq_len: the training
    window, and the limit of architectures that have one. options: the mixer's own (`zoo.mixers.options(model)`).
    Raises ZooError for a name, size or option that is not there.
    """
    return LanguageModel(model_config(model, size, vocab_size, seq_len, dropout, **options))
