"""Where a loss or a gradient stopped being finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.training.module import TrainingModule


def report(module: TrainingModule, step: int, loss: float, grad_norm: float) -> ZooError:
    """The error to raise. The weights are still those before `step`, whose batch is run again to find the layer."""
    where = first_bad(module, step)
    return ZooError(f"step {step + 1}: loss {loss:g}, gradient norm {grad_norm:g}: first not finite in {where}; the "
                    "last checkpoint is kept (a lower optim.lr or optim.clip may help)")


def _finite(value: Tensor) -> bool:
    return bool((value.full_tensor() if isinstance(value, DTensor) else value).isfinite().all())


def first_bad(module: TrainingModule, step: int) -> str:
    """The first module whose output is not finite, else the parameter nearest the loss whose gradient is not."""
    model, found = module.model, list[str]()
    names = {part: name for name, part in model.named_modules() if name}

    def look(part: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f"the output of {names[part]}")

    hooks = [part.register_forward_hook(look) for part in names]
    try:
        module.captured = None  # its memory may be needed
        model.zero_grad()
        tokens, targets = (part.to(module.device) for part in module.batch_of(step))
        with module.trainer.precision_plugin.forward_context():
            loss = model.loss(tokens, targets)
        if found:
            return found[0]  # children report before the modules they are in
        loss.backward()
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
        weights = [name for name, p in model.named_parameters() if not _finite(p.detach())]
    except (RuntimeError, torch.OutOfMemoryError):
        return "a place that could not be computed again"
    finally:
        for hook in hooks:
            hook.remove()
    if bad or weights:
        return f"parameter {weights[0]}" if weights else f"the gradient of {bad[-1]}"
    return "nothing that is the same when computed again"
