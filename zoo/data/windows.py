"""Which tokens a step reads. The order is a pure function of (seed, sample), so a resumed run needs no loader state,
and any number of workers or ranks sees the same stream."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from zoo.errors import ZooError

IGNORE = -100  # PyTorch's `ignore_index`: a target that is no text


class TrainingOrder:
    """Sample i -> where in the tokens it starts. A sample is seq_len inputs and, one further on, their targets.

    Each epoch cuts the tokens anew, from a random phase on, into windows that follow each other, and reads each of them
    once in a random order; at most 2 seq_len - 2 tokens at the two ends are no targets in that epoch.
    """

    def __init__(self, num_tokens: int, seq_len: int, seed: int):
        _check_length(num_tokens, seq_len, "training")
        if not 0 <= seed < 1 << 64:
            raise ZooError(f"seed={seed}; allowed: 0 to 2^64 - 1")
        self.seq_len, self.seed = seq_len, seed
        # As many windows as fit behind every phase below seq_len, so that all epochs have the same number.
        self.windows = max(1, (num_tokens - seq_len) // seq_len)
        self._phases = min(seq_len, num_tokens - self.windows * seq_len)
        self._epochs: dict[int, np.ndarray] = {}

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """Offsets of samples [n] of any epochs, int64 [n]."""
        samples = np.asarray(samples, dtype=np.int64)
        epochs, windows = np.divmod(samples, self.windows)
        starts = np.empty_like(samples)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            starts[inside] = self._epoch(int(epoch))[windows[inside]]
        return starts

    def _epoch(self, epoch: int) -> np.ndarray:
        """The starts of an epoch in its order [windows]."""
        if epoch not in self._epochs:
            # Philox counts: its numbers for (seed, epoch) need no earlier ones. Raw numbers and a stable sort,
            # because numpy promises those for all its versions, and a Generator's permutations for none.
            random = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.windows + 1)
            phase = int(random[0] % np.uint64(self._phases))
            while len(self._epochs) > 1:  # a batch spans two epochs at most, unless there are few windows
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = np.argsort(random[1:], kind="stable") * self.seq_len + phase
        return self._epochs[epoch]


def training_batch(tokens: np.ndarray, order: TrainingOrder, first_sample: int,
                   count: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples first_sample .. first_sample + count - 1 as (inputs, targets), int64 [count, seq_len] each.

    Separators are targets too: the model learns where documents end.
    """
    inputs = np.empty((count, order.seq_len), dtype=np.int64)
    targets = np.empty_like(inputs)
    for row, start in enumerate(order.starts(np.arange(first_sample, first_sample + count))):
        inputs[row] = tokens[start:start + order.seq_len]
        targets[row] = tokens[start + 1:start + order.seq_len + 1]
    return inputs, targets


def num_evaluation_windows(num_tokens: int, seq_len: int) -> int:
    """How many windows cover a split: every token but the first is a target once."""
    _check_length(num_tokens, seq_len, "evaluation")
    return -(-(num_tokens - 1) // seq_len)


def evaluation_batch(tokens: np.ndarray, seq_len: int, first_window: int, count: int,
                     separator: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Windows first_window .. first_window + count - 1, fewer at the end, as (inputs, targets), int64 [n, seq_len]
    each.

    Windows follow each other without overlap, so each byte of the text is predicted exactly once, with 0 to seq_len -
    1 tokens of its window before it (and the one at the window's start). Targets that are no text are -100:
    separators, and what pads the last window. Nats summed over the others / ln 2 / bytes of text is bits per byte.
    """
    count = max(0, min(count, num_evaluation_windows(len(tokens), seq_len) - first_window))
    start = first_window * seq_len
    block = np.asarray(tokens[start:start + count * seq_len + 1], dtype=np.int64)
    inputs = np.full(count * seq_len, separator, dtype=np.int64)
    targets = np.full_like(inputs, IGNORE)
    if count:
        inputs[:len(block) - 1] = block[:-1]
        targets[:len(block) - 1] = np.where(block[1:] == separator, IGNORE, block[1:])
    return inputs.reshape(count, seq_len), targets.reshape(count, seq_len)


def evaluation_windows(tokens: np.ndarray, seq_len: int, batch_size: int,
                       stride: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All windows of a split in batches: `evaluation_batch`'s, or with a stride `sliding_batch`'s."""
    if stride is None or stride == seq_len:
        for first in range(0, num_evaluation_windows(len(tokens), seq_len), batch_size):
            yield evaluation_batch(tokens, seq_len, first, batch_size)
        return
    for first in range(0, num_sliding_windows(len(tokens), seq_len, stride), batch_size):
        yield sliding_batch(tokens, seq_len, stride, first, batch_size)


def num_sliding_windows(num_tokens: int, seq_len: int, stride: int) -> int:
    """How many windows, each `stride` tokens after the one before, have every token but the first as a target once."""
    _check_length(num_tokens, seq_len, "evaluation")
    if not 1 <= stride <= seq_len:
        raise ZooError(f"stride={stride} is not allowed: 1 to {seq_len}, the window's length")
    return 1 + -(-(num_tokens - 1 - seq_len) // stride)


def sliding_batch(tokens: np.ndarray, seq_len: int, stride: int, first_window: int, count: int,
                  separator: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Like `evaluation_batch`, of windows that overlap: all but the first have their last `stride` targets alone, each
    with at least seq_len - stride tokens of its window before it; the others, and what is no text, are -100."""
    count = max(0, min(count, num_sliding_windows(len(tokens), seq_len, stride) - first_window))
    inputs = np.full((count, seq_len), separator, dtype=np.int64)
    targets = np.full_like(inputs, IGNORE)
    for row in range(count):
        start = (first_window + row) * stride
        block = np.asarray(tokens[start:start + seq_len + 1], dtype=np.int64)
        own = 0 if start == 0 else seq_len - stride
        inputs[row, :len(block) - 1] = block[:-1]
        targets[row, own:len(block) - 1] = np.where(block[own + 1:] == separator, IGNORE, block[own + 1:])
    return inputs, targets


def _check_length(num_tokens: int, seq_len: int, what: str) -> None:
    if seq_len < 1:
        raise ZooError(f"seq_len={seq_len}; allowed: 1 or more")
    if num_tokens < seq_len + 1:
        raise ZooError(f"the text for {what} has {num_tokens} tokens, too short for seq_len={seq_len}; allowed: at "
                       f"least {seq_len + 1} tokens, or a shorter seq_len")
