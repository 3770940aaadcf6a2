"""What RWKV does with a head's output: a norm of its own, gain and bias, a gate (2404.05892, section 4, eq. 15).

    z = (w (y - mean) / sqrt(var + eps) + b) silu(g),    mean and variance over a head's channels: a group norm
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ops.norm_gate_triton import KERNEL, norm_gate_triton


def norm_gate(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y [B, T, H, K], gate [B, T, H K], weight, bias [H K] -> [B, T, H K]. The kernels compute in float32."""
    if y.dtype == gate.dtype and KERNEL.chosen(y, y.shape[-1]):
        return norm_gate_triton(y, gate, weight, bias, eps)
    y = F.layer_norm(y, y.shape[-1:], eps=eps).flatten(-2)  # half the time of torch's group norm on a CPU
    return torch.addcmul(bias, y, weight) * F.silu(gate)
