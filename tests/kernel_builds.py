"""Build Triton kernels for a GPU that is not there: launches inside `building()` compile, and run nothing.

    python tests/kernel_builds.py tests/test_kernels_NAME.py     a line for each build: registers, spills, shared memory

A build that ptxas got wrong (`kernel_descriptors`) says so in its line, and the exit status is 1.

TRITON_INTERPRET must not be set. Tensors may be on the CPU: only their types count.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from kernel_descriptors import lost_descriptors

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32",
            torch.int64: "*i64", torch.float64: "*fp64", torch.bool: "*i1", torch.uint8: "*u8"}
SHARED_MEMORY = 232448  # bytes a block can have on Hopper


@dataclass(frozen=True)
class Build:
    """One compiled kernel: registers a thread, bytes of local memory a thread (spills), shared memory, seconds; and how
    many of its tensor-core products read from a place that ptxas lost."""

    kernel: str
    options: dict[str, Any]
    registers: int
    local: int
    shared: int
    seconds: float
    lost: int

    def __str__(self) -> str:
        return (f"{self.kernel:34s} registers {self.registers:3d}  local {self.local:5d}  shared {self.shared:6d}  "
                f"{self.seconds:5.1f} s  {f'{self.lost} PRODUCTS OF GARBAGE  ' if self.lost else ''}{self.options}")


@contextlib.contextmanager
def building(capability: int = 90) -> Iterator[list[Build]]:
    """Within it every launch of a kernel compiles it for that compute capability, into the list."""
    from triton.runtime.jit import JITFunction

    built: list[Build] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        built.append(_build(self, args, kwargs, capability))

    with mock.patch.object(JITFunction, "run", run):
        yield built


def _build(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Build:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    parameters = {parameter.name: parameter for parameter in kernel.params}
    options = {name: kwargs.pop(name) for name in list(kwargs) if name not in parameters}
    bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
    bound.apply_defaults()
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(bound.arguments.items()):
        fixed = parameters[name].do_not_specialize
        one = type(value) is int and value == 1 and not fixed  # Triton makes a constant of it
        if parameters[name].is_constexpr or value is None or one:
            signature[name], constants[(i,)] = "constexpr", value
        elif hasattr(value, "block_shape"):  # a TensorDescriptor, Gluon's with a layout
            layout = f",{value.layout!r}" if kernel.is_gluon() else ""
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}{layout}>"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not fixed:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    began = time.perf_counter()
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    seconds = time.perf_counter() - began
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([tools / tool, option, file.name], capture_output=True, text=True).stdout
                       for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")))
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Build(kernel.fn.__name__, options, registers, max(stack, local), compiled.metadata.shared, seconds,
                 len(lost_descriptors(code)))


def main() -> None:
    """Run the `builds()` of a test file, which calls the ops as users do."""
    for path in sys.argv[1:]:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with building() as built:
            module.builds()
        print(*built, sep="\n")
        if any(build.lost for build in built):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
