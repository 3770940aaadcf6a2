"""What torch.compile gets of a model. Parameters keep their names, and the model itself runs as it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.model import LanguageModel


def generate(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """torch.compile's own backend."""
    from torch._inductor.compile_fx import compile_fx  # seconds of imports, for who compiles

    return compile_fx(graph, inputs)


def compiled_loss(model: LanguageModel) -> Callable[..., Tensor]:
    """`model.loss` in four graphs: what is before the blocks, the first, one whose code serves all others, the end.

    As one graph it takes as long to run, and longer to compile the more layers there are. Shapes are built in: two at
    most, of a micro-batch and of a shorter last one. The code lives as long as what is returned: where another model is
    compiled dynamo forgets it, and a CUDA graph that replays its kernels would find them unloaded.
    """
    _begin_anew()
    kept = list[Any]()

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        kept.append(generate(graph, inputs))
        return kept[-1]

    begin, end = (torch.compile(part, backend=keep, dynamic=False) for part in (model.begin, model.end))
    blocks = [torch.compile(block.forward, backend=keep, dynamic=False) for block in model.blocks]

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
