"""From logits to token ids, and token by token from a model's state. No text here: `zoo/generation.py` has that."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from zoo.contract import State
from zoo.errors import ZooError
from zoo.model import LanguageModel
from zoo.ops.sample import pick

if TYPE_CHECKING:
    from zoo.decoding import Recorded

PREFILL = 1024  # prompt tokens read at a time, so that a long prompt's logits are never in memory together
ALONE = 2**26  # bytes of weights times rows, up to which a CPU's step is one thread's work
AHEAD = 8  # steps that a GPU is given before the tokens of the first are read
DRAWN_AHEAD = 256  # random numbers of a row that go to the device together


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. What is set applies in this order, which is that of transformers' `generate`.

    repetition_penalty: the logits of tokens that the row holds already, prompt included, are divided by it where they
        are positive and multiplied where negative (1909.05858 section 4.1; the sign is transformers'). 1: none.
    temperature: of softmax(logits / temperature); 0 always takes the likeliest token, whatever follows here.
    top_k: keeps the k likeliest tokens; None: all.
    top_p: of those, keeps the fewest that together have at least this probability (nucleus, 1904.09751 section 3.1).
    min_p: of those, keeps the ones with at least this share of the likeliest one's probability (2407.01082).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ZooError(f"temperature={self.temperature} is not allowed: 0 (always the likeliest token) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ZooError(f"top_k={self.top_k} is not allowed: 1 or above")
        if not 0 < self.top_p <= 1:
            raise ZooError(f"top_p={self.top_p} is not allowed: above 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise ZooError(f"min_p={self.min_p} is not allowed: 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ZooError(f"repetition_penalty={self.repetition_penalty} is not allowed: above 0; 1 is none, more is "
                           "against repetition")


def sample(logits: Tensor, draws: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """One token id a row: logits [B, V] -> [B] int64, by the numbers draws [B] float32 in [0, 1).

    seen [B, V] bool: the tokens that each row holds, for the repetition penalty. A function of its tensors alone that
    waits for no device, and a row's token does not depend on the rows beside it.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return pick(logits, draws, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


def row_generators(seed: int, positions: Sequence[int]) -> list[torch.Generator]:
    """A (CPU) generator for each row, which gives the number that draws the token at `positions[row]`, then the next's.

    The number is a function of (seed, row, position) alone, so that a row that is taken up again goes on with the
    numbers it would have had.
    """
    if not 0 <= seed < 1 << 64:
        raise ZooError(f"seed={seed} is not allowed: a whole number from 0 to 2^64 - 1")
    generators = []
    for row, position in enumerate(positions):
        (state,) = np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)
        generators.append(torch.Generator().manual_seed(int(state)))
        torch.rand(position, generator=generators[-1])
    return generators


def draw(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """The next `count` numbers of each row, [B, count] float32 in [0, 1) on the CPU, the same in any portions."""
    return torch.stack([torch.rand(count, generator=generator) for generator in generators])


def select_rows(state: State, rows: Tensor) -> State:
    """The state of some rows, in the order given, as new tensors: rows [n] int64."""
    return {name: value[rows] for name, value in state.items()}


def resize(model: LanguageModel, state: State, room: int) -> State:
    """A copy of a state with room for `room` tokens, at least as many as it has read.

    Of an entry [B, ...] only dimension 1 may depend on the room; what is filled stands in front, and what follows is
    what `init_state` puts there.
    """
    position = state["position"]
    larger = model.init_state(len(position), max(1, room), device=position.device)
    new = {name: larger[name].to(value.dtype) for name, value in state.items()}
    for name, value in state.items():
        held = (slice(None), slice(min(value.shape[1], new[name].shape[1]))) if value.ndim > 1 else ...
        new[name][held] = value[held]
    return new


def check_tokens(model: LanguageModel, tokens: Sequence[int]) -> None:
    """Raise ZooError for ids that the model has no embedding of; a GPU would stop the whole process there."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < model.config.vocab_size:
        raise ZooError(f"token ids of this model lie in 0 .. {model.config.vocab_size - 1}; "
                       f"got {min(tokens)} .. {max(tokens)}")


@torch.inference_mode()
def prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], max_len: int | None = None,
            state: State | None = None) -> tuple[Tensor, State]:
    """Read prompts of any lengths >= 1 -> (logits after each one's last token [B, V], their state).

    Rows of one length are read together; nothing is padded, so that a row's state is what it would be alone.
    max_len: tokens to make room for in every row, the longest prompt's length if None.
    state [1, ...]: has read the first tokens of every prompt already, as many as its position says and fewer than any
        prompt has; it is left as it is.
    """
    if not prompts or not all(map(len, prompts)):
        raise ZooError("every prompt needs at least one token, and there must be one prompt")
    room = max(max_len or 0, *map(len, prompts))
    done = 0 if state is None else int(state["position"])
    groups: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        check_tokens(model, prompt)
        groups[len(prompt)].append(row)
    if min(groups) <= done:
        raise ZooError(f"a prompt of {min(groups)} tokens does not go on after the {done} that its state has read")
    model.check_length(max(groups))
    last, states, device = [], [], model.head.weight.device
    start = None if state is None else resize(model, state, room)
    for rows in groups.values():
        tokens = torch.tensor([list(prompts[row][done:]) for row in rows], device=device)
        if start is None:
            part = model.init_state(len(rows), room)
        else:
            part = select_rows(start, torch.zeros(len(rows), dtype=torch.int64, device=device))
        for piece in tokens.split(PREFILL, dim=1):
            logits, part = model.extend(piece, part)
        last.append(logits[:, -1])
        states.append(part)
    if len(states) == 1:
        return last[0], states[0]
    back = torch.tensor([row for rows in groups.values() for row in rows], device=device).argsort()
    merged = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    return torch.cat(last)[back], select_rows(merged, back)


@contextlib.contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Within the block PyTorch's operators run on this thread alone, if so wanted.

    A small model's step is hundreds of operators of microseconds, and each waits for the slowest thread: where others
    want the cores, too, two threads took a hundred times as long as one.
    """
    before = torch.get_num_threads()
    if not wanted or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Steps:
    """The step from one token of every row to the next: draw by the logits, then read what was drawn.

    state: has read every token that `next` returned but the last of each row.
    """

    def __init__(self, model: LanguageModel, logits: Tensor, state: State, sampling: Sampling,
                 seen: Tensor | None = None):
        """logits [B, V] and state behind the prompts; seen [B, V] bool: the tokens in them, for a penalty."""
        self.model, self.logits, self.state, self.sampling, self.seen = model, logits, state, sampling, seen
        self.ids: Tensor | None = None
        weights = sum(parameter.nbytes for parameter in model.parameters())
        self.alone = logits.device.type == "cpu" and weights * len(logits) <= ALONE

    def next(self, draws: Tensor) -> Tensor:
        """draws [B] in [0, 1) -> the next token id of every row [B], all on the model's device."""
        if self.ids is not None:
            with one_thread(self.alone):
                logits, self.state = self.model.extend(self.ids.unsqueeze(1), self.state)
            self.logits = logits[:, -1]
        self.ids = sample(self.logits, draws, self.sampling, self.seen)
        if self.seen is not None:
            self.seen.scatter_(1, self.ids.unsqueeze(1), True)
        return self.ids

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone: rows [n] int64, ascending."""
        self.state, self.logits = select_rows(self.state, rows), self.logits[rows]
        self.ids = None if self.ids is None else self.ids[rows]
        self.seen = None if self.seen is None else self.seen[rows]


class Continuation:
    """Rows of tokens of any lengths, all continued together, a token of each at a time.

    prompts: the whole rows; `state` [1, ...], as in `prefill`, has read their first tokens already.
    max_tokens: at most so many for every row. seed: the number for a token is a function of (seed, row, position).
    alive: the rows that go on, ascending. One that does not costs nothing.
    Raises ZooError, before the first token, where a prompt and its continuation are past the model's limit.
    """

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]], *, max_tokens: int,
                 sampling: Sampling | None = None, seed: int = 0, state: State | None = None):
        if max_tokens < 0:
            raise ZooError(f"max_tokens={max_tokens} is not allowed: 0 or above")
        longest = max(map(len, prompts), default=0)
        # The last token drawn is not read, hence one less.
        if model.max_len is not None and longest + max_tokens - 1 > model.max_len:
            raise ZooError(f"a prompt of {longest} tokens and {max_tokens} more are past the limit of this "
                           f"{model.config.model}: at most {model.max_len}")
        sampling = sampling or Sampling()
        self.generators = row_generators(seed, [len(prompt) for prompt in prompts])
        self.device, self.left = model.head.weight.device, max_tokens
        self.alive = list(range(len(prompts))) if max_tokens else []
        self.rows = list(self.alive)  # those that `steps` has, some of which may have ended since
        if not self.alive:
            return
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                check_tokens(model, prompt)
                seen[row, list(prompt)] = True
            seen = seen.to(self.device)
        logits, behind = prefill(model, prompts, longest + max_tokens - 1, state)
        self.steps: Steps | Recorded
        if self.device.type == "cuda":
            from zoo.decoding import Recorded  # which is built on this file

            self.steps = Recorded(model, logits, behind, sampling, seen)
        else:
            self.steps = Steps(model, logits, behind, sampling, seen)
        self.draws, self.used = torch.empty(len(prompts), 0), 0
        self.ahead = AHEAD if self.device.type == "cuda" else 0
        self.handed, self.coming = 0, deque[tuple[list[int], Callable[[], list[int]]]]()

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """The next token of each row that is alive -> (row, token id) in order of rows; nothing where no row is.

        On a GPU the next few steps are under way when this one's tokens are handed out, so that nobody waits for who
        reads them; of a row that ends, what they drew is dropped.
        """
        if not self.alive:
            return []
        while self.left and len(self.coming) <= min(self.ahead, self.handed):  # the first token soonest
            self.coming.append(self._launch())
        rows, ids = self.coming.popleft()
        self.handed += 1
        going = set(self.alive)
        if not (self.left or self.coming):
            self.alive = []
        return [(row, token) for row, token in zip(rows, ids(), strict=True) if row in going]

    def _launch(self) -> tuple[list[int], Callable[[], list[int]]]:
        """Draw a token for each row that is alive -> the rows, and a call that waits for their tokens."""
        if len(self.alive) < len(self.rows):
            going = set(self.alive)
            kept = torch.tensor([i for i, row in enumerate(self.rows) if row in going], device=self.device)
            self.steps.keep(kept)
            self.draws, self.rows = self.draws[kept], list(self.alive)
        if self.used == self.draws.shape[1]:
            generators = [self.generators[row] for row in self.rows]
            self.draws, self.used = draw(generators, min(DRAWN_AHEAD, self.left)).to(self.device), 0
        ids = self.steps.next(self.draws[:, self.used])
        self.used += 1
        self.left -= 1
        return list(self.rows), _on_its_way(ids)

    def end(self, row: int) -> None:
        """The row goes no further."""
        self.alive = [other for other in self.alive if other != row]


def _on_its_way(ids: Tensor) -> Callable[[], list[int]]:
    """Token ids on their way to the host: the call waits for them alone, not for what was launched after them."""
    if not ids.is_cuda:
        return ids.tolist
    here = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
    here.copy_(ids, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        return here.tolist()

    return wait


def stream(model: LanguageModel, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling | None = None,
           seed: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """A `Continuation` as (row, token id), as they are drawn, in order of rows; a row ends before the id `stop`."""
    rows = Continuation(model, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed)
    while drawn := rows.step():
        for row, token in drawn:
            if token == stop:
                rows.end(row)
            else:
                yield row, token
