"""How many bytes of tensors are alive at one time, counted on a CPU."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors made inside of it, and inside of the zoo's ops: the most alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "zoo":  # past the mode, which would be asked again, and with it inside
            with self:
                found = function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        else:
            found = function(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and (place := x.untyped_storage().data_ptr()) not in given | self.alive.keys():
                self.alive[place] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.alive.pop, place)
        if sum(self.alive.values()) > self.peak:
            gc.collect()  # the interpreter leaves a kernel's arguments in cycles
            self.peak = max(self.peak, sum(self.alive.values()))
        return found
