"""Runs Gluon kernels for Hopper on a CPU, program by program, as far as zoo/kernels/attention_hopper*.py use Gluon.

Triton's interpreter has no Gluon. Here a kernel's Python source runs with stand-ins for the language: registers are
tensors, a copy by TMA is done at once, and a product is done when it must have been: at the wait that covers it. So a
tile overwritten too early or a result used too early gives wrong numbers or an error, and a wait for a copy that never
comes raises instead of hanging. What this cannot see: layouts, races between threads, ptxas.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Shared:
    """Shared memory, full of NaN at first."""

    def __init__(self, data: Tensor):
        self.data, self.dtype, self.shape = data, data.dtype, data.shape

    def index(self, i: int) -> Shared:
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
        return Shared(self.data.view(shape))


class Barrier:
    """An mbarrier of count 1: flips when it was told to expect bytes, and all of them have come."""

    def __init__(self) -> None:
        self.flips, self.awaited = 0, 0

    def expect(self, size: int) -> None:
        assert not self.awaited, "expects a copy while another is under way"
        self.awaited = size

    def arrive(self, size: int) -> None:
        self.awaited -= size
        assert self.awaited >= 0, "more bytes came than were expected"
        if not self.awaited:
            self.flips += 1


class Barriers(list[Barrier]):
    def index(self, i: int) -> Barrier:
        return self[int(i)]


@dataclass
class Product:
    """a b + acc, done when it is waited for; or a tensor that a chain of products begins with."""

    a: Any
    b: Any
    acc: Any
    value: Tensor | None = None

    def run(self) -> None:
        a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        assert acc is not None
        self.value = acc + a.float() @ b.float()


@dataclass
class Pointer:
    """Into a tensor's storage; offsets may be tensors."""

    data: Tensor
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.data.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)


@dataclass
class Descriptor:
    """A tensor that TMA reads in blocks, 0 beyond its shape."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: object = None
    dtype: Any = field(init=False)
    block_type: Any = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = self.base.dtype
        count = torch.Size(self.block_shape).numel()
        self.block_type = types.SimpleNamespace(nbytes=count * self.base.element_size())

    def read(self, at: list[Any]) -> Tensor:
        block = torch.zeros(self.block_shape, dtype=self.dtype)
        whole = self.base.as_strided(self.shape, self.strides)
        starts = [int(i) for i in at]
        sizes = zip(starts, self.block_shape, self.shape, strict=True)
        ranges = [range(max(a, 0), min(a + n, size)) for a, n, size in sizes]
        if all(ranges):
            there = tuple(slice(r.start - a, r.stop - a) for r, a in zip(ranges, starts, strict=True))
            block[there] = whole[tuple(slice(r.start, r.stop) for r in ranges)]
        return block


class Machine:
    """The stand-ins for one program at a time, and its products under way."""

    def __init__(self) -> None:
        self.program, self.under_way = 0, list[Product]()

    def language(self) -> types.SimpleNamespace:
        def layout(*_: object) -> None:
            return None

        shared_layout = types.SimpleNamespace(get_default_for=layout)
        return types.SimpleNamespace(
            constexpr=lambda x: x, static_range=range, float32=torch.float32, int64=torch.int64, bfloat16=None,
            float16=None, NVMMASharedLayout=_Callable(layout, shared_layout), NVMMADistributedLayout=layout,
            DotOperandLayout=layout, SliceLayout=layout, program_id=lambda _: torch.tensor(self.program),
            arange=lambda a, b, _: torch.arange(a, b), zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
            full=lambda shape, x, dtype, _: torch.full(shape, x, dtype=dtype), where=_where, minimum=_minimum,
            maximum=_maximum, max=lambda x, dim: x.amax(dim), sum=lambda x, dim: x.sum(dim), exp2=torch.exp2,
            log2=torch.log2, convert_layout=lambda x, _, assert_trivial=False: x, split=lambda x: x.unbind(-1),
            allocate_shared_memory=_allocate, load=_load, store=_store)

    def globals(self) -> dict[str, Any]:
        mbarrier = types.SimpleNamespace(init=lambda bar, count: None, expect=_expect, wait=_wait,
                                         MBarrierLayout=lambda: None)
        return {"gl": self.language(), "mbarrier": mbarrier, "barrier": lambda: None,
                "fence_async_shared": lambda: None, "TensorDescriptor": Descriptor,
                "tma": types.SimpleNamespace(async_copy_global_to_shared=_copy), "warpgroup_mma": self.multiply,
                "warpgroup_mma_init": lambda x: Product(None, None, None, x), "warpgroup_mma_wait": self.wait}

    def multiply(self, a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        product = Product(a, b, acc if use_acc else torch.zeros(a.shape[0], b.shape[1]))
        self.under_way.append(product)
        return product

    def wait(self, count: int, deps: tuple[Product, ...]) -> Any:
        while len(self.under_way) > count:
            self.under_way.pop(0).run()
        values = [x.value if isinstance(x, Product) else x for x in deps]
        assert all(x is not None for x in values), "not waited for"
        return values[0] if len(values) == 1 else tuple(values)

    def launch(self, kernel: Callable[..., None]) -> Any:
        """kernel[(programs,)](...) as Triton launches it; tensors become pointers."""
        def start(grid: tuple[int]) -> Callable[..., None]:
            def run(*args: Any, num_warps: int, **constants: Any) -> None:
                for self.program in range(grid[0]):
                    kernel(*(Pointer(x) if isinstance(x, Tensor) else x for x in args), **constants)
                    assert not self.under_way, "a program ended before its products"
            return run
        return types.SimpleNamespace(__getitem__=start)


class _Callable:
    def __init__(self, call: Callable[..., Any], names: types.SimpleNamespace):
        self.call, self.get_default_for = call, names.get_default_for

    def __call__(self, *args: object) -> Any:
        return self.call(*args)


class _Launcher:
    def __init__(self, machine: Machine, kernel: Callable[..., None]):
        self.start = machine.launch(kernel).__getitem__

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return self.start(grid)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b))


def _minimum(a: Any, b: Any) -> Tensor:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def _maximum(a: Any, b: Any) -> Tensor:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Any:
    if dtype == torch.int64:
        return Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full(shape, torch.nan, dtype=dtype))


def _offsets(p: Pointer, like: Any) -> Tensor:
    offset = torch.as_tensor(p.offset)
    return offset if like is None else offset.broadcast_to(torch.broadcast_shapes(offset.shape, like.shape))


def _memory(p: Pointer) -> Tensor:
    """From the first of a tensor's numbers to the last, with what stands between its rows."""
    last = sum((size - 1) * stride for size, stride in zip(p.data.shape, p.data.stride(), strict=True))
    return p.data.as_strided((last + 1,), (1,))


def _load(p: Pointer) -> Tensor:
    return _memory(p)[_offsets(p, None)]


def _store(p: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    offset = _offsets(p, value)
    seen = torch.ones_like(offset, dtype=torch.bool) if mask is None else mask.broadcast_to(offset.shape)
    _memory(p)[offset[seen]] = value.broadcast_to(offset.shape)[seen].to(p.data.dtype)


def _expect(bar: Barrier, size: int, there: Any = True) -> None:
    if there:
        bar.expect(size)


def _copy(d: Descriptor, at: list[Any], bar: Barrier, s: Shared, there: Any = True) -> None:
    if there:
        s.data.copy_(d.read(at))
        bar.arrive(d.block_type.nbytes)


def _wait(bar: Barrier, phase: Any) -> None:
    assert bar.flips % 2 != int(phase), "waits for a copy that nobody began: a GPU would hang"


def _constant(x: Any) -> Any:
    """A number that has itself as `.value`, as both kernels and launchers use it."""
    return type("Constant", (type(x),), {"value": x})(x)


def emulated(*modules: Any) -> dict[str, Any]:
    """The functions of modules of Gluon kernels and their launchers, later modules using the names of those before."""
    from triton.experimental.gluon import language as gl
    from triton.runtime.jit import JITFunction

    machine = Machine()
    names: dict[str, Any] = {}
    for module in modules:
        for name, value in vars(module).items():
            if not name.startswith("__") and name not in names:
                names[name] = _constant(value.value) if isinstance(value, gl.constexpr) else value
    names |= machine.globals()
    result: dict[str, Any] = {}
    for name, value in list(names.items()):
        function = value.fn if isinstance(value, JITFunction) else value
        if isinstance(function, types.FunctionType) and any(function.__module__ == m.__name__ for m in modules):
            made = types.FunctionType(function.__code__, names, name, function.__defaults__, function.__closure__)
            names[name] = _Launcher(machine, made) if name.endswith("_kernel") else made
            result[name] = names[name]
    return result
