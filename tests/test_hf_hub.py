"""Models on the hub: up to and down from a stand-in on this machine, and out of a cache without any network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import Case, tiny
from hub_server import TOKEN, Hub, serve

import zoo
from zoo import ZooError
from zoo.cli import main
from zoo.hf.folder import save_hf
from zoo.hf.hub import download, parse, push_to_hub
from zoo.pretrained import save_pretrained
from zoo.tokenizers import BPETokenizer, ByteTokenizer

ROOT = Path(__file__).parent.parent
NAME = "somebody/rwkv.small"
# Sees every socket of a process, whichever library asks for it.
REFUSING = """
import sys
def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(refuse)
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of byte-pair tokens as a folder for transformers: it has every kind of file."""
    tokenizer = BPETokenizer.train([b"the cat sat on the mat. " * 40], 280)
    model = tiny(Case("rwkv", ()), vocab_size=tokenizer.vocab_size, scramble=True)
    return save_hf(tmp_path_factory.mktemp("hub") / "m", model, tokenizer, {"note": "for the hub"}, name="m")


def test_up_and_down_again(hub: Hub, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    (folder / "diary.txt").write_text("not for the public")
    page = push_to_hub(folder, f"hf://{NAME}", endpoint=hub.endpoint)
    assert page == f"{hub.endpoint}/{NAME}"
    assert hub.repositories[NAME]["private"]
    held = hub.repositories[NAME]["commits"][hub.repositories[NAME]["refs"]["main"]]
    assert held.keys() - {".gitattributes"} == {path.name for path in saved.iterdir()}
    fetched = download(f"hf://{NAME}", endpoint=hub.endpoint, cache=tmp_path / "cache")
    assert not list(fetched.glob("*.py"))  # code is nothing that the zoo needs of it
    model, expected = zoo.load_pretrained(fetched), zoo.load_pretrained(saved)
    assert model.card == expected.card
    assert zoo.generate(model, "the cat", max_tokens=10, temperature=0) == zoo.generate(
        expected, "the cat", max_tokens=10, temperature=0)


def test_a_revision_is_pinned(hub: Hub, tmp_path: Path) -> None:
    models = [tiny(Case("transformer", ()), vocab_size=256, scramble=True) for _ in range(2)]
    commits = []
    for index, model in enumerate(models):
        folder = save_pretrained(tmp_path / f"m{index}", model, ByteTokenizer(), {"index": index})  # the zoo's own form
        push_to_hub(folder, f"hf://{NAME}", private=False, endpoint=hub.endpoint)
        commits.append(hub.repositories[NAME]["refs"]["main"])
    assert not hub.repositories[NAME]["private"]
    hub.repositories[NAME]["refs"]["v1.0"] = commits[0]
    for revision, index in ((f"@{commits[0]}", 0), ("@v1.0", 0), ("@main", 1), ("", 1)):
        folder = download(f"hf://{NAME}{revision}", endpoint=hub.endpoint, cache=tmp_path / "cache")
        loaded = zoo.load_pretrained(folder)
        assert loaded.card == {"index": index}
        assert torch.equal(loaded.head.weight, models[index].head.weight)
    asked = len(hub.asked)
    download(f"hf://{NAME}@{commits[0]}", endpoint=hub.endpoint, cache=tmp_path / "cache")
    assert len(hub.asked) == asked  # a commit does not change: nobody is asked for what is here


def test_what_the_hub_sends_is_checked(hub: Hub, saved: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    hub.commit("a/flipped", files | {"model.safetensors": bytes(weights)})
    hub.commit("a/empty", {"README.md": b"nothing"})
    hub.commit("a/outside", files | {"config.json": files["config.json"].replace(b"zoo_tokenizer.json", b"../secret")})
    for name, message in (("flipped", "damaged or replaced"), ("empty", "holds no saved model"),
                          ("outside", "plain file name")):
        with pytest.raises(ZooError, match=message) as caught:
            zoo.load_pretrained(download(f"hf://a/{name}", endpoint=hub.endpoint, cache=tmp_path / "cache"))
        assert "\n" not in str(caught.value)


def test_what_the_hub_refuses_is_one_line(hub: Hub, saved: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("a/model", {"README.md": b"nothing"})
    for address in ("hf://a/none", "hf://a/model@v9"):
        with pytest.raises(ZooError, match=f"cannot fetch {address}: .*404") as caught:
            download(address, endpoint=hub.endpoint, cache=tmp_path / "cache")
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(ZooError, match=r"cannot upload to hf://a/model: .*401") as caught:
        push_to_hub(saved, "hf://a/model", endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)
    asked = len(hub.asked)
    with pytest.raises(ZooError, match="no such folder"):
        push_to_hub(tmp_path / "none", "hf://a/model", endpoint=hub.endpoint)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{}")
    with pytest.raises(ZooError, match="format None"):
        push_to_hub(tmp_path / "damaged", "hf://a/model", endpoint=hub.endpoint)
    assert len(hub.asked) == asked


@pytest.mark.parametrize("address", [
    "hf://", "hf://a", "hf://a/b/c", "hf:///a/b", "hf://../b", "hf://a/..", "hf://a/.b", "hf://a/b.", "hf://a--b/c",
    "hf://a/b@", "hf://a/b@../main", "hf://a/b@x/../y", "hf://a/b@/x", "hf://a/b@x y", "hf://a/b.git", "hf://a\\b/c",
    "hf://a/b\n", "hf://ä/b", "http://a/b", "a/b"])
def test_what_is_no_address_is_refused_unasked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (parse, download, lambda address: push_to_hub("rwkv.novels-6m", address)):
        with pytest.raises(ZooError, match="allowed: hf://OWNER/NAME or hf://OWNER/NAME@REVISION") as caught:
            use(address)
        assert "\n" not in str(caught.value)


def test_without_the_package_it_is_one_line(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (download, lambda address: push_to_hub(saved, address)):
        with pytest.raises(ZooError, match="needs the package `huggingface_hub`"):
            use("hf://a/b")


def test_addresses() -> None:
    assert parse("hf://a/b") == ("a/b", None)
    assert parse("hf://Some-body/rwkv.novels-6m@v1.0") == ("Some-body/rwkv.novels-6m", "v1.0")
    assert parse("hf://a/b@refs/pr/1") == ("a/b", "refs/pr/1")


def prepared_cache(saved: Path, cache: Path) -> str:
    """A hub's cache of one commit, as `huggingface_hub` lays it out; returns the commit."""
    commit = hashlib.sha1(b"x").hexdigest()
    repository = cache / f"models--{NAME.replace('/', '--')}"
    for path in saved.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        link = repository / "snapshots" / commit / path.name
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(Path("../..") / "blobs" / blob.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return commit


def test_a_cached_model_loads_without_a_network(saved: Path, tmp_path: Path) -> None:
    """By the address alone, in a process that may open no socket; and what is not cached is one line."""
    commit = prepared_cache(saved, tmp_path / "cache")
    code = REFUSING + f"""
import zoo
for address in ("hf://{NAME}", "hf://{NAME}@main", "hf://{NAME}@{commit}"):
    print(zoo.load_pretrained(address).card)
for address in ("hf://{NAME}@{'0' * 40}", "hf://somebody/else"):
    try:
        zoo.load_pretrained(address)
    except zoo.ZooError as error:
        print(repr(str(error)))
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path),
                                "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["{'note': 'for the hub'}"] * 3
    assert all("cannot fetch hf://" in line and "HF_HUB_OFFLINE" in line for line in lines[3:]), lines
    assert len(lines) == 5


def test_the_command_uploads(hub: Hub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:
    """`zoo export FOLDER hf://...`, and `zoo.load_pretrained` of it; the server is set as HF_ENDPOINT sets it."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.endpoint)
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE",
                        hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    status, out, err = run("export", str(saved), f"hf://{NAME}", "--public")
    assert (status, out) == (0, f"{hub.endpoint}/{NAME}\n"), err
    assert not hub.repositories[NAME]["private"]
    held = hub.repositories[NAME]["commits"][hub.repositories[NAME]["refs"]["main"]]
    assert json.loads(held["config.json"])["model_type"] == "zoo"
    assert zoo.load_pretrained(f"hf://{NAME}").card == zoo.load_pretrained(saved).card
    status, out, _ = run("generate", f"hf://{NAME}", "--prompt", "the", "--max-tokens", "3")
    assert status == 0
    assert out.startswith("the")
    for arguments, message in (((f"hf://{NAME}@../x",), "is no address of a model"),
                               ((f"hf://{NAME}", "--to", "zoo"), "unknown reader 'zoo'; allowed: hf"),
                               ((str(tmp_path / "out"), "--public"), "--public is of an upload")):
        status, out, err = run("export", str(saved), *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err
