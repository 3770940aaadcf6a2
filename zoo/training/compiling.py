"""What torch.compile gets of a model: in place, so that parameters keep their names."""

from __future__ import annotations

from zoo.model import LanguageModel


def compile_in_place(model: LanguageModel) -> None:
    """Compile each block. Blocks are alike, so that the first one's code serves all."""
    for block in model.blocks:
        block.compile()
