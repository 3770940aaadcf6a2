"""What torch.compile gets of a model. Parameters keep their names, and the model itself runs as it did."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.model import LanguageModel


def compiled_loss(model: LanguageModel) -> Callable[..., Tensor]:
    """`model.loss` in four graphs: what is before the blocks, the first, one whose code serves all others, the end.

    As one graph it takes as long to run, and longer to compile the more layers there are. Shapes are built in: two at
    most, of a micro-batch and of a shorter last one.
    """
    _expect_many_models()
    begin, end = torch.compile(model.begin, dynamic=False), torch.compile(model.end, dynamic=False)
    blocks = [torch.compile(block.forward, dynamic=False) for block in model.blocks]

    def loss(tokens: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        model.check_length(tokens.shape[1])
        x, y = begin(tokens), None
        for block in blocks:
            x, y = block(x, y)
        return end(x, y, targets, reduction)

    return loss


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
