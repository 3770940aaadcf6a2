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
    _begin_anew()
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
    _begin_anew()
    for block in model.blocks:
        block.compile()


def _begin_anew() -> None:
    """Code of an earlier model is forgotten: what its ops run on was asked when it was traced, and holds for it alone.

    Nor would dynamo keep it all: past 8 variants of a function the rest run uncompiled, with no error.
    """
    import torch._dynamo.config as dynamo  # a second's work, which who does not compile is spared

    torch._dynamo.reset()
    dynamo.recompile_limit = max(64, dynamo.recompile_limit)  # blocks in place: first and others, two shapes, two modes
