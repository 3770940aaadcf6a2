"""What torch.compile gets of a model. Parameters keep their names, and the model itself runs as it did."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.model import LanguageModel


def compiled_loss(model: LanguageModel) -> Callable[..., Tensor]:
    """`model.loss` as one graph, so that each sum of the residual stream is read and written with the norm after it.

    Shapes are built in: there are two at most, a micro-batch and a shorter last one.
    """
    _expect_many_models()
    return torch.compile(model.loss, dynamic=False)


def compile_in_place(model: LanguageModel) -> None:
    """Compile each block by itself. Blocks are alike, so that the first one's code serves all."""
    _expect_many_models()
    for block in model.blocks:
        block.compile()


def _expect_many_models() -> None:
    """A sweep in one process compiles the same functions for model after model; past 8 they would run uncompiled."""
    import torch._dynamo.config as dynamo  # a second's work, which who does not compile is spared

    dynamo.recompile_limit = max(256, dynamo.recompile_limit)
    dynamo.accumulated_recompile_limit = max(4096, dynamo.accumulated_recompile_limit)
