"""From a run's configuration to its tokens."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.data.cache import Progress, TokenData, locked, prepare, writing
from zoo.data.sources import Source, Stdlib
from zoo.data.sources_hub import Enwik8, FineWebEdu, Lambada, TinyStories, WikiText2, WikiText103
from zoo.data.sources_novels import Novels
from zoo.data.sources_text import Text
from zoo.errors import ZooError, choose
from zoo.files import replace
from zoo.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer

_CLASSES: tuple[Any, ...] = (Stdlib, Novels, Text, Enwik8, WikiText103, WikiText2, TinyStories, FineWebEdu, Lambada)
SOURCES: dict[str, Callable[..., Source]] = {source.name: source for source in _CLASSES}


def load_data(config: Mapping[str, Any], progress: Progress | None = None,
              tokenizer: Tokenizer | None = None) -> TokenData:
    """The tokens of `config["data"]` under `config["tokenizer"]`, prepared on first use and found again later.

    Both are plain tables as in conf/data and conf/tokenizer; `tokenizer` overrides the second, to read a corpus as a
    saved model does. What they name wrongly, or a text that cannot be used, is a ZooError.
    """
    data = dict(config["data"])
    cache = cache_folder(data.pop("cache", None))
    source = make_source(data, cache)
    if tokenizer is None:
        tokenizer = make_tokenizer(config["tokenizer"], source, cache, progress)
    return prepare(source, tokenizer, cache, progress)


def cache_folder(cache: str | None) -> Path:
    """Where prepared corpora are kept: ~/.cache/zoo unless data.cache names another folder."""
    check_text("data.cache", cache)
    return Path(cache).expanduser() if cache is not None else Path.home() / ".cache" / "zoo"


def make_source(options: Mapping[str, Any], cache: Path) -> Source:
    """The source `options["name"]` with the other options as its arguments."""
    arguments = dict(options)
    build = SOURCES[choose("data", arguments.pop("name", None), SOURCES)]
    parameters = inspect.signature(build, eval_str=True).parameters
    allowed = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    for name, value in arguments.items():
        choose(f"option of data={options['name']}", name, [*allowed, "cache"])
        if name in allowed and parameters[name].annotation in (str, str | None):
            check_text(f"data.{name}", value)
    if "cache" in parameters:
        arguments["cache"] = cache
    return build(**arguments)


def check_text(option: str, value: object) -> None:
    """Raise ZooError for what is neither text nor None: the 2024 of a command line is a number, and no path."""
    if not isinstance(value, str | None):
        raise ZooError(f"{option}={value!r} is not text; allowed: text, a number as ./2024 or in quotes of its own")


def make_tokenizer(options: Mapping[str, Any], source: Source, cache: Path,
                   progress: Progress | None = None) -> Tokenizer:
    """Bytes, or BPE: from the tokenizer.json at `path`, or trained on the first `train_bytes` of the training split."""
    arguments = dict(options)
    name = choose("tokenizer", arguments.pop("name", None), ("bytes", "bpe"))
    for option in arguments:
        choose(f"option of tokenizer={name}", option, ("vocab_size", "train_bytes", "path") if name == "bpe" else ())
    return ByteTokenizer() if name == "bytes" else _bpe(source, cache, progress, **arguments)


def _bpe(source: Source, cache: Path, progress: Progress | None, vocab_size: int = 8192,
         train_bytes: int = 100_000_000, path: str | None = None) -> BPETokenizer:
    check_text("tokenizer.path", path)
    if path is not None:
        file = Path(path).expanduser()
        file = file / BPETokenizer.file if file.is_dir() else file
        try:
            return BPETokenizer(file.read_bytes())
        except OSError as error:
            raise ZooError(f"tokenizer.path={path}: cannot read {file}: {error.strerror}") from None
    if isinstance(train_bytes, bool) or not isinstance(train_bytes, int) or train_bytes < 1:
        raise ZooError(f"tokenizer.train_bytes={train_bytes!r}; allowed: a whole number from 1")
    recipe = {"source": source.identity(), "vocab_size": vocab_size, "train_bytes": train_bytes}
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    file = cache / "tokenizers" / f"bpe-{source.name}-{vocab_size}-{key[:12]}.json"
    if not file.exists():
        with locked(file):
            if not file.exists():
                trained = BPETokenizer.train(_training_text(source, train_bytes, progress), vocab_size)
                with writing(file.parent):
                    replace(file, trained.content)
    return BPETokenizer(file.read_bytes())


def _training_text(source: Source, limit: int, progress: Progress | None) -> Iterator[bytes]:
    """Training text alone, so that nothing of the held-out text shapes the vocabulary it is measured in."""
    read = 0
    for piece in source:
        if piece.split == "train":
            yield piece.text[:limit - read]
            read = min(limit, read + len(piece.text))
            if progress is not None:
                progress(read, limit)
            if read == limit:
                return
