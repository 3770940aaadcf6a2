"""`zoo generate`: prompts from files, states, windows, a conversation; and how it fails."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, tiny

import zoo
from zoo.cli import main
from zoo.decoding import narrowed
from zoo.generation import Context
from zoo.pretrained import save_pretrained
from zoo.tokenizers import ByteTokenizer

GREEDY = "--temperature", "0", "--max-tokens", "12"
HOW: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model that reads 60 tokens at most."""
    model = tiny(Case("aft", ()), vocab_size=256, seq_len=60, scramble=True)
    return str(save_pretrained(tmp_path / "model", model, ByteTokenizer(), {}))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def call(*arguments: object, typed: bytes = b"") -> tuple[int, str, str]:
        """-> (exit status, stdout, stderr)"""
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        with pytest.raises(SystemExit) as stop:
            main(["generate", *map(str, arguments)])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


def test_prompts_from_files_are_read_as_they_are(run, folder: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("Käse\r\n".encode())
    model = zoo.load_pretrained(folder)
    first, second = zoo.generate(model, ["a", "Käse\r\n"], **HOW)
    status, out, err = run(folder, "--prompt-file", tmp_path / "p.txt", "--prompt", "a", *GREEDY)
    assert (status, out, err) == (0, f"a{first}\n---\nKäse\r\n{second}\n", "")


def test_every_option_reaches_the_function(run, folder: str) -> None:
    how = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.3, "repetition_penalty": 1.3, "max_tokens": 30,
           "seed": 4}
    options = [part for key, value in how.items() for part in (f"--{key.replace('_', '-')}", value)]
    text = zoo.generate(zoo.load_pretrained(folder), "a", **how)
    assert run(folder, "--prompt", "a", *options) == (0, f"a{text}\n", "")
    plain = {"temperature": 1.0, "top_k": 256, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}
    for key, value in plain.items():  # none of them is without effect here
        assert zoo.generate(zoo.load_pretrained(folder), "a", **how | {key: value}) != text, key
    stop = text[7:9]
    assert run(folder, "--prompt", "a", *options, "--stop", stop, "--stop", "no such text") == (
        0, f"a{text.partition(stop)[0]}\n", "")


def test_weights_may_be_narrow(run, folder: str, tmp_path: Path) -> None:
    narrow = narrowed(zoo.load_pretrained(folder), torch.bfloat16)
    text = zoo.generate(narrow, "a", **HOW)
    state = tmp_path / "n.state"
    assert run(folder, "--prompt", "a", "--dtype", "bfloat16", "--save-state", state, *GREEDY) == (0, f"a{text}\n", "")
    assert ByteTokenizer().decode(Context.load(state, narrow).tokens) == f"a{text}"
    status, _, err = run(folder, "--state", state, *GREEDY)
    assert status == 2
    assert "n.state belongs to another model: aft, bfloat16" in err


def test_a_prefix_is_read_once_and_gone_on_with(run, folder: str, tmp_path: Path) -> None:
    model, state = zoo.load_pretrained(folder), tmp_path / "a.state"
    assert run(folder, "--prompt", "Once ", "--max-tokens", 0, "--save-state", state) == (0, "Once \n", "")
    whole = zoo.generate(model, ["Once a", "Once b"], **HOW)
    assert run(folder, "--state", state, "--prompt", "a", "--prompt", "b", *GREEDY) == (
        0, f"a{whole[0]}\n---\nb{whole[1]}\n", "")
    # an answer that is saved with it is gone on with, too, without a further prompt
    assert run(folder, "--state", state, "--save-state", state, "--prompt", "a", *GREEDY)[1] == f"a{whole[0]}\n"
    longer = zoo.generate(model, "Once a", temperature=0, max_tokens=24)
    assert run(folder, "--state", state, *GREEDY) == (0, longer.removeprefix(whole[0]) + "\n", "")


def test_a_window_is_said_on_stderr(run, folder: str) -> None:
    status, out, err = run(folder, "--prompt", "x" * 70, "--window", *GREEDY)
    assert (status, out.startswith("x" * 70)) == (0, True)
    assert err == ("prompt 1: the first 22 of 71 tokens are left out; this aft reads 60, 12 are for what it writes\n")


def test_lines_are_continued_one_after_the_other(run, folder: str, tmp_path: Path) -> None:
    context, expected = Context(zoo.load_pretrained(folder)), []
    context.read("Hm")
    for line in ("\none\n", "two\n"):
        expected.append(context.write(line, stop="\n", temperature=0, max_tokens=12) + "\n")
        context.read("\n")  # the model has read what the terminal shows
    answer = run(folder, "--interactive", "--prompt", "Hm", *GREEDY, "--stop", "\n", "--save-state",
                 tmp_path / "c.state", typed=b"one\ntwo")
    assert answer == (0, "".join(expected), "")
    saved = Context.load(tmp_path / "c.state", context.model)
    assert [*saved.tokens, ord("\n")] == context.tokens  # that line end is read before the next line


def test_a_conversation_may_slide_in_its_window(run, folder: str) -> None:
    typed = b"0123456789abcdef\n" * 5
    status, out, err = run(folder, "--interactive", *GREEDY, typed=typed)
    assert (status, out != "") == (2, True)
    assert err == "error: a prompt of 78 tokens and 12 more are past the limit of this aft: at most 60\n"
    status, out, err = run(folder, "--interactive", "--window", *GREEDY, typed=typed)
    assert status == 0
    assert err.count("tokens are left out") == err.count("\n") >= 2


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_session(tmp_path: Path) -> None:
    """In a terminal of its own, with the state saved at the end."""
    model = tiny(Case("rwkv", ()), vocab_size=256, scramble=True)
    save_pretrained(tmp_path / "model", model, ByteTokenizer(), {})
    terminal, inside = pty.openpty()
    code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from zoo.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", tmp_path / "model", "--interactive", "--max-tokens", "100000000",
               "--save-state", tmp_path / "s.state"]
    child = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(inside)

    def read_until(wanted: bytes, pressing: bytes = b"") -> None:
        got, until = b"", time.monotonic() + 100
        os.write(terminal, pressing)
        while wanted not in got:
            assert time.monotonic() < until, got
            if select.select([terminal], [], [], 5)[0]:
                got += os.read(terminal, 4096)
            else:
                os.write(terminal, pressing)

    with child:
        read_until(b"> ")
        # Nothing to stop: another line. Pressed again after a silence, as `input` misses a signal just before it waits.
        read_until(b"> ", pressing=b"\x03")
        os.write(terminal, b"first\n")
        read_until(b"first\r\n")
        assert select.select([terminal], [], [], 100)[0]  # it writes
        os.write(terminal, b"\x03")
        read_until(b"\n> ")
        os.write(terminal, b"\x04")
        with suppress(OSError):  # how Linux says that the other side is gone
            while os.read(terminal, 4096):
                pass
        assert child.wait() == 0
    os.close(terminal)
    context = Context.load(tmp_path / "s.state", zoo.load_pretrained(tmp_path / "model"))
    assert context.tokens[:7] == [0, *b"first\n"]
    assert len(context.tokens) > 7


@pytest.mark.parametrize(("arguments", "message"), [
    (["MODEL", "--stop", ""], "a stop string is empty; allowed: one or more characters"),
    (["MODEL", "--stop", "", "--interactive"], "a stop string is empty"),
    (["MODEL", "--repetition-penalty", "-1"], "repetition_penalty=-1.0 is not allowed: above 0"),
    (["MODEL", "--min-p", "1.5"], "min_p=1.5 is not allowed: 0 to 1"),
    (["MODEL", "--temperature", "-1"], "temperature=-1.0 is not allowed"),
    (["MODEL", "--max-tokens", "-1"], "max_tokens=-1 is not allowed: 0 or above"),
    (["MODEL", "--seed", "-1"], "seed=-1 is not allowed"),
    (["MODEL", "--dtype", "int8"], "unknown dtype 'int8'; allowed: bfloat16, float16, float32"),
    (["MODEL", "--prompt", "x" * 70], "a prompt of 71 tokens and 1 more are past the limit of this aft: at most 60"),
    (["MODEL", "--prompt-file", "none.txt"], "cannot read none.txt: No such file or directory"),
    (["MODEL", "--prompt-file", "latin.txt"], "latin.txt is not text in UTF-8: invalid continuation byte at byte 1"),
    (["MODEL", "--prompt-file", "nul.txt"], "the text holds a NUL byte"),
    (["MODEL", "--state", "none.state"], "cannot read none.state: No such file or directory"),
    (["MODEL", "--state", "latin.txt"], "latin.txt is not a whole safetensors file"),
    (["MODEL", "--state", "other.state"], "other.state belongs to another model: rwkv, float32"),
    (["MODEL", "--save-state", "none/a.state"], "cannot write none/a.state: no such folder"),
    (["MODEL", "--save-state", "a", "--prompt", "a", "--prompt", "b"], "2 prompts are not allowed with"),
    (["MODEL", "--interactive", "--prompt", "a", "--prompt", "b"], "2 prompts are not allowed with"),
])
def test_errors_are_one_line_and_status_2(run, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("Käse".encode("latin-1"))
    Path("nul.txt").write_bytes(b"a\0b")
    Context(tiny(Case("rwkv", ()), vocab_size=256), ByteTokenizer()).save("other.state")
    status, out, err = run(*(folder if part == "MODEL" else part for part in arguments), typed=b"a line\n")
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert (err.count("\n"), out) == (1, "")


def test_what_the_docs_say_runs(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "generation.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if kind == "python":
            exec(block, names)
        else:
            for line in block.splitlines():
                command, subcommand, *arguments = shlex.split(line)
                assert (command, subcommand) == ("zoo", "generate")
                status, out, err = run(*arguments)
                assert (status, out != "", err) == (0, True, ""), line
    assert names["text"]
    assert re.findall(r"^    zoo generate (.*)$", page, re.MULTILINE) == ["rwkv.novels-6m --interactive"]


def test_a_line_that_is_no_text_is_refused(run, folder: str) -> None:
    status, out, err = run(folder, "--interactive", *GREEDY, typed=b"\xff\n")
    assert (status, out) == (2, "")
    assert err == "error: the input is not text in UTF-8: invalid start byte\n"
