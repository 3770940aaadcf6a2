"""From logits to token ids, and token by token from a model's state. No text here: `zoo/generation.py` has that."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from zoo.contract import State
from zoo.errors import ZooError
from zoo.model import LanguageModel

PREFILL = 1024  # prompt tokens read at a time, so that a long prompt's logits are never in memory together


def check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
    """Raise ZooError for a value that `sample` has no meaning for."""
    if not 0 <= temperature < math.inf:
        raise ZooError(f"temperature={temperature} is not allowed: 0 (always the likeliest token) or above")
    if top_k is not None and top_k < 1:
        raise ZooError(f"top_k={top_k} is not allowed: 1 or above")
    if not 0 < top_p <= 1:
        raise ZooError(f"top_p={top_p} is not allowed: above 0, at most 1")


def sample(logits: Tensor, generators: Sequence[torch.Generator], *, temperature: float = 1.0, top_k: int | None = None,
           top_p: float = 1.0) -> Tensor:
    """One token id a row: logits [B, V] -> [B] int64, drawn from softmax(logits / temperature).

    `top_k` keeps the k likeliest tokens; of those, `top_p` keeps the fewest that together have at least that
    probability (nucleus sampling, 1904.09751). Temperature 0 takes the likeliest. Each row draws one number from its
    own (CPU) generator, so that what a row gets does not depend on the rows beside it.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    ordered, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered, ids = ordered[:, :top_k], ids[:, :top_k]
    total = ((ordered - ordered[:, :1]) / temperature).softmax(-1).cumsum(-1)
    kept = 1 + (total[:, :-1] < top_p).sum(-1, keepdim=True)
    drawn = torch.stack([torch.rand(1, generator=g) for g in generators]).to(logits.device)
    # Inverse of the cumulative distribution; the last token kept is where rounding could step over the end.
    choice = torch.searchsorted(total, drawn * total.gather(-1, kept - 1), right=True).minimum(kept - 1)
    return ids.gather(-1, choice).squeeze(-1)


def row_generators(seed: int, rows: int) -> list[torch.Generator]:
    """A generator for each row, a function of (seed, row) alone."""
    if not 0 <= seed < 1 << 64:
        raise ZooError(f"seed={seed} is not allowed: a whole number from 0 to 2^64 - 1")
    seeds = (np.random.SeedSequence([seed, row]).generate_state(1, np.uint64) for row in range(rows))
    return [torch.Generator().manual_seed(int(s[0])) for s in seeds]


def select_rows(state: State, rows: Tensor) -> State:
    """The state of some rows, in the order given: rows [n] int64."""
    return {name: value[rows] for name, value in state.items()}


@torch.inference_mode()
def prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], max_len: int | None = None) -> tuple[Tensor, State]:
    """Read prompts of any lengths >= 1 -> (logits after each one's last token [B, V], their state).

    Rows of one length are read together; nothing is padded, so that a row's state is what it would be alone.
    `max_len`: tokens to make room for in every row, the longest prompt's length if None.
    """
    if not prompts or not all(map(len, prompts)):
        raise ZooError("every prompt needs at least one token, and there must be one prompt")
    room = max(max_len or 0, *map(len, prompts))
    groups: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[len(prompt)].append(row)
    last, states, device = [], [], model.head.weight.device
    for length, rows in groups.items():
        model.check_length(length)
        tokens = torch.tensor([list(prompts[row]) for row in rows], device=device)
        state = model.init_state(len(rows), room)
        for piece in tokens.split(PREFILL, dim=1):
            logits, state = model.extend(piece, state)
        last.append(logits[:, -1])
        states.append(state)
    back = torch.tensor([row for rows in groups.values() for row in rows], device=device).argsort()
    merged = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    return torch.cat(last)[back], select_rows(merged, back)


@torch.inference_mode()
def stream(model: LanguageModel, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float = 1.0,
           top_k: int | None = None, top_p: float = 1.0, seed: int = 0,
           stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Continue prompts of any lengths, all rows at once: yields (row, token id) as they are drawn, in order of rows.

    A row ends after `max_tokens`, or before the id `stop`, and costs nothing from then on. Raises ZooError, before the
    first token, where a prompt and its continuation are past the model's limit.
    """
    check_sampling(temperature, top_k, top_p)
    if max_tokens < 1:
        raise ZooError(f"max_tokens={max_tokens} is not allowed: 1 or above")
    generators = row_generators(seed, len(prompts))
    longest = max(map(len, prompts), default=0)
    # The last token drawn is not read, hence one less.
    if model.max_len is not None and longest + max_tokens - 1 > model.max_len:
        raise ZooError(f"a prompt of {longest} tokens and {max_tokens} more are past the limit of this "
                       f"{model.config.model}: at most {model.max_len}")
    logits, state = prefill(model, prompts, longest + max_tokens - 1)
    alive = list(range(len(prompts)))
    for count in range(1, max_tokens + 1):
        ids = sample(logits, [generators[row] for row in alive], temperature=temperature, top_k=top_k, top_p=top_p)
        drawn = ids.tolist()
        yield from ((row, token) for row, token in zip(alive, drawn, strict=True) if token != stop)
        going = [i for i, token in enumerate(drawn) if token != stop]
        if not going or count == max_tokens:
            return
        if len(going) < len(alive):
            alive, rows = [alive[i] for i in going], torch.tensor(going, device=ids.device)
            ids, state = ids[rows], select_rows(state, rows)
        logits, state = model.extend(ids[:, None], state)
        logits = logits[:, -1]
