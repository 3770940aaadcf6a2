"""The token cache: exact, narrow, resumable after kill -9, whole or absent."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

import zoo.data.cache as cache_module
from zoo.data.baselines import gzip_bits, unigram_entropy
from zoo.data.cache import narrow, open_cache, prepare, token_dtype
from zoo.data.sources import InterruptedReadError, Piece
from zoo.errors import ZooError
from zoo.tokenizers import BPETokenizer, ByteTokenizer

PIECES = [
    Piece("train", "a", b"the first document, in two"), Piece("train", "a", b" pieces\n", begins=False),
    Piece("validation", "b", "held out: é".encode()), Piece("train", "c", b"the second\n"),
    Piece("test", "d", b"tested"), Piece("validation", "e", b"more"),
]


class Listed:
    """A source that is a list; `fail` is raised in place of piece number `fail_at`."""

    name = "listed"
    splits = ("train", "validation", "test")

    def __init__(self, pieces=PIECES, fail_at=None, fail=None, name="listed"):
        self.pieces, self.fail_at, self.fail, self.name = pieces, fail_at, fail, name
        self.total_bytes = sum(len(piece.text) for piece in pieces)
        self.passes = 0

    def identity(self):
        return {"source": self.name, "pieces": hashlib.sha256(repr(self.pieces).encode()).hexdigest()}

    def __iter__(self):
        self.passes += 1
        for index, piece in enumerate(self.pieces):
            if index == self.fail_at:
                raise self.fail
            yield piece


def stream(*documents):
    return b"".join(b"\0" + document for document in documents)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([piece.text for piece in PIECES] * 3, 300)


def test_tokens_counts_and_manifest(tmp_path):
    seen = []
    data = prepare(Listed(), ByteTokenizer(), tmp_path, lambda done, total: seen.append((done, total)))
    assert data.train.tobytes() == stream(b"the first document, in two pieces\n", b"the second\n")
    assert data.validation.tobytes() == stream("held out: é".encode(), b"more")
    assert data.test.tobytes() == stream(b"tested")
    assert data.bytes == {"train": 45, "validation": 16, "test": 6}
    assert seen[-1] == (67, 67)
    entry = data.manifest["splits"]["validation"]
    assert entry == {"file": "validation.bin", "dtype": "uint8", "tokens": 18, "bytes": 16, "documents": 2,
                     "sha256": hashlib.sha256(data.validation.tobytes()).hexdigest()}
    assert isinstance(data.train, np.memmap)
    assert not data.train.flags.writeable
    assert sorted(contents(data.folder)) == ["manifest.json", "test.bin", "train.bin", "validation.bin"]
    assert not [file for file in tmp_path.iterdir() if file.is_file() and file.suffix != ".lock"]


def test_bpe_cache_counts_bytes_of_text(tmp_path, bpe):
    data = prepare(Listed(), bpe, tmp_path)
    assert data.train.dtype == np.uint16
    assert data.bytes == {"train": 45, "validation": 16, "test": 6}
    assert len(data.train) < 45
    assert (data.train == 0).sum() == data.manifest["splits"]["train"]["documents"] == 2
    assert b"".join(data.text("validation")) == "held out: émore".encode()
    opened = open_cache(data.folder, verify=True)  # the folder carries its tokenizer
    assert opened.tokenizer.spec == bpe.spec


def test_it_is_prepared_once(tmp_path):
    source = Listed()
    first = prepare(source, ByteTokenizer(), tmp_path)
    again = prepare(source, ByteTokenizer(), tmp_path)
    assert source.passes == 1
    assert again.folder == first.folder
    other = prepare(Listed(PIECES[:-1]), ByteTokenizer(), tmp_path)
    assert other.folder != first.folder
    assert other.fingerprint != first.fingerprint


def test_fingerprint_is_of_content_and_tokenizer(tmp_path, bpe):
    """The same text read in another way is the same corpus."""
    first = prepare(Listed(), ByteTokenizer(), tmp_path)
    assert prepare(Listed(name="renamed"), ByteTokenizer(), tmp_path).fingerprint == first.fingerprint
    assert prepare(Listed(), bpe, tmp_path).fingerprint != first.fingerprint


def test_narrowing_never_wraps(tmp_path):
    """numpy casts 256 to uint8 as 0, silently; here it is an error, as is a separator inside text."""
    assert np.array([256, 65536]).astype(np.uint8).tolist() == [0, 0]
    tokenizer = ByteTokenizer()
    assert narrow(np.array([1, 255]), np.dtype(np.uint8), tokenizer).tolist() == [1, 255]
    for wrong in (256, 65537, -1, 0):
        with pytest.raises(ZooError, match=r"allowed: 1 \.\. 255"):
            narrow(np.array([5, wrong]), np.dtype(np.uint8), tokenizer)

    class Wide(ByteTokenizer):
        def encode_batch(self, texts):
            return [ids + 200 for ids in super().encode_batch(texts)]

    with pytest.raises(ZooError, match=r"allowed: 1 \.\. 255"):
        prepare(Listed(), Wide(), tmp_path)
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize(("vocab_size", "dtype"),
                         [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_dtype_by_vocabulary(vocab_size, dtype):
    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1


MANY = [Piece(split, f"{split}{index}", (f"{split} {index} " * (index % 7 + 1)).encode(), begins=index % 3 != 1)
        for index in range(120) for split in ("train", "train", "validation", "test")]

KILLED = textwrap.dedent("""
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    import zoo.data.cache as cache_module
    from test_data_cache import MANY, Listed
    from zoo.tokenizers import ByteTokenizer
    cache_module.GROUP_BYTES, cache_module.JOURNAL_BYTES = 64, 500
    def progress(done, total):
        if done > int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    cache_module.prepare(Listed(MANY), ByteTokenizer(), sys.argv[1], progress)
""")


def test_resumes_after_kill_9_byte_for_byte(tmp_path):
    whole = prepare(Listed(MANY), ByteTokenizer(), tmp_path / "whole")
    total = sum(len(piece.text) for piece in MANY)
    for at in (total // 3, 2 * total // 3):  # twice: the second resume goes on from the first
        command = [sys.executable, "-c", KILLED, tmp_path / "cut", Path(__file__).parent, str(at)]
        killed = subprocess.run(command, check=False)
        assert killed.returncode == -signal.SIGKILL
    folder = next(path for path in (tmp_path / "cut").iterdir() if path.is_dir())
    assert not (folder / "manifest.json").exists()
    journal = json.loads((folder / "journal.json").read_bytes())
    assert journal["pieces"] > len(MANY) / 2  # finished documents were kept
    assert (folder / "train.bin").stat().st_size > journal["splits"]["train"][0]  # and more was written than it counts
    tokenized = []

    class Counting(ByteTokenizer):
        def encode_batch(self, texts):
            tokenized.extend(texts)
            return super().encode_batch(texts)

    resumed = prepare(Listed(MANY), Counting(), tmp_path / "cut")
    assert contents(resumed.folder) == contents(whole.folder)
    assert len(tokenized) == len(MANY) - journal["pieces"]  # and not done again


@pytest.mark.parametrize("damage", ["journal", "tokens"])
def test_a_damaged_journal_starts_over(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(cache_module, "GROUP_BYTES", 16)
    monkeypatch.setattr(cache_module, "JOURNAL_BYTES", 16)
    source = Listed(fail_at=4, fail=InterruptedReadError("the line is dead"))
    with pytest.raises(InterruptedReadError):
        prepare(source, ByteTokenizer(), tmp_path)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert (folder / "journal.json").exists()
    os.truncate(folder / ("journal.json" if damage == "journal" else "train.bin"), 5)
    data = prepare(Listed(), ByteTokenizer(), tmp_path)
    assert data.train.tobytes() == stream(b"the first document, in two pieces\n", b"the second\n")


def test_bad_text_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZooError, match="binary"):
        prepare(Listed([*PIECES, Piece("train", "x", b"a\0b")]), ByteTokenizer(), tmp_path)
    with pytest.raises(ZooError, match="not UTF-8"):
        prepare(Listed(fail_at=3, fail=ZooError("x is not UTF-8")), ByteTokenizer(), tmp_path)
    with pytest.raises(ZooError, match="no text for validation"):
        prepare(Listed([PIECES[0], PIECES[4]]), ByteTokenizer(), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


FULL = textwrap.dedent("""
    import resource, sys
    sys.path.insert(0, sys.argv[2])
    from test_data_cache import Listed
    from zoo.data.cache import prepare
    from zoo.data.sources import Piece
    from zoo.errors import ZooError
    from zoo.tokenizers import ByteTokenizer
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    pieces = [Piece(split, split, b"x" * (3 << 20)) for split in ("validation", "test", "train")]
    try:
        prepare(Listed(pieces), ByteTokenizer(), sys.argv[1])
    except ZooError as error:
        print(error)
""")


def test_a_full_disk_is_one_clear_line(tmp_path):
    """A limit on file sizes makes the system refuse the write, as a full disk does."""
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path, Path(__file__).parent], capture_output=True, text=True,
                          check=True)
    assert done.stdout.startswith("cannot write to ")
    assert "data.cache" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match="cannot write to"):
        prepare(Listed(), ByteTokenizer(), tmp_path / "file")


HELD = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from test_data_cache import Listed
    from zoo.data.cache import prepare
    from zoo.tokenizers import ByteTokenizer
    def slowly(done, total):
        print("holding", flush=True)
        time.sleep(1)
    prepare(Listed(), ByteTokenizer(), sys.argv[1], slowly)
""")


def test_a_second_process_waits_for_the_first(tmp_path, caplog):
    command = [sys.executable, "-c", HELD, tmp_path, Path(__file__).parent]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"holding\n"
        source, start = Listed(), time.monotonic()
        data = prepare(source, ByteTokenizer(), tmp_path)
    assert source.passes == 0  # the first one's work is used
    assert time.monotonic() - start > 0.5
    assert "waiting" in caplog.text
    assert data.bytes["train"] == 45


@pytest.mark.parametrize(("file", "change", "message"), [
    ("train.bin", lambda content: content[:-1], r"train\.bin is damaged \(46 bytes, expected 47\)"),
    ("train.bin", None, r"train\.bin"),
    ("manifest.json", lambda content: content[:50], r"manifest\.json is damaged"),
    ("manifest.json", lambda content: b"[]", r"manifest\.json is damaged"),
    ("manifest.json", lambda content: content.replace(b'"format": 1', b'"format": 9'), "format 9"),
])
def test_damage_is_named_with_the_way_out(tmp_path, file, change, message):
    folder = prepare(Listed(), ByteTokenizer(), tmp_path).folder
    path = folder / file
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    with pytest.raises(ZooError, match=message) as caught:
        open_cache(folder)
    assert f"delete the folder {folder}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hashes_are_checked_on_demand(tmp_path):
    folder = prepare(Listed(), ByteTokenizer(), tmp_path).folder
    content = bytearray((folder / "test.bin").read_bytes())
    content[3] ^= 1
    (folder / "test.bin").write_bytes(content)
    open_cache(folder)
    with pytest.raises(ZooError, match=r"test\.bin is damaged \(SHA-256"):
        open_cache(folder, verify=True)


def test_pickles_by_name(tmp_path):
    data = prepare(Listed([Piece(split, split, b"x" * 100_000) for split in Listed.splits]), ByteTokenizer(), tmp_path)
    assert len(data.train) == 100_001
    assert len(pickle.dumps(data)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(data)).train, data.train)


def test_memory_does_not_grow_with_the_text(tmp_path):
    """48 MiB through a process that may hold 24 MiB more than before it began."""
    code = textwrap.dedent("""
        import resource, sys
        sys.path.insert(0, sys.argv[2])
        from zoo.data.sources import Piece
        from test_data_cache import Listed
        from zoo.data.cache import prepare
        from zoo.tokenizers import ByteTokenizer
        class Long(Listed):
            def __iter__(self):
                for index in range(48):
                    yield Piece(self.splits[index % 3], str(index), b"text " * ((1 << 20) // 5))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prepare(Long(), ByteTokenizer(), sys.argv[1])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    done = subprocess.run([sys.executable, "-c", code, tmp_path, Path(__file__).parent], capture_output=True, text=True,
                          check=True)
    assert int(done.stdout) < 24 << 10


def test_baselines(tmp_path, bpe):
    """Both are of the text alone, whatever the tokens are."""
    text = b"aabbbbcccccccc" * 20_000
    pieces = [Piece("train", "a", b"x"), Piece("validation", "b", text), Piece("test", "c", b"zzzz")]
    share = np.array([2, 4, 8]) / 14
    for tokenizer in (ByteTokenizer(), bpe):
        data = prepare(Listed(pieces), tokenizer, tmp_path)
        assert unigram_entropy(data) == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-12)
        assert unigram_entropy(data, "test") == 0
        packer = zlib.compressobj(9, zlib.DEFLATED, wbits=31)
        packed = len(packer.compress(text) + packer.flush())
        assert gzip_bits(data) == pytest.approx(8 * packed / len(text), rel=0.02)
    source = Listed(pieces[:2])
    source.splits = ("train", "validation")
    with pytest.raises(ZooError, match="no text in its test split"):
        unigram_entropy(prepare(source, ByteTokenizer(), tmp_path), "test")
