"""A pass forward and back as one CUDA graph: the host says a word where it would launch hundreds of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Captured:
    """call(*inputs) -> Tensor, adding gradients to `parameters`, with what it does on the GPU recorded and replayed.

    The first call runs as it is, so that what compilers and libraries set up once stays out of the graph; the second of
    its shapes is recorded, with inputs and output in places of their own. Other shapes run as they are. Random numbers
    are drawn from torch's generator in a replay as in a call, so a recording changes no bit of a run.

    adds: gradients add up over the calls between two of `zero_grad`. If not, there is one call between them, and its
    graph writes the gradients where the last one did: zeroing and adding would be two launches a parameter.
    beside: another, whose memory is used again; none needs its gradients or output once the other has been called.
    """

    def __init__(self, call: Callable[..., Tensor], parameters: Sequence[nn.Parameter], *, adds: bool,
                 beside: Captured | None = None):
        self.call, self.parameters, self.adds, self.beside = call, parameters, adds, beside
        self.stream: torch.cuda.Stream | None = None if beside is None else beside.stream
        self.shapes: list[torch.Size] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = [each.shape for each in inputs]
        if shapes != self.shapes:
            self.shapes = self.shapes or shapes
            if self.graph is not None and not self.adds:
                self._zero()
            return self._aside(*inputs)
        if self.graph is None:
            self.graph = self._record(inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output

    def zero_grad(self) -> None:
        """Forget the gradients; once recorded, they keep their place in memory."""
        if self.adds:
            self._zero()
        elif self.graph is None:
            self._drop()

    def _zero(self) -> None:
        torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])

    def _drop(self) -> None:
        for p in self.parameters:
            p.grad = None

    def _aside(self, *inputs: Tensor) -> Tensor:
        """The call as it is, on the stream that it is recorded on: autograd and cuBLAS keep things by stream."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(inputs[0].device)
        main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            output = self.call(*inputs)
        main.wait_stream(self.stream)
        return output

    def _record(self, inputs: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        self.inputs = [each.clone() for each in inputs]
        if not self.adds:
            self._drop()
        graph = torch.cuda.CUDAGraph()
        pool = self.beside.graph.pool() if self.beside is not None and self.beside.graph is not None else None
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            self.output = self.call(*self.inputs)
        return graph
