"""Multi-query associative recall (MQAR), as Zoology defines it (2312.04927) and its published code generates it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.errors import ZooError


@dataclass(frozen=True)
class Recall:
    """The task: `pairs` keys with a value each, then every key once more, at which its value is to be predicted.

    Keys are distinct ids of 1 .. vocab_size / 2 - 1, values distinct ones of vocab_size / 2 .. vocab_size - 1. The
    pairs stand first, key value key value ...; behind them is room for (seq_len - 2 pairs) / 2 queries, one every
    second token. The query of each key in turn takes a free place k = 1, 2, ... with probability in proportion to
    k^(power - 1), so that most come soon: the gaps between equal bigrams in text follow such a law. All else is id 0.
    """

    seq_len: int
    pairs: int
    vocab_size: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.seq_len % 2 or 4 * self.pairs > self.seq_len:
            raise ZooError(f"{self.pairs} pairs in {self.seq_len} tokens are not allowed: 1 to a quarter of the "
                           "tokens, whose number is even")
        if self.vocab_size % 2 or self.vocab_size < 2 * self.pairs + 2:
            raise ZooError(f"a vocabulary of {self.vocab_size} is not allowed: even, {2 * self.pairs + 2} or more for "
                           f"{self.pairs} pairs")
        if not 0 < self.power <= 1:
            raise ZooError(f"power={self.power} is not allowed: above 0, at most 1")

    def examples(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> tokens [count, seq_len], where the queries stand in them and what they ask for, [count, pairs] each.

        A function of (count, seed). int32; a row's queries are in the order of its pairs.
        """
        random, half = np.random.Generator(np.random.Philox(seed)), self.vocab_size // 2
        keys = _distinct(random, count, self.pairs, half - 1) + 1
        values = _distinct(random, count, self.pairs, half) + half
        context = 2 * self.pairs
        room = (self.seq_len - context) // 2
        # A race of exponentials: the order in which they arrive is that of drawing without replacement by their rates.
        rates = np.arange(1, room + 1) ** (self.power - 1)
        places = np.argsort(random.exponential(size=(count, room)) / rates, axis=1)[:, :self.pairs]
        where = (context + 2 * places).astype(np.int32)
        tokens = np.zeros((count, self.seq_len), dtype=np.int32)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
        np.put_along_axis(tokens, where, keys, axis=1)
        return tokens, where, values


def _distinct(random: np.random.Generator, rows: int, count: int, below: int) -> np.ndarray:
    """`count` distinct numbers of 0 .. below - 1 a row, uniformly: rows with a repetition are drawn anew."""
    if 2 * count > below:  # few rows would do without
        return np.argsort(random.random((rows, below)), axis=1)[:, :count].astype(np.int32)
    drawn = random.integers(below, size=(rows, count), dtype=np.int32)
    while True:
        ordered = np.sort(drawn, axis=1)
        again = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(again):
            return drawn
        drawn[again] = random.integers(below, size=(len(again), count), dtype=np.int32)
