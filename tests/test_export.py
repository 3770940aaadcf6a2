"""A model out of a run: the newest or the best checkpoint, whole or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo import ZooError
from zoo.cli import main
from zoo.export import export_run
from zoo.export_hf import export_hf
from zoo.pretrained import read_json
from zoo.training.run import train

TEXT = "the cat sat on the mat, the dog on the log, and the hen on the pen.\n"


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text(TEXT * 200)
    return {
        "model": {"name": "transformer"}, "size": {"name": "nano", "layers": 1, "dim": 32, "heads": 2},
        "data": {"name": "text", "path": str(text), "cache": str(folder / "cache")}, "tokenizer": {"name": "bytes"},
        "schedule": {"name": "cosine"}, "steps": 4, "batch_tokens": 64, "seq_len": 32, "save_every": 2,
        "validate_every": 4, "sample_tokens": 0, "out": str(folder / "run"),
    } | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    train(config(folder, tokenizer={"name": "bpe", "vocab_size": 270}))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The run as if it had been killed before its end: checkpoints, but no model."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_what_is_exported_is_what_the_run_would_have_saved(finished: Path, run: Path, tmp_path: Path) -> None:
    expected = zoo.load_pretrained(finished)
    model = zoo.load_pretrained(export_run(run, tmp_path / "out"))
    tokens = torch.randint(270, (2, 30))
    assert torch.equal(model(tokens), expected(tokens))
    assert model.tokenizer.encode("the cat").tolist() == expected.tokenizer.encode("the cat").tolist()
    assert len(model.tokenizer.encode(TEXT)) < len(TEXT)
    shared = expected.card.keys() & model.card.keys()
    assert shared >= {"step", "tokens", "seconds", "training", "command", "commit", "validation_bits_per_byte"}
    for key in shared - {"data"}:
        assert model.card[key] == expected.card[key], key
    assert model.card["data"]["fingerprint"] == expected.card["data"]["fingerprint"]


def test_best_and_last_and_half_precision(run: Path, tmp_path: Path) -> None:
    last, earlier = sorted(run.glob("checkpoints/step-*.ckpt"))[::-1][:2]
    shutil.copy(earlier, run / "checkpoints" / "best.ckpt")
    folders = [export_run(run, tmp_path / which, which=which, dtype=torch.bfloat16) for which in ("last", "best")]
    models = [zoo.load_pretrained(folder) for folder in folders]
    assert [model.card["step"] for model in models] == [4, 2]
    assert models[0].card["validation_bits_per_byte"] > 0
    assert "validation_bits_per_byte" not in models[1].card  # nothing was measured at that step
    assert not torch.equal(models[0].head.weight, models[1].head.weight)
    assert torch.equal(models[0].head.weight, models[0].head.weight.bfloat16().float())
    last.write_bytes(last.read_bytes()[:-1000])
    complaints: list[str] = []
    fallen_back = zoo.load_pretrained(export_run(run, tmp_path / "back", complain=complaints.append))
    assert fallen_back.card["step"] == 2
    assert str(last) in complaints[0]


def test_for_transformers(finished: Path, run: Path, tmp_path: Path) -> None:
    """Of a finished run what it saved, else a checkpoint; of a saved model its own dtype, or the one asked for."""
    expected = zoo.load_pretrained(finished)
    whole = zoo.load_pretrained(export_hf(finished, tmp_path / "whole"))
    assert "evaluation" in whole.card
    assert whole.card.keys() == expected.card.keys()
    checkpoint = zoo.load_pretrained(export_hf(run, tmp_path / "checkpoint"))
    assert "evaluation" not in checkpoint.card
    tokens = torch.randint(270, (2, 30))
    for model in (whole, checkpoint):
        assert torch.equal(model(tokens), expected(tokens))
        assert model.tokenizer.encode("the cat").tolist() == expected.tokenizer.encode("the cat").tolist()
    shutil.copy(min(run.glob("checkpoints/step-*.ckpt")), run / "checkpoints" / "best.ckpt")
    assert zoo.load_pretrained(export_hf(run, tmp_path / "best", which="best")).card["step"] < 4
    half = export_run(run, tmp_path / "half", dtype=torch.bfloat16)
    for dtype, stored in ((None, "bfloat16"), (torch.float32, "float32")):
        config = read_json(export_hf(half, tmp_path / stored, dtype=dtype) / "config.json")
        assert config["zoo"]["weights"]["dtype"] == stored
    again = export_hf(tmp_path / "bfloat16", tmp_path / "again")
    assert zoo.load_pretrained(again).card == zoo.load_pretrained(half).card


@pytest.mark.parametrize(("arguments", "message"), [
    (["RUN", "OUT", "--to", "onnx"], "unknown reader 'onnx'; allowed: hf, zoo"),
    (["RUN", "hf://a/b", "--to", "zoo"], "unknown reader 'zoo'; allowed: hf"),
    (["RUN", "hf://a"], "'hf://a' is no address of a model; allowed: hf://OWNER/NAME"),
    (["RUN", "OUT", "--public"], "--public is of an upload; allowed with hf://OWNER/NAME"),
    (["RUN", "OUT", "--to", "hf", "--publish", "words"], "--publish makes a folder of the zoo's own"),
    (["no.such-model", "OUT", "--to", "hf"], "unknown saved model (and no folder of that name) 'no.such-model'"),
    (["RUN", "OUT", "--to", "hf", "--dtype", "int8"], "unknown dtype 'int8'"),
    (["RUN", "OUT", "--to", "hf", "--which", "first"], "unknown checkpoint 'first'; allowed: best, last"),
    (["RUN", "RUN", "--to", "hf"], "is not a saved model alone: it is left as it is"),
])
def test_wrong_exports_are_one_line_and_status_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                 arguments: list[str], message: str) -> None:
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as stop:
        main(["export", *(places.get(argument, argument) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no such folder"):
        export_run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ZooError, match="no run's folder, or has saved nothing yet"):
        export_run(tmp_path, tmp_path / "out")
    with pytest.raises(ZooError, match="unknown checkpoint 'first'; allowed: best, last"):
        export_run(run, tmp_path / "out", which="first")
    with pytest.raises(ZooError, match="is not a saved model alone"):
        export_run(run, run)
    assert (run / "config.json").is_file()
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_other_data_is_not_taken_for_the_runs(run: Path, tmp_path: Path) -> None:
    from zoo.training import checkpoint

    path = max(run.glob("checkpoints/step-*.ckpt"))
    saved = checkpoint.load(path)
    text = tmp_path / "other.txt"
    text.write_text("nothing of a cat is in here, but much of whales.\n" * 200)
    saved["zoo"]["config"]["data"]["path"] = str(text)
    checkpoint.save(path.with_name("step-00000099.ckpt"), saved)
    with pytest.raises(ZooError, match="not what the run was trained on"):
        export_run(run, tmp_path / "out")
