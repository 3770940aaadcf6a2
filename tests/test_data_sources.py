"""The standard library as a corpus, the 100 English Novels, and what all sources share."""

import hashlib
import io
import json
import lzma
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from zoo.data import sources, sources_novels
from zoo.data.sources import SPLITS, Stdlib, blocks, hashed_split
from zoo.data.sources_novels import FACTS, Facts, Novels
from zoo.errors import ZooError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "novels"


def test_stdlib_holds_out_whole_modules():
    source = Stdlib()
    split_of, bytes_of = {}, dict.fromkeys(SPLITS, 0)
    names = []
    for piece in source:
        module = piece.name.split("/")[0].removesuffix(".py")
        assert split_of.setdefault(module, piece.split) == piece.split
        bytes_of[piece.split] += len(piece.text)
        names.append(piece.name)
    assert names == sorted(set(names))
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert {"argparse.py", "json/decoder.py", "typing.py"} <= set(names)
    assert not any("_sysconfigdata" in name for name in names)
    for split in ("validation", "test"):
        assert sum(where == split for where in split_of.values()) >= 4
        assert 200_000 < bytes_of[split] < 600_000  # seconds to evaluate on a CPU
    assert bytes_of["train"] > 8_000_000
    assert source.total_bytes == sum(bytes_of.values())


def test_stdlib_split_is_the_same_for_ever():
    """The figures of every recorded run are on these modules."""
    for split, modules in {"validation": ("ast", "codecs", "contextlib", "functools", "pdb"),
                           "test": ("copy", "importlib", "ntpath", "pathlib"),
                           "train": ("argparse", "asyncio", "email", "json", "typing", "unittest")}.items():
        assert {Stdlib.split_of(module) for module in modules} == {split}


def test_stdlib_skips_what_is_no_utf8(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "good.py").write_text("é = 1\n", encoding="utf-8")
    (tmp_path / "a" / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "a" / "nul.py").write_bytes(b"#\0\n")
    (tmp_path / "a" / "empty.py").touch()
    (tmp_path / "a" / "tests").mkdir()
    (tmp_path / "a" / "tests" / "t.py").write_text("1\n")
    assert [piece.name for piece in Stdlib(root=tmp_path)] == ["a/good.py"]
    with pytest.raises(ZooError, match="no Python sources"):
        Stdlib(root=tmp_path / "a" / "tests" / "none")


def test_hashed_split_keeps_to_its_fractions():
    where = [hashed_split(str(index).encode(), 0.1, 0.05) for index in range(4000)]
    assert where == [hashed_split(str(index).encode(), 0.1, 0.05) for index in range(4000)]
    assert 320 < where.count("validation") < 480
    assert 150 < where.count("test") < 250
    assert hashed_split(b"x", 0.0, 0.0) == "train"


@pytest.mark.parametrize("text", [
    "", "short", "é" * 300, "日本語" * 100, "line\n" * 100, "a very long line " * 40 + "\n", "\n" * 300, "é\n\n" * 80,
    "\ufeffmarked", "🦜" * 64 + "x",
])
def test_blocks_are_whole_characters_and_small(monkeypatch, text):
    monkeypatch.setattr(sources, "BLOCK", 64)
    parts = list(blocks(io.BytesIO(text.encode()), "x", "data=text"))
    assert b"".join(parts) == text.removeprefix("\ufeff").encode()
    assert all(part.decode() for part in parts)
    assert max(map(len, parts), default=0) <= 128
    if "line\n" in text:
        assert all(part.endswith(b"\n") for part in parts)


@pytest.mark.parametrize("data", [b"a\0b", b"\xff\xfea\0", b"ok" * 100 + b"\xc3", b"\xe9t\xe9"])
def test_binary_is_refused(monkeypatch, data):
    monkeypatch.setattr(sources, "BLOCK", 64)
    with pytest.raises(ZooError, match=r"data=text: FILE is binary or not UTF-8; allowed"):
        list(blocks(io.BytesIO(data), "FILE", "data=text"))


# A corpus in miniature: the same layout, order and checks as the novels.

BOOKS = {"Austen_Emma": "\ufeffEmma\r\nWoodhouse\r\n", "Brown_Ann": "Ann\nGrieve é", "Cole_Held": "\ufeffheld out\r\n",
         "Dunn_Test": "tested\rhere", "Eliot_Silas": "Silas\r\n\r\nMarner\r\n"}


def normal(title):
    return BOOKS[title].removeprefix("\ufeff").replace("\r\n", "\n").encode()


def facts(**changes):
    texts = {"train": normal("Austen_Emma") + normal("Brown_Ann") + normal("Eliot_Silas"),
             "validation": normal("Cole_Held"), "test": normal("Dunn_Test")}
    values = {"repository": "https://example.org/novels", "commit": "c0ffee" * 6,
              "held_out": {"validation": ("Cole_Held",), "test": ("Dunn_Test",)},
              "bytes": {split: len(text) for split, text in texts.items()},
              "sha256": {split: hashlib.sha256(text).hexdigest() for split, text in texts.items()}}
    return Facts(**{**values, **changes})


def archive(path, books=BOOKS, mode="w:xz", root="corpus/", extra=()):
    with tarfile.open(path, mode) as tar:
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size) if member.isreg() else None)
        for title, text in books.items():
            member = tarfile.TarInfo(f"{root}{title}.txt")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def folder(path, books=BOOKS):
    path.mkdir(parents=True)
    for title, text in books.items():
        (path / f"{title}.txt").write_bytes(text.encode())
    return path


@pytest.mark.parametrize("make", [
    lambda tmp: folder(tmp / "novels"), lambda tmp: folder(tmp / "clone" / "corpus").parent,
    lambda tmp: archive(tmp / "corpus.tar.xz"), lambda tmp: archive(tmp / "corpus.tar.xz").parent,
    lambda tmp: archive(tmp / "n.tar.gz", mode="w:gz", root="novels-c0ffee/corpus/"),
    lambda tmp: archive(tmp / "n.tar", mode="w"),
])
def test_novels_from_folder_and_archive(tmp_path, make):
    pieces = list(Novels(str(make(tmp_path)), cache=tmp_path, facts=facts()))
    assert [piece.name for piece in pieces] == list(BOOKS)
    assert [piece.text for piece in pieces] == [normal(title) for title in BOOKS]
    assert [piece.split for piece in pieces] == ["train", "train", "validation", "test", "train"]


@pytest.mark.parametrize(("title", "change", "message"), [
    ("Cole_Held", "held 0ut\r\n", r"the validation split has SHA-256 \w{64}, expected \w{64}"),
    ("Dunn_Test", "tested", "the test split has bytes 6, expected 11"),
    ("Brown_Ann", None, r"the train split has bytes \d+, expected \d+"),
    ("Added_Book", "more", r"the train split has bytes \d+, expected \d+"),
])
def test_a_mismatch_names_split_expected_and_found(tmp_path, title, change, message):
    books = {name: text for name, text in sorted({**BOOKS, title: change}.items()) if text is not None}
    with pytest.raises(ZooError, match=message):
        list(Novels(str(folder(tmp_path / "novels", books)), cache=tmp_path, facts=facts()))


def test_archives_cannot_play_tricks(tmp_path, monkeypatch):
    """Nothing is unpacked, links and foreign paths are not followed, and no member can fill the memory."""
    outside = tarfile.TarInfo("../../escaped.txt")
    link = tarfile.TarInfo("corpus/Austen_Emma.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    other = tarfile.TarInfo("other/Zzz.txt")
    other.size = outside.size = 3
    before = sorted(path for path in tmp_path.rglob("*"))
    path = archive(tmp_path / "a.tar.xz", extra=[outside, link, other])
    assert [piece.name for piece in Novels(str(path), cache=tmp_path, facts=facts())] == list(BOOKS)
    assert sorted(path for path in tmp_path.rglob("*")) == [*before, path]
    monkeypatch.setattr(sources_novels, "LARGEST_FILE", 10)
    with pytest.raises(ZooError, match="no novel has over"):
        list(Novels(str(path), cache=tmp_path, facts=facts()))


def test_broken_novels_are_one_line(tmp_path):
    whole = archive(tmp_path / "a.tar.xz").read_bytes()
    backwards = dict(reversed(BOOKS.items()))
    (tmp_path / "empty").mkdir()
    for name, content, message in [
        ("cut.tar.xz", whole[:len(whole) // 2], "cannot read the archive"),
        ("text.tar.xz", b"no archive at all", "cannot read"),
        ("bomb.tar.xz", lzma.compress(b"x" * 2000), "cannot read"), ("absent", None, "does not exist; allowed"),
        ("empty", None, "neither .txt files nor corpus"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ZooError, match=message) as caught:
            list(Novels(str(tmp_path / name), cache=tmp_path, facts=facts()))
        assert "\n" not in str(caught.value)
    with pytest.raises(ZooError, match="file-name order"):
        list(Novels(str(archive(tmp_path / "b.tar.xz", backwards)), cache=tmp_path, facts=facts()))
    latin = folder(tmp_path / "latin")
    (latin / "Brown_Ann.txt").write_bytes(b"\xe9")
    with pytest.raises(ZooError, match=r"Brown_Ann\.txt is not UTF-8"):
        list(Novels(str(latin), cache=tmp_path, facts=facts()))


def test_nothing_is_fetched_unless_asked(tmp_path):
    with pytest.raises(ZooError, match=r"data\.path=fetch"):
        Novels(cache=tmp_path)


def test_fetch_downloads_once_verifies_and_reads(tmp_path):
    """The commit's archive, here by a file:// address in the layout of the public one."""
    made = facts(repository=(tmp_path / "remote").as_uri())
    remote = tmp_path / "remote" / "archive" / f"{made.commit}.tar.gz"
    remote.parent.mkdir(parents=True)
    archive(remote, mode="w:gz", root=f"novels-{made.commit}/corpus/")
    cache = tmp_path / "cache"
    assert len(list(Novels("fetch", cache=cache, facts=made))) == 5
    remote.unlink()
    assert len(list(Novels("fetch", cache=cache, facts=made))) == 5  # from the cache now
    assert len(list(Novels(cache=cache, facts=made))) == 5
    assert [path.name for path in (cache / "downloads").iterdir()] == [f"novels-{made.commit}.tar.gz"]


def test_a_failed_fetch_leaves_nothing(tmp_path, monkeypatch):
    made = facts(repository=(tmp_path / "remote").as_uri())
    remote = tmp_path / "remote" / "archive" / f"{made.commit}.tar.gz"
    remote.parent.mkdir(parents=True)
    archive(remote, {**BOOKS, "Cole_Held": "changed"}, mode="w:gz")
    with pytest.raises(ZooError, match="the validation split has bytes 7"):
        Novels("fetch", cache=tmp_path / "cache", facts=made)

    def no_network(url, timeout):
        assert url.startswith("https://github.com/computationalstylistics/100_english_novels/archive/143e601875d7")
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(ZooError, match=r"cannot fetch https://.*Name or service not known.*data\.path=ARCHIVE"):
        Novels("fetch", cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/novels is not here")
def test_the_published_novels_are_what_the_facts_say(tmp_path):
    """Every byte and hash of the real corpus, against the shipped facts and the ones that came with it."""
    published = json.loads((SHARED / "splits.json").read_text())
    assert published["commit"] == FACTS.commit
    assert published["bytes"] == FACTS.bytes
    assert published["sha256_of_concatenated_normalised_documents"] == FACTS.sha256
    assert {split: tuple(published[split]) for split in ("validation", "test")} == FACTS.held_out
    counts = dict.fromkeys(SPLITS, 0)
    for piece in Novels(str(SHARED), cache=tmp_path):  # raises at its end where anything differs
        counts[piece.split] += 1
    assert counts == {"train": 91, "validation": 4, "test": 5}
