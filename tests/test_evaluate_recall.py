"""Multi-query associative recall: that the examples are what Zoology describes, and that models are trained on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
import zoo.recall as recall
from zoo.cli import main
from zoo.data.recall import Recall, _distinct
from zoo.errors import ZooError
from zoo.recall import Recipe, Result, answers_of, best, build, grid, prepared, read_csv, score, train_one, write_csv

CPU = torch.device("cpu")
EASY = Recall(32, 6, vocab_size=64)
QUICK = Recipe(steps=400, batch=32, examples=4000, tests=200, test_every=50, enough=0.9, vocab_size=64)


@pytest.mark.parametrize(("length", "pairs", "vocab"), [(64, 4, 8192), (256, 16, 8192), (16, 4, 10), (4, 1, 4)])
def test_examples_are_the_task(length: int, pairs: int, vocab: int) -> None:
    tokens, where, answers = Recall(length, pairs, vocab).examples(200, seed=3)
    assert tokens.shape == (200, length)
    for row, at, wanted in zip(tokens, where, answers, strict=True):
        keys, values = row[0:2 * pairs:2], row[1:2 * pairs:2]
        assert len(set(keys)) == len(set(values)) == len(set(at)) == pairs
        assert keys.min() >= 1
        assert keys.max() < vocab // 2 <= values.min()
        assert values.max() < vocab
        assert (at >= 2 * pairs).all()
        assert (at % 2 == 0).all()
        assert (row[at] == keys).all()
        assert (wanted == values).all()
        assert (np.delete(row[2 * pairs:], at - 2 * pairs) == 0).all()
    again, other = (Recall(length, pairs, vocab).examples(200, seed=seed)[0] for seed in (3, 4))
    assert (tokens == again).all()
    assert (tokens != other).any()


def test_queries_come_soon_by_a_power_law() -> None:
    """The places of the first two keys, against the law of drawing one after the other without replacement."""
    count = 40_000
    for power in (0.01, 1.0):
        _, where, _ = Recall(32, 2, 64, power).examples(count, seed=0)
        p = np.arange(1, 15) ** (power - 1)
        p = p / p.sum()
        pair = p[:, None] * p / (1 - p[:, None]) * (1 - np.eye(14))  # P(first = i, second = j)
        seen = np.zeros((14, 14))
        np.add.at(seen, tuple(((where - 4) // 2).T), 1)
        assert (np.abs(seen - count * pair) < 5 * np.sqrt(count * pair + 1)).all()
        assert np.abs(seen.sum(1) / count - p).max() < 0.01


def test_distinct_numbers_are_uniform() -> None:
    random = np.random.default_rng(0)
    for count, below in ((3, 40), (3, 5), (5, 5)):
        drawn = _distinct(random, 20_000, count, below)
        assert (np.diff(np.sort(drawn), axis=1) > 0).all()
        for place in range(count):
            seen = np.bincount(drawn[:, place], minlength=below)
            assert np.abs(seen - 20_000 / below).max() < 5 * np.sqrt(20_000 / below)


@pytest.mark.parametrize(("change", "message"), [
    ({"pairs": 9}, "9 pairs in 32 tokens are not allowed: 1 to a quarter"), ({"pairs": 0}, "0 pairs in 32 tokens"),
    ({"seq_len": 31}, "6 pairs in 31 tokens"), ({"vocab_size": 33}, "a vocabulary of 33 is not allowed: even, 14 or"),
    ({"vocab_size": 12}, "a vocabulary of 12"), ({"power": 0.0}, "power=0.0 is not allowed: above 0, at most 1"),
])
def test_tasks_that_are_not_there(change: dict[str, int], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        replace(EASY, **change)


@pytest.mark.parametrize("name", zoo.list_models())
def test_only_queries_are_scored(name: str) -> None:
    model = build(name, EASY, 64)
    examples = tokens, where, answers = prepared(EASY, 30, 0, CPU)
    logits = model(tokens)
    at = torch.arange(30).unsqueeze(1), where
    torch.testing.assert_close(answers_of(model, tokens, where), logits[at], rtol=1e-4, atol=1e-5)
    expected = (logits[at].argmax(-1) == answers).float().mean()
    for batch in (7, 100):
        assert score(model, examples, batch) == pytest.approx(float(expected))
    assert float(expected) < 0.3
    targets = torch.full_like(tokens, -100).scatter(1, where, answers)
    recall._pass(model, *examples)
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss(tokens, targets).backward()
    for mine, theirs in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-3, atol=1e-6)


def test_attention_learns_it() -> None:
    examples, tests = prepared(EASY, 4000, 2, CPU), prepared(EASY, 200, 3, CPU)
    result = train_one("transformer", EASY, 64, 4e-3, QUICK, examples, tests)
    assert result.accuracy > 0.9  # of a model that guesses among the values before it, 1/6
    assert result.steps < QUICK.steps
    assert result.steps % QUICK.test_every == 0
    assert result.state_bytes == 2 * 2 * 32 * 64 * 4  # layers, keys and values, tokens, channels, float32
    short = [train_one("rwkv", EASY, 64, 4e-3, replace(QUICK, steps=20), examples, tests) for _ in range(2)]
    assert short[0].accuracy == short[1].accuracy
    assert (short[0].steps, short[0].job) == (20, ("rwkv", 32, 6, 64, 4e-3))


@pytest.mark.gpu
@pytest.mark.parametrize("name", zoo.list_models())
def test_a_gpu_trains_it_as_a_cpu_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded pass: the same first steps as without one, whose losses are compared."""
    losses: dict[str, list[float]] = {}
    recipe = replace(QUICK, steps=12, test_every=100)
    for device in ("cpu", "cuda"):
        kept = losses.setdefault(device, [])
        norm = torch.nn.utils.clip_grad_norm_

        def keep(*given, kept=kept, norm=norm):
            kept.append(float(found := norm(*given)))
            return found

        monkeypatch.setattr(recall, "clip_grad_norm_", keep)
        place = torch.device(device)
        train_one(name, EASY, 64, 4e-3, recipe, prepared(EASY, 4000, 2, place), prepared(EASY, 200, 3, place))
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)
    assert len(set(losses["cuda"])) == 12


def test_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def fake(name: str, setting: Recall, width: int, rate: float, *rest: object) -> Result:
        trained.append((name, setting.seq_len, setting.pairs, width, rate))
        return Result(*trained[-1], 0.5 + rate, 10, 1, 1, 0.0)

    monkeypatch.setattr(recall, "train_one", fake)
    ask = ["rwkv", "aft"], [(16, 2), (32, 4)], [64, 128], [0.1, 0.2], QUICK, CPU
    results = list(grid(*ask))
    assert len(set(trained)) == len(trained) == 16
    assert len(best(results)) == 8
    assert all(result.lr == 0.2 for result in best(results))
    trained.clear()
    assert list(grid(*ask, known=results[3:])) == results[:3]
    for change, message in (((0, ["gpt"]), "unknown model 'gpt'"), ((1, [(16, 2), (16, 5)]), "5 pairs in 16 tokens"),
                            ((3, [0.1, 0.0]), "a learning rate of 0.0 is not"), ((2, [64, 0]), "dim=0")):
        changed = list(ask)
        changed[change[0]] = change[1]
        trained.clear()
        with pytest.raises(ZooError, match=message):
            list(grid(*changed))
        assert not trained


def test_results_are_kept(tmp_path: Path) -> None:
    results = [Result("rwkv", 64, 4, 64, 3e-3, 0.98765, 300, 132_352, 33_792, 12.3),
               Result("aft", 64, 4, 64, 1e-2, 0.25, 400, 129_792, 33_280, 9.0)]
    assert read_csv(tmp_path / "r.csv") == []
    write_csv(tmp_path / "r.csv", results)
    assert read_csv(tmp_path / "r.csv") == results
    (tmp_path / "other.csv").write_text("model,seq_len\nrwkv,many\n")
    with pytest.raises(ZooError, match="holds no results of recall"):
        read_csv(tmp_path / "other.csv")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recall", "--models", "aft,transformer", "--grid", "16:2,16:4", "--widths", "64", "--vocab", "32",
             "--steps", "6", "--batch", "8", "--examples", "20", "--tests", "10", "--csv", str(tmp_path / "r.csv"),
             "--device", "cpu"]
    for expected in ("transformer 16:4 width 64 at 0.003: 0.", "4 results were in "):
        with pytest.raises(SystemExit) as stop:
            main(words)
        out, err = capsys.readouterr()
        assert (stop.value.code, err) == (0, "")
        assert expected in out
        assert "16:4" in out.partition("at the best rate")[2]
        assert len(read_csv(tmp_path / "r.csv")) == 4


@pytest.mark.parametrize(("words", "message"), [
    (["--models", "gpt"], "unknown model 'gpt'; allowed: aft, linformer"),
    (["--grid", "64"], "--grid: [64] is not allowed: tokens:pairs"),
    (["--grid", "64:x"], "--grid: 'x' is not allowed"),
    (["--grid", "64:17"], "17 pairs in 64 tokens are not allowed"),
    (["--widths", "0"], "dim=0 is not a positive whole number"),
    (["--rates", "fast"], "--rates: 'fast' is not allowed: numbers with commas"),
    (["--rates", "0"], "a learning rate of 0.0 is not allowed: above 0"),
    (["--steps", "0"], "steps=0 is not allowed: 1 or more"),
    (["--batch", "64", "--examples", "20"], "20 examples are fewer than a batch of 64"),
    (["--vocab", "7"], "a vocabulary of 7 is not allowed"),
    (["--csv", "nowhere/r.csv"], "no such folder"),
    (["--device", "tpu"], "unknown device 'tpu'"),
])
def test_mistakes_are_one_line_and_status_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["recall", *words])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
