"""What every test shares: GPU tests skip by name without a GPU, and nothing may reach the network."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels run without a GPU, slowly

torch.set_num_threads(1)  # sums in one order, and as many tests side by side as there are cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"{item.name} needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting anywhere but to this machine fails the test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        local = self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1"))
        if not local:
            pytest.fail(f"a test opened a connection to {address!r}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """A GPU's memory does not stay with the process of one test: several processes share the GPU."""
    yield
    if torch.cuda.is_available() and request.node.get_closest_marker("gpu"):
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def command() -> ModuleType:
    """train.py as a module, to be run in this process."""
    spec = importlib.util.spec_from_file_location("train_command", Path(__file__).parent.parent / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_command"] = module
    spec.loader.exec_module(module)
    return module
