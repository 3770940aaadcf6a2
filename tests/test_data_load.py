"""From a configuration to tokens; the configuration groups; the BPE that belongs to a corpus."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import zoo.data.load as load_module
from zoo.data import load_data, open_cache
from zoo.data.load import SOURCES, cache_folder, make_source
from zoo.data.sources import Stdlib
from zoo.errors import ZooError
from zoo.tokenizers import BPETokenizer, load_tokenizer

CONF = Path(__file__).resolve().parents[1] / "conf"


@pytest.fixture
def config(tmp_path):
    text = "".join(f"the cat number {index} sat on mat {index % 7}\n" for index in range(2000))
    (tmp_path / "a.txt").write_text(text)
    return {"data": {"name": "text", "path": str(tmp_path / "a.txt"), "cache": str(tmp_path / "cache")},
            "tokenizer": {"name": "bytes"}}


@pytest.mark.parametrize("name", SOURCES)
def test_a_group_is_its_sources_arguments(name):
    options = yaml.safe_load((CONF / "data" / f"{name}.yaml").read_text())
    assert options.pop("name") == name
    assert options.pop("cache") is None
    parameters = inspect.signature(SOURCES[name]).parameters.items()
    assert options == {option: parameter.default for option, parameter in parameters
                       if parameter.kind is not parameter.KEYWORD_ONLY}


def test_every_group_is_covered():
    assert {file.stem for file in (CONF / "data").glob("*.yaml")} == set(SOURCES)
    assert yaml.safe_load((CONF / "tokenizer" / "bytes.yaml").read_text()) == {"name": "bytes"}
    options = yaml.safe_load((CONF / "tokenizer" / "bpe.yaml").read_text())
    assert options.pop("name") == "bpe"
    parameters = inspect.signature(load_module._bpe).parameters.items()
    assert options == {option: parameter.default for option, parameter in parameters
                       if option not in ("source", "cache", "progress")}


def test_the_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder(None) == tmp_path / ".cache" / "zoo"
    assert cache_folder(str(tmp_path / "x")) == tmp_path / "x"


def test_stdlib_from_its_yaml(tmp_path):
    data = load_data({"data": {**yaml.safe_load((CONF / "data" / "stdlib.yaml").read_text()), "cache": str(tmp_path)},
                      "tokenizer": yaml.safe_load((CONF / "tokenizer" / "bytes.yaml").read_text())})
    pieces = list(Stdlib())
    for split in ("train", "validation", "test"):
        texts = [piece.text for piece in pieces if piece.split == split]
        assert data.split(split).tobytes() == b"".join(b"\0" + text for text in texts)
        assert data.bytes[split] == sum(map(len, texts))
    open_cache(data.folder, verify=True)


def test_bpe_learns_from_training_text_only_and_once(config, monkeypatch):
    config["tokenizer"] = {"name": "bpe", "vocab_size": 320}
    learnt, train = [], BPETokenizer.train

    def watched(texts, vocab_size):
        learnt.append(b"".join(texts))
        return train([learnt[-1]], vocab_size)

    monkeypatch.setattr(BPETokenizer, "train", watched)
    data = load_data(config)
    assert learnt == [b"".join(data.text("train"))]
    assert load_data(config).fingerprint == data.fingerprint
    assert len(learnt) == 1
    load_data({**config, "tokenizer": {"name": "bpe", "vocab_size": 320, "train_bytes": 1000}})
    assert learnt[1] == learnt[0][:1000]
    assert data.tokenizer.vocab_size == 320
    assert len(data.train) < data.bytes["train"] / 2


def test_a_saved_tokenizer_reads_another_corpus(config, tmp_path):
    first = load_data({**config, "tokenizer": {"name": "bpe", "vocab_size": 300}})
    (tmp_path / "model").mkdir()
    spec = first.tokenizer.save(tmp_path / "model")
    named = load_data({**config, "tokenizer": {"name": "bpe", "path": str(tmp_path / "model")}})
    given = load_data(config, tokenizer=load_tokenizer(tmp_path / "model", spec))
    assert named.fingerprint == given.fingerprint == first.fingerprint
    assert np.array_equal(named.train, first.train)


def test_progress_reaches_the_total(config):
    seen = []
    load_data(config, lambda done, total: seen.append((done, total)))
    size = Path(config["data"]["path"]).stat().st_size
    assert seen[-1] == (size, size)


@pytest.mark.parametrize(("group", "change", "message"), [
    ("data", {"name": "wiki"}, "unknown data 'wiki'; allowed: enwik8, fineweb_edu, lambada, novels, stdlib, text"),
    ("data", {"name": None}, "unknown data None"),
    ("data", {"filed": "x"}, "unknown option of data=text 'filed'; allowed: cache, field, path"),
    ("data", {"path": 2024}, r"data\.path=2024 is not text; allowed: text, a number as \./2024"),
    ("data", {"validation_path": ["a", "b"]}, r"data\.validation_path=\['a', 'b'\] is not text"),
    ("data", {"field": 3}, r"data\.field=3 is not text"),
    ("data", {"cache": 5}, r"data\.cache=5 is not text"),
    ("tokenizer", {"name": "bpe", "path": 7}, r"tokenizer\.path=7 is not text"),
    ("tokenizer", {"name": "words"}, "unknown tokenizer 'words'; allowed: bpe, bytes"),
    ("tokenizer", {"vocab_size": 300}, "unknown option of tokenizer=bytes 'vocab_size'"),
    ("tokenizer", {"name": "bpe", "vocab_size": 10}, "vocab_size=10; allowed: a whole number from 257"),
    ("tokenizer", {"name": "bpe", "train_bytes": 0}, "train_bytes=0"),
    ("tokenizer", {"name": "bpe", "path": "/absent.json"}, "cannot read"),
])
def test_wrong_configurations_say_what_is_allowed(config, group, change, message):
    config[group].update(change)
    with pytest.raises(ZooError, match=message) as caught:
        load_data(config)
    assert "\n" not in str(caught.value)


def test_internal_arguments_are_no_options(tmp_path):
    with pytest.raises(ZooError, match="unknown option of data=novels 'facts'"):
        make_source({"name": "novels", "facts": {}}, tmp_path)


def test_heavy_packages_are_imported_only_where_used():
    code = ("import sys, zoo.data, zoo.data.load, zoo.data.baselines\n"
            "heavy = {'torch', 'datasets', 'pyarrow', 'tokenizers', 'zstandard'} & set(sys.modules)\n"
            "sys.exit(', '.join(heavy) or None)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
