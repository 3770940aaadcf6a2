"""Saved models: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

import hashlib
import json
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, listed, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from unimportable import run_without

import zoo
from zoo import ZooError
from zoo.pretrained import save_pretrained
from zoo.tokenizers import BPETokenizer, ByteTokenizer

ROOT = Path(__file__).parent.parent
PLAIN = Case("transformer", ())
CARD = {"data": "none", "note": "ein Wörtchen"}
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pretrained(tmp_path / "model", tiny(PLAIN, vocab_size=256), ByteTokenizer(), CARD)


def reseal(folder: Path, change: Callable[[Tensors], object] = lambda tensors: None, **config: Any) -> None:
    """Change weights and configuration so that size and hash agree again, as someone who means harm would."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    seal(folder, path.read_bytes(), **config)


def seal(folder: Path, weights: bytes, **config: Any) -> None:
    where = folder / "config.json"
    (folder / "model.safetensors").write_bytes(weights)
    said = json.loads(where.read_text())
    said["weights"] |= {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)}
    said["model"] |= config
    where.write_text(json.dumps(said))


def edit(folder: Path, **changes: Any) -> None:
    where = folder / "config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | changes))


@pytest.mark.parametrize("case", listed(), ids=str)
def test_a_model_comes_back_as_it_was(case: Case, tmp_path: Path) -> None:
    model = tiny(case, vocab_size=256, scramble=True)
    save_pretrained(tmp_path / "m", model, ByteTokenizer(), CARD)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loaded = zoo.load_pretrained(tmp_path / "m")
    assert torch.equal(torch.rand(1), expected)  # the caller's generator did not move
    assert loaded.config == model.config
    assert loaded.card == CARD
    assert loaded.tokenizer.kind == "bytes"
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    tokens = torch.randint(256, (2, 40))
    assert torch.equal(loaded(tokens), model(tokens))


def test_half_precision_takes_half_the_room_and_loads_as_float32(tmp_path: Path) -> None:
    model = tiny(PLAIN, vocab_size=256)
    full = save_pretrained(tmp_path / "full", model, ByteTokenizer(), CARD)
    half = save_pretrained(tmp_path / "half", model, ByteTokenizer(), CARD, dtype=torch.bfloat16)
    sizes = [(f / "model.safetensors").stat().st_size for f in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = zoo.load_pretrained(half)
    assert torch.equal(loaded.head.weight, model.head.weight.bfloat16().float())
    assert zoo.load_pretrained(half, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_a_finished_runs_folder_will_do(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run / "model")
    assert zoo.load_pretrained(str(run)).card == CARD
    shutil.rmtree(run / "model")
    (run / "checkpoints").mkdir()
    (run / "config.json").write_text("{}")  # of the run, not of a model
    with pytest.raises(ZooError, match="zoo export"):
        zoo.load_pretrained(run)
    with pytest.raises(ZooError, match="is not a saved model alone"):
        save_pretrained(run, tiny(PLAIN, vocab_size=256), ByteTokenizer(), CARD)


def test_bpe_goes_along(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train([b"the cat sat on the mat, the cat sat on the hat. " * 40], 280)
    model = tiny(PLAIN, vocab_size=tokenizer.vocab_size)
    folder = save_pretrained(tmp_path / "m", model, tokenizer, CARD)
    ids = tokenizer.encode("the cat")
    assert zoo.load_pretrained(folder).tokenizer.encode("the cat").tolist() == ids.tolist()
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"t", b"u", 1))
    with pytest.raises(ZooError, match=r"tokenizer\.json"):
        zoo.load_pretrained(folder)
    with pytest.raises(ZooError, match="the tokenizer has 256 tokens"):
        save_pretrained(tmp_path / "n", model, ByteTokenizer(), CARD)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def weights(f: Path) -> Path:
    return f / "model.safetensors"


def widen(tensors: Tensors) -> None:
    tensors["head.weight"] = torch.zeros(256, 33)


def poison(tensors: Tensors) -> None:
    tensors["blocks.0.sequence_norm.bias"][3] = torch.inf


def to_double(tensors: Tensors) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].double()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no saved model"),
    "no weights": (lambda f: weights(f).unlink(), r"cannot read .*model\.safetensors: No such file"),
    "no card": (lambda f: (f / "card.json").unlink(), r"cannot read .*card\.json: No such file"),
    "cut off": (lambda f: truncate(weights(f)), r"cut off or replaced"),
    "one bit": (lambda f: flip(weights(f)), r"SHA-256 .* damaged or replaced"),
    "cut off, sealed": (lambda f: seal(f, weights(f).read_bytes()[:-100]), "not a whole safetensors file"),
    "no header": (lambda f: seal(f, b"\xff" * 64), "not a whole safetensors file"),
    "empty, sealed": (lambda f: seal(f, b""), "not a whole safetensors file"),
    "key missing": (lambda f: reseal(f, lambda t: t.pop("norm.weight")), r"does not fit .*: no norm\.weight"),
    "key too many": (lambda f: reseal(f, lambda t: t.update(spare=torch.ones(1))), r"does not fit .*: unknown spare"),
    "wrong shape": (lambda f: reseal(f, widen), r"head\.weight is \[256, 33\], not \[256, 32\]"),
    "wrong dtype": (lambda f: reseal(f, to_double), r"norm\.weight is F64, not F32"),
    "not finite": (lambda f: reseal(f, poison), r"not finite: blocks\.0\.sequence_norm\.bias"),
    "unknown mixer": (lambda f: reseal(f, model="hydra"), r"unknown model 'hydra'; allowed: .*transformer"),
    "unknown option": (lambda f: reseal(f, options={"_target_": "os.system"}), "no option '_target_'"),
    "unknown field": (lambda f: reseal(f, _target_="os.system"), "unknown _target_"),
    "odd option": (lambda f: reseal(f, options={"kv_heads": [1]}), "kv_heads"),
    "odd options": (lambda f: reseal(f, options="kv_heads"), "wrong type"),
    "odd dropout": (lambda f: reseal(f, dropout="much"), "wrong type"),
    "too deep": (lambda f: reseal(f, layers=10**9), "too few for the 1000000000 layers"),
    "too wide": (lambda f: reseal(f, dim=2**24), r"does not fit"),
    "absurdly wide": (lambda f: reseal(f, dim=2**60, channel_dim=2**60), "describes no transformer"),
    "other vocabulary": (lambda f: reseal(f, vocab_size=257), "the tokenizer has 256 tokens, the model 257"),
    "format 2": (lambda f: edit(f, format=2), "format 2; this version reads: 1"),
    "format true": (lambda f: edit(f, format=True), "format True"),
    "more in config": (lambda f: edit(f, extra=1), "allowed and needed: format"),
    "weights a list": (lambda f: edit(f, weights=[]), "must be objects"),
    "no hash": (lambda f: edit(f, weights={"bytes": 1, "dtype": "float32"}), "weights must be sha256"),
    "odd dtype": (lambda f: edit(f, weights={"sha256": "", "bytes": 1, "dtype": "int8"}), "weights must be sha256"),
    "odd tokenizer": (lambda f: edit(f, tokenizer={"kind": "bpe", "file": "../x"}), "plain file name"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "not an object": (lambda f: (f / "card.json").write_text("[]"), "not a JSON object"),
    "nested": (lambda f: (f / "card.json").write_text("[" * 100_000), "is not JSON"),
    "NaN": (lambda f: (f / "card.json").write_text('{"loss": NaN}'), "is not JSON: NaN"),
    "a huge card": (lambda f: (f / "card.json").write_text(" " * (1 << 21)), "larger than"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
@pytest.mark.timeout(20)  # an absurd size must be refused, not tried
def test_a_damaged_folder_is_refused_in_one_line(damage: str, folder: Path) -> None:
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(ZooError, match=message) as caught:
        zoo.load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    seal(folder, pickle.dumps(Payload()))
    with pytest.raises(ZooError, match="not a whole safetensors file"):
        zoo.load_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_published_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a source tree and from an installed package; a name is looked up, never joined to a path."""
    tree, installed = tmp_path / "tree", tmp_path / "site"
    shutil.copytree(folder, tree / "checkpoints" / "transformer.tiny-1m")
    (tree / "checkpoints" / "rwkv.no-config").mkdir()
    shutil.copytree(folder, tree / "checkpoints" / "nodot")
    (tree / "pyproject.toml").touch()
    shutil.copytree(folder, installed / "zoo" / "checkpoints" / "aft.tiny-1m")
    shutil.copytree(folder, installed / "checkpoints" / "foreign.model")  # site-packages is nobody's source tree
    for root, name in ((tree, "transformer.tiny-1m"), (installed, "aft.tiny-1m")):
        monkeypatch.setattr("zoo.pretrained.__file__", str(root / "zoo" / "pretrained.py"))
        assert zoo.list_pretrained() == [name]
        assert zoo.load_pretrained(name).card == CARD
        with pytest.raises(ZooError, match=f"unknown saved model .*'rwkv.x'; allowed: {name}"):
            zoo.load_pretrained("rwkv.x")
        for path in ("../checkpoints/none", "/none", str(tmp_path / "none")):
            with pytest.raises(ZooError, match="no such folder"):
                zoo.load_pretrained(path)
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match="is a file"):
        zoo.load_pretrained(tmp_path / "file")
    with pytest.raises(ZooError, match="unknown device 'tpu'; allowed: auto, cpu"):
        zoo.load_pretrained(folder, device="tpu")


def test_what_is_published_loads() -> None:
    for name in zoo.list_pretrained():
        assert zoo.load_pretrained(name)(torch.zeros(1, 8, dtype=torch.int64)).isfinite().all(), name


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The disk refuses files past `size` bytes, as a full one does at some point."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    other = tiny(PLAIN, vocab_size=256, scramble=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target in (folder, tmp_path / "new"):
        with files_of_at_most(5000), pytest.raises(ZooError, match=f"cannot write {target}: File too large"):
            save_pretrained(target, other, ByteTokenizer(), CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # and nothing temporary
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_replaces_a_model_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    other = tiny(PLAIN, vocab_size=256, scramble=True)
    save_pretrained(folder, other, ByteTokenizer(), {"second": True})
    loaded = zoo.load_pretrained(folder)
    assert loaded.card == {"second": True}
    assert torch.equal(loaded.head.weight, other.head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    (tmp_path / "letter").write_text("dear")
    (folder / "notes").write_text("mine")
    for name in ("thesis", "letter", "model"):
        with pytest.raises(ZooError, match="is not a saved model alone: it is left as it is"):
            save_pretrained(tmp_path / name, other, ByteTokenizer(), CARD)
    assert zoo.load_pretrained(folder).card == {"second": True}
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = tiny(PLAIN, vocab_size=256)
    with pytest.raises(ZooError, match="plain JSON values only"):
        save_pretrained(tmp_path / "m", model, ByteTokenizer(), {"path": tmp_path})
    with pytest.raises(ZooError, match="float32, bfloat16, float16"):
        save_pretrained(tmp_path / "m", model, ByteTokenizer(), CARD, dtype=torch.float64)
    model.norm.weight.data[0] = torch.nan
    with pytest.raises(ZooError, match=r"not finite: norm\.weight"):
        save_pretrained(tmp_path / "m", model, ByteTokenizer(), CARD)
    assert not list(tmp_path.iterdir())


def test_loading_needs_no_training_library(folder: Path) -> None:
    """Loading and sampling with these packages made unimportable, and every socket refused."""
    training = "lightning", "pytorch_lightning", "hydra", "omegaconf", "datasets", "wandb", "triton", "typer", "rich"
    run_without(training, f"""
import socket
def refuse(*args, **kwargs): raise AssertionError("a socket was opened")
socket.socket.connect = refuse
import zoo
model = zoo.load_pretrained({str(folder)!r})
assert len(zoo.generate(model, "ab", max_tokens=5, temperature=0)) <= 5
print(zoo.list_pretrained())
""")
