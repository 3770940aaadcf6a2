"""What a model makes of a text: bits per byte over every byte once, perplexity, and the loss by position.

Three ways to read it. Windows that follow each other without overlap are what training and the comparison use: a byte
at the beginning of its window is predicted from little. Windows that overlap (a stride) give every byte but the first
ones a context of some length, for as many times the work. Carried state reads each document from its beginning to its
end in one go, as decoding does: every byte is predicted from all of its document before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.cache import TokenData
from zoo.data.windows import IGNORE, evaluation_windows, num_evaluation_windows
from zoo.errors import ZooError, choose
from zoo.model import LanguageModel

BINS = 64  # of positions, at most
AT_ONCE = {"cpu": 4096, "cuda": 65536}  # tokens that go through the model together, if it is not said how many
PIECE = 1024  # tokens of a document, at least, that are read at a time, with its state carried on to the next
Progress = Callable[[int, int], object]
"""Called with the tokens read so far, and how many there are to read."""


@dataclass(frozen=True)
class Evaluation:
    """bits_per_byte: over the bytes of text that the targets stand for. perplexity: of a token. tokens: targets.

    The loss by position in the window is in bins: `nats[i]` is the mean of the targets with more than `upto[i - 1]`
    tokens before them in their window (0 for the first bin) and at most `upto[i]`. Short contexts have a bin each,
    long ones share it, as their mean changes with the logarithm of the length.
    """

    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int
    upto: tuple[int, ...]
    nats: tuple[float, ...]

    @property
    def positions(self) -> dict[str, list[int] | list[float]]:
        """The loss by position in plain values, for a file."""
        return {"upto": list(self.upto), "nats": list(self.nats)}


class Tally:
    """Nats and targets of windows [B, T], summed by position in float64: how windows are batched does not show."""

    def __init__(self, seq_len: int, device: torch.device):
        self.nats = torch.zeros(seq_len, dtype=torch.float64, device=device)
        self.targets = torch.zeros(seq_len, dtype=torch.int64, device=device)

    def add(self, nats: Tensor, targets: Tensor, start: int = 0) -> None:
        """nats [B, T], 0 where targets [B, T] are -100; `start`: tokens before the first of them, in every row."""
        at = slice(start, start + nats.shape[1])
        self.nats[at] += nats.double().sum(0)
        self.targets[at] += (targets != IGNORE).sum(0)

    def reduce(self, sum_up: Callable[[Tensor], Tensor]) -> None:
        """Sum over the processes that each saw a share of the windows."""
        self.nats, self.targets = sum_up(self.nats), sum_up(self.targets)

    def result(self, text_bytes: int, upto: Sequence[int] | None = None) -> Evaluation:
        """What the sums say of a text of so many bytes. upto: the bins' upper ends, `position_bins` if None."""
        nats, targets = self.nats.cpu(), self.targets.cpu()
        upto = position_bins(len(nats)) if upto is None else upto
        sizes = [after - before for before, after in pairwise((0, *upto))]
        parts = zip(upto, nats.split(sizes), targets.split(sizes), strict=True)
        means = {edge: float(part.sum() / seen.sum()) for edge, part, seen in parts if seen.any()}
        total, count = float(nats.sum()), int(targets.sum())
        if not count or not text_bytes:
            raise ZooError("there is no text to evaluate")
        return Evaluation(total / math.log(2) / text_bytes, math.exp(min(700.0, total / count)), count, text_bytes,
                          tuple(means), tuple(means.values()))


def position_bins(seq_len: int) -> tuple[int, ...]:
    """The upper ends of at most `BINS` bins of 1 .. seq_len, each a constant factor above the one before."""
    return tuple(sorted({round(seq_len ** (i / (BINS - 1))) for i in range(BINS)}))


def evaluate(model: LanguageModel, data: TokenData, split: str = "validation", seq_len: int | None = None, *,
             rows: int | None = None, bf16: bool = False, windows: int | None = None) -> Evaluation:
    """Read a split in windows that follow each other without overlap, each from its beginning, on the model's device.

    seq_len: of a window, the model's own if None. rows: windows at once; changes rounding alone. bf16: autocast, as
    training does it on a GPU. windows: the first so many, a slice of the split; None for all. Raises ZooError for a
    split that has fewer tokens than a window, or a window past the model's limit.
    """
    choose("split", split, data.bytes)
    length = model.config.seq_len if seq_len is None else seq_len
    model.check_length(length)
    tokens, text_bytes = data.split(split), data.bytes[split]
    count = num_evaluation_windows(len(tokens), length)
    if windows is not None:
        if not 1 <= windows <= count:
            raise ZooError(f"windows={windows} is not allowed: 1 to {count}, as many as the {split} split has")
        tokens = tokens[:windows * length + 1]
        text_bytes = len(data.tokenizer.to_bytes(tokens[1:]))
    batch_tokens = None if rows is None else rows * length
    return read_windows(model, tokens, length, batch_tokens=batch_tokens, bf16=bf16).result(text_bytes)


def read_windows(model: LanguageModel, tokens: np.ndarray, seq_len: int, stride: int | None = None, *,
                 batch_tokens: int | None = None, bf16: bool = False, progress: Progress | None = None) -> Tally:
    """The losses of tokens [n] by their position in windows of seq_len, each read from its beginning.

    stride: of windows that overlap, 1 to seq_len; all targets but the first seq_len then have at least seq_len - stride
    tokens before them. None: windows side by side. batch_tokens: at once, but a window at least; changes rounding
    alone. Raises ZooError for fewer tokens than a window, or a window past the model's limit.
    """
    model.check_length(seq_len)
    device = model.head.weight.device
    rows = max(1, (batch_tokens or at_once(device)) // seq_len)
    tally, done = Tally(seq_len, device), 0
    with reading(model, bf16):
        for inputs, wanted in evaluation_windows(tokens, seq_len, rows, stride):
            targets = torch.from_numpy(wanted).to(device)
            tally.add(model.loss(torch.from_numpy(inputs).to(device), targets, reduction="none"), targets)
            if progress is not None:
                done += len(inputs) * (stride or seq_len)
                progress(min(done, len(tokens) - 1), len(tokens) - 1)
    return tally


def read_carried(model: LanguageModel, tokens: np.ndarray, separator: int = 0, *, batch_tokens: int | None = None,
                 piece: int | None = None, bf16: bool = False, progress: Progress | None = None) -> Tally:
    """The losses of tokens [n] by their position in their document, every document read with one state.

    Documents begin with a separator; the state before it is the empty one. They are read side by side, the long ones
    first, in pieces of `piece` tokens; if None, of 1024, or more where few documents leave room. batch_tokens: at once,
    one document's piece at least; like `piece` it changes rounding alone. Raises ZooError for a document past the
    model's limit.
    """
    starts = np.flatnonzero(np.asarray(tokens) == separator)
    lengths = np.diff(starts, append=len(tokens)) - 1  # targets: a document's tokens, not the separator after it
    if not len(starts) or starts[0] != 0 or not lengths.any():
        raise ZooError("there is no text to evaluate: carrying the state wants documents that begin with a separator")
    longest, device = int(lengths.max()), model.head.weight.device
    model.check_length(longest)
    tally, done, order = Tally(longest, device), 0, np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    together = batch_tokens or at_once(device)
    rows = min(len(order), max(1, together // min(piece or PIECE, longest)))
    piece = min(piece or max(PIECE, together // rows), longest)
    with reading(model, bf16):
        for first in range(0, len(order), rows):
            group = order[first:first + rows]
            room = int(lengths[group[0]])
            state = model.init_state(len(group), room)
            for at in range(0, room, piece):
                alive = group[lengths[group] > at]
                if len(alive) < len(state["position"]):  # the longest come first
                    state = {name: value[:len(alive)] for name, value in state.items()}
                inputs, wanted = _pieces(tokens, starts[alive], lengths[alive], at, min(piece, room - at), separator)
                targets = torch.from_numpy(wanted).to(device)
                logits, state = model.extend(torch.from_numpy(inputs).to(device), state)
                tally.add(_nats(logits, targets), targets, at)
                if progress is not None:
                    done += int((wanted != IGNORE).sum())
                    progress(done, int(lengths.sum()))
    return tally


def _pieces(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, at: int, size: int,
            separator: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `at` .. at + size - 1 of documents, and their targets, int64 [n, size]; -100 past a document's end."""
    inputs = np.full((len(starts), size), separator, dtype=np.int64)
    targets = np.full_like(inputs, IGNORE)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        here = min(size, length - at)
        block = tokens[start + at:start + at + here + 1]
        inputs[row, :here], targets[row, :here] = block[:-1], block[1:]
    return inputs, targets


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [B, t, V], targets [B, t] -> [B, t] in float32, 0 where there is no target."""
    with torch.autocast(logits.device.type, enabled=False):
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(targets.shape)


def at_once(device: torch.device) -> int:
    """Tokens that go through a model together, if it is not said how many."""
    return AT_ONCE.get(device.type, AT_ONCE["cpu"])


@contextmanager
def reading(model: LanguageModel, bf16: bool) -> Iterator[None]:
    """The model as it is measured: no dropout, no gradients; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.head.weight.device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        model.train(training)
