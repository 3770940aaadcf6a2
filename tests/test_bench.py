"""Measurements measure what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, tiny
from training_runs import config, write_corpus

import zoo
from zoo import ZooError
from zoo.bench import loop
from zoo.bench.timing import Timing, interleave
from zoo.bench.train import COLUMNS, Row, Side, Step, bench_train, published_side, table, to_csv, windows
from zoo.bench.train_peers import PlainDecoder, decoder_flops
from zoo.cli import main
from zoo.sizing import SIZES, Size

CPU = torch.device("cpu")


class Clock:
    """Stands in for the `time` module: time passes only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def side(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes each of `seconds` in turn, and the last of them from then on."""

        def call() -> None:
            self.now += seconds[min(self.calls.count(name), len(seconds) - 1)]
            self.calls.append(name)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("zoo.bench.timing.time", clock)
    return clock


def test_sides_take_turns_and_warm_up_outside_the_clock(clock: Clock) -> None:
    told: list[float] = []
    sides = {"a": clock.side("a", 9.0, 5.0, 2.0), "b": clock.side("b", 9.0, 5.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0)}
    found = interleave(sides, device=CPU, budget=0, warmup=2, least=5, progress=told.append)
    assert clock.calls[:6] == ["a"] * 3 + ["b"] * 3  # warm-up, and one call to see how long it takes
    rounds = [clock.calls[i : i + 2] for i in range(6, 16, 2)]
    assert len(clock.calls) == 16
    assert all(sorted(pair) == ["a", "b"] for pair in rounds)
    assert len({tuple(pair) for pair in rounds}) == 2  # neither side always goes first
    assert found["a"] == Timing(2, 2, 2, 5)
    b = found["b"]
    assert (b.p50, b.p20, b.p80, b.samples) == pytest.approx((5, 3.8, 6.2, 5))
    assert told[-1] == 1


def test_short_calls_are_timed_in_bunches(clock: Clock) -> None:
    found = interleave({"a": clock.side("a", 0.001)}, device=CPU, budget=0, warmup=1, least=2, slice_seconds=0.02)
    assert len(clock.calls) == 1 + 1 + 2 * 20
    assert found["a"].p50 == pytest.approx(0.001)


def test_the_budget_ends_the_rounds(clock: Clock) -> None:
    told: list[float] = []
    sides = {"a": clock.side("a", 1.0), "b": clock.side("b", 2.0)}
    found = interleave(sides, device=CPU, budget=30.0, warmup=1, progress=told.append)
    assert clock.now <= 30
    assert found["a"].samples == found["b"].samples == 8
    assert told == sorted(told)
    assert 0.9 <= told[-1] <= 1
    assert interleave(sides, device=CPU, budget=1e9, warmup=1, most=7)["a"].samples == 7


def test_the_step_that_is_timed_trains() -> None:
    model = tiny(Case("transformer", ()), vocab_size=256)
    batch = torch.randint(256, (2, 17))
    step = Step(Side("transformer", "zoo", model, model.loss, 1), batch)
    before = model.loss(batch[:, :-1], batch[:, 1:]).item()
    for _ in range(20):
        step()
    assert model.loss(batch[:, :-1], batch[:, 1:]).item() < before - 0.5


def test_every_architecture_gets_a_row() -> None:
    rows, left_out = bench_train(device=CPU, seq_len=16, batch_tokens=32, budget=0)
    assert {row.model for row in rows} == set(zoo.list_models())
    assert left_out == {}
    assert [row.tokens_per_s for row in rows] == sorted((row.tokens_per_s for row in rows), reverse=True)
    assert all(row.slow <= row.tokens_per_s <= row.fast for row in rows)
    head, *lines = to_csv(rows).splitlines()
    assert head == "model,impl,size,T,batch_tokens,tokens_per_s,mfu,peak_mib,first_step_s" == ",".join(COLUMNS)
    assert len(lines) == len(rows)
    fields = dict(zip(COLUMNS, lines[0].split(","), strict=True))
    assert float(fields.pop("tokens_per_s")) > 0 < float(fields.pop("first_step_s"))
    assert fields == {"model": rows[0].model, "impl": "zoo", "size": "nano", "T": "16", "batch_tokens": "32", "mfu": "",
                      "peak_mib": ""}
    ratios = dict(zip((row.model for row in rows), table(rows, CPU).columns[4].cells, strict=True))
    assert ratios["transformer"] == "1.00"


TEXT = Path(__file__).read_bytes()


def test_published_weights_stay_what_they_are() -> None:
    side = published_side("aft", "small", 16, CPU, compiled=False)
    assert (side.model, side.impl) == ("aft.novels-6m", "zoo")
    assert side.flops == zoo.create_model("aft", "small", seq_len=1024).flops(16)
    before = [p.clone() for p in side.module.parameters()]
    step = Step(side, windows(TEXT, 2, 17))
    for _ in range(3):
        step()
    learnt = zoo.load_pretrained("aft.novels-6m")
    assert all(map(torch.equal, side.module.parameters(), before))
    assert all(map(torch.equal, side.module.parameters(), learnt.parameters()))
    assert all(bool(step.optimizer.state[p]["exp_avg"].any()) for p in side.module.parameters())  # its work was done
    with pytest.raises(ZooError, match="1025 tokens are past the limit of this aft: at most 1024"):
        published_side("aft", "small", 1025, CPU, compiled=False)
    with pytest.raises(ZooError, match="no weights of aft are published at size=base"):
        published_side("aft", "base", 16, CPU, compiled=False)


def test_published_weights_get_rows_under_their_names() -> None:
    rows, left_out = bench_train(["transformer", "rwkv"], device=CPU, size="small", seq_len=8, batch_tokens=8, budget=0,
                                 weights="published", text=TEXT)
    assert {row.model for row in rows} == {"transformer.novels-6m", "rwkv.novels-6m"}
    assert left_out == {}
    ratios = dict(zip((row.model for row in rows), table(rows, CPU).columns[4].cells, strict=True))
    assert ratios["transformer.novels-6m"] == "1.00"
    with pytest.raises(ZooError, match="published weights without a text are not allowed"):
        bench_train(device=CPU, weights="published")
    with pytest.raises(ZooError, match="unknown weights 'old'; allowed: fresh, published"):
        bench_train(device=CPU, weights="old")


def test_windows_of_a_text() -> None:
    assert windows(bytes(range(10)), 3, 4).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert windows(b"ab", 2, 2).tolist() == [[97, 98]] * 2
    with pytest.raises(ZooError, match="a text of 2 bytes is not allowed: at least 3"):
        windows(b"ab", 1, 3)


def row(model: str = "aft", seq_len: int = 16, speed: float = 10.0) -> Row:
    return Row(model, "zoo", "nano", seq_len, 32, speed, speed, speed, None, 1.5, 2.0)


def test_rows_of_a_run_take_the_place_of_the_same_rows() -> None:
    before = to_csv([row(), row("rwkv"), row(seq_len=8)])
    again = to_csv([row("rwkv", speed=20.0), row("aft.novels-6m")], before)
    assert [line.split(",")[:6] for line in again.splitlines()[1:]] == [
        ["aft", "zoo", "nano", "16", "32", "10"], ["aft", "zoo", "nano", "8", "32", "10"],
        ["rwkv", "zoo", "nano", "16", "32", "20"], ["aft.novels-6m", "zoo", "nano", "16", "32", "10"]]
    assert to_csv([], again) == again
    for other in ("a,b\n1,2\n", before + "aft,zoo\n", "\n", "x" * 200_000):
        with pytest.raises(ZooError, match="allowed is a table of model, impl, size"):
            to_csv([row()], other)


def test_the_command_keeps_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = tmp_path / "train.csv", tmp_path / "text"
    text.write_bytes(TEXT)

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["bench", "train", "--device", "cpu", "--seconds", "0", "--batch-tokens", "16", "--csv", str(out),
                  "--seq-len", "16", *words])
        return int(stop.value.code or 0)

    assert run("--models", "transformer", "--seq-len", "8,16") == 0
    assert run("--models", "transformer", "--size", "small", "--weights", "published", "--text", str(text)) == 0
    assert [line.split(",")[:4] for line in out.read_text().splitlines()[1:]] == [
        ["transformer", "zoo", "nano", "8"], ["transformer", "zoo", "nano", "16"],
        ["transformer.novels-6m", "zoo", "small", "16"]]
    capsys.readouterr()
    assert run("--weights", "published", "--text", str(tmp_path / "none")) == 2
    assert run("--weights", "published", "--text", str(text), "--models", "aft") == 2
    out.write_text("a,b\n")
    assert run("--models", "aft") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    for error, words in zip(errors, ("cannot read", "no weights of aft are published at size=nano", "cannot be added"),
                            strict=True):
        assert words in error


def test_what_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out of all, an error where it was asked for."""
    from zoo.bench import train

    def create(name: str, *args: object, **kwargs: object):
        if name != "transformer":
            raise ZooError(f"{name} is too wide")
        return tiny(Case(name, ()), vocab_size=256, seq_len=8)

    monkeypatch.setattr(train, "create_model", create)
    monkeypatch.setattr(train, "list_mixers", lambda: ["transformer", "wide"])
    rows, left_out = bench_train(device=CPU, seq_len=8, batch_tokens=8, budget=0)
    assert [row.model for row in rows] == ["transformer"]
    assert left_out == {"wide": "wide is too wide"}
    with pytest.raises(ZooError, match="wide is too wide"):
        bench_train(["transformer", "wide"], device=CPU, seq_len=8, batch_tokens=8, budget=0)


def test_peers_train_beside_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain decoder with the same parameters within 4 %; one whose library is missing is named."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows, left_out = bench_train(["transformer"], device=CPU, seq_len=8, batch_tokens=8, budget=0, peers=True)
    assert {(row.model, row.impl) for row in rows} == {("transformer", "zoo"), ("transformer", "plain-decoder")}
    assert left_out == {"hf-llama": "transformers is not installed"}
    monkeypatch.setattr(PlainDecoder, "loss", lambda self, tokens, targets: torch.zeros(2) @ torch.zeros(3))
    rows, left_out = bench_train(["transformer"], device=CPU, seq_len=8, batch_tokens=8, budget=0, peers=True)
    assert [row.impl for row in rows] == ["zoo"]
    assert left_out["plain-decoder"].startswith("it does not train, or cannot be recorded: ")
    for size in ("small", "base", "medium"):
        with torch.device("meta"):
            plain = PlainDecoder(SIZES[size], 256, 1024)
        parameters = sum(p.numel() for p in plain.parameters())
        assert parameters == pytest.approx(SIZES[size].budget(256), rel=0.04)
        ours = zoo.create_model("transformer", size).flops(1024) / SIZES[size].budget(256)
        assert decoder_flops(plain, SIZES[size], 1024) / parameters == pytest.approx(ours, rel=0.02)


def test_the_plain_decoder_is_one() -> None:
    """It learns, is causal, and its rotary phases tell positions apart."""
    torch.manual_seed(0)
    model = PlainDecoder(Size(2, 16, 2), 256, 16)
    batch = torch.randint(256, (2, 17))
    step = Step(Side("transformer", "plain-decoder", model, model.loss, 1), batch)
    before = model.loss(batch[:, :-1], batch[:, 1:]).item()
    for _ in range(30):
        step()
    assert model.loss(batch[:, :-1], batch[:, 1:]).item() < before - 0.1
    x = torch.randn(1, 16, 16)
    y = model.blocks[0](x, model.cos, model.sin)
    later = x.clone()
    later[:, 9:] = 100 * torch.randn(1, 7, 16)
    torch.testing.assert_close(model.blocks[0](later, model.cos, model.sin)[:, :9], y[:, :9])
    swapped = x[:, [1, 0, *range(2, 16)]]
    assert not torch.allclose(model.blocks[0](swapped, model.cos, model.sin)[:, -1], y[:, -1], atol=1e-4)


def test_llama_attends_causally_without_a_mask() -> None:
    """What transformers itself gives PyTorch, compiled, is a mask; the loss is the same."""
    pytest.importorskip("transformers")
    from zoo.bench.train_peers import HuggingFaceLlama

    model, tokens = HuggingFaceLlama(SIZES["nano"], 256, 32).train(), torch.randint(256, (2, 33))
    graphs = list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    got = torch.compile(model.loss, dynamic=False, backend=backend)(tokens[:, :-1], tokens[:, 1:])
    asked = [node.kwargs for graph in graphs for node in graph.graph.nodes if "scaled_dot" in str(node.target)]
    assert [(each["attn_mask"], each["is_causal"]) for each in asked] == [(None, True)] * SIZES["nano"].layers
    model.model.config._attn_implementation = "sdpa"
    torch.testing.assert_close(got, model.loss(tokens[:, :-1], tokens[:, 1:]))


def test_the_loop_is_measured_against_the_bare_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """A run as it is given to `train`, but for its text; as many intervals from either side."""
    corpus, given = write_corpus(tmp_path), loop.run_config

    def made(*arguments: Any) -> dict[str, Any]:
        return given(*arguments) | {"data": config(corpus, tmp_path)["data"]}

    monkeypatch.setattr(loop, "run_config", made)
    monkeypatch.setattr(loop, "LOG_EVERY", 2)
    shape = "transformer", "nano", 16, 32, 8, CPU
    bare, whole = loop.bare(*shape), loop.whole(*shape)
    assert len(bare) == len(whole) == 3
    assert min(bare + whole) > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loop.main(["transformer"], size="nano", seq_len=16, batch_tokens=32, steps=4)
    assert "transformer nano, T=16, 32 tokens a step: bare" in capsys.readouterr().out
