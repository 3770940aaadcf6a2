"""The public corpora: the real loading code on small local copies in their published layouts, without a network."""

import hashlib
import json
import re
import socket
import sys
import zipfile
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents import by_split

from zoo.data import load_data, sources_hub
from zoo.data.sources import InterruptedReadError
from zoo.data.sources_hub import Enwik8, FineWebEdu, Lambada, TinyStories, WikiText2, WikiText103, load_rows
from zoo.errors import ZooError


@pytest.fixture(autouse=True)
def no_names(monkeypatch):
    """Looking up a host fails the test, also where the library would hide it."""
    looked_up = []

    def refuse(host, *rest, **more):
        looked_up.append(host)
        raise socket.gaierror(f"no look-up of {host}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield looked_up
    assert not looked_up


def write(folder, files):
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": list(range(len(rows))), "text": rows}), folder / name, row_group_size=50)
    return str(folder)


ENWIK = "".join(f"<page>{index} é \u2028 [[link|{'x' * (index % 50)}]]</page>\n\n" for index in range(2000)) + "no end"


@pytest.mark.parametrize("layout", ["enwik8", "enwik8.zip", "folder", "zip folder"])
def test_enwik8_is_cut_in_bytes(tmp_path, layout, caplog):
    raw, packed = tmp_path / "enwik8", tmp_path / "enwik8.zip"
    if "zip" in layout:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("enwik8", ENWIK)
    else:
        raw.write_text(ENWIK, encoding="utf-8")
    source = Enwik8(str(tmp_path if "folder" in layout else packed if "zip" in layout else raw), cache=tmp_path)
    texts = by_split(source)
    data = ENWIK.encode()
    ends = [0, len(data) * 90 // 100, len(data) * 95 // 100, len(data)]
    assert texts == {split: [data[start:end]] for split, start, end in
                     zip(("train", "validation", "test"), ends, ends[1:], strict=False)}
    assert f"{len(data)} bytes, not 100000000" in caplog.text  # said loudly


def test_enwik8_of_full_size_is_verified(tmp_path, monkeypatch, caplog):
    (tmp_path / "enwik8").write_text(ENWIK, encoding="utf-8")
    monkeypatch.setattr(Enwik8, "size", len(ENWIK.encode()))
    with pytest.raises(ZooError, match=r"is not enwik8: SHA-256 \w{64}, expected 2b49720e"):
        list(Enwik8(str(tmp_path), cache=tmp_path))
    monkeypatch.setattr(Enwik8, "sha256", hashlib.sha256(ENWIK.encode()).hexdigest())
    assert len(by_split(Enwik8(str(tmp_path), cache=tmp_path))["train"]) == 1
    assert not caplog.text


WIKI = ["", " = First Article = \n", "", " Some text é . \n", " = = Section = = \n", "", " = = = Deeper = = = \n", "",
        " x = y \n", "", " = Second = \n", "", " More . \n", ""]


def test_wikitext103_documents_are_articles(tmp_path):
    path = write(tmp_path, {
        "wikitext-103-raw-v1/train-00000-of-00002.parquet": WIKI[:6],
        "wikitext-103-raw-v1/train-00001-of-00002.parquet": WIKI[6:],
        "wikitext-103-raw-v1/validation-00000-of-00001.parquet": WIKI[9:],
        "wikitext-103-raw-v1/test-00000-of-00001.parquet": ["", " = Only = \n", " one . \n"],
        "wikitext-2-raw-v1/train-00000-of-00001.parquet": ["another corpus"],
    })
    texts = by_split(WikiText103(path, cache=tmp_path / "cache"))
    lines = [row or " \n" for row in WIKI]
    assert texts["train"] == ["".join(lines[:10]).encode(), "".join(lines[10:]).encode()]
    assert texts["validation"] == ["".join(lines[9:]).encode()]
    assert texts["test"] == [b" \n = Only = \n one . \n"]


def test_wikitext2_is_the_small_one_of_the_same_repository(tmp_path):
    files = {f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet": WIKI for split in ("train", "validation", "test")}
    path = write(tmp_path, {"wikitext-103-raw-v1/test-00000-of-00001.parquet": ["another corpus"], **files})
    texts = by_split(WikiText2(path, cache=tmp_path / "cache"))
    assert texts["test"] == texts["train"] == by_split(WikiText2(path, cache=tmp_path))["validation"]
    assert b"".join(texts["test"]).decode() == "".join(row or " \n" for row in WIKI)
    assert WikiText2(cache=tmp_path).identity() != WikiText103(cache=tmp_path).identity()


def test_lambada_is_for_testing_alone(tmp_path):
    passages = ["she put down the é pen", "where is he ? asked the captain", ""]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "lambada_test.jsonl").write_text(
        "".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    source = Lambada(str(tmp_path), cache=tmp_path / "cache")
    assert by_split(source)["test"] == [passage.encode() for passage in passages[:2]]
    data = load_data({"data": {"name": "lambada", "path": str(tmp_path), "cache": str(tmp_path / "cache")},
                      "tokenizer": {"name": "bytes"}})
    assert (data.bytes["train"], len(data.train), data.bytes["test"]) == (0, 0, 54)
    assert bytes(data.test).split(b"\0")[1:] == [passage.encode() for passage in passages[:2]]


def test_where_a_download_would_come_from(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sources_hub, "load_rows", lambda *given, **options: asked.append((given, options)) or iter(()))
    for source in (Lambada(cache=tmp_path), WikiText2(cache=tmp_path)):
        list(source.rows("test"))
    (lambada, options), (wikitext, _) = asked
    assert lambada == ("lambada", "json",
                       "hf://datasets/EleutherAI/lambada_openai@d28e11e11bebdeb93b75d632656ef68423adca9d"
                       "/data/lambada_test.jsonl")
    assert not options["local"]
    assert wikitext[1:] == ("parquet", "hf://datasets/Salesforce/wikitext@b08601e04326c79dfdd32d625aee71d232d685c3"
                                       "/wikitext-2-raw-v1/test-*.parquet")


def test_tinystories_test_is_held_out_by_hash(tmp_path):
    stories = [f"Once upon a time {index}." for index in range(1500)] + ["The same."] * 30 + ["", "a\0b"]
    path = write(tmp_path, {"data/train-00000-of-00001-2d5a.parquet": stories,
                            "data/validation-00000-of-00001-869c.parquet": ["One.", "Two."]})
    texts = by_split(TinyStories(path, cache=tmp_path / "cache"))
    assert texts["validation"] == [b"One.", b"Two."]
    assert 3 < len(set(texts["test"])) < 40
    assert set(texts["train"]).isdisjoint(texts["test"])
    # neither empty nor with a NUL
    assert sorted(texts["train"] + texts["test"]) == sorted(text.encode() for text in stories[:-2])


def test_fineweb_edu_stops_at_its_bound(tmp_path):
    pages = [f"Page {index:04d} é " * 5 for index in range(900)]
    path = write(tmp_path, {"sample/10BT/000_00000.parquet": pages[:500], "sample/10BT/001_00000.parquet": pages[500:],
                            "data/other.parquet": ["not of the sample"]})
    bound = 600 * len(pages[0].encode()) + 7
    source = FineWebEdu(path, max_bytes=bound, validation_fraction=0.1, test_fraction=0.05, cache=tmp_path / "cache")
    texts = by_split(source)
    assert sorted(chain(*texts.values())) == [page.encode() for page in pages[:600]]
    assert 30 < len(texts["validation"]) < 95
    assert 10 < len(texts["test"]) < 55


def test_a_whole_copy_with_its_readme(tmp_path):
    """Its declaration of other files and columns, which `datasets` would read, changes nothing."""
    path = write(tmp_path, {"sample/10BT/0.parquet": [f"page {index}" for index in range(5)]})
    (tmp_path / "README.md").write_text("""---
configs:
- config_name: default
  features: [{name: text, dtype: string}, {name: url, dtype: string}]
  data_files: [{split: train, path: data/*/*}]
---
""")
    pieces = list(FineWebEdu(path, cache=tmp_path))
    assert sorted(piece.text for piece in pieces) == [b"page %d" % index for index in range(5)]


def test_the_converting_reader_gives_the_same_rows(tmp_path):
    """What a download goes through: `datasets` builds its own table in the cache, and that is read."""
    path = write(tmp_path / "copy", {"data/train-0.parquet": [f"é {index}" for index in range(120)]})
    options = {"local": True, "cache": tmp_path / "cache", "columns": ["text"]}
    files = f"{path}/data/train-*.parquet"
    streamed = list(load_rows("x", "parquet", files, streaming=True, **options))
    assert not list(tmp_path.rglob("*.arrow"))  # a local copy is not copied again
    converted = list(load_rows("x", "parquet", files, streaming=False, **options))
    assert converted == streamed == [f"é {index}" for index in range(120)]
    assert list((tmp_path / "cache" / "datasets").rglob("*.arrow"))
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("enwik8", ENWIK)
    rows = load_rows("x", "text", str(tmp_path / "enwik8.zip"), streaming=False, local=True, cache=tmp_path / "cache",
                     keep_linebreaks=True)
    assert "".join(rows) == ENWIK


def test_through_the_cache_to_tokens(tmp_path):
    path = write(tmp_path, {"data/train-0.parquet": [f"Story {index}. " * 20 for index in range(800)],
                            "data/validation-0.parquet": ["One. " * 20]})
    data = load_data({"data": {"name": "tinystories", "path": path, "cache": str(tmp_path / "cache")},
                      "tokenizer": {"name": "bpe", "vocab_size": 300}})
    assert data.bytes["validation"] == 100
    assert data.tokenizer.decode(data.validation) == "One. " * 20
    assert sum(entry["documents"] for entry in data.manifest["splits"].values()) == 801


@pytest.mark.parametrize(("build", "file"), [
    (WikiText103, "wikitext-103-raw-v1/train-*"), (TinyStories, "data/train-*"), (FineWebEdu, "sample/10BT/*"),
    (Enwik8, "enwik8"),
])
def test_a_wrong_folder_says_what_is_needed(tmp_path, build, file):
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ZooError, match=r"data\.path=") as caught:
            build(str(place), cache=tmp_path)
        assert file in str(caught.value)


def test_a_damaged_or_foreign_copy_is_one_line(tmp_path):
    (tmp_path / "sample" / "10BT").mkdir(parents=True)
    file = tmp_path / "sample" / "10BT" / "a.parquet"
    file.write_bytes(b"no parquet")
    with pytest.raises(ZooError, match="data=fineweb_edu: cannot read the local copy") as caught:
        list(FineWebEdu(str(tmp_path), cache=tmp_path))
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"body": ["x"]}), file)
    with pytest.raises(ZooError, match="cannot read the local copy"):
        list(FineWebEdu(str(tmp_path), cache=tmp_path))


@pytest.mark.parametrize("build", [WikiText103, TinyStories, FineWebEdu, Enwik8])
def test_without_a_network_it_is_one_line(tmp_path, monkeypatch, build):
    import datasets

    asked = []

    def offline(place, **options):
        asked.append((place, options))
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InterruptedReadError, match=r"reach the Hub; without a network give data\.path") as caught:
        list(build(cache=tmp_path))
    assert "\n" not in str(caught.value)
    place, options = asked[0]
    files = options["data_files"]["train"]
    if build is Enwik8:
        assert (place, files) == ("text", "https://mattmahoney.net/dc/enwik8.zip")
    else:
        assert place == "parquet"
        pattern = f"hf://datasets/{build.repository}@REVISION/{build.files['train']}"
        assert re.sub("@[0-9a-f]{40}/", "@REVISION/", files) == pattern
    assert options["streaming"] == (build is FineWebEdu)


def test_without_the_package_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ZooError, match="needs the package `datasets`"):
        list(TinyStories(cache=tmp_path))


@pytest.mark.parametrize("options",
                         [{"max_bytes": 0}, {"max_bytes": 1e9}, {"validation_fraction": 0}, {"test_fraction": 1}])
def test_wrong_bounds_are_refused(tmp_path, options):
    with pytest.raises(ZooError, match="allowed"):
        FineWebEdu(cache=tmp_path, **options)


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(sources_hub, "BLOCK", 10)
    joined = sources_hub._joined(iter(["aaaa", "bbbb", "cccc", "d" * 30, "e"]))
    assert list(joined) == [b"aaaabbbbcccc", b"d" * 30, b"e"]
