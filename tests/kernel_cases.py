"""How all tests of kernels measure: against float64, beside plain PyTorch in the same dtype, in NaN-filled memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from zoo.ops.backend import use_backend

LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 1000)
"""Every T to be right at on a GPU: on, before and after every border of a chunk."""

SHORT_LENGTHS = (1, 3, 16, 17, 65)
"""T in Triton's interpreter, which takes a second for what a GPU does in a microsecond."""

HEAD_SIZES = (16, 24, 32, 40, 64, 80, 96, 128, 160, 192, 256)
"""Key and value widths to be right at on a GPU, powers of two and others."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU")


@contextlib.contextmanager
def nan_memory() -> Iterator[None]:
    """torch.empty and its kin come filled with NaN, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that are specialised anew within the block, by this process."""
    import triton

    seen: list[str] = []

    def count(*arguments: object, **facts: object) -> None:
        seen.append(str(facts.get("repr")))

    before, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, count
    try:
        yield seen
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def outputs_and_gradients(function: Function, inputs: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """function(**inputs) under random cotangents: "0", "1", ... for its outputs, "d<name>" for floating inputs."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    results = function(**leaves)
    results = (results,) if isinstance(results, Tensor) else tuple(results)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64, device=results[0].device)
    for y in results:
        cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)
        total = total + (y.double() * cotangent.to(y.dtype)).sum()
    total.backward()
    found = {str(i): y.detach() for i, y in enumerate(results)}
    return found | {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}


def eager_and_compiled(function: Function, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the kernels give under bf16 autocast, called as they are, and in one graph of `torch.compile`."""
    device = next(iter(inputs.values())).device.type
    with use_backend("triton"), torch.autocast(device, dtype=torch.bfloat16):
        return (outputs_and_gradients(function, inputs),
                outputs_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs))


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||; NaN anywhere is an infinite error."""
    error = float((x.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def check_against_float64(kernel: Function, exact: Function, plain: Function, inputs: Mapping[str, Tensor],
                          dtype: torch.dtype, *, factor: float = 2.0, keep: Sequence[str] = ()) -> dict[str, float]:
    """Outputs and all gradients of `kernel` in `dtype` are at most `factor` times as wrong as those of `plain`.

    inputs float64, rounded to `dtype` for all three (those named in `keep`, states say, to float32); `exact` gets them
    in float64. `plain` is what a user would write in PyTorch, in `dtype` throughout. -> the kernel's relative errors.
    """
    given = {name: x if not x.is_floating_point() else x.to(torch.float32 if name in keep else dtype)
             for name, x in inputs.items()}
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    with use_backend("eager"):
        truth = outputs_and_gradients(exact, wide)
        theirs = outputs_and_gradients(plain, given)
    with use_backend("triton"), nan_memory():
        ours = outputs_and_gradients(kernel, given)
    assert ours.keys() == truth.keys()
    errors = {name: relative_error(ours[name], truth[name]) for name in truth}
    floor = 4 * torch.finfo(dtype).eps  # where plain PyTorch happens to be exact
    for name, error in errors.items():
        allowed = max(factor * relative_error(theirs[name], truth[name]), floor)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}; all: {errors}"
    return errors
