"""What an architecture is, in a row of a table: its own words and figures, read off its mixer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

import torch

from zoo.mixers import get_mixer
from zoo.model import LanguageModel, ModelConfig
from zoo.sizing import SIZES

SIZE = "small"
CONTEXTS = (1024, 16384)  # a state that grows with the context shows it between these


@dataclass(frozen=True)
class Facts:
    """Text is empty where the mixer does not say it. state_bytes: of one sequence of each length of `CONTEXTS`."""

    name: str
    summary: str
    paper: str
    complexity: str
    state_bytes: tuple[int, ...]


def facts(name: str) -> Facts:
    """The facts of an architecture; ZooError for a name that is not there."""
    mixer = get_mixer(name)
    about = inspect.getdoc(inspect.getmodule(mixer)) or ""
    return Facts(name, about.split("\n")[0].rstrip("."), getattr(mixer, "paper", ""), getattr(mixer, "complexity", ""),
                 tuple(state_bytes(name, context) for context in CONTEXTS))


def state_bytes(name: str, context: int, size: str = SIZE) -> int:
    """Bytes of one sequence's float32 state with room for `context` tokens, of a model built for that context."""
    shape = SIZES[size]
    return state_bytes_of(ModelConfig(name, vocab_size=256, seq_len=context, layers=shape.layers, dim=shape.dim,
                                      heads=shape.heads, channel_dim=shape.dim), context)


def state_bytes_of(config: ModelConfig, context: int) -> int:
    """The same of a configuration, its own length replaced by `context`. No state depends on the channel width."""
    with torch.device("meta"):
        state = LanguageModel(replace(config, seq_len=context)).init_state(1, context, device="meta")
    return sum(value.numel() * value.element_size() for value in state.values())
