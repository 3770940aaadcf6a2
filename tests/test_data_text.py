"""A user's own files, in every format, and what is wrong with them."""

import bz2
import gzip
import io
import json
import lzma
import os
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from documents import by_split

from zoo.data import load_data, sources
from zoo.data.sources_text import Text
from zoo.errors import ZooError

PACK = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".zst": zstandard.compress}
LINES = "".join(f"line {index}: été 🦜\n" for index in range(400))


def parquet(records):
    sink = io.BytesIO()
    pq.write_table(pa.table(records), sink, row_group_size=2)
    return sink.getvalue()


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["book.txt", "notes.md", "plain"])
def test_one_file_is_cut_at_lines(tmp_path, suffix, name):
    file = tmp_path / (name + suffix)
    file.write_bytes(PACK[suffix](LINES.encode()))
    texts = by_split(Text(str(file)))
    assert b"".join(texts["train"] + texts["validation"] + texts["test"]) == LINES.encode()
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert len(texts[split]) == 1
        assert texts[split][0].endswith(b"\n")
        assert len(texts[split][0]) == pytest.approx(share * len(LINES.encode()), abs=40)


@pytest.mark.parametrize("text", [LINES, "é" * 5000, "🦜x" * 2000 + "\n"])
@pytest.mark.parametrize("block", [64, 1000, 1 << 20])
def test_cuts_do_not_depend_on_blocks(tmp_path, monkeypatch, text, block):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    whole = by_split(Text(str(tmp_path / "a.txt"), test_fraction=0.2))
    assert all(whole.values())
    monkeypatch.setattr(sources, "BLOCK", block)
    parts = by_split(Text(str(tmp_path / "a.txt"), test_fraction=0.2))
    for texts in parts.values():
        assert b"".join(texts).decode()  # never half a character
        assert len(texts) == 1
    assert b"".join(chain(*parts.values())) == text.encode()
    for split in whole:
        assert abs(len(parts[split][0]) - len(whole[split][0])) <= 64


def test_two_files_are_both_cut(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(LINES.replace("line", name), encoding="utf-8")
    texts = by_split(Text(str(tmp_path)))
    assert [len(documents) for documents in texts.values()] == [2, 2, 2]
    assert [document[:1] for document in texts["validation"]] == [b"a", b"b"]


def test_many_files_are_held_out_whole(tmp_path):
    sizes = {f"folder{index % 3}/{index}.txt": 100 + 10 * index for index in range(60)}
    sizes["folder0/huge.txt"] = 50_000
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name + "x" * (size - len(name)))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "binary").write_bytes(b"\0")
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    source = Text(str(tmp_path), validation_fraction=0.05, test_fraction=0.02)
    texts = by_split(source)
    assert sum(map(len, texts.values())) == 61
    total = sum(sizes.values())
    assert 0.05 * total <= sum(map(len, texts["validation"])) <= 0.1 * total
    assert 0.02 * total <= sum(map(len, texts["test"])) <= 0.04 * total
    assert by_split(Text(str(tmp_path), validation_fraction=0.05, test_fraction=0.02)) == texts
    assert [piece.name for piece in source] == sorted(sizes)
    globbed = by_split(Text(str(tmp_path / "folder*" / "*.txt"), test_fraction=0))
    assert sum(map(len, globbed.values())) == 61
    assert not globbed["test"]


def test_three_files_give_one_to_each(tmp_path):
    for name, size in (("a", 10_000), ("b", 9000), ("c", 8000)):
        (tmp_path / name).write_text(name * size)
    texts = by_split(Text(str(tmp_path)))
    assert [len(documents) for documents in texts.values()] == [1, 1, 1]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "parquet"])
def test_records(tmp_path, kind, suffix):
    records = [f"record {index} é" for index in range(300)] + ["twice"] * 20 + [""]
    if kind == "parquet":
        data = parquet({"other": list(range(321)), "body": records})
    else:
        data = "\n\n".join(json.dumps({"n": 1, "body": text}) for text in records).encode()
    file = tmp_path / f"all.{kind}{suffix}"
    file.write_bytes(PACK[suffix](data))
    texts = by_split(Text(str(file), field="body", validation_fraction=0.2, test_fraction=0.1))
    assert sorted(chain(*texts.values())) == sorted(text.encode() for text in records if text)
    assert 30 < len(texts["validation"]) < 100
    assert sum(b"twice" in documents for documents in texts.values()) == 1  # equal texts are never in two splits
    assert set(texts["train"]).isdisjoint(texts["validation"] + texts["test"])


def test_given_splits_are_used_and_kept_out_of_training(tmp_path):
    for name in ("a", "b", "c", "valid", "exam"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text")
    given = {"validation_path": str(tmp_path / "valid.txt"), "test_path": str(tmp_path / "exam.txt")}
    texts = by_split(Text(str(tmp_path), **given))
    assert texts == {"train": [b"a text", b"b text", b"c text"], "validation": [b"valid text"], "test": [b"exam text"]}
    (tmp_path / "one").write_text(LINES, encoding="utf-8")
    texts = by_split(Text(str(tmp_path / "one"), validation_path=str(tmp_path / "valid.txt")))
    assert texts["validation"] == [b"valid text"]
    assert len(texts["test"]) == 1  # still held out of path


def test_a_changed_file_is_another_corpus(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(LINES, encoding="utf-8")
    config = {"data": {"name": "text", "path": str(file), "cache": str(tmp_path / "cache")},
              "tokenizer": {"name": "bytes"}}
    first = load_data(config)
    file.write_text(LINES.replace("line", "LINE"), encoding="utf-8")
    os.utime(file, ns=(1, 1))
    assert load_data(config).fingerprint != first.fingerprint
    assert load_data(config).train.tobytes().startswith(b"\0LINE 0")


BAD = {
    "missing": ("absent.txt", None, "names no file; allowed: a file, a folder with files, or a glob"),
    "nothing matched": ("*.nothing", None, "names no file"),
    "empty": ("a.txt", b"", "is empty"),
    "binary": ("a.txt", LINES.encode() + b"\0\1\2", "binary or not UTF-8"),
    "utf-16": ("a.txt", LINES.encode("utf-16"), "binary or not UTF-8"),
    "latin-1": ("a.txt", "é\n".encode("latin-1") * 100, "binary or not UTF-8"),
    "too short": ("a.txt", b"abc", "too short, it leaves no text for validation"),
    "only empty inside": ("a.txt.gz", gzip.compress(b""), "too short"),
    "gzip cut": ("a.txt.gz", gzip.compress(os.urandom(4000))[:-900], r"cannot read .*a\.txt\.gz"),
    "no gzip": ("a.txt.gz", b"plain text", r"cannot read .*a\.txt\.gz"),
    "no bzip2": ("a.txt.bz2", b"plain text", "cannot read"),
    "no xz": ("a.txt.xz", b"plain text", "cannot read"),
    "no zstandard": ("a.txt.zst", b"plain text", "cannot read"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    "no object": ("a.jsonl", b"[1]\n", "line 1 has no field 'text' but no object; set data.field"),
    "no field": ("a.jsonl", b'{"body": "a", "id": 3}\n', "no field 'text' but body, id; set data.field"),
    "no string": ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' is int, not text"),
    "NUL in JSON": ("a.jsonl", b'{"text": "a\\u0000"}\n', "NUL"),
    "no Unicode in JSON": ("a.jsonl", b'{"text": "\\ud800"}\n', "not valid Unicode"),
    "few records": ("a.jsonl", b'{"text": "abc"}\n', "leaves no text for"),
    "no parquet": ("a.parquet", b"plain text that is no parquet file", "cannot read"),
    "no column": ("a.parquet", parquet({"body": ["a"], "id": [1]}), "no column 'text' but body, id; set data.field"),
    "numbers": ("a.parquet", parquet({"text": [1, 2]}), "row 1: field 'text' is int"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line_and_leaves_nothing(tmp_path, case):
    name, content, message = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    cache = tmp_path / "cache"
    config = {"data": {"name": "text", "path": str(tmp_path / name), "cache": str(cache)},
              "tokenizer": {"name": "bytes"}}
    with pytest.raises(ZooError, match=message) as caught:
        load_data(config)
    assert "\n" not in str(caught.value)
    assert not [path for path in cache.glob("*") if path.is_dir()]


@pytest.mark.parametrize(("options", "message"), [
    ({}, r"needs data\.path"),
    ({"path": "x", "validation_fraction": 0.5}, r"validation_fraction=0\.5; allowed: 0 to less"),
    ({"path": "x", "test_fraction": "many"}, "test_fraction='many'"),
    ({"path": "x", "validation_fraction": 0}, "validate"),
    ({"path": "x", "test_fraction": True}, "test_fraction=True"),
])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        Text(**options)
