"""`zoo report` on real runs of seconds: what it says is what they wrote, and what breaks a rule is refused."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import config, train, write_corpus
from unimportable import run_without

import zoo
from zoo.catalogue import state_bytes_of
from zoo.cli import main
from zoo.errors import ZooError
from zoo.report.contents import learning
from zoo.report.protocol import RULES, check
from zoo.report.ranking import Spread, at_cost, by_position, curve, labelled, rank
from zoo.report.runs import Refusal, Run, find_runs, read_run
from zoo.report.words import memory
from zoo.report.write import COLUMNS, write_report
from zoo.revision import shown_command
from zoo.training.metrics import read_rows

SIDES = [("transformer", 1, 3e-3), ("transformer", 2, 3e-3), ("transformer", 1, 1e-3), ("rwkv", 1, 3e-3),
         ("rwkv", 2, 3e-3)]
SMALL = {"validate_every": 3, "sample_tokens": 0, "save_every": 12}


def name_of(model: str, seed: int, rate: float) -> str:
    return f"{model}-{seed}-{rate:g}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("corpus"))
    (folder / "test.txt").write_text("This is what nobody looks at until the end. " * 9)
    return folder


def setting(corpus: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return config(corpus, out, **SMALL | {"data__test_path": str(corpus / "test.txt")} | changes)


@pytest.fixture(scope="module")
def trained(corpus: Path) -> Path:
    """A sweep's folder: two architectures, two seeds each, one of them at a second rate."""
    for side in SIDES:
        model, seed, rate = side
        train(setting(corpus, corpus / "sweep" / name_of(*side), model={"name": model}, seed=seed, optim__lr=rate))
    return corpus / "sweep"


@pytest.fixture
def sweep(trained: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(trained, tmp_path / "sweep", ignore=shutil.ignore_patterns("*.ckpt")))


@pytest.fixture(scope="module")
def runs(trained: Path) -> list[Run]:
    found = [read_run(name, folder) for name, folder in find_runs([trained]).items()]
    assert all(isinstance(run, Run) for run in found)
    return found  # type: ignore[return-value]


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, arguments)])
    return stop.value.code


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """The first table of each section of a report.md, a dict a row."""
    found = {}
    for section in text.split("\n## ")[1:]:
        if (start := section.find("\n| ")) >= 0:
            lines = [[cell.strip() for cell in line[1:-1].split(" | ")]
                     for line in section[start + 1:].partition("\n\n")[0].splitlines()]
            found[section.partition("\n")[0]] = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    return found


# What it says


def test_a_run_is_read_as_it_was_written(trained: Path, runs: list[Run]) -> None:
    assert sorted(run.name for run in runs) == sorted(name_of(*side) for side in SIDES)
    for run in runs:
        folder = trained / run.name
        model, rows = zoo.load_pretrained(folder), read_rows(folder / "metrics.csv")
        assert run.validation == model.card["validation_bits_per_byte"]
        assert run.test == model.card["test_bits_per_byte"]
        assert run.parameters == model.num_parameters()
        assert run.flops == pytest.approx(3 * model.flops(32) / 32, abs=1)
        assert [point.tokens for point in run.curve] == [384, 768, 1152, 1536]
        assert run.curve[-1].bits == pytest.approx(run.validation, rel=1e-6)
        assert run.curve[-1].seconds == pytest.approx(float(rows[-1]["seconds"]))
        assert run.seconds == pytest.approx(float(rows[-1]["seconds"]), rel=0.05, abs=0.01)
        assert run.peak_memory == max(int(row["peak_memory"]) for row in rows)
        assert name_of(run.model.model, run.seed, run.rate) == run.name
        assert run.positions[-1][0] == 32


def test_ranking_by_the_best_rate_on_validation(runs: list[Run]) -> None:
    entries = rank(runs)
    by_name = {run.name: run.validation for run in runs}
    assert [entry.validation.mean for entry in entries] == sorted(entry.validation.mean for entry in entries)
    found = {entry.label: entry for entry in entries}
    assert found.keys() == {"transformer", "rwkv"}
    means = {3e-3: (by_name["transformer-1-0.003"] + by_name["transformer-2-0.003"]) / 2,
             1e-3: by_name["transformer-1-0.001"]}
    best = min(means, key=lambda rate: means[rate])
    entry = found["transformer"]
    assert entry.rate == best == 3e-3  # at this few steps the higher rate learns more
    assert {rate: seen.mean for rate, seen in entry.rates.items()} == pytest.approx(means)
    assert entry.validation.low == min(by_name["transformer-1-0.003"], by_name["transformer-2-0.003"])
    assert entry.validation.count == 2
    assert entry.at_an_edge
    assert not found["rwkv"].at_an_edge  # one rate is no grid


def test_the_report_of_a_sweep(trained: Path, runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
                               ) -> None:
    out = tmp_path / "deep" / "report"
    assert command(trained, "--out", out) == 0
    said, err = capsys.readouterr()
    assert said.splitlines() == [str(out / name) for name in ("report.md", "report.csv", "report.html")]
    assert err == ""
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    found, entries = tables(text), rank(runs)
    assert [row["model"] for row in found["Ranking"]] == [entry.label for entry in entries]
    for row, entry in zip(found["Ranking"], entries, strict=True):
        for key, seen in (("validation", entry.validation), ("test", entry.test)):
            assert row[key] == f"{seen.mean:.4f} ({seen.low:.4f} to {seen.high:.4f})"
        assert row["seeds"] == "2"
    gap = entries[0].validation.mean - entries[1].validation.mean
    reference = next(row for row in found["Ranking"] if row["model"] == "transformer")
    other = next(row for row in found["Ranking"] if row["model"] == "rwkv")
    assert reference["against transformer"] == "0"
    assert float(other["against transformer"]) == pytest.approx(gap if other["#"] == "1" else -gap, abs=1e-4)
    assert f"`{entries[0].label}` is best on validation: {entries[0].validation.mean:.4f}" in text
    for run in runs:  # every run's figures, command and commit
        row = next(row for row in found["The runs"] if row["run"] == run.name)
        assert row["validation"] == f"{run.validation:.4f}"
        assert row["commit"].startswith(run.about["commit"][:12])
        assert row["device"] == run.about["device"]
        assert f"| {run.name} | `{run.about['command']}` |".replace("|", "") in text.replace("\\|", "").replace("|", "")
    by_rate = next(row for row in found["Learning rates"] if row["model"] == "transformer")
    assert by_rate["0.003"].startswith("**")
    assert by_rate["0.001"] == f"{next(run.validation for run in runs if run.rate == 1e-3):.4f}"
    assert "`transformer` is best at 0.003, an end of what was tried" in text
    assert "Not all were tried at the same rates" in text
    state = next(row for row in found["Decoding"] if row["model"] == "rwkv")
    model = next(run.model for run in runs if run.model.model == "rwkv")
    assert state["16k"] == memory(state_bytes_of(model, 16384))
    assert "Decoding speed was not measured" in text
    assert next(row for row in found["What is equal in all runs"] if row["rule"] == "tokens seen")["in all runs"] == \
        "`1,536`"
    assert str(trained) not in text + page  # a report may be published: no places of this machine
    assert page.count("<svg class=") == 8  # seeds, three costs, positions, their difference, rates, state
    for title in ("Validation against training tokens", "Validation against training seconds",
                  "Validation against training FLOPs", "Loss by position in the context"):
        assert title in page


def test_the_csv_has_a_line_a_run(trained: Path, runs: list[Run], tmp_path: Path) -> None:
    write_report([trained], tmp_path / "report")
    with (tmp_path / "report" / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert {row["run"]: float(row["validation_bits_per_byte"]) for row in rows} == \
        {run.name: run.validation for run in runs}
    assert [row["rank"] for row in rows] == sorted(row["rank"] for row in rows)
    assert [row["run"] for row in rows if row["best_rate"] == "no"] == ["transformer-1-0.001"]
    assert all(row["refused"] == "" for row in rows)


def test_folders_may_be_given_one_by_one(trained: Path, tmp_path: Path) -> None:
    one, two = trained / "rwkv-1-0.003", trained / "transformer-1-0.003"
    write_report([one, two, one], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert len(tables(text)["The runs"]) == 2
    assert "One seed each" in text
    assert "## Learning rates" not in text


def test_speed_tables_are_shown(trained: Path, tmp_path: Path) -> None:
    lines = ["model,impl,size,T,batch_tokens,tokens_per_s,mfu,peak_mib,first_step_s"]
    for length in (512, 1024, 4096):
        lines += [f"transformer,zoo,small,{length},65536,{2e9 / length:.0f},0.3,900,5",
                  f"rwkv,zoo,small,{length},65536,1000000,0.2,500,5",
                  f"transformer,plain-decoder,small,{length},65536,{3e9 / length:.0f},0.3,900,5"]
    (tmp_path / "train-h100.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "decode.csv").write_text(
        "model,impl,size,batch,context,tokens_per_s,ms_per_token,gbytes_per_s,state_bytes,peak_mib\n"
        "transformer,zoo,small,1,128,900,1,1,4096,10\nrwkv,zoo,small,1,128,800,1,1,4096,10\n")
    out = tmp_path / "report"
    assert command(trained, "--out", out, "--train-csv", tmp_path / "train-h100.csv", "--decode-csv",
                   tmp_path / "decode.csv") == 0
    text = (out / "report.md").read_text()
    # 2e9 / T is 1e6 at T = 2000, which log-log interpolation finds exactly on a power law
    assert "`rwkv` against `transformer`: crossover at T = 1.95k, ahead from there on (0.26 times as fast at T=512, " \
        "2.05 at 4k)." in text
    assert "`transformer` against `plain-decoder`: behind or level at every one measured (0.67 times as fast" in text
    assert "Training speed against `transformer`: `rwkv` ahead from T = 1.95k on." in text
    assert "Decoding speed against `transformer`: `rwkv` behind at context = 128, the longest." in text
    assert "From `train-h100.csv`." in text
    page = (out / "report.html").read_text()
    for title in ("Training speed", "Model FLOP utilisation", "Peak memory of a step", "State in memory"):
        assert f"<figcaption>{title}" in page


# Putting runs together


def test_curves_and_costs(runs: list[Run]) -> None:
    mine = [run for run in runs if run.model.model == "rwkv"]
    line = curve(mine, lambda run, point: point.tokens)
    assert [x for x, _ in line] == [384, 768, 1152, 1536]
    for place, (_, seen) in enumerate(line):
        assert seen == Spread.of(run.curve[place].bits for run in mine)
    ends = at_cost(mine, lambda run, point: point.tokens, 1536)
    assert ends is not None
    assert ends.mean == pytest.approx(sum(run.curve[-1].bits for run in mine) / 2)
    between = at_cost(mine[:1], lambda run, point: point.tokens, math.sqrt(384 * 768))
    assert between is not None
    assert between.mean == pytest.approx((mine[0].curve[0].bits + mine[0].curve[1].bits) / 2)
    assert at_cost(mine, lambda run, point: point.tokens, 383) is None
    assert at_cost(mine, lambda run, point: point.tokens, 1537) is None
    places = dict(by_position(mine))
    assert places[32].mean == pytest.approx(sum(dict(run.positions)[32] for run in mine) / 2)


def test_runs_validated_at_their_ends_alone_have_no_curves(runs: list[Run]) -> None:
    entries = rank([type(run)(**vars(run) | {"curve": run.curve[-1:]}) for run in runs])
    kinds = [type(block).__name__ for block in learning(entries, dict.fromkeys(labelled(runs), 0)).blocks]
    assert (kinds.count("Chart"), kinds.count("Table")) == (0, 1)


def test_labels_name_what_differs(runs: list[Run]) -> None:
    def with_options(run: Run, name: str, **options: Any) -> Run:
        given = run.config.to_dict() | {"model": {"name": run.model.model} | options}
        return type(run)(**vars(run) | {"config": type(run.config).from_dict(given), "name": name})

    one, two = (with_options(runs[0], f"w{window}", window=window, variant="local") for window in (16, 32))
    assert set(labelled([one, two])) == {f"{runs[0].model.model} window={window}" for window in (16, 32)}
    assert set(labelled([one])) == {runs[0].model.model}


# What is refused

BREAKS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "data: text deadbeef, the others text ": ("model/card.json", lambda v: v["data"].update(fingerprint="deadbeef")),
    "tokens seen: 999, the others 1,536": ("model/card.json", lambda v: v.update(tokens=999)),
    "tokenizer: bpe, sha256 00, the others bytes": ("model/config.json",
                                                     lambda v: v.update(tokenizer={"kind": "bpe", "sha256": "00"})),
    "context: 16, the others 32": ("config.json", lambda v: v.update(seq_len=16)),
    "tokens a step: 256, the others 128": ("config.json", lambda v: v.update(batch_tokens=256)),
    "schedule: cosine, warmup 0.3, the others cosine, warmup 0.2": ("config.json",
                                                                    lambda v: v["schedule"].update(warmup=0.3)),
    "dropout: 0.2, the others 0.1": ("config.json", lambda v: v.update(dropout=0.2)),
    "optimiser but for its rate: adamw with weight decay 0,": ("config.json",
                                                               lambda v: v["optim"].update(weight_decay=0.0)),
    "precision: bf16-mixed, the others 32-true": ("config.json", lambda v: v["trainer"].update(precision="bf16-mixed")),
    "evaluation: windows of 16, 32-true, the others windows of 32": ("model/card.json",
                                                                     lambda v: v["evaluation"].update(seq_len=16)),
    "evaluation: windows of 32, bf16-mixed, the others": ("model/card.json",
                                                          lambda v: v["evaluation"].update(precision="bf16-mixed")),
    "test split: none, the others measured": ("model/card.json", lambda v: v.update(test_bits_per_byte=None)),
    "; allowed: 2%": ("model/card.json", lambda v: v.update(parameters=round(1.06 * v["parameters"]))),
    "debug.overfit: trained on one batch": ("config.json", lambda v: v["debug"].update(overfit=True)),
    "the same model, options, learning rate and seed as transformer-1-0.003": ("config.json",
                                                                                lambda v: v.update(seed=1)),
    "unfinished: its model is of step 12, of 20": ("config.json", lambda v: v.update(steps=20)),
    "its card has no evaluation: made by an earlier version": ("model/card.json", lambda v: v.pop("evaluation")),
    "is not what a run writes": ("model/card.json", lambda v: v.update(parameters="many")),
    "unknown key colour": ("config.json", lambda v: v.update(colour="red")),
}


@pytest.mark.parametrize("reason", sorted(BREAKS))
def test_what_breaks_a_rule_is_refused_with_the_reason(sweep: Path, tmp_path: Path, reason: str,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    bad = sweep / "transformer-2-0.003"
    file, change = BREAKS[reason]
    edit(bad / file, change)
    assert command(sweep, "--out", tmp_path / "report") == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert first.startswith("error: transformer-2-0.003: ")
    assert reason in first
    assert last.startswith("error: 1 of 5 runs cannot be compared")
    assert not (tmp_path / "report").exists()


def test_every_rule_can_be_broken() -> None:
    for what in RULES:
        assert any(reason.startswith(f"{what}: ") for reason in BREAKS), what


def test_separate_puts_them_into_a_table_of_their_own(sweep: Path, runs: list[Run], tmp_path: Path) -> None:
    edit(sweep / "transformer-2-0.003" / "config.json", lambda v: v.update(dropout=0.2, batch_tokens=256))
    shutil.rmtree(sweep / "rwkv-2-0.003" / "model")
    assert command(sweep, "--out", tmp_path / "report", "--separate") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    found = tables(text)
    apart = {row["run"]: row for row in found["Not comparable"]}
    assert apart.keys() == {"transformer-2-0.003", "rwkv-2-0.003"}
    why = apart["transformer-2-0.003"]["why"]
    assert why == "tokens a step: 256, the others 128; dropout: 0.2, the others 0.1"
    assert "unfinished: at step 12 of 12" in apart["rwkv-2-0.003"]["why"]
    half = next(run for run in runs if run.name == "rwkv-2-0.003")
    assert apart["rwkv-2-0.003"]["validation"] == f"{half.validation:.4f}"
    assert {row["run"] for row in found["The runs"]} == {run.name for run in runs} - apart.keys()
    with (tmp_path / "report" / "report.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {name for name, row in rows.items() if row["refused"]} == apart.keys()
    assert rows["rwkv-2-0.003"]["rank"] == ""


def test_an_unfinished_run_says_how_far_it_got(sweep: Path) -> None:
    bad = sweep / "rwkv-1-0.003"
    shutil.rmtree(bad / "model")
    lines = (bad / "metrics.csv").read_text().splitlines()
    (bad / "metrics.csv").write_text("\n".join(lines[:8]) + "\n8,1024,1.")  # cut off by a kill
    found = read_run("it", bad)
    assert isinstance(found, Refusal)
    assert found.reasons == ("unfinished: at step 7 of 12; the same command with resume=auto goes on",)
    assert (found.architecture, found.seed) == ("rwkv", 1)
    assert found.validation == pytest.approx(float(read_rows(bad / "metrics.csv")[5]["validation_bits_per_byte"]))


def test_the_majority_is_the_rule(runs: list[Run]) -> None:
    odd = [type(run)(**vars(run) | {"tokens": 7, "name": f"odd {run.name}"}) for run in runs[:2]]
    kept, refused = check([*odd, *runs])
    assert {run.name for run in kept} == {run.name for run in runs}
    assert {refusal.name for refusal in refused} == {run.name for run in odd}
    assert check([]) == ([], [])


@pytest.mark.parametrize(("arguments", "message"), [
    (["NONE"], "no such folder: NONE"),
    (["EMPTY"], "holds no run: no run.json in it or below"),
    ([], "Missing argument 'runs'"),
    (["SWEEP", "--train-csv", "NONE"], "cannot read NONE: No such file"),
    (["SWEEP", "--train-csv", "SWEEP/rwkv-1-0.003/metrics.csv"], "no column model; allowed: columns model, impl"),
    (["SWEEP", "--decode-csv", "EMPTY/none.csv"], "none.csv is no table to read here: it has no rows"),
    (["SWEEP", "--out", "EMPTY/none.csv"], "cannot write into EMPTY/none.csv"),
])
def test_wrong_use_is_one_line(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                               message: str, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "none.csv").touch()
    (tmp_path / "SWEEP").symlink_to(trained)
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_nothing_but_unfinished_runs(sweep: Path, tmp_path: Path) -> None:
    for folder in sweep.iterdir():
        shutil.rmtree(folder / "model")
    with pytest.raises(ZooError, match="no run is finished, so there is nothing to compare"):
        write_report([sweep], tmp_path / "report", separate=True)


def test_commands_are_shown_without_this_machines_places() -> None:
    assert shown_command("python train.py model=rwkv data.path=/home/u/novels out=runs/a/b") == \
        "python train.py model=rwkv data.path=.../novels out=runs/a/b"
    assert shown_command("python train.py 'data.path=[\"/a b/c\",/d/e/]' prompt='and / or'") == \
        "python train.py 'data.path=[\".../c\",.../e]' 'prompt=and / or'"


def test_neither_lightning_nor_hydra_is_needed(trained: Path, tmp_path: Path) -> None:
    said = run_without(("lightning", "hydra", "omegaconf", "wandb", "datasets", "triton", "matplotlib"), f"""
from zoo.cli import main
main(["report", {str(trained)!r}, "--out", {str(tmp_path / "report")!r}])
""")
    assert re.search(r"report\.html\n$", said)
