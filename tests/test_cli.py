"""The `zoo` command: what it prints, and how it fails."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import Case, tiny

import zoo
from zoo.cli import main
from zoo.model import LanguageModel
from zoo.pretrained import save_pretrained
from zoo.tokenizers import ByteTokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> str:
    model = tiny(Case("transformer", ()), vocab_size=256, scramble=True)
    return str(save_pretrained(tmp_path / "model", model, ByteTokenizer(), {}))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str) -> tuple[int, str, str]:
        """-> (exit status, stdout, stderr)"""
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return call


def test_list_names_every_architecture_with_its_state(run) -> None:
    status, out, err = run("list")
    assert (status, err) == (0, "")
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    for name in zoo.list_models():
        assert "B" in rows[name].split("│")[-2]
    # small is 8 layers x 256: keys and values of 1024 tokens in float32 are 16 MiB, of 16384 tokens 256
    assert [cell.strip() for cell in rows["transformer"].split("│")[-3:-1]] == ["16.0 MiB", "256.0 MiB"]
    assert ", ".join(zoo.list_pretrained()) in out


def test_generate_writes_what_the_function_does(run, folder: str) -> None:
    how = {"max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "seed": 3}
    options = [part for key, value in how.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    prompts = ["a", "Once upon", ""]
    written = zoo.generate(zoo.load_pretrained(folder), prompts, **how)
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    assert run("generate", folder, *options, *given) == (
        0, f"a{written[0]}\n---\nOnce upon{written[1]}\n---\n{written[2]}\n", "")
    alone = zoo.generate(zoo.load_pretrained(folder), "", **how)
    assert run("generate", folder, *options) == (0, alone + "\n", "")


def test_doctor_tries_every_architecture(run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run("doctor")
    assert status == 0, out
    for word in ("python 3.", "torch 2.", "lightning 2.", "hydra-core 1.", "datasets", "wandb", "threads"):
        assert word in out
    for name in zoo.list_models():
        assert f"ok     {name} on cpu" in out
    assert out.endswith("training on a CPU works\n")

    loss = LanguageModel.loss
    monkeypatch.setattr(LanguageModel, "loss", lambda self, *args: loss(self, *args) * float("nan"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, out, _ = run("doctor")
    assert status == 1
    assert "FAILED transformer on cpu: ArithmeticError" in out
    assert "FAILED wandb" in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["lisst"], "No such command 'lisst'"),
    (["list", "--all"], "No such option: --all"),
    (["generate"], "Missing argument 'model'"),
    (["generate", "x", "--seed", "one"], "Invalid value for '--seed'"),
    (["generate", "no.such-model"], "unknown saved model"),
    (["generate", "../no-such-folder"], "no such folder: ../no-such-folder"),
    (["generate", "FOLDER", "--top-p", "2"], "top_p=2.0 is not allowed: above 0, at most 1"),
    (["generate", "FOLDER", "--prompt", "a\udcff"], "the text is not valid Unicode"),
    (["generate", "FOLDER", "--device", "tpu"], "unknown device 'tpu'; allowed: auto, cpu"),
    (["export", "../no-such-run", "OUT"], "no such folder: ../no-such-run"),
    (["bench", "train", "--models", "gpt"], "unknown model 'gpt'; allowed:"),
    (["bench", "train", "--size", "huge"], "unknown size 'huge'; allowed: base, medium, nano, small"),
    (["bench", "train", "--seq-len", "100", "--batch-tokens", "250"], "batch_tokens=250 is not allowed at seq_len=100"),
])
def test_errors_are_one_line_and_status_2(run, folder: str, arguments: list[str], message: str) -> None:
    status, out, err = run(*(folder if part == "FOLDER" else part for part in arguments))
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_file_that_cannot_be_written(run, tmp_path: Path) -> None:
    status, _, err = run("bench", "train", "--models", "transformer", "--seq-len", "8", "--batch-tokens", "8",
                         "--seconds", "0", "--csv", str(tmp_path / "none" / "t.csv"))
    assert status == 2
    assert f"error: cannot write {tmp_path}/none/t.csv: No such file or directory\n" in err


def test_ctrl_c_is_130_without_a_word(run, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "extend", interrupted)
    status, _, err = run("generate", folder)
    assert (status, err.strip()) == (130, "")


def test_help_is_quick() -> None:
    """PyTorch takes seconds to import; a word of help does not wait for it."""
    code = "import sys; import zoo.cli; sys.exit(any(m in sys.modules for m in ('torch', 'rich.console', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    done = subprocess.run([Path(sys.executable).with_name("zoo"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("list", "doctor", "generate", "eval", "recall", "export", "reproduce", "report", "bench"):
        assert f"  {command} " in done.stdout
    assert "...\n" not in done.stdout.partition("Commands:")[2]  # what each one does is said within a line


def test_a_terminal_that_is_not_utf8_shows_what_it_can(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="latin-1"))
    with pytest.raises(SystemExit) as stop:
        main(["generate", folder, "--prompt", "Käse 世", "--max-tokens", "1"])
    assert stop.value.code == 0
    assert shown.getvalue().startswith("Käse ?".encode("latin-1"))


def test_a_reader_that_leaves_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from zoo.cli import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (0, 1)
