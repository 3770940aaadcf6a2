"""Text from a model. `zoo.generate` is the function; a module of that name would hide it, hence this one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

from zoo.errors import ZooError
from zoo.model import LanguageModel
from zoo.sampling import stream
from zoo.tokenizers import StreamDecoder, Tokenizer

MAX_TOKENS = 256  # generated where the caller names no number


@overload
def generate(model: LanguageModel, prompts: str, *, max_tokens: int | None = ..., temperature: float = ...,
             top_k: int | None = ..., top_p: float = ..., seed: int = ..., tokenizer: Tokenizer | None = ...,
             on_text: Callable[[int, str], object] | None = ...) -> str: ...
@overload
def generate(model: LanguageModel, prompts: list[str] | tuple[str, ...], *, max_tokens: int | None = ...,
             temperature: float = ..., top_k: int | None = ..., top_p: float = ..., seed: int = ...,
             tokenizer: Tokenizer | None = ..., on_text: Callable[[int, str], object] | None = ...) -> list[str]: ...
def generate(model: LanguageModel, prompts: str | list[str] | tuple[str, ...], *, max_tokens: int | None = None,
             temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, seed: int = 0,
             tokenizer: Tokenizer | None = None,
             on_text: Callable[[int, str], object] | None = None) -> str | list[str]:
    """Continue one prompt (-> its continuation) or several of any lengths (-> a list), from the model's state.

    A prompt is read as the beginning of a document: the separator goes before it, an empty prompt is the separator
    alone, and a separator that the model writes ends the row.

    max_tokens: at most so many a row; 256 if None, or as many as the model's limit leaves.
    temperature, top_k, top_p: as in `zoo.sampling.sample`; temperature 0 is greedy.
    seed: row i draws from a generator of (seed, i).
    tokenizer: the model's own if None.
    on_text: on_text(row, piece) is told of each piece of text once its characters are complete; together they are the
        row's text.
    Raises ZooError past the model's limit, or for a model without a tokenizer.
    """
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ZooError("this model brings no tokenizer; pass tokenizer=zoo.tokenizers.ByteTokenizer() or its own")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        return []
    tokens = [[tokenizer.separator, *tokenizer.encode(text).tolist()] for text in texts]
    if max_tokens is None:
        room = MAX_TOKENS if model.max_len is None else model.max_len - max(map(len, tokens)) + 1
        max_tokens = max(1, min(MAX_TOKENS, room))
    decoders = [StreamDecoder(tokenizer) for _ in texts]
    pieces: list[list[str]] = [[] for _ in texts]

    def tell(row: int, piece: str) -> None:
        if piece:
            pieces[row].append(piece)
            if on_text is not None:
                on_text(row, piece)

    for row, token in stream(model, tokens, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                             seed=seed, stop=tokenizer.separator):
        tell(row, decoders[row].push(token))
    for row, decoder in enumerate(decoders):
        tell(row, decoder.finish())
    written = ["".join(row) for row in pieces]
    return written[0] if isinstance(prompts, str) else written
