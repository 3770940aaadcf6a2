"""Decoding speed: every architecture has its row, the peers decode, and the table is what a report reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from zoo import ZooError, cli
from zoo.bench import decode
from zoo.bench.decode import COLUMNS, Row, bench_decode, bytes_read, drawn_state, to_csv
from zoo.bench.decode_peers import PlainSteps
from zoo.report.speed import DECODE, curves, read_table
from zoo.sizing import SIZES, Size

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a measurement; and models of no more than they need."""
    monkeypatch.setattr(decode, "TOKENS", 2)
    monkeypatch.setattr(decode, "LEAST_WINDOW", 16)
    monkeypatch.setitem(SIZES, "nano", Size(1, 32, 2))


def row(model: str = "aft", context: int = 128, speed: float = 10.0) -> Row:
    return Row(model, "zoo", "nano", 1, context, speed, speed, speed, 1e3 / speed, 1.5, 2048, None)


def test_every_architecture_gets_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows, left_out = bench_decode(device=CPU, size="nano", batch=2, context=9, budget=0, peers=True)
    assert {(row.model, row.impl) for row in rows} == {("transformer", "plain-decoder"),
                                                       *((name, "zoo") for name in zoo.list_models())}
    assert left_out == {"hf-llama": "transformers is not installed"}
    assert [row.tokens_per_s for row in rows] == sorted((row.tokens_per_s for row in rows), reverse=True)
    for each in rows:
        assert each.slow <= each.tokens_per_s <= each.fast
        assert each.tokens_per_s == pytest.approx(2e3 / each.ms_per_token)
    (tmp_path / "decode.csv").write_text(to_csv(rows))
    read = read_table(tmp_path / "decode.csv", DECODE)
    assert COLUMNS == DECODE
    assert set(curves(read, "context", "tokens_per_s")) == {(each.model, each.impl) for each in rows}
    ours = {each.model: each.state_bytes for each in rows if each.impl == "zoo"}
    assert ours["transformer"] > 9 * 2 * 32 * 4 > 0


def test_what_is_read_is_weights_and_states() -> None:
    """Twice the context, twice the transformer's cache; of the embedding nothing."""
    model = zoo.create_model("transformer", "nano", 256, 16)
    weights = 4 * (model.num_parameters() - 256 * 32)
    positions = 8 * 2  # the model's and its mixer's
    assert bytes_read(model, 3, 10, torch.float32) == (weights + 3 * (10 * 2 * 32 * 4 + positions),
                                                       10 * 2 * 32 * 4 + positions)
    narrow = bytes_read(model, 1, 20, torch.bfloat16)[1] - positions
    assert narrow == 20 * 2 * 32 * 2
    state = drawn_state(model, 2, 10, 12, torch.float32)
    assert state["position"].tolist() == state["blocks.0.sequence_mixer.position"].tolist() == [10, 10]
    assert state["blocks.0.sequence_mixer.k"].shape[1] == 12


def test_the_plain_decoder_decodes() -> None:
    """Token by token it writes what its forward pass finds likeliest."""
    torch.manual_seed(0)
    steps = PlainSteps(Size(2, 16, 2), 1, 0, 10)
    call = steps.recorded(CPU)
    written = [0]
    with torch.inference_mode():
        for _ in range(10):
            call()
            written.append(int(steps.ids))
    decoder, losses = steps.decoder, torch.zeros(256)
    with torch.inference_mode():
        for token in range(256):  # of all tokens the one written is the least surprising
            losses[token] = decoder.loss(torch.tensor([written[:10]]), torch.tensor([[-100] * 9 + [token]]))
    assert int(losses.argmin()) == written[10]
    assert int(steps.position) == 10


def test_wrong_shapes_and_names_are_refused() -> None:
    for how, message in (({"batch": 0}, "batch=0"), ({"context": 0}, "context=0"), ({"size": "huge"}, "huge"),
                         ({"models": ["lstm"]}, "lstm")):
        with pytest.raises(ZooError, match=message):
            bench_decode(device=CPU, **{"size": "nano", "budget": 0} | how)  # type: ignore[arg-type]


def test_rows_are_added_to_a_table() -> None:
    first = to_csv([row(), row("rwkv")])
    both = to_csv([row(speed=20.0), row(context=256)], first).splitlines()
    assert both[0] == ",".join(COLUMNS)
    assert [line.split(",")[0] + line.split(",")[4] for line in both[1:]] == ["rwkv128", "aft128", "aft256"]
    assert both[2].split(",")[5] == "20"
    with pytest.raises(ZooError, match="rows cannot be added"):
        to_csv([row()], "a,b\n1,2\n")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "decode.csv"
    arguments = ["bench", "decode", "--device", "cpu", "--models", "rwkv", "--context", "8,16", "--seconds", "0"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--csv", str(table)])
    assert not ended.value.code
    assert "Decoding at size nano, batch 1, context 16" in capsys.readouterr().out
    assert [line.split(",")[:5] for line in table.read_text().splitlines()[1:]] == [
        ["rwkv", "zoo", "nano", "1", "8"], ["rwkv", "zoo", "nano", "1", "16"]]
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "decode", "--context", "1k"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: context: '1k' is not allowed: whole numbers with commas between\n"
