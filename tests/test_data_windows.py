"""The order of training data and the windows of evaluation."""

import math

import numpy as np
import pytest

from zoo.data.windows import (
    IGNORE,
    TrainingOrder,
    evaluation_batch,
    evaluation_windows,
    num_evaluation_windows,
    training_batch,
)
from zoo.errors import ZooError

LENGTHS = [(17, 16), (18, 16), (31, 16), (32, 16), (33, 16), (48, 16), (49, 16), (1000, 16), (1001, 7), (50, 1), (2, 1)]


@pytest.mark.parametrize(("num_tokens", "seq_len"), LENGTHS)
def test_each_window_is_read_once_an_epoch(num_tokens, seq_len):
    order = TrainingOrder(num_tokens, seq_len, seed=1)
    for epoch in range(4):
        starts = np.sort(order.starts(np.arange(epoch * order.windows, (epoch + 1) * order.windows)))
        assert (np.diff(starts) == seq_len).all()
        assert 0 <= starts[0] < seq_len
        assert starts[-1] + seq_len + 1 <= num_tokens
        unread = num_tokens - 1 - order.windows * seq_len  # as targets; the first token is never one
        assert unread < 2 * seq_len - 1


def test_order_depends_on_seed_and_epoch():
    def epoch(seed, number, windows=400):
        order = TrainingOrder(windows * 16 + 16, 16, seed)
        return order.starts(np.arange(number * order.windows, (number + 1) * order.windows))

    first = epoch(1, 0)
    assert np.array_equal(first, epoch(1, 0))
    for other in (epoch(2, 0), epoch(1, 1), epoch(1 << 63, 0)):
        assert (other == first).mean() < 0.05
    assert len({int(epoch(1, number)[0]) % 16 for number in range(40)}) > 8  # the phase moves
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.2


def test_order_is_the_same_for_ever():
    """A change here changes what every recorded run and every resumed one reads."""
    starts = TrainingOrder(1000, 32, seed=7).starts(np.array([0, 1, 2, 29, 30, 31, 95]))
    assert starts.tolist() == [228, 900, 484, 836, 893, 669, 466]


def test_order_needs_no_history():
    """Any step, in any order, by any reader: the same samples."""
    order = TrainingOrder(999, 8, seed=3)
    whole = order.starts(np.arange(1000))
    shuffled = np.random.default_rng(0).permutation(1000)
    fresh = TrainingOrder(999, 8, seed=3)
    assert np.array_equal(np.concatenate([fresh.starts(shuffled[i:i + 7]) for i in range(0, 1000, 7)]), whole[shuffled])


def test_training_batches_are_the_tokens_at_their_starts():
    tokens = np.arange(200, dtype=np.uint8)
    order = TrainingOrder(200, 9, seed=0)
    inputs, targets = training_batch(tokens, order, first_sample=order.windows - 2, count=5)  # crosses into epoch 1
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.shape == targets.shape == (5, 9)
    assert np.array_equal(inputs, order.starts(np.arange(order.windows - 2, order.windows + 3))[:, None] + np.arange(9))
    assert np.array_equal(targets, inputs + 1)


def test_ranks_see_one_stream():
    tokens = np.random.default_rng(0).integers(0, 256, 3000).astype(np.uint8)
    order = TrainingOrder(3000, 16, seed=0)
    whole = training_batch(tokens, order, 16, 8)
    parts = [training_batch(tokens, TrainingOrder(3000, 16, seed=0), 16 + 2 * rank, 2) for rank in range(4)]
    for index in range(2):
        assert np.array_equal(whole[index], np.concatenate([part[index] for part in parts]))


@pytest.mark.parametrize("seq_len", [1, 2, 5, 16, 99, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_evaluation_targets_each_byte_once(seq_len, batch_size):
    random = np.random.default_rng(0)
    tokens = random.integers(1, 256, 101).astype(np.uint8)
    tokens[[0, 17, 18, 60, 100]] = 0  # documents, an empty one, one at the very end
    seen, counted = [], 0
    for inputs, targets in evaluation_windows(tokens, seq_len, batch_size):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == seq_len
        assert len(inputs) <= batch_size
        kept = targets != IGNORE
        assert (targets[kept] > 0).all()
        seen.append(targets[kept])
        counted += kept.sum()
        flat = inputs.reshape(-1)[1:], targets.reshape(-1)[:-1]  # an input is the target before it, or a separator
        assert np.array_equal(flat[0], np.where(flat[1] == IGNORE, 0, flat[1]))
    assert np.array_equal(np.concatenate(seen), tokens[tokens > 0])
    assert counted == 101 - 5


def test_evaluation_windows_can_be_shared_out():
    tokens = np.arange(1, 60, dtype=np.uint16)
    whole = np.concatenate([targets for _, targets in evaluation_windows(tokens, 8, 2)])
    assert len(whole) == num_evaluation_windows(len(tokens), 8) == 8
    for rank in range(3):
        shared = [evaluation_batch(tokens, 8, first, 1)[1] for first in range(rank, 8, 3)]
        assert np.array_equal(np.concatenate(shared), whole[rank::3])
    assert evaluation_batch(tokens, 8, 8, 4)[0].shape == (0, 8)


@pytest.mark.parametrize("vocab_size", [256, 8192])
def test_a_uniform_model_costs_what_its_tokens_do(vocab_size):
    """Bits per byte = sum of nats / ln 2 / bytes: 8 for bytes, log2(V) tokens / bytes for any vocabulary."""
    random = np.random.default_rng(1)
    tokens = random.integers(1, vocab_size, 1234)
    tokens[[0, 500]] = 0
    text_tokens, text_bytes = 1232, 1232 if vocab_size == 256 else 5000
    nats = sum((targets != IGNORE).sum() * math.log(vocab_size) for _, targets in evaluation_windows(tokens, 64, 4))
    assert nats / math.log(2) / text_bytes == pytest.approx(math.log2(vocab_size) * text_tokens / text_bytes, rel=1e-12)


@pytest.mark.parametrize("make", [lambda n, t: TrainingOrder(n, t, 0), num_evaluation_windows])
def test_too_short_a_text_is_refused(make):
    make(65, 64)
    with pytest.raises(ZooError, match=r"64 tokens, too short for seq_len=64; allowed: at least 65 tokens"):
        make(64, 64)
    with pytest.raises(ZooError, match="seq_len=0"):
        make(64, 0)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_wrong_seed_is_refused(seed):
    with pytest.raises(ZooError, match="seed"):
        TrainingOrder(100, 10, seed)
