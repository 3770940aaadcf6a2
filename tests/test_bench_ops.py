"""`zoo bench ops`: equal work on both sides, honest rows, and nothing left out in silence."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo import ZooError
from zoo.bench import ops as measuring
from zoo.bench import ops_peers
from zoo.bench.ops import EAGER, ZOO, Ceilings, Found, Row, bench_ops, zoo_sides
from zoo.bench.ops_cases import BLOCK, DIRECTIONS, LENGTHS, OPS, RANK, TOKENS, Case, build, cases
from zoo.bench.ops_peers import Peer, Side
from zoo.bench.ops_report import COLUMNS, from_csv, left_out, plot, table, to_csv
from zoo.bench.timing import Timing
from zoo.cli import main
from zoo.ops import aft
from zoo.revision import source_commit

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = {"causal_attention": (2, 32, 32), "squared_relu": (1, 24, 40), "linears": (1, 24, 40),
         "linear_cross_entropy": (1, 24, 300),
         **dict.fromkeys(("aft_full", "aft_simple", "aft_local", "aft_full_learnt", "aft_local_learnt", "add_norm",
                          "token_mix", "ddlerp"), (1, 24, 24))}


def small(op: str, T: int = 150) -> Case:
    return Case(op, 2, T, *SMALL.get(op, (2, 16, 16)), torch.float32)


def row(op: str = "wkv6", impl: str = ZOO, direction: str = DIRECTIONS[1], T: int = 64, ms: float = 2.0, **more) -> Row:
    case = Case(op, 64 // T or 1, T, 2, 16, 16, torch.float32)
    return Row(**{"case": case, "impl": impl, "direction": direction, "timing": Timing(ms / 1e3, ms / 2e3, ms / 5e2, 5),
                  "peak_mib": None, "flops": 8e9, "bytes": 1e6, "error": 0.0} | more)


@pytest.mark.parametrize("op", OPS)
def test_shapes_on_a_gpu(op: str) -> None:
    found = cases(op, GPU)
    assert len(set(found)) == len(found)
    assert {case.dtype for case in found} == {torch.bfloat16}
    swept = [case for case in found if case.kind == found[0].kind and case.B * case.T == TOKENS]
    if op == "linear_cross_entropy":  # it flattens its tokens
        assert {(case.B * case.T, case.K, case.V) for case in found} == {
            (32768, 768, 8192), (16384, 768, 50304), (32768, 512, 256)}
    elif op in ("aft_full_learnt", "aft_local_learnt"):
        assert [(case.B, case.T) for case in found] == [(32, 1024)]
    else:
        assert tuple(case.T for case in swept) == LENGTHS
        assert {case.T for case in cases(op, GPU, [512])} == {512}


def test_every_op_with_kernels_is_measured() -> None:
    kernels = {path.stem.removesuffix("_triton") for path in Path(aft.__file__).parent.glob("*_triton.py")}
    assert len(kernels) > 10
    assert not [name for name in kernels if not any(name in op for op in OPS)]


def test_the_published_shapes_are_among_them() -> None:
    def has(op: str, *shape: int) -> bool:
        return Case(op, *shape, torch.bfloat16) in cases(op, GPU)

    for T in (1024, 4096, 16384):
        assert has("causal_attention", 16384 // T, T, 16, 64, 64)
        assert has("causal_attention", 16384 // T, T, 8, 128, 128)
    assert has("wkv6", 32, 1024, 8, 64, 64)
    assert has("linear_attention", 32, 1024, 8, 64, 64)
    assert has("linear_attention", 32, 1024, 8, 256, 64)
    assert has("favor_attention", 32, 1024, 8, 64, 64)
    assert has("favor_attention", 8, 4096, 16, 64, 64)
    assert has("aft_full", 32, 1024, 1, 512, 512)
    assert has("aft_full", 8, 4096, 1, 1024, 1024)
    assert has("aft_simple", 32, 1024, 1, 512, 512)


@pytest.mark.parametrize("op", OPS)
def test_a_problem_is_the_ops_own_and_the_same_each_time(op: str) -> None:
    problem, again = build(small(op), CPU), build(small(op), CPU)
    side = zoo_sides(problem)[EAGER]()
    y = side.forward()
    outputs = (y,) if isinstance(y, Tensor) else y
    assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in problem.dy]
    gradients = torch.autograd.grad(outputs, side.leaves, problem.dy)
    assert all(bool(gradient.any()) for gradient in gradients)
    given = {"projection", "targets", "table", "past_table"}
    assert len(side.leaves) == len(problem.inputs.keys() - given)
    for name, x in problem.inputs.items():
        assert torch.equal(x, again.inputs[name]), name
    forward, both = (problem.bytes(direction) for direction in DIRECTIONS)
    assert 2 * forward < both <= 3 * forward + sum(x.nbytes for x in problem.dy)
    assert problem.flops(DIRECTIONS[1]) >= 3 * problem.flops(DIRECTIONS[0])


def test_trained_parameters_stay_in_float32() -> None:
    case = dataclasses.replace(small("wkv6"), dtype=torch.bfloat16)
    dtypes = {name: x.dtype for name, x in build(case, CPU).inputs.items()}
    assert dtypes.pop("u") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    case = dataclasses.replace(small("aft_full"), dtype=torch.bfloat16)
    assert build(case, CPU).inputs["bias"].dtype == torch.float32


@pytest.mark.parametrize("T", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_flops_count_what_is_seen(T: int) -> None:
    """Pairs of query and key, counted one by one; two products of each, an addition with every multiplication."""
    tokens = range(T)
    each = 2 * 2 * 16 * 2 * 2  # FLOPs of a multiply-add, products, head size, B, H
    causal = build(dataclasses.replace(small("causal_attention", T), K=16, V=16), CPU)
    assert causal.flops("forward") == each * sum(t + 1 for t in tokens)
    blocks = build(small("block_attention", T), CPU)
    assert blocks.flops("forward") == each * sum(t % BLOCK + 1 + t // BLOCK * RANK for t in tokens)
    assert blocks.flops("forward+backward") == 3.5 * blocks.flops("forward")


PEERS = [(op, peer) for op in OPS for peer in ops_peers.peers(op)]


@pytest.mark.parametrize(("op", "peer"), PEERS, ids=[f"{op}-{peer.name}" for op, peer in PEERS])
def test_peers_do_the_same_work(op: str, peer: Peer) -> None:
    if why := peer.missing(small(op), CPU):
        pytest.skip(f"{peer.name}: {why}")
    problem = build(small(op), CPU)
    expected: list[Tensor] = []
    assert measuring._difference(zoo_sides(problem)[EAGER](), problem, expected) == 0
    assert measuring._difference(peer.make(problem), problem, expected) <= (1e-2 if peer.tolerance > 0.05 else 1e-5)


def test_every_library_of_the_comparison_is_known() -> None:
    known = {peer.name: peer for peer in ops_peers._PEERS}
    assert set(known) >= {"sdpa-flash", "sdpa-cudnn", "fla", "liger", "cut-cross-entropy", "performer-pytorch", "torch",
                          "torch-compile"}
    assert [name for name, peer in known.items() if peer.tunes] == ["fla"]
    absent = dataclasses.replace(known["torch"], module="no_such_module", package="no-such")
    assert absent.missing(small("aft_full"), GPU) == "not installed (pip install no-such)"
    assert known["sdpa-flash"].missing(small("causal_attention"), CPU) == "runs on a GPU only"
    assert "up to T=8192" in known["sdpa-mask"].missing(small("block_attention", 8193), GPU)
    assert known["sdpa-mask"].missing(small("block_attention", 8192), GPU) == ""
    assert "shapes of bars only" in known["torch-compile-safe"].missing(small("aft_full", 512), GPU)
    assert known["torch-compile-safe"].missing(small("aft_full", 1024), GPU) == ""


def test_rows_and_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem) -> Side:
        return Side(lambda: problem.zoo() * 1.5, problem.leaves)

    def nan(problem) -> Side:
        return Side(lambda: problem.zoo() * torch.nan, problem.leaves)

    def broken(problem) -> Side:
        raise RuntimeError("no\nimage")

    many = [Peer("right", ("aft_simple",), lambda problem: Side(problem.zoo, problem.leaves), on_cpu=True)]
    many += [Peer(make.__name__, ("aft_simple",), make, on_cpu=True) for make in (wrong, nan, broken)]
    many.append(Peer("absent", ("aft_simple",), wrong, module="no_such_module", package="absent-package"))
    monkeypatch.setattr(ops_peers, "peers", lambda op: many)
    told: list[tuple[str, float]] = []
    kept: list[list[Row]] = []
    found, = bench_ops(["aft_simple"], device=CPU, lengths=[8, 16], budget=0, keep=kept.append,
                       progress=lambda op, done: told.append((op, done)))
    assert [len(rows) for rows in kept] == [4, 4]
    assert [row for rows in kept for row in rows] == found.rows
    assert told == [("importing", 0), ("aft_simple", 0), ("aft_simple", 0.5)]
    assert [(row.case.T, row.direction, row.impl) for row in found.rows] == [
        (T, direction, impl) for T in (8, 16) for direction in DIRECTIONS for impl in (EAGER, "right")]
    assert all(0 < row.timing.p20 <= row.timing.p50 <= row.timing.p80 and row.peak_mib is None for row in found.rows)
    said = {line.split()[2]: line for line in left_out(found)}
    assert set(said) == {ZOO, "wrong", "nan", "broken", "absent"}
    assert all("(aft_simple, H1 K64 V64 T=8,16)" in line for line in said.values())
    assert "Triton's interpreter" in said[ZOO]
    assert "a relative error of 0.5, 0.05 allowed" in said["wrong"]
    assert "not finite" in said["nan"]
    assert "RuntimeError: no image" in said["broken"]
    assert "not installed (pip install absent-package)" in said["absent"]
    alone, = bench_ops(["aft_simple"], device=CPU, lengths=[8], peers=False, budget=0)
    assert {row.impl for row in alone.rows} == {EAGER}


def test_a_reference_is_never_timed_as_a_kernel() -> None:
    """Where the kernels are asked for but none of the zoo's own ops runs, that is seen."""
    with torch.no_grad(), measuring._Called() as called:
        torch.ones(2) + 1
    assert not called.ours

    @torch.library.custom_op("zoo::called_in_a_test", mutates_args=())
    def op(x: Tensor) -> Tensor:
        return x + 1

    with measuring._Called() as called:
        op(torch.ones(2))
    assert called.ours


def test_shapes_of_bars_come_first_and_the_rest_may_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []
    monkeypatch.setattr(measuring, "_measure", lambda case, *rest: order.append((case.op, case.T)))
    found = list(bench_ops(["aft_full", "wkv6"], device=CPU, lengths=[512, 1024, 4096]))
    assert order == [("aft_full", 1024), ("wkv6", 1024), ("aft_full", 512), ("aft_full", 4096), ("wkv6", 512),
                     ("wkv6", 4096)]
    assert [each.op for each in found] == ["aft_full", "wkv6"] * 2
    assert {str(case) for case in cases("aft_full", GPU) if case.first} == {
        "B32 T1024 H1 K512 V512", "B8 T4096 H1 K1024 V1024"}
    del order[:]
    cut = list(bench_ops(["aft_full", "wkv6"], device=CPU, lengths=[1024], limit=-1))
    assert order == []
    assert all("not begun within" in why for each in cut for _, why in each.left_out)


def test_ceilings_bound_both_ways() -> None:
    assert Ceilings(10.0, 2.0).floor(20, 2) == 2
    assert Ceilings(10.0, 2.0).floor(10, 8) == 4
    found = measuring.measure_ceilings(CPU)
    assert found.flops > 1e8
    assert found.bytes > 1e7


def test_csv_has_exactly_the_columns() -> None:
    head, line, second = csv.reader(to_csv([row(), row(impl="fla", peak_mib=12.345)], CPU).splitlines())
    assert ",".join(head) == ("op,impl,direction,B,T,H,K,V,dtype,ms_p50,ms_p20,ms_p80,peak_mib,gpu,torch,triton,commit"
                              ) == ",".join(COLUMNS)
    fields = dict(zip(head, line, strict=True))
    assert [fields[name] for name in ("op", "impl", "direction", "B", "T", "H", "K", "V", "dtype")] == [
        "wkv6", "zoo", "forward+backward", "1", "64", "2", "16", "16", "float32"]
    assert [fields[name] for name in ("ms_p50", "ms_p20", "ms_p80", "peak_mib", "gpu")] == ["2", "1", "4", "", "cpu"]
    assert fields["torch"] == torch.__version__
    assert second[COLUMNS.index("peak_mib")] == "12.3"


def test_rows_of_a_run_take_the_place_of_the_same_rows() -> None:
    before = to_csv([row(T=16), row(T=64), row("aft_simple", "torch")], CPU, commit="0123abc")
    again = to_csv([row(ms=4.0, T=64), row(impl="fla")], CPU, before=before, commit="fff")
    lines = [dict(zip(COLUMNS, line, strict=True)) for line in csv.reader(again.splitlines())][1:]
    assert [(line["op"], line["impl"], line["T"], line["ms_p50"], line["commit"]) for line in lines] == [
        ("aft_simple", "torch", "64", "2", "0123abc"), ("wkv6", "zoo", "16", "2", "0123abc"),
        ("wkv6", "zoo", "64", "4", "fff"), ("wkv6", "fla", "64", "2", "fff")]
    assert to_csv([], CPU, before=again) == again
    other = again.replace(",cpu,", ",GPU X,")
    assert to_csv([], CPU, before=again + other.split("\n", 1)[1]).count("\n") == 9  # another device's rows are others
    read = from_csv(again, "cpu")
    assert [(each.case, each.impl, each.direction) for each in read] == [
        (each.case, each.impl, each.direction) for each in (
            row("aft_simple", "torch"), row(T=16), row(T=64), row(impl="fla"))]
    assert [each.timing.p50 for each in read] == [0.002, 0.002, 0.004, 0.002]
    assert from_csv(other, "cpu") == []
    assert len(from_csv(other, "GPU X")) == 4
    assert to_csv([row()], CPU).splitlines()[1].split(",")[-1] == (source_commit(12) or "")


HEAD = ",".join(COLUMNS)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", HEAD + "\n1,2\n", HEAD + "\n" + "x," * 16 + "x\n", "\x00\n\n"])
def test_rows_are_not_added_to_another_kind_of_file(text: str) -> None:
    with pytest.raises(ZooError, match="allowed is a table of op, impl"):
        to_csv([row()], CPU, before=text)


def test_the_table_compares() -> None:
    rows = [row(impl=ZOO, ms=2.0), row(impl=EAGER, ms=8.0), row(impl="fla", ms=6.0, error=0.0123)]
    columns = {column.header: list(column.cells) for column in table(Found("wkv6", rows), Ceilings(8e12, 1e12)).columns}
    assert columns["of zoo"] == ["1.00", "4.00", "3.00"]
    assert columns["TFLOP/s"] == ["4", "1", "1.33"]
    assert columns["of floor"] == ["50%", "12%", "17%"]  # 1 us for the bytes, 1 ms for the FLOPs
    assert columns["error"] == ["", "", "1.2e-02"]
    without = table(Found("wkv6", rows[1:]), Ceilings(8e12, 1e12))
    assert list(without.columns[5].cells) == ["1.00", "0.75"]  # then the reference is the measure


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_plot_is_drawn(tmp_path: Path) -> None:
    rows = [row(impl=impl, T=T, ms=ms) for impl, ms in ((ZOO, 1.0), (EAGER, 3.0), ("fla", 2.0)) for T in (16, 32, 64)]
    rows += [row("linear_cross_entropy", impl) for impl in (ZOO, "liger")]
    for path in (tmp_path / "a.svg", tmp_path / "b.svg"):
        plot(rows, path, "Ops")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "<svg" in text
    for words in ("fla", "liger", "zoo-eager", "wkv6", "linear_cross_entropy"):
        assert f"<!-- {words}" in text, words
    with pytest.raises(ZooError, match=r"allowed: a name that ends in \.svg"):
        plot(rows, tmp_path / "a.txt", "Ops")
    with pytest.raises(ZooError, match="cannot write"):
        plot(rows, tmp_path / "missing" / "a.svg", "Ops")
    with pytest.raises(ZooError, match="nothing was measured"):
        plot([], tmp_path / "a.svg", "Ops")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ZooError, match=r"pip install 'zoo-lm\[bench\]'"):
        plot([row()], Path("a.svg"), "Ops")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str) -> tuple[int, str, str]:
        """-> (exit status, stdout, stderr)"""
        with pytest.raises(SystemExit) as stop:
            main(["bench", "ops", "--device", "cpu", *arguments])
        return stop.value.code, *capsys.readouterr()

    return call


def test_the_command(run, tmp_path: Path) -> None:
    out = tmp_path / "ops.csv"
    status, said, err = run("--ops", "aft_simple, linear_cross_entropy", "--lengths", "8,16", "--seconds", "0", "--csv",
                            str(out))
    assert (status, err) == (0, "")
    for words in ("aft_simple: milliseconds", "B32 T16 H1 K64 V64", "zoo-eager", "left out: zoo (aft_simple",
                  "left out: torch-compile", "left out: liger", "left out: cut-cross-entropy"):
        assert words in said, words
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {line["op"] for line in rows} == {"aft_simple", "linear_cross_entropy"}
    assert {line["impl"] for line in rows} == {"zoo-eager", "torch"}
    status, said, _ = run("--ops", "aft_simple", "--lengths", "8", "--seconds", "0", "--no-peers")
    assert status == 0
    assert "torch" not in said


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled beforehand in another process, captured in graphs, in time and memory."""
    out = tmp_path / "ops.csv"
    with pytest.raises(SystemExit) as stop:
        main(["bench", "ops", "--ops", "aft_simple", "--lengths", "64", "--seconds", "0", "--workers", "2", "--tuning",
              "250", "--commit", "0123abc", "--csv", str(out)])
    said = capsys.readouterr()
    assert stop.value.code == 0, said
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {(line["impl"], line["direction"]) for line in rows} == {
        (impl, direction) for impl in ("zoo", "zoo-eager", "torch", "torch-compile")
        for direction in DIRECTIONS}, said
    assert "launches" not in said.out
    for line in rows:
        assert 0 < float(line["ms_p20"]) <= float(line["ms_p50"]) <= float(line["ms_p80"])
        assert float(line["peak_mib"]) > 0
        assert (line["gpu"], line["commit"]) == (torch.cuda.get_device_name(), "0123abc")


def test_what_is_measured_is_kept(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ops.csv"

    def stops(*args: object, **kwargs):
        kwargs["keep"]([row()])
        assert len(out.read_text().splitlines()) == 2
        yield Found("wkv6", [row()])
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "bench_ops", stops)
    assert run("--csv", str(out))[0] == 130
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (("--ops", "softmax"), "unknown op 'softmax'; allowed: add_norm, aft_conv, aft_full"),
    (("--lengths", "12,x"), "lengths: 'x' is not allowed: whole numbers"),
    (("--lengths", "0"), "lengths=[0] are not allowed"),
    (("--workers", "-1"), "workers=-1 is not allowed: whole numbers from 0"),
    (("--csv", __file__), "rows cannot be added to this file"),
    (("--csv", "/missing/ops.csv"), "cannot write /missing/ops.csv"),
    (("--plot", "ops.jpeg2"), "a name that ends in .svg"),
])
def test_wrong_options(run, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
