"""A run's configuration: plain dataclasses from plain dicts, each value checked before anything is made of it."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from zoo.errors import ZooError, choose
from zoo.model import ModelConfig
from zoo.ops.backend import Backend
from zoo.sizing import SIZES, Size, model_config
from zoo.training.schedules import Schedule, get_schedule


@dataclass(frozen=True)
class SizeChoice:
    """A size by name; what is not null here replaces that size's own."""

    name: str = "nano"
    layers: int | None = None
    dim: int | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        for key in ("layers", "dim", "heads"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"size.{key}", value, "1 or above, or null")

    def shape(self) -> Size:
        base = SIZES[choose("size", self.name, SIZES)]
        return Size(self.layers or base.layers, self.dim or base.dim, self.heads or base.heads)


@dataclass(frozen=True)
class Optim:
    """AdamW (1711.05101). `clip`: the global gradient norm that is not exceeded, null for none."""

    name: Literal["adamw"] = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim.lr", self.lr, "finite, above 0")
        _require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "finite, 0 or above")
        _require(all(0 <= b < 1 for b in self.betas), "optim.betas", list(self.betas), "two numbers from 0 to below 1")
        _require(0 < self.eps < math.inf, "optim.eps", self.eps, "finite, above 0")
        _require(self.clip is None or 0 < self.clip < math.inf, "optim.clip", self.clip, "finite, above 0, or null")


@dataclass(frozen=True)
class Hardware:
    """What the run computes on. None of it changes which numbers are trained on, nor in which order.

    devices: processes that share the work, started by torchrun; null: as many as it started. micro_batch: tokens that
    one device sees at a time, null for its whole part of a batch. compile: torch.compile of the loss, or of the
    blocks alone under fsdp; on a single GPU the passes forward and back are a CUDA graph too.
    """

    accelerator: Literal["cpu", "gpu"] = "cpu"
    strategy: Literal["single", "ddp", "fsdp"] = "single"
    devices: int | None = None
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    micro_batch: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for key in ("devices", "micro_batch"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"trainer.{key}", value, "1 or above, or null")


@dataclass(frozen=True)
class Logging:
    """Where metrics go beside metrics.csv, which every run writes."""

    name: Literal["csv", "tensorboard", "wandb"] = "csv"
    project: str = "zoo"
    mode: Literal["offline", "online"] = "offline"
    entity: str | None = None


@dataclass(frozen=True)
class Debug:
    """overfit: every step trains on the batch of step 0. profile: table and trace of where so many steps
    spent their time."""

    overfit: bool = False
    profile: int = 0

    def __post_init__(self) -> None:
        _require(self.profile >= 0, "debug.profile", self.profile, "0 or above")


@dataclass(frozen=True)
class Config:
    """Everything about a run. `conf/train.yaml` and its groups mirror it.

    backend: what the ops run on, `zoo.ops.backend`; "triton" refuses to do without its kernels.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    tokenizer: dict[str, Any]
    schedule: dict[str, Any]
    size: SizeChoice = field(default_factory=SizeChoice)
    optim: Optim = field(default_factory=Optim)
    trainer: Hardware = field(default_factory=Hardware)
    logger: Logging = field(default_factory=Logging)
    debug: Debug = field(default_factory=Debug)
    steps: int = 1000
    batch_tokens: int = 8192
    seq_len: int = 256
    dropout: float = 0.0
    seed: int = 1
    backend: Backend = "auto"
    out: str | None = None
    resume: str | None = None
    log_every: int = 10
    validate_every: int = 250
    save_every: int = 250
    sample_every: int = 250
    sample_tokens: int = 256
    prompt: str = ""

    def __post_init__(self) -> None:
        for key in ("steps", "batch_tokens", "seq_len", "log_every", "validate_every", "save_every", "sample_every"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "1 or above")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to 2^32 - 1")
        _require(self.sample_tokens >= 0, "sample_tokens", self.sample_tokens, "0 (no samples) or above")
        for group in ("model", "data", "tokenizer", "schedule"):
            if not isinstance(getattr(self, group).get("name"), str):
                raise ZooError(f"{group} must be a group with a name: {group}=NAME or {group}.name=NAME")
        if self.batch_tokens % self.seq_len:
            below = max(1, self.batch_tokens // self.seq_len) * self.seq_len
            raise ZooError(f"batch_tokens={self.batch_tokens} is not a multiple of seq_len={self.seq_len}; "
                           f"allowed: {below}, {below + self.seq_len}, ...")
        micro = self.trainer.micro_batch
        if micro is not None and micro % self.seq_len:
            raise ZooError(f"trainer.micro_batch={micro} is not a multiple of seq_len={self.seq_len}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Raises ZooError, in one line with the key's name, for what is unknown, missing, of a wrong type or value."""
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return _plain(asdict(self))

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model's shapes and mathematics. Raises ZooError for an unknown name, option, or head count."""
        options = {key: value for key, value in self.model.items() if key != "name"}
        return model_config(self.model["name"], self.size.shape(), vocab_size, self.seq_len, self.dropout, **options)

    def lr_schedule(self) -> Schedule:
        return get_schedule(**self.schedule)

    def default_out(self) -> str:
        """The same for equal model, size, data and seed, so that ranks agree on it and resume=auto finds it again."""
        return f"runs/{self.model['name']}-{self.size.name}-{self.data['name']}-seed{self.seed}"


# What a resumed run may set anew. The data's text and tokens are compared by their fingerprint, not by where they lie.
MAY_CHANGE = {"steps", "out", "resume", "log_every", "validate_every", "save_every", "sample_every", "sample_tokens",
              "prompt", "backend", "trainer", "logger", "debug.profile", "data", "tokenizer"}


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's configuration a published model states: all but the places on one machine."""
    data = {key: value for key, value in config["data"].items() if key != "cache" and not key.endswith("path")}
    tokenizer = {key: value for key, value in config["tokenizer"].items() if key != "path"}
    rest = {key: value for key, value in config.items() if key not in ("out", "resume")}
    return rest | {"data": data, "tokenizer": tokenizer}


def check_resumable(saved: Mapping[str, Any], given: Mapping[str, Any], source: str) -> None:
    """Raise ZooError where a configuration contradicts the one that a checkpoint was trained with."""
    old, new = _flatten(saved), _flatten(given)
    for key in sorted(old.keys() | new.keys()):
        if key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE or old.get(key) == new.get(key):
            continue
        raise ZooError(f"cannot resume {source}: {key} is {old.get(key)!r} there and {new.get(key)!r} here; "
                       f"allowed to change: {', '.join(sorted(MAY_CHANGE - {'data', 'tokenizer'}))}")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise ZooError(f"{key}={value} is not allowed: {allowed}")


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    if unknown := sorted(str(key) for key in values.keys() - known):
        raise ZooError(f"unknown key {prefix}{unknown[0]}; allowed: {', '.join(sorted(prefix + key for key in known))}")
    missing = [key for key in ("model", "data", "tokenizer", "schedule") if cls is Config and values.get(key) is None]
    if missing:
        raise ZooError(f"no {missing[0]} is chosen: {missing[0]}=NAME")
    return cls(**{key: _convert(value, hints[key], prefix + key) for key, value in values.items()})


def _convert(value: Any, kind: Any, key: str) -> Any:
    """`value` as the annotation `kind` wants it, or a ZooError. A whole number may stand for a fraction."""
    if hasattr(kind, "__dataclass_fields__"):
        if value is None:
            return kind()
        if isinstance(value, Mapping):
            return _build(kind, value, f"{key}.")
        raise ZooError(f"{key}={value!r} is not a group of settings")
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _convert(value, arguments[0], key)
    if origin is Literal:
        return choose(key, value, arguments)
    if origin is tuple:
        if isinstance(value, list | tuple) and len(value) == len(arguments):
            return tuple(_convert(v, k, key) for v, k in zip(value, arguments, strict=True))
    elif origin is dict:
        if isinstance(value, Mapping):
            return _plain(value)
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ZooError(f"{key}={value!r} is not {names.get(kind, 'of the form ' + str(kind))}")
