"""Saved models: a folder of model.safetensors, config.json and card.json (and tokenizer.json where text is not bytes).

`docs/pretrained.md` describes the format. Nothing in such a folder is code: weights are safetensors, the rest plain
JSON, and what the JSON claims about the weights is checked before memory of that size is asked for. A folder for
`transformers` (zoo/hf/folder.py) holds the same in files that library wants, and is read as well.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from zoo.errors import ZooError, choose
from zoo.files import sync
from zoo.model import LanguageModel, ModelConfig
from zoo.tokenizers import Tokenizer, load_tokenizer

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
               torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # its names for dtypes
MAX_JSON = 1 << 20  # bytes of config.json and of card.json
FILES = {"model.safetensors", "config.json", "card.json", "tokenizer.json", "curve.csv"}
HF_FILES = {"model.safetensors", "config.json", "card.json", "tokenizer.json", "tokenizer_config.json",
            "zoo_tokenizer.json", "generation_config.json", "modeling_zoo.py", "README.md"}
HF_TYPE = "zoo"  # `model_type` in the config.json of a folder for transformers, and the key of what the zoo has there
HF_PREFIX = "model."  # of its weights' names
REMOTE = "hf://"
NAME = re.compile(r"[a-z0-9_]+\.[A-Za-z0-9][A-Za-z0-9_-]*")  # <model>.<tag>


class PretrainedModel(LanguageModel):
    """A language model with the tokenizer that its weights were trained on, and its card."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, card: dict[str, Any]):
        super().__init__(config)
        self.tokenizer = tokenizer
        self.card = card


def list_pretrained() -> list[str]:
    """Names of the published models that this copy of the project holds."""
    return sorted(_published())


def load_pretrained(name_or_folder: str | Path, *, device: torch.device | str = "cpu",
                    dtype: torch.dtype = torch.float32) -> PretrainedModel:
    """A saved model: a name of `list_pretrained()`, a folder, or the folder of a training run that finished.

    "hf://owner/name" and "hf://owner/name@revision" are taken from the Hugging Face hub, or its cache on this machine;
    nothing else asks a network for anything. Weights are converted to `dtype`, float32 by default whatever they were
    stored in (which loses nothing).
    Raises ZooError, before any weight is loaded, for whatever is missing, damaged or contradicts itself.
    """
    device = find_device(device) if isinstance(device, str) else device
    folder = find_saved(name_or_folder)
    config, prefix = read_config(folder)
    model_config, weights = _check_config(folder, config)
    card = read_json(folder / "card.json")
    tokenizer = load_tokenizer(folder, config["tokenizer"])
    check_vocabulary(tokenizer, model_config)
    path = folder / "model.safetensors"
    _check_bytes(path, weights)
    with torch.random.fork_rng(devices=[]):  # building draws weights, but the generator is the caller's
        try:
            with safe_open(path, framework="pt") as file:
                _check_shapes(file, path, model_config, DTYPES[weights["dtype"]], prefix)
                tensors = {key.removeprefix(prefix): file.get_tensor(key)
                           for key in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ZooError(f"{path} is not a whole safetensors file: {_line(error)}") from None
        _check_finite(tensors, str(path))
        model = PretrainedModel(model_config, tokenizer, card)
    model.load_state_dict(tensors)
    return model.to(device=device, dtype=dtype).eval()


def find_device(name: str = "auto") -> torch.device:
    """The device of a name; "auto" is a GPU where there is one. Raises ZooError for one that is not here."""
    gpus = torch.cuda.device_count()
    allowed = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    choose("device", name, allowed)
    return torch.device(("cuda" if gpus else "cpu") if name == "auto" else name)


def save_pretrained(folder: str | Path, model: LanguageModel, tokenizer: Tokenizer, card: dict[str, Any], *,
                    dtype: torch.dtype | None = None, curve: bytes | None = None) -> Path:
    """Write a model's folder, whole or not at all; returns it.

    dtype: what the weights are stored as, the model's own if None. curve: the run's metrics, kept as curve.csv.
    A saved model that is already there is replaced; anything else of that name is left alone. Raises ZooError for that,
    for weights that are not finite, a card that is not JSON, or a disk that refuses.
    """
    folder = Path(folder)
    check_vocabulary(tokenizer, model.config)
    about = to_json(card)
    data, weights = serialise_weights(model, dtype)

    def fill(new: Path) -> None:
        config = {"format": FORMAT, "model": model.config.to_dict(), "tokenizer": tokenizer.save(new),
                  "weights": weights}
        (new / "model.safetensors").write_bytes(data)
        (new / "config.json").write_bytes(to_json(config))
        (new / "card.json").write_bytes(about)
        if curve is not None:
            (new / "curve.csv").write_bytes(curve)

    replace_folder(folder, fill)
    return folder


# Finding


def _published() -> dict[str, Path]:
    """Published models by name: `checkpoints/` of the source tree, or what an installed package brought along."""
    package = Path(__file__).parent
    roots = [package / "checkpoints"]
    if (package.parent / "pyproject.toml").is_file():
        roots.append(package.parent / "checkpoints")
    return {folder.name: folder for root in roots if root.is_dir() for folder in root.iterdir()
            if NAME.fullmatch(folder.name) and (folder / "config.json").is_file()}


def find_saved(name_or_folder: str | Path) -> Path:
    """The folder of a saved model, as `load_pretrained` looks for it."""
    if isinstance(name_or_folder, str) and name_or_folder.startswith(REMOTE):
        from zoo.hf.hub import download  # and with it huggingface_hub, for nobody else

        return download(name_or_folder)
    published = _published()
    if isinstance(name_or_folder, str) and name_or_folder in published:
        return published[name_or_folder]
    folder = Path(name_or_folder)
    if not folder.is_dir():
        if folder.exists():
            raise ZooError(f"{folder} is a file; a saved model is a folder with config.json and model.safetensors")
        if len(folder.parts) != 1 or isinstance(name_or_folder, Path):
            raise ZooError(f"no such folder: {folder}")
        choose("saved model (and no folder of that name)", str(name_or_folder), published)
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if (folder / "checkpoints").is_dir():
        raise ZooError(f"{folder} is a run that has not finished; `zoo export {folder} OUT` makes a model of it")
    if not (folder / "config.json").is_file():
        raise ZooError(f"{folder} holds no saved model: no config.json in it or in its model/")
    return folder


# Checking


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """What config.json says in the zoo's own terms, and what the names of the weights begin with."""
    config = read_json(folder / "config.json")
    if config.get("model_type") != HF_TYPE:
        return config, ""
    inner = config.get(HF_TYPE)
    if not isinstance(inner, dict):
        raise ZooError(f"{folder / 'config.json'} is for transformers and has no object {HF_TYPE!r} of this project")
    return inner, HF_PREFIX


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 1 MiB; ZooError for anything else."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
        if len(data) > MAX_JSON:
            raise ZooError(f"{path} is larger than {MAX_JSON} bytes")
        value = json.loads(data, parse_constant=_no_constant)
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror}") from None
    except ZooError:
        raise
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{path} is not JSON: {_line(error)}") from None
    if not isinstance(value, dict):
        raise ZooError(f"{path} is not a JSON object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_config(folder: Path, config: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration and what is said of its weights, from config.json."""
    where = folder / "config.json"
    form = config.get("format")
    if type(form) is not int or form != FORMAT:
        raise ZooError(f"{where} has format {form!r}; this version reads: {FORMAT}")
    if config.keys() != {"format", "model", "tokenizer", "weights"}:
        raise ZooError(f"{where} holds {', '.join(sorted(config)) or 'nothing'}; allowed and needed: format, model, "
                       "tokenizer, weights")
    if not all(isinstance(config[key], dict) for key in ("model", "tokenizer", "weights")):
        raise ZooError(f"{where}: model, tokenizer and weights must be objects")
    weights = config["weights"]
    if (weights.keys() != {"sha256", "bytes", "dtype"} or not isinstance(weights["sha256"], str)
            or type(weights["bytes"]) is not int or weights["dtype"] not in DTYPES):
        raise ZooError(f"{where}: weights must be sha256, bytes and a dtype of: {', '.join(DTYPES)}")
    try:
        return ModelConfig.from_dict(config["model"]), weights
    except ZooError as error:
        raise ZooError(f"{where}: {error}") from None
    except (TypeError, AttributeError) as error:
        raise ZooError(f"{where}: a value of the wrong type: {_line(error)}") from None


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size != config.vocab_size:
        raise ZooError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}")


def _check_bytes(path: Path, weights: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != weights["bytes"]:
            raise ZooError(f"{path} has {size} bytes where config.json says {weights['bytes']}: cut off or replaced")
        found = digest(path)
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror}") from None
    if found != weights["sha256"]:
        raise ZooError(f"{path} has SHA-256 {found[:12]}..., config.json says {weights['sha256'][:12]}...: damaged "
                       "or replaced")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_shapes(file: Any, path: Path, config: ModelConfig, dtype: torch.dtype, prefix: str) -> None:
    """Compare the file's header with a model that has shapes only, so that nothing large is built on a false claim."""
    found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    if config.layers > len(found):  # before as many blocks are built, even without weights
        raise ZooError(f"{path} has {len(found)} tensors, too few for the {config.layers} layers of config.json")
    try:
        with torch.device("meta"):
            wanted = LanguageModel(config).state_dict(prefix=prefix)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ZooError(f"{path.with_name('config.json')} describes no {config.model}: {_line(error)}") from None
    wrong = [f"no {key}" for key in wanted.keys() - found.keys()]
    wrong += [f"unknown {key}" for key in found.keys() - wanted.keys()]
    for key in sorted(wanted.keys() & found.keys()):
        shape, kind = found[key].get_shape(), found[key].get_dtype()
        expected = dtype if wanted[key].is_floating_point() else wanted[key].dtype
        if list(wanted[key].shape) != shape:
            wrong.append(f"{key} is {shape}, not {list(wanted[key].shape)}")
        elif kind != SAFETENSORS[expected]:
            wrong.append(f"{key} is {kind}, not {SAFETENSORS[expected]}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ZooError(f"{path} does not fit the {config.model} of config.json: {'; '.join(sorted(wrong)[:3])}{more}")


def _check_finite(tensors: dict[str, torch.Tensor], what: str) -> None:
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise ZooError(f"{what} has weights that are not finite: {key}")


# Writing


def serialise_weights(model: LanguageModel, dtype: torch.dtype | None,
                      prefix: str = "") -> tuple[bytes, dict[str, Any]]:
    """The bytes of model.safetensors, and what config.json says of them. dtype: the model's own if None."""
    dtype = dtype or model.head.weight.dtype
    if dtype not in DTYPES.values():
        raise ZooError(f"weights cannot be saved as {dtype}; allowed: {', '.join(DTYPES)}")
    tensors = {key: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
               for key, value in model.state_dict(prefix=prefix).items()}
    _check_finite(tensors, "this model")
    data = serialise(tensors, metadata={"format": "pt"})
    return data, {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data),
                  "dtype": str(dtype).removeprefix("torch.")}


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Put a folder that `fill` writes in place of `folder`: nobody ever sees half of one under that name."""
    if folder.exists():
        held = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if held and not ({"model.safetensors"} <= held <= FILES or {"modeling_zoo.py"} <= held <= HF_FILES):
            raise ZooError(f"{folder} is there and is not a saved model alone: it is left as it is")
    mark = f".{folder.name}.{secrets.token_hex(4)}"
    new, old = folder.with_name(mark + ".new"), folder.with_name(mark + ".old")
    try:
        new.mkdir(parents=True)
        fill(new)
        for path in [*new.iterdir(), new]:
            sync(path)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        sync(folder.parent)
    except OSError as error:
        raise ZooError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def to_json(value: dict[str, Any]) -> bytes:
    try:
        data = (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ZooError(f"a card holds plain JSON values only: {_line(error)}") from None
    if len(data) > MAX_JSON:
        raise ZooError(f"a card of {len(data)} bytes is larger than {MAX_JSON}")
    return data


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
