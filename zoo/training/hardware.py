"""What a GPU can do at best, for model FLOP utilisation (MFU)."""

from __future__ import annotations

import re
import resource
import sys

import torch

# Dense bf16 tensor throughput with float32 accumulation, TFLOP/s, from the makers' data sheets (whose headline figure
# is often twice that, for 2:4 sparsity). The first pattern found as whole words in the device's name counts.
BF16_TFLOPS = {
    "GB200": 2500.0, "B200": 2250.0,
    "GH200": 989.4, "H200": 989.4, "H100 NVL": 835.5, "H100 PCIe": 756.5, "H100": 989.4, "H800": 989.4, "H20": 148.0,
    "A100": 312.0, "A800": 312.0, "A40": 149.7, "A30": 165.0, "A10G": 70.0, "A10": 125.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "RTX 6000 Ada": 364.2, "RTX A6000": 154.8, "RTX A5000": 111.0,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090 Ti": 80.0, "RTX 3090": 71.0, "RTX 3080": 59.5,
}


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name its driver gives, None where it is not known (a laptop's part, say)."""
    if re.search(r"\b(Laptop|Max-Q|MIG|SUPER|D)\b", name):
        return None  # another chip, or a part of one, under the same number
    for pattern, tflops in BF16_TFLOPS.items():
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(pattern)}(?![A-Za-z0-9])", name, re.IGNORECASE):
            return tflops * 1e12
    return None


def device_name(device: torch.device) -> str:
    """What the device is called; for a CPU, how many threads compute."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: of the GPU by tensors, of the process where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
