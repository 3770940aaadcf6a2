"""Benchmarks' tables in a report: what is read of them, and where one curve crosses another."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.bench.train import COLUMNS, Row, to_csv
from zoo.errors import ZooError
from zoo.report.contents_speed import crossovers
from zoo.report.speed import DECODE, TRAIN, compared, crossing, curves, read_table, side_name, verdicts
from zoo.report.words import context_of

HEAD = ",".join(TRAIN)


def test_what_zoo_bench_train_writes_is_read(tmp_path: Path) -> None:
    assert TRAIN == COLUMNS
    rows = [Row("rwkv", "zoo", "small", 1024, 65536, 2.5e6, 2.4e6, 2.6e6, 0.31, 812.5, 9.5),
            Row("transformer", "hf-llama", "small", 1024, 65536, 1e6, 1e6, 1e6, None, None, 20.0)]
    (tmp_path / "train.csv").write_text(to_csv(rows))
    first, second = read_table(tmp_path / "train.csv", TRAIN)
    assert dict(first) == {"model": "rwkv", "impl": "zoo", "size": "small", "T": 1024.0, "batch_tokens": 65536.0,
                           "tokens_per_s": 2.5e6, "mfu": 0.31, "peak_mib": 812.5, "first_step_s": 9.5}
    assert second["mfu"] is second["peak_mib"] is None


@pytest.mark.parametrize(("text", "message"), [
    ("", "it has no rows; allowed: columns model, impl"),
    (HEAD, "it has no rows"),
    ("model,impl\nrwkv,zoo", "no column size"),
    (f"{HEAD}\nrwkv,zoo,small,1k,1,1,1,1,1", "line 2: T='1k' is not a number"),
    (f"{HEAD}\nrwkv,zoo,small,\x00,1,1,1,1,1", "line 2: T="),
    (f'{HEAD}\nrwkv,zoo,"small,1,1,1,1,1,1', "cannot read .*: unexpected end of data"),
])
def test_another_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ZooError, match=message) as caught:
        read_table(tmp_path / "t.csv", TRAIN)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ZooError, match="cannot read"):
        read_table(tmp_path / "t.csv", DECODE)


def test_curves_leave_out_what_was_not_measured() -> None:
    rows = [{"model": "rwkv", "impl": "zoo", "T": 2048.0, "mfu": 0.2}, {"model": "rwkv", "impl": "zoo", "T": 512.0,
            "mfu": 0.1}, {"model": "aft", "impl": "zoo", "T": 512.0, "mfu": None}]
    assert curves(rows, "T", "mfu") == {("rwkv", "zoo"): {512: 0.1, 2048: 0.2}}
    assert side_name(("rwkv", "zoo")) == "rwkv"
    assert side_name(("transformer", "hf-llama")) == "hf-llama"


@pytest.mark.parametrize(("mine", "where"), [
    ({1: 2.0, 2: 2.0, 4: 2.0}, 1),            # always above
    ({1: 0.5, 2: 0.9, 4: 1.0}, None),         # level at the end is not above
    ({1: 0.5, 4: 2.0}, 2),                    # halfway, logarithmically
    ({1: 2.0, 2: 0.5, 4: 0.5}, None),         # falls behind
    ({1: 2.0, 2: 0.5, 8: 2.0}, 4),            # the last crossing counts
    ({16: 2.0}, None),                        # nothing in common
])
def test_crossing(mine: dict[int, float], where: float | None) -> None:
    other = dict.fromkeys((1, 2, 4, 8), 1.0)
    assert crossing(mine, other) == (None if where is None else pytest.approx(where))


@pytest.mark.parametrize(("mine", "said"), [
    ({512: 2.0, 1024: 3.0}, "`a` against `b`: ahead at every one measured (2.00 times as fast at T=512, 3.00 at 1k)."),
    ({512: 0.5, 1024: 1.0}, "`a` against `b`: behind or level at every one measured (0.50 times as fast at T=512, 1.00 "
                            "at 1k)."),
    ({512: 0.5, 2048: 2.0}, "`a` against `b`: crossover at T = 1k, ahead from there on (0.50 times as fast at T=512, "
                            "2.00 at 2k)."),
    ({512: 2.0, 1024: 0.9, 2048: 0.5}, "`a` against `b`: behind or level at T = 1k, 2k (2.00 times as fast at T=512, "
                                       "0.50 at 2k)."),
    ({1024: 0.5}, "`a` against `b`: behind or level at every one measured (0.50 times as fast at T=1k)."),
    ({4096: 0.5}, None),
])
def test_sentences(mine: dict[int, float], said: str | None) -> None:
    assert compared("a", "b", mine, dict.fromkeys((512, 1024, 2048), 1.0), "T", context_of) == said


def test_each_of_ours_against_the_reference_and_its_peers() -> None:
    found = {("transformer", "zoo"): {512: 1.0}, ("rwkv", "zoo"): {512: 2.0}, ("transformer", "hf-llama"): {512: 0.5},
             ("rwkv", "fla"): {512: 4.0}, ("mamba", "fla"): {512: 4.0}}
    assert [line.partition(":")[0] for line in verdicts(found, "T", context_of)] == \
        ["`rwkv` against `transformer`", "`transformer` against `hf-llama`", "`rwkv` against `fla`"]
    assert not verdicts({("rwkv", "zoo"): {512: 2.0}}, "T", context_of)


def test_a_summary_of_crossovers() -> None:
    rows = [{"model": model, "impl": "zoo", "size": "small", "batch_tokens": 1.0, "T": length, "tokens_per_s": speed}
            for model, speeds in {"transformer": (4.0, 1.0), "aft": (1.0, 4.0), "rwkv": (5.0, 2.0),
                                  "linformer": (1.0, 0.5)}.items()
            for length, speed in zip((512.0, 2048.0), speeds, strict=True)]
    assert crossovers(rows, "T") == ("against `transformer`: `aft` ahead from T = 1k on; `linformer` behind at T = 2k, "
                                     "the longest; `rwkv` ahead at every T measured")
    assert crossovers([row for row in rows if row["model"] != "transformer"], "T") is None
