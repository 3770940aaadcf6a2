"""Every architecture and variant there is, found by listing: a new mixer or yaml is tested with no test written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from zoo import mixers
from zoo.model import LanguageModel, ModelConfig

CONF = Path(__file__).parent.parent / "conf"


class Case(NamedTuple):
    model: str
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return "-".join([self.model, *(str(value) for _, value in self.options)])


def listed() -> list[Case]:
    """The default of every mixer, each of its variants, and what a yaml of conf/model sets otherwise."""
    found = {Case(name, ()) for name in mixers.list_mixers()}
    for name in mixers.list_mixers():
        for option, names in mixers.variants(name).items():
            found |= {Case(name, ((option, value),)) for value in names if value != mixers.options(name)[option]}
    for path in sorted((CONF / "model").glob("*.yaml")):
        given = yaml.safe_load(path.read_text())
        name = given.pop("name")
        different = {k: v for k, v in given.items() if v != mixers.options(name).get(k)}
        found.add(Case(name, tuple(sorted(different.items()))))
    return sorted(found, key=str)


def tiny(case: Case, *, seq_len: int = 160, layers: int = 2, scramble: bool = False, **shape: int) -> LanguageModel:
    """A model of some ten thousand parameters, in eval mode.

    `scramble` moves every parameter off its initial value: a projection that starts at zero hides from a test whatever
    stands before it.
    """
    config = {"vocab_size": 64, "dim": 32, "heads": 2, "channel_dim": 48} | shape
    model = LanguageModel(ModelConfig(case.model, seq_len=seq_len, layers=layers, options=dict(case.options), **config))
    if scramble:
        with torch.no_grad():
            for parameter in model.parameters():
                width = parameter.shape[-1] if parameter.ndim > 1 else 1
                parameter.add_(torch.randn_like(parameter), alpha=0.3 * width**-0.5)
    return model.eval()


def train_on(model: LanguageModel, tokens: Tensor, steps: int, lr: float, weight_decay: float = 0.0) -> Iterator[float]:
    """AdamW on one batch [B, T + 1]: yields the loss before each step."""
    optimizer = torch.optim.AdamW(model.train().parameter_groups(lr, weight_decay), betas=(0.9, 0.95))
    for step in range(steps):
        model.set_step(step)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
