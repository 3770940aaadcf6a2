"""Sweeps: each job has a folder of its own, and one that fails harms no other."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import hydra
import pytest
from omegaconf import OmegaConf
from training_runs import ROOT, config, train, words, write_corpus
from training_runs import command as start

import zoo
from zoo.errors import ZooError
from zoo.training.loggers import read_rows
from zoo.training.sweep import finished


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_sweep_with_a_job_that_fails(command: ModuleType, corpus: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["train.py", "-m", *words(corpus, None, steps=2, sample_tokens=0)]
    base = [word for word in base if not word.startswith(("seed=", "dropout="))]
    monkeypatch.setattr(sys, "argv", [*base, "seed=1,2", "dropout=1.5,0.0"])
    assert command.main() == 2
    _, err = capsys.readouterr()
    folders = sorted(path.parent for path in tmp_path.glob("runs/sweep/*/config.json"))
    assert sorted(json.loads((folder / "config.json").read_text())["seed"] for folder in folders) == [1, 2]
    assert all("dropout=0.0" in folder.name for folder in folders)
    assert not any("corpus" in folder.name for folder in folders)  # paths are in the digest alone
    for folder in folders:
        assert [row["step"] for row in read_rows(folder / "metrics.csv")] == ["1", "2"]
        assert zoo.load_pretrained(folder).card["step"] == 2
    lines = err.splitlines()
    assert len(lines) == 3  # a line for each failed job, and the last one for the sweep
    assert all(line.startswith("error: ") and "dropout=1.5" in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]

    # The same sweep goes on where it stopped, with more steps.
    base.remove("steps=2")
    monkeypatch.setattr(sys, "argv", [*base, "seed=1,2", "dropout=0.0", "steps=4", "resume=auto"])
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    assert command.main() == 0
    assert sorted(path.parent for path in tmp_path.glob("runs/sweep/*/config.json")) == folders
    for folder in folders:
        assert [row["step"] for row in read_rows(folder / "metrics.csv")] == ["1", "2", "3", "4"]


def test_a_sweep_passes_over_what_is_finished(command: ModuleType, corpus: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """With neither weights nor checkpoints left, without reading the text; what is not finished goes on."""
    monkeypatch.chdir(tmp_path)
    base = [word for word in words(corpus, None, steps=2, sample_tokens=0) if not word.startswith("seed=")]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *base, "seed=1,2", "resume=auto"])
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    assert command.main() == 0
    one, two = sorted(path.parent for path in tmp_path.glob("runs/sweep/*/config.json"))
    (one / "model" / "model.safetensors").unlink()
    for path in (one / "checkpoints").iterdir():
        path.unlink()
    (two / "model" / "card.json").unlink()
    before = (one / "run.json").read_bytes()
    capsys.readouterr()
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    assert command.main() == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("finished before")] == [
        f"finished before: {one.relative_to(tmp_path)}"]
    assert (one / "run.json").read_bytes() == before
    assert (two / "model" / "card.json").is_file()


def test_a_finished_job_is_known_by_its_whole_configuration(corpus: Path, tmp_path: Path) -> None:
    given = config(corpus, tmp_path / "run", steps=2, sample_tokens=0, resume="auto")
    assert finished(given) is None
    result = train(given)
    passed = finished(given)
    assert passed is not None
    assert passed == {key: result[key] for key in passed} | {"seconds": round(result["seconds"], 3)}
    assert finished(given | {"steps": 3}) is None
    assert finished(given | {"resume": None}) is None
    assert finished(given | {"data": given["data"] | {"test_fraction": 0.1}}) is None
    with pytest.raises(ZooError, match=r"dropout is 0\.1 there and 0\.2 here"):
        finished(given | {"dropout": 0.2})


EXPERIMENTS = "head_to_head", "head_to_head_base", "head_to_head_grid"
FREE = {"model", "optim", "seed", "size", "steps", "sample_tokens"}  # what may differ among jobs of the comparison


def test_every_job_of_the_comparison_is_trained_alike() -> None:
    """Their sweeps as they are written, composed for each architecture."""
    shared = []
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for experiment in EXPERIMENTS:
            whole = hydra.compose("train", [f"experiment={experiment}"], return_hydra_config=True)
            params = whole.hydra.sweeper.params
            assert sorted(params.model.split(",")) == zoo.list_models()
            assert str(params.seed).split(",") == (["1", "2", "3"] if experiment == "head_to_head" else ["1"])
            assert whole.hydra.sweep.dir == f"runs/{experiment}"
            assert set(whole.rates) == set(zoo.list_models())
            for model in zoo.list_models():
                values = OmegaConf.to_container(hydra.compose("train", [f"experiment={experiment}", f"model={model}"]))
                assert values["size"]["name"] == ("base" if experiment.endswith("base") else "small")
                assert values["resume"] == "auto"
                rate = values["optim"].pop("lr")
                assert rate == (2e-3 if experiment.endswith("grid") else "${rates.${model.name}}")
                shared.append({key: value for key, value in values.items() if key not in FREE - {"optim"}})
    assert all(one == shared[0] for one in shared)


def test_a_rate_that_was_not_measured_is_refused(command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """Of the grid's table a model gets its own number, and without one its run is not begun."""
    monkeypatch.chdir(tmp_path)
    base = ["train.py", "experiment=head_to_head", "trainer=cpu", "model=rwkv"]
    for rate, error in (("not measured yet", "optim.lr='not measured yet' is not a number"),
                        ("2e-3", "data.path=./nowhere")):
        hydra.core.global_hydra.GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [*base, f"rates.rwkv={rate}", "data.path=./nowhere"])
        assert command.main() == 2
        assert error in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sweep_over_steps(command: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps may change on resume and are left out of folders' names, but not where they are what is varied."""
    monkeypatch.chdir(tmp_path)
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    base = [word for word in words(corpus, None, sample_tokens=0) if not word.startswith("steps=")]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *base, "steps=1,2"])
    assert command.main() == 0
    done = [json.loads(path.read_text())["steps"] for path in tmp_path.glob("runs/sweep/*/config.json")]
    assert sorted(done) == [1, 2]


def test_a_reader_that_leaves_ends_a_run_without_a_traceback(corpus: Path, tmp_path: Path) -> None:
    for given in (["--help"], words(corpus, tmp_path / "run", steps=3)):
        process = start(*given, cwd=tmp_path)
        process.stdout.close()
        process.wait(timeout=120)
        assert process.stderr.read() == ""
        assert process.returncode == 141


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "submitit_slurm"])
def test_launchers_can_be_chosen(launcher: str) -> None:
    package = f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (the extra `sweep` brings it)")
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = hydra.compose("train", ["model=transformer", f"hydra/launcher={launcher}"], return_hydra_config=True)
    assert launcher.partition("_")[0] in composed.hydra.launcher._target_
    assert composed.hydra.output_subdir is None


def test_jobs_run_side_by_side_with_joblib(corpus: Path, tmp_path: Path) -> None:
    """In worker processes, where nothing of this one's state is known; and a job that fails there is heard of here."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra `sweep` brings it")
    base = [word for word in words(corpus, None, steps=1, sample_tokens=0) if not word.startswith("dropout=")]
    process = start("-m", *base, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "dropout=0.0,0.1,1.5",
                      cwd=tmp_path)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert err.count("\n") == err.count("error: ") == 2, err
    assert err.endswith("error: dropout=1.5 is not in [0, 1)\n")
    folders = [path.parent for path in tmp_path.glob("runs/sweep/*/config.json")]
    assert sorted(json.loads((folder / "config.json").read_text())["dropout"] for folder in folders) == [0.0, 0.1]
    assert all(zoo.load_pretrained(folder).card["step"] == 1 for folder in folders)


def test_warnings_get_through_hydras_logging(command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """What the data layer warns of is said in every job: Hydra's own logging would silence it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "enwik8").write_text("<page> The text of a page is here. </page>\n" * 300)
    for job in ("first", "second"):
        hydra.core.global_hydra.GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["train.py", "data=enwik8", "data.path=enwik8", f"data.cache={job}", "steps=1",
                                          "size.dim=32", "size.heads=2", "batch_tokens=64", "seq_len=32",
                                          "sample_tokens=0", f"out={job}-run"])
        assert command.main() == 0
        assert "bytes, not 100000000" in capsys.readouterr().err, job
