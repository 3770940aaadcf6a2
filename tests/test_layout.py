"""The layers of docs/architecture.md, held to by reading the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from unimportable import run_without

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "zoo").rglob("*.py"), ROOT / "train.py"])
FREE_OF = "lightning", "pytorch_lightning", "hydra", "omegaconf", "datasets", "wandb", "triton", "tensorboard", "typer"


def layer(module: str) -> int:
    """The height of a module in the table, from the ground up."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else ""
    ground = {"errors": 0, "files": 0, "revision": 0, "tokenizers": 0, "kernels": 0, "ops": 1, "contract": 2,
              "layers": 2, "mixers": 3, "data": 4, "model": 4, "sizing": 4, "sampling": 4, "pretrained": 4, "hf": 4,
              "evaluate": 4, "decoding": 4, "training": 5}
    return 7 if parts[0] == "train" or name.partition("_")[0] == "cli" else ground.get(name, 6)


def imported(path: Path) -> set[str]:
    """The zoo modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            deeper = (ROOT / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if deeper else {node.module}
    return {name for name in found if name.split(".")[0] == "zoo"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    if path == ROOT / "zoo" / "__init__.py":  # the names users import, from wherever they are
        return
    own = layer(".".join(path.relative_to(ROOT).with_suffix("").parts))
    upwards = [name for name in imported(path) if layer(name) > own]
    assert not upwards
    assert len(path.read_text().splitlines()) <= 400


def test_data_needs_no_torch() -> None:
    for path in (ROOT / "zoo" / "data").glob("*.py"):
        assert "import torch" not in path.read_text(), path.name


def test_models_need_neither_lightning_nor_hydra_nor_triton() -> None:
    """import zoo and run a model with these packages made unimportable."""
    run_without(FREE_OF, """
import torch, zoo
for name in zoo.list_models():
    model = zoo.create_model(name, size="nano", seq_len=64)
    logits, state = model.extend(torch.ones(1, 3, dtype=torch.int64), model.init_state())
    assert logits.shape == (1, 3, 256), name
""")
