"""Text from a model. `zoo.generate` is the function; a module of that name would hide it, hence this one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict, Unpack, overload

import torch

from zoo.errors import ZooError
from zoo.model import LanguageModel
from zoo.sampling import Continuation, Sampling, prefill
from zoo.saved_state import load_state, save_state
from zoo.tokenizers import StreamDecoder, Tokenizer

MAX_TOKENS = 256  # generated where the caller names no number


class Options(TypedDict, total=False):
    """Keywords of `generate` that `Context.write` has, too."""

    max_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: str | Sequence[str]
    seed: int
    window: bool
    on_text: Callable[[int, str], object] | None
    complain: Callable[[str], object] | None


class Context:
    """What a model has read of one text so far, to be gone on with: by many prompts, by further ones, on another day.

    It begins as the beginning of a document. tokens: the text, the separator before it. state: has read all of them but
    the last; that one is read with what follows, whose logits it gives.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None = None):
        """tokenizer: the model's own if None."""
        self.model, self.tokenizer = model, _tokenizer(model, tokenizer)
        self.tokens: list[int] = [self.tokenizer.separator]
        self.state = model.init_state(1, 1)

    def read(self, text: str, *, window: bool = False) -> None:
        """Go on by a text. Past the model's limit raises ZooError, or with `window` keeps the last tokens that fit.

        Interrupted or refused, it leaves everything as it was.
        """
        row, limit = [*self.tokens, *self.tokenizer.encode(text).tolist()], self.model.max_len
        self._become(row[-limit:] if window and limit is not None else row)

    def write(self, prompt: str = "", **how: Unpack[Options]) -> str:
        """`generate` one continuation, and go on behind it: the prompt, and what was written, have been read then."""
        (row,), written = _generate(self.model, self.tokenizer, [prompt], self, **how)
        self._become([*row, *written[0].kept()])
        return written[0].text

    def save(self, path: str | Path) -> None:
        """Write tokens and state into a file, for this model alone; `docs/generation.md` has the format."""
        save_state(path, self.model, self.tokenizer, self.tokens, self.state)

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel, tokenizer: Tokenizer | None = None) -> Context:
        """What `save` wrote. Raises ZooError for a file that is damaged, or is of another model."""
        context = cls(model, tokenizer)
        context.tokens, context.state = load_state(path, model, context.tokenizer)
        return context

    def _become(self, row: list[int]) -> None:
        """Have read the tokens of `row`, going on from what was read if `row` begins with it."""
        known = len(self.tokens)
        goes_on = row[:known] == self.tokens
        if goes_on and len(row) == known:
            return
        self.model.check_length(len(row) - 1)
        if len(row) == 1:
            state = self.model.init_state(1, 1)
        else:
            with _in_memory(self.model, 1, len(row)):
                _, state = prefill(self.model, [row[:-1]], state=self.state if goes_on else None)
        self.tokens, self.state = row, state


@overload
def generate(model: LanguageModel, prompts: str, *, tokenizer: Tokenizer | None = ..., context: Context | None = ...,
             **how: Unpack[Options]) -> str: ...
@overload
def generate(model: LanguageModel, prompts: list[str] | tuple[str, ...], *, tokenizer: Tokenizer | None = ...,
             context: Context | None = ..., **how: Unpack[Options]) -> list[str]: ...
def generate(model: LanguageModel, prompts: str | list[str] | tuple[str, ...], *, tokenizer: Tokenizer | None = None,
             context: Context | None = None, **how: Unpack[Options]) -> str | list[str]:
    """Continue one prompt (-> its continuation) or several of any lengths (-> a list), from the model's state.

    A prompt is read as the beginning of a document: the separator goes before it, an empty prompt is the separator
    alone, and a separator that the model writes ends the row. With a `context` it is read as what follows there.

    tokenizer: the model's own if None.
    context: what was read before every prompt, once; it is left as it is (`Context.write` goes on with it).
    max_tokens: at most so many a row; 256 if None, or as many as the model's limit leaves. 0 writes nothing.
    temperature, top_k, top_p, min_p, repetition_penalty: as in `zoo.sampling.Sampling`, and its defaults; temperature 0
        is greedy.
    stop: strings that end a row. Its text ends before the one that is complete first; no part of that is handed out.
    seed: the number that draws a token is a function of (seed, row, the token's position).
    window: a row that is too long for the model's limit keeps its last tokens that fit, with `max_tokens` behind them
        (if None: 256, or half the limit), and `complain` is told in a line.
    on_text: on_text(row, piece) is told of each piece of text once its characters are complete; together they are the
        row's text.
    Raises ZooError past the model's limit, for a model without a tokenizer, and for what does not fit into memory.
    """
    tokenizer = _tokenizer(model, tokenizer if context is None else context.tokenizer)
    if context is not None and context.model is not model:
        raise ZooError("the context is of another model; allowed: one that this model has read")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    written = [text.text for text in _generate(model, tokenizer, texts, context, **how)[1]]
    return written[0] if isinstance(prompts, str) else written


def _tokenizer(model: LanguageModel, tokenizer: Tokenizer | None) -> Tokenizer:
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ZooError("this model brings no tokenizer; pass tokenizer=zoo.tokenizers.ByteTokenizer() or its own")
    return tokenizer


def _generate(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], context: Context | None, *,
              max_tokens: int | None = None, stop: str | Sequence[str] = (), seed: int = 0, window: bool = False,
              on_text: Callable[[int, str], object] | None = None, complain: Callable[[str], object] | None = None,
              **sampling: float | None) -> tuple[list[list[int]], list[_Text]]:
    """What was read for each prompt, as tokens, and what was written behind it."""
    options = Sampling(**sampling)  # type: ignore[arg-type]
    stops = _checked_stops(stop, tokenizer)
    before = [tokenizer.separator] if context is None else context.tokens
    rows = [[*before, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    rows, max_tokens, whole = _fitted(model, rows, max_tokens, window, complain)
    texts = [_Text(tokenizer, stops, row) for row in rows]

    def tell(row: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(row, piece)

    with _in_memory(model, len(rows), max(map(len, rows), default=0) + max_tokens):
        going = Continuation(model, rows, max_tokens=max_tokens, sampling=options, seed=seed,
                             state=context.state if context is not None and whole else None)
        while drawn := going.step():
            for row, token in drawn:
                if token == tokenizer.separator:
                    going.end(row)
                    continue
                tell(row, texts[row].push(token))
                if texts[row].stopped:
                    going.end(row)
    for row, text in enumerate(texts):
        tell(row, text.finish())
    return rows, texts


@contextmanager
def _in_memory(model: LanguageModel, rows: int, tokens: int) -> Iterator[None]:
    """Raise ZooError where what is done with so many rows of so many tokens takes more memory than there is."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise ZooError(f"{rows} x {tokens} tokens do not fit into the memory of {model.head.weight.device}; fewer "
                       "prompts or tokens at a time may") from None


def _fitted(model: LanguageModel, rows: list[list[int]], max_tokens: int | None, window: bool,
            complain: Callable[[str], object] | None) -> tuple[list[list[int]], int, bool]:
    """The rows, cut if they may be; how many tokens to write; whether the rows are whole."""
    limit, longest = model.max_len, max(map(len, rows), default=1)
    if limit is None:
        return rows, MAX_TOKENS if max_tokens is None else max_tokens, True
    if not window:
        return rows, max(1, min(MAX_TOKENS, limit - longest + 1)) if max_tokens is None else max_tokens, True
    max_tokens = min(MAX_TOKENS, (limit + 1) // 2) if max_tokens is None else max_tokens
    room = limit - max(1, max_tokens) + 1  # the last token drawn is not read
    if room < 1:
        raise ZooError(f"max_tokens={max_tokens} is past the limit of this {model.config.model}: at most {limit}")
    for number, row in enumerate(rows, 1):
        if len(row) > room and complain is not None:
            complain(f"prompt {number}: the first {len(row) - room} of {len(row)} tokens are left out; this "
                     f"{model.config.model} reads {limit}, {max_tokens} are for what it writes")
    return [row[-room:] for row in rows], max_tokens, longest <= room


def _checked_stops(stop: str | Sequence[str], tokenizer: Tokenizer) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for each in stops:
        if not each:
            raise ZooError("a stop string is empty; allowed: one or more characters")
        tokenizer.encode(each)  # refuses what no text can hold
    return stops


class _Text:
    """What a row writes: whole characters, up to a stop string. tokens: those drawn; stopped: by a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], before: Sequence[int]):
        self.tokenizer, self.stops, self.decoder = tokenizer, stops, StreamDecoder(tokenizer)
        self.decoder.push(before[-3:])  # which may have ended inside a character
        self.text, self.held, self.stopped = "", "", False
        self.tokens: list[int] = []
        self.lengths: list[int] = []  # characters decoded after each token

    def push(self, token: int) -> str:
        """The text that is certain now; nothing more will be where `stopped` is set."""
        self.held += self.decoder.push(token)
        self.tokens.append(token)
        self.lengths.append(len(self.text) + len(self.held))
        # The one that is complete first ends the text, so that how tokens cut the text does not show.
        found = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        self.stopped = bool(found)
        return self._release(min(found)[1] if found else len(self.held) - self._begun())

    def finish(self) -> str:
        """What was held back and is text after all."""
        if self.stopped:
            return ""
        self.held += self.decoder.finish()
        return self._release(len(self.held))

    def kept(self) -> list[int]:
        """The tokens of the text alone: without those of the stop string."""
        if not self.stopped:
            return self.tokens
        if not self.text:
            return []
        if len(self.text) in self.lengths:
            return self.tokens[: self.lengths.index(len(self.text)) + 1]
        return self.tokenizer.encode(self.text).tolist()  # it ends inside a token

    def _begun(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self.stops), default=1)
        sizes = range(min(len(self.held), longest - 1), 0, -1)
        return next((size for size in sizes if any(stop.startswith(self.held[-size:]) for stop in self.stops)), 0)

    def _release(self, count: int) -> str:
        piece, self.held = self.held[:count], self.held[count:]
        self.text += piece
        return piece
