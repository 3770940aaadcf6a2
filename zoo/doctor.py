"""What works on this machine, tried rather than looked up."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from zoo.mixers import list_mixers
from zoo.ops.backend import decisions, self_test_file
from zoo.sizing import create_model

NEEDED = {"torch": "torch", "lightning": "lightning", "hydra-core": "hydra", "datasets": "datasets", "wandb": "wandb",
          "tokenizers": "tokenizers", "safetensors": "safetensors", "numpy": "numpy"}  # distribution: its module
GPU_ONLY = {"triton": "triton"}
LENGTH = 64  # tokens that each architecture is tried on


def examine(tell: Callable[[str], object]) -> bool:
    """Tell line by line what is here and what works; True if training on a CPU does."""
    tell(f"python {platform.python_version()} on {platform.platform()}")
    works = True
    for package in NEEDED.items():
        works &= _package(tell, *package)
    for package in GPU_ONLY.items():
        _package(tell, *package, note=" (only kernels on a GPU need it)")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    tell(f"cpu: {torch.get_num_threads()} threads of {os.cpu_count()}, {memory:.0f} GiB of memory, "
         f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free on this disk")
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for gpu in gpus:
        facts = torch.cuda.get_device_properties(gpu)
        tell(f"{gpu}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}")
    if not gpus:
        tell(f"no GPU that this torch can use (built for CUDA {torch.version.cuda or 'none'})")
    before = len(decisions())
    for device in [torch.device("cpu"), *gpus]:
        for name in list_mixers():
            works &= _trains(tell, name, device) or device.type != "cpu"
    if (file := self_test_file()) is None:
        tell("no kernels without triton: all ops run on their eager reference")
    else:
        tell(f"kernels: {'on the GPU, where they pass their self-test' if gpus else 'none without a GPU'}; results of "
             f"self-tests are kept in {file}")
    for line in decisions()[before:] if gpus else ():
        tell(f"       {line}")
    tell("training on a CPU works" if works else "training on a CPU does not work here: see above")
    return works


def _package(tell: Callable[[str], object], name: str, module: str, note: str = "") -> bool:
    try:
        import_module(module)
        tell(f"ok     {name} {version(name)}")
    except PackageNotFoundError:
        tell(f"ok     {name} (of unknown version)")
    except Exception as error:  # a broken install raises anything at import
        tell(f"FAILED {name}: {_line(error)}{note}")
        return False
    return True


def _trains(tell: Callable[[str], object], name: str, device: torch.device) -> bool:
    """Whether a nano model's loss and gradients come out finite, and its state can be extended."""
    try:
        torch.manual_seed(0)
        model = create_model(name, "nano", seq_len=LENGTH).to(device)
        tokens = torch.arange(2 * (LENGTH + 1), device=device).view(2, -1)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):  # as in training
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        spent = time.perf_counter() - start
        with torch.inference_mode():
            logits, _ = model.extend(tokens[:, :3], model.init_state(2))
        if not all(bool(value.isfinite().all()) for value in (loss, logits, *gradients)):
            raise ArithmeticError("the loss, a gradient or a logit is not finite")
    except Exception as error:  # whatever it is, the other architectures are tried all the same
        tell(f"FAILED {name} on {device}: {_line(error)}")
        return False
    tell(f"ok     {name} on {device}: forward and backward of 2 x {LENGTH} tokens in {spent * 1e3:.0f} ms")
    return True


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
