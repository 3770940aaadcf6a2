"""What a model makes of a text: bits per byte over every byte once, perplexity, and the loss by position."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from zoo.data.cache import TokenData
from zoo.data.windows import IGNORE, evaluation_windows, num_evaluation_windows
from zoo.errors import ZooError, choose
from zoo.model import LanguageModel

BINS = 64  # of positions, at most
AT_ONCE = {"cpu": 4096, "cuda": 65536}  # tokens that go through the model together, if it is not said how many


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

    def add(self, nats: Tensor, targets: Tensor) -> None:
        """nats [B, T], 0 where targets [B, T] are -100."""
        self.nats += nats.double().sum(0)
        self.targets += (targets != IGNORE).sum(0)

    def reduce(self, sum_up: Callable[[Tensor], Tensor]) -> None:
        """Sum over the processes that each saw a share of the windows."""
        self.nats, self.targets = sum_up(self.nats), sum_up(self.targets)

    def result(self, text_bytes: int) -> Evaluation:
        """What the sums say of a text of so many bytes."""
        nats, targets = self.nats.cpu(), self.targets.cpu()
        upto = position_bins(len(nats))
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
    device, training = model.head.weight.device, model.training
    rows = max(1, AT_ONCE.get(device.type, AT_ONCE["cpu"]) // length) if rows is None else rows
    tally = Tally(length, device)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for inputs, wanted in evaluation_windows(tokens, length, rows):
                targets = torch.from_numpy(wanted).to(device)
                tally.add(model.loss(torch.from_numpy(inputs).to(device), targets, reduction="none"), targets)
    finally:
        model.train(training)
    return tally.result(text_bytes)
