"""The Gluon kernels of causal attention on a CPU: as numbers, run by an emulator; as code, compiled for sm_90.

On a Hopper GPU the tests of test_kernels_attention.py run them, wherever they ask for causal attention in 16 bits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gluon_emulator import emulated
from torch import Tensor

from zoo.kernels import attention_hopper, attention_hopper_backward
from zoo.ops.rotary import phases, turn

KERNELS = emulated(attention_hopper, attention_hopper_backward)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize(("B", "T", "H", "G", "K"), [
    (1, 1, 1, 1, 64), (2, 63, 2, 2, 64), (1, 64, 1, 1, 128), (1, 65, 2, 2, 40), (1, 128, 1, 1, 96), (2, 129, 2, 1, 64),
    (1, 400, 2, 2, 64), (1, 400, 3, 1, 128), (1, 330, 4, 2, 64)])
def test_numbers(B: int, T: int, H: int, G: int, K: int) -> None:
    q, dy = (torch.randn(B, T, H, K) for _ in range(2))
    k, v = (torch.randn(B, T, G, 2 * K)[..., :K] for _ in range(2))  # rows that lie apart
    y, lse = KERNELS["forward"](q, k, v, K**-0.5)
    gradients = KERNELS["backward"](dy, q, k, v, y, lse, K**-0.5)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected = plain(*wide)
    for x, exact in zip((y, *gradients), (expected, *torch.autograd.grad(expected, wide, dy.double())), strict=True):
        assert x.shape == exact.shape
        assert (x - exact).norm() <= 1e-5 * exact.norm().clamp(min=1)
    assert bool(lse[..., :T].isfinite().all())
    assert bool((lse[..., T:] == torch.inf).all())


@pytest.mark.parametrize(("B", "T", "H", "G", "K"), [(2, 65, 2, 1, 64), (1, 1, 1, 1, 64), (1, 130, 1, 1, 128)])
def test_gradients_in_a_row_are_turned_back(B: int, T: int, H: int, G: int, K: int) -> None:
    qkv, dy, table = torch.randn(B, T, H + 2 * G, K), torch.randn(B, T, H, K), phases(torch.arange(T), K)
    q, k, v = qkv.split([H, G, G], dim=2)
    q, k = turn(q, table), turn(k, table)
    y, lse = KERNELS["forward"](q, k, v, K**-0.5)
    dqkv = torch.full_like(qkv, torch.nan)
    KERNELS["backward_in_row"](dqkv, dy, q, k, v, y, lse, K**-0.5, table)
    wide = qkv.double().requires_grad_()
    q, k, v = wide.split([H, G, G], dim=2)
    expected = plain(turn(q, table.double()), turn(k, table.double()), v)
    exact, = torch.autograd.grad(expected, wide, dy.double())
    for a, b in zip((y, *dqkv.split([H, G, G], dim=2)), (expected, *exact.split([H, G, G], dim=2)), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm().clamp(min=1)


def test_another_sample_that_is_no_number_is_not_read() -> None:
    q, k, v, dy = (torch.randn(2, 70, 1, 64) for _ in range(4))
    runs = []
    for _ in range(2):
        y, lse = KERNELS["forward"](q, k, v, 0.1)
        runs.append([x[0] for x in (y, *KERNELS["backward"](dy, q, k, v, y, lse, 0.1))])
        for x in (q, k, v, dy):
            x[1] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_emulator_sees_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product used before it was waited for; a copy that never comes; a tile overwritten before it was used."""
    q = torch.randn(1, 200, 1, 64)
    names = KERNELS["forward"].__globals__
    wait = names["warpgroup_mma_wait"]
    monkeypatch.setitem(names, "warpgroup_mma_wait", lambda count, deps: wait(count + 1, deps))
    with pytest.raises(AssertionError, match="not waited for"):
        KERNELS["forward"](q, q, q, 0.1)
    monkeypatch.undo()
    wait.__self__.under_way.clear()
    fetch = names["fetch"]
    monkeypatch.setitem(names, "fetch", lambda *_: None)
    with pytest.raises(AssertionError, match="a GPU would hang"):
        KERNELS["forward"](q, q, q, 0.1)
    monkeypatch.setitem(names, "fetch", fetch)
    right = KERNELS["forward"](q, q, q, 0.1)[0]
    monkeypatch.setitem(names, "weigh", _before_waiting(names["weigh"], names))
    assert not torch.equal(KERNELS["forward"](q, q, q, 0.1)[0], right)


def _before_waiting(weigh: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """`weigh`, after which the values of a product under way are overwritten, as by a copy that comes too early."""
    def run(*args: Any) -> Any:
        for product in names["warpgroup_mma_wait"].__self__.under_way:
            product.b.data.zero_()
        return weigh(*args)
    return run


def test_products_run_while_others_do() -> None:
    """ptxas does not serialise the products of any kernel, which it says of those that it does (C7512, C7515)."""
    program = """
import subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from kernel_builds import building
from zoo.kernels import attention_hopper, attention_hopper_backward
ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
compile = triton.compile
def compile_and_ask(source, **options):
    built = compile(source, **options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(built.asm["ptx"])
        file.flush()
        command = [ptxas, "-arch=sm_90a", "-v", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0 and "registers" in said.stderr, said.stderr
    print(source.fn.fn.__name__, "serialised" if "are serialized" in said.stderr else "fine")
    return built
triton.compile = compile_and_ask
for K, groups in ((64, 2), (128, 2), (64, 1), (128, 1)):
    q, k = (torch.zeros(1, 256, H, K, dtype=torch.bfloat16) for H in (2, groups))
    with building():
        y, lse = attention_hopper.forward(q, k, k, 0.1)
        attention_hopper_backward.backward(y, q, k, k, y, lse, 0.1)
        rows, table = torch.zeros(1, 256, 2 + 2 * groups, K, dtype=torch.bfloat16), torch.zeros(256, 2, K // 2)
        attention_hopper_backward.backward_in_row(rows, y, q, k, k, y, lse, 0.1, table)
"""
    here = Path(__file__).parent
    paths = os.pathsep.join(filter(None, (str(here), str(here.parent), os.environ.get("PYTHONPATH"))))
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert len(kernels) == 20
    assert all(state == "fine" for _, state in kernels), done.stdout
