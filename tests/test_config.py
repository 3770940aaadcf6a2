"""Configuration: every yaml that is there composes and makes sense, and what makes no sense is refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

import zoo.mixers
from zoo.data.load import SOURCES
from zoo.errors import ZooError
from zoo.sizing import SIZES
from zoo.training.config import Config, Hardware, Logging, Optim, SizeChoice, check_resumable
from zoo.training.schedules import SCHEDULES
from zoo.training.sweep import job_folder

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
OPTIONS = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml") if file.parent.name != "rates")
MODELS = [name for group, name in OPTIONS if group == "model"]


@pytest.fixture(scope="module", autouse=True)
def composing() -> Iterator[None]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def compose(*overrides: str) -> Config:
    composed = hydra.compose("train", list(overrides))
    if "rates" in composed:  # a table for experiments, of what was measured: until then it holds words, and is refused
        rates = composed["rates"]
        assert set(rates) == set(zoo.mixers.list_mixers())
        for name, rate in rates.items():
            if not isinstance(rate, float):
                assert "not measured" in rate
                rates[name] = 1e-3
    values: Any = OmegaConf.to_container(composed, resolve=True)
    values.pop("rates", None)
    return Config.from_dict(values)


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=["=".join(option) for option in OPTIONS])
def test_every_yaml_composes(group: str, name: str) -> None:
    config = compose(f"{group}={name}")
    config.lr_schedule()
    config.model_config(256)
    assert Config.from_dict(config.to_dict()) == config
    if group in ("data", "tokenizer", "schedule"):
        assert getattr(config, group)["name"] == name


def test_yamls_and_code_name_the_same_things() -> None:
    listed = {group: {name for g, name in OPTIONS if g == group} for group, _ in OPTIONS}
    # A mixer may have more yamls than that of its name, with other options.
    assert {compose(f"model={name}").model["name"] for name in MODELS} == set(zoo.mixers.list_mixers())
    assert listed["model"] >= set(zoo.mixers.list_mixers())
    assert listed["size"] == set(SIZES)
    assert listed["schedule"] == set(SCHEDULES)
    assert listed["data"] == set(SOURCES)


def test_yamls_and_dataclasses_have_the_same_defaults() -> None:
    config = compose("model=transformer")
    assert config.optim == Optim()
    assert config.trainer == Hardware()
    assert config.size == SizeChoice()
    plain = Config(model=config.model, data=config.data, tokenizer=config.tokenizer, schedule=config.schedule)
    assert plain == config
    for group, cls in (("trainer", Hardware), ("optim", Optim), ("size", SizeChoice)):
        for file in (CONF / group).glob("*.yaml"):
            assert OmegaConf.load(file).keys() == asdict(cls()).keys(), file
    assert compose("logger=wandb").logger == Logging(name="wandb")
    for name in SCHEDULES:
        options = {key: value for key, value in compose(f"schedule={name}").schedule.items() if key != "name"}
        assert options == SCHEDULES[name].__kwdefaults__


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", sorted(SIZES))
def test_every_model_has_every_size(model: str, size: str) -> None:
    shapes = compose(f"model={model}", f"size={size}").model_config(256)
    assert (shapes.layers, shapes.dim, shapes.heads) == (SIZES[size].layers, SIZES[size].dim, SIZES[size].heads)


def test_size_overrides_replace_single_numbers() -> None:
    shapes = compose("model=transformer", "size=nano", "size.layers=1", "size.heads=8").model_config(256)
    assert (shapes.layers, shapes.dim, shapes.heads) == (1, 128, 8)


def test_model_options_reach_the_mixer() -> None:
    assert compose("model=transformer", "model.kv_heads=2").model_config(256).options["kv_heads"] == 2


def check(override: str) -> None:
    config = compose(override) if override == "~model" else compose("model=transformer", override)
    config.lr_schedule()
    config.model_config(256)


@pytest.mark.parametrize(("override", "words"), [
    ("steps=0", "steps=0 1 or above"),
    ("steps=many", "steps='many' whole number"),
    ("steps=1.5", "steps=1.5 whole number"),
    ("steps=true", "steps=True whole number"),
    ("optim.lr=-1", "optim.lr above 0"),
    ("optim.lr=fast", "optim.lr number"),
    *((f"optim.{key}={value}", f"optim.{key}={value} finite") for value in ("nan", "inf")
      for key in ("lr", "weight_decay", "eps", "clip")),
    ("optim.betas=[0.9]", "optim.betas"),
    ("optim.name=sgd", "optim.name adamw"),
    ("batch_tokens=1000", "batch_tokens=1000 seq_len=256 768, 1024"),
    ("batch_tokens=100", "batch_tokens=100 256"),
    ("seq_len=0", "seq_len 1 or above"),
    ("trainer.precision=bf16-true", "trainer.precision 'bf16-true' 32-true, bf16-mixed"),
    ("trainer.precision=16-mixed", "trainer.precision 32-true"),
    ("trainer.precision=float8", "trainer.precision 32-true"),
    ("trainer.micro_batch=100", "micro_batch=100 seq_len"),
    ("trainer.strategy=deepspeed", "trainer.strategy ddp, fsdp, single"),
    ("trainer.compile=maybe", "trainer.compile true or false"),
    ("seed=-1", "seed"),
    ("backend=cuda", "unknown backend 'cuda' auto, eager, triton"),
    ("+nonsense=1", "unknown key nonsense allowed"),
    ("+optim.momentum=0.9", "unknown key optim.momentum optim.betas"),
    ("size.name=huge", "unknown size 'huge' nano"),
    ("size.heads=3", "heads=3 dim=128 1, 2, 4, 8"),
    ("size.layers=0", "size.layers 1 or above"),
    ("dropout=1.0", "dropout"),
    ("+model.window=3", "window kv_heads"),
    ("model.name=mamba", "unknown model 'mamba' transformer"),
    ("schedule.warmup=3", "schedule.warmup fraction"),
    ("logger.name=mlflow", "csv, tensorboard, wandb"),
    ("~model", "no model is chosen model=NAME"),
])
def test_wrong_values_are_refused_in_one_line(override: str, words: str) -> None:
    with pytest.raises(ZooError) as caught:
        check(override)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word.strip(",") in message for word in words.split()), message


@pytest.mark.parametrize(("change", "key"), [
    ("model=linformer", "model."), ("size=small", "size.name"), ("seq_len=128", "seq_len"), ("seed=2", "seed"),
    ("batch_tokens=4096", "batch_tokens"), ("optim.lr=1e-4", "optim.lr"), ("optim.clip=null", "optim.clip"),
    ("dropout=0.5", "dropout"), ("schedule=linear", "schedule."), ("schedule.final=0.5", "schedule.final"),
    ("debug=overfit", "debug.overfit"),
])
def test_a_resume_that_contradicts_is_refused(change: str, key: str) -> None:
    saved = compose("model=transformer").to_dict()
    with pytest.raises(ZooError) as caught:
        check_resumable(saved, compose("model=transformer", change).to_dict(), "run.ckpt")
    assert f": {key}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    "steps=9", "out=elsewhere", "resume=auto", "log_every=3", "validate_every=3", "save_every=3", "sample_every=3",
    "sample_tokens=3", "prompt=Once", "backend=eager", "trainer=ddp", "trainer.micro_batch=256", "logger=wandb",
    "debug.profile=3", "data.cache=elsewhere",
])
def test_what_may_change_on_resume(change: str) -> None:
    base = compose("model=transformer")
    check_resumable(base.to_dict(), compose("model=transformer", change).to_dict(), "run.ckpt")


def test_default_out_does_not_depend_on_the_moment() -> None:
    config = compose("model=transformer", "size=small", "seed=7")
    assert config.default_out() == "runs/transformer-small-stdlib-seed7"


def test_jobs_of_a_sweep_have_folders_of_their_own() -> None:
    jobs = [[f"model={model}", f"seed={seed}", "steps=5"] for model in ("rwkv", "aft") for seed in (1, 2)]
    folders = [job_folder("runs/sweep", job) for job in jobs]
    assert len(set(folders)) == 4
    assert folders[0] == "runs/sweep/model=rwkv,seed=1"
    assert job_folder("runs/sweep", [*jobs[0], "resume=auto", "trainer=cpu", "out=x", "steps=9"]) == folders[0]
    # What a sweep varies is in the name all the same.
    assert job_folder("runs/sweep", ["seed=1", "steps=5", "+swept=[steps]"], ["steps"]) == "runs/sweep/seed=1,steps=5"
    # Paths, and names longer than a file's, stay inside the root and apart.
    a, b = (job_folder("root", [f"data.path=/{letter * 300}/../x"]) for letter in "ab")
    assert a != b
    assert Path(a).parent == Path(b).parent == Path("root")
    assert len(Path(a).name) < 200
    assert job_folder("root", ["data.path=a/b"]) != job_folder("root", ["data.path=a_b"])


# The command, in this process


@pytest.mark.parametrize(("words", "expected"), [
    (["model=mamba"], "error: unknown model 'mamba'; allowed: "),
    (["size=huge"], "error: unknown size 'huge'; allowed: base, medium, nano, small"),
    (["data=internet"], "error: unknown data 'internet'; allowed: "),
    (["schedule=step"], "error: unknown schedule 'step'; allowed: cosine, linear, wsd"),
    (["stepss=5"], "error: unknown key stepss; allowed: backend, batch_tokens, "),
    (["schedule=wsd", "schedule.foo=1"], "error: unknown key schedule.foo; allowed: schedule.decay, "),
    (["steps=["], "error: "),
    (["size=5"], "error: Config group override must be a string or a list. Got int"),
    (["--steps", "5"], "error: unrecognized arguments: --steps"),
    (["data=text", "data.path=2024"], "error: data.path=2024 is not text; allowed: text, a number as ./2024"),
    (["model=transformer", "steps=0"], "error: steps=0 is not allowed: 1 or above"),
    (["model=transformer", "size.heads=3"], "error: heads=3 does not divide dim=128; allowed: 1, 2, 4, "),
    (["model=transformer", "trainer=ddp", "trainer.accelerator=cpu"],
     "error: trainer.strategy=ddp is started by torchrun"),
    (["model=transformer", "trainer.devices=2"], "error: trainer.strategy=single is one process"),
    (["model=transformer", "resume=nowhere.ckpt"], "error: no checkpoint at nowhere.ckpt"),
    (["model=transformer", "data=text", "data.path=nowhere"], "error: "),
    (["model=transformer", "data=text", "data.path=empty"], "error: "),
    (["model=transformer", "data=text", "data.path=binary"], "error: "),
    (["model=transformer", "data=text", "data.path=short"], "error: the text for "),
    (["model=transformer", "data=text", "data.path=short", "out=short"], "error: out=short is a file"),
    (["-m", "model=transformer,mamba"], "error: unknown model 'mamba'; allowed: "),
])
def test_mistakes_exit_with_2_and_leave_nothing(
        command: ModuleType, words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("empty", b""), ("binary", bytes(range(256)) * 40), ("short", b"a few words\n" * 3)):
        (tmp_path / name).write_bytes(content)
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", ["train.py", *words, *(["data.cache=cache"] if "data=text" in words else [])])
    hydra.core.global_hydra.GlobalHydra.instance().clear()
    assert command.main() == 2
    _, err = capsys.readouterr()
    assert err.startswith(expected), err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/*/config.json"))
    left = {path.name for path in tmp_path.iterdir()} - before - {"cache"}
    assert left <= ({"runs"} if "-m" in words else set())
