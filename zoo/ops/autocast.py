"""What autocast does to the inputs of PyTorch's own products, for ops that it does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast(x: Tensor) -> Tensor:
    """x in the dtype of autocast where it is on; float64 stays."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
