"""The step from one token to the next as one CUDA graph: the state stands still, and the host says a word a token.

A step reads the last token of every row, and draws the next from the logits, all on the device: `LanguageModel.read` of
one token asks nothing of it. What it writes is copied back to where the state was, but for what kernels wrote in place.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from zoo.contract import State
from zoo.model import LanguageModel
from zoo.sampling import Sampling, sample, select_rows


@torch.no_grad()
def narrowed(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """A copy for decoding whose matrices are in `dtype`: what a step has to read is nearly all theirs.

    What a product has no part in stays as it is: norms, decays, position biases, and the embedding, of which a step
    reads a row. float32 gives the model itself.
    """
    if dtype == torch.float32:
        return model
    held = {id(parameter): parameter.to(dtype) for name, parameter in _matrices(model)}
    twin = copy.deepcopy(model, {key: torch.nn.Parameter(value, requires_grad=False) for key, value in held.items()})
    return twin.requires_grad_(False).eval()


def _matrices(model: LanguageModel) -> list[tuple[str, Tensor]]:
    """The parameters that are factors of products alone, by name."""
    names = {f"{owner}.{own}" for owner, mixer in model.mixers() for own in mixer.matrices()} | {"head.weight"}
    return [(name, parameter) for name, parameter in model.named_parameters() if name in names]


class Recorded:
    """`zoo.sampling.Steps` on a GPU: the first step runs as it is, the second is recorded, and replayed from then on.

    Rows that are not kept go on unseen until half of them have gone: then the rest is recorded anew.
    """

    def __init__(self, model: LanguageModel, logits: Tensor, state: State, sampling: Sampling,
                 seen: Tensor | None = None):
        """As of `Steps`; the state must have room for every token to come (`LanguageModel.reserve`)."""
        self.model, self.sampling = model, sampling
        self._hold(logits, state, seen)
        self.draws = torch.zeros(len(logits), device=logits.device)
        self.ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        self.began = False

    def _hold(self, logits: Tensor, state: State, seen: Tensor | None) -> None:
        self.static = {name: value.contiguous() for name, value in state.items()}
        self.logits, self.seen = logits.contiguous(), seen
        self.rows: Tensor | None = None  # of those held, that are kept; None: all
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None

    @property
    def state(self) -> State:
        """Of the rows that are kept: has read every token that `next` returned but the last of each."""
        return self.static if self.rows is None else select_rows(self.static, self.rows)

    def next(self, draws: Tensor) -> Tensor:
        """draws [B] in [0, 1) -> the next token id of every row [B], a new tensor; nobody waits for the device."""
        if self.rows is None:
            self.draws.copy_(draws, non_blocking=True)
        else:
            self.draws[self.rows] = draws
        if not self.began:
            self.began = True
            self._choose()
        else:
            self.advance()
        return self.ids.clone() if self.rows is None else self.ids[self.rows]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone: rows [n] int64, ascending, of those kept so far."""
        self.rows = rows if self.rows is None else self.rows[rows]
        if 2 * len(self.rows) > len(self.ids):
            return
        kept, self.draws, self.ids = self.rows, self.draws[self.rows], self.ids[self.rows]
        seen = None if self.seen is None else self.seen[kept]
        self._hold(self.logits[kept], select_rows(self.static, kept), seen)

    def advance(self) -> None:
        """Read `ids`, and draw the next by `draws`."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.ids.device)
            main = torch.cuda.current_stream(self.ids.device)
            self.stream.wait_stream(main)
            with torch.cuda.stream(self.stream):
                self._read()
            main.wait_stream(self.stream)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # other threads, a loader's say, may ask CUDA what they like meanwhile
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self._read()
        self.graph.replay()

    def _read(self) -> None:
        logits, new = self.model.read(self.ids.unsqueeze(1), self.static)
        moved = [(held, new[name]) for name, held in self.static.items() if new[name] is not held]
        if moved:
            torch._foreach_copy_([held for held, _ in moved], [value for _, value in moved])
        self.logits = logits[:, -1]
        self._choose()

    def _choose(self) -> None:
        self.ids.copy_(sample(self.logits, self.draws, self.sampling, self.seen))
        if self.seen is not None:
            self.seen.scatter_(1, self.ids.unsqueeze(1), True)
