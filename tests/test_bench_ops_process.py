"""The processes of `zoo bench ops`: bounded, and what goes wrong in one stays there and is told."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor import config

from zoo.bench import ops as measuring
from zoo.bench import ops_peers, ops_prepare
from zoo.bench.ops import EAGER, ZOO, Found, bench_ops
from zoo.bench.ops_cases import DIRECTIONS, LENGTHS, Case, cases
from zoo.bench.ops_peers import Peer, Side
from zoo.bench.ops_process import THREADS, EndedError, FailedError, Process, reason
from zoo.errors import ZooError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WAIT = 200.0  # seconds that importing may take on a busy machine


def small(op: str, T: int = 8, H: int = 1) -> Case:
    return Case(op, 2, T, H, 16, 16, torch.float32)


@pytest.fixture
def process() -> Iterator[Process]:
    started = Process()
    yield started
    started.end()


def test_a_process_answers_fails_and_ends(process: Process) -> None:
    assert process.ask(divmod, 17, 5, limit=WAIT) == (3, 2)
    assert process.ask(print, "what a library says") is None  # and the answers stay whole
    assert process.ask(eval, "__import__('torch._inductor.config')._inductor.config.compile_threads") == THREADS
    with pytest.raises(FailedError, match="ValueError: invalid literal"):
        process.ask(int, "x")
    assert process.ask(os.getpid) not in (os.getpid(), None)
    process.ask(os.write, 2, b"a fault\nin a library\n\n")
    with pytest.raises(EndedError, match=r"its process ended: in a library \(exit status 3\)"):
        process.ask(os._exit, 3)
    with pytest.raises(EndedError, match="its process ended"):
        process.ask(os.getpid)
    process.end()
    process.end()


def test_one_that_takes_too_long_ends_with_what_it_started(process: Process) -> None:
    child = process.ask(eval, "__import__('subprocess').Popen(['sleep', '600']).pid", limit=WAIT)
    os.kill(child, 0)
    began = time.monotonic()
    with pytest.raises(EndedError, match="it took longer than 0 s"):
        process.ask(time.sleep, 600, limit=0.2)
    assert time.monotonic() - began < 20
    state = Path(f"/proc/{child}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":  # nobody has asked how it ended
            return
        time.sleep(0.1)
    pytest.fail("what it started goes on")


def test_who_waits_is_told_of_a_kill(process: Process) -> None:
    process.ask(os.getpid, limit=WAIT)
    threading.Timer(0.3, process.kill).start()
    with pytest.raises(EndedError, match="exit status -9"):
        process.ask(time.sleep, 600)


def test_reasons_are_one_line() -> None:
    assert reason(torch.OutOfMemoryError("CUDA: a page of figures")) == "out of memory"
    assert reason(ZooError("what is\nallowed")) == "what is allowed"
    assert reason(KeyError("x")) == "KeyError: 'x'"


def test_an_op_in_a_process_of_its_own() -> None:
    """As on a GPU: the same rows as here."""
    apart, = bench_ops(["aft_simple"], device=CPU, lengths=[8], peers=False, budget=0, apart=True)
    here, = bench_ops(["aft_simple"], device=CPU, lengths=[8], peers=False, budget=0, apart=False)
    assert [(row.case, row.impl, row.direction, row.bytes) for row in apart.rows] == [
        (row.case, row.impl, row.direction, row.bytes) for row in here.rows]
    assert {row.impl for row in apart.rows} == {EAGER}
    assert apart.left_out == here.left_out != {}


def test_a_process_that_ends_takes_one_case_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is replaced: after an end, a failure, and where a case left it broken."""
    started: list[OneCase] = []
    answers = iter([EndedError("its process ended: no memory"), "good", FailedError("RuntimeError: a fault"), "spoiled",
                    "good"])

    class OneCase:
        def __init__(self, *ops: str) -> None:
            assert ops == ()  # nothing to import without peers
            started.append(self)
            self.ended = False

        def ask(self, function, case: Case, *arguments, limit: float) -> tuple[Found, bool]:
            assert function is measuring.measure_case
            assert not self.ended
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            found = Found(case.op)
            found.leave_out(answer, f"within {limit:.0f} s", case)
            return found, answer == "good"

        def ready(self, device: torch.device) -> None:
            assert not self.ended

        def end(self) -> None:
            self.ended = True

    monkeypatch.setattr(measuring, "Process", OneCase)
    found, = bench_ops(["wkv6"], device=CPU, lengths=[2, 3, 4, 5, 6], peers=False, apart=True)
    assert {who_why: [case.T for case in left] for who_why, left in found.left_out.items()} == {
        ("all", "its process ended: no memory"): [2], ("good", "within 300 s"): [3, 6],
        ("all", "RuntimeError: a fault"): [4], ("spoiled", "within 300 s"): [5]}
    assert len(started) == 4
    assert all(process.ended for process in started)


def test_what_peers_import_is_there_beforehand() -> None:
    process = Process("linear_cross_entropy", "no op of this name")
    process.ready(CPU)
    modules = "list(__import__('sys').modules)"
    try:
        assert "torch._inductor.compile_fx" in process.ask(eval, modules)
        process.kill()
        process.ready(CPU)  # told when it is asked
        with pytest.raises(EndedError):
            process.ask(eval, modules)
    finally:
        process.end()


def test_what_is_refused_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(problem) -> Side:
        raise AssertionError

    monkeypatch.setattr(ops_peers, "peers", lambda op: [Peer("slow", (op,), make, on_cpu=True)])
    found, sound = measuring.measure_case(small("wkv6"), CPU, True, 0.0, {"slow": "it took minutes to compile"})
    assert sound
    assert found.left_out["slow", "it took minutes to compile"] == [small("wkv6")]


def test_tuning_is_bounded_and_its_failure_told(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer("nobody", ("wkv6",), lambda problem: Side(problem.zoo, []), on_cpu=True, tunes=True)
    said = ops_prepare.tune(process, peer, small("wkv6"), CPU, WAIT)
    assert "its first call failed: unknown peer 'nobody'; allowed: fla" in said
    os.kill(process.ask(os.getpid), signal.SIGSTOP)  # or its answer may be there at once
    assert "longer than 0 s" in ops_prepare.tune(process, peer, small("wkv6"), CPU, 0.0)
    asked: list[Case] = []
    monkeypatch.setattr(ops_prepare, "tune", lambda process, peer, case, *rest: asked.append(case) or "it was long")
    monkeypatch.setattr(ops_peers, "peers", lambda op: [peer])
    found, = bench_ops(["wkv6"], device=CPU, lengths=[4, 8], budget=0)
    assert [case.T for case in asked] == [4]  # once a head size
    assert [case.T for case in found.left_out["nobody", "it was long"]] == [4, 8]


def test_first_calls_go_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: what the others do."""
    called: list[tuple[str, bool]] = []

    def make(problem) -> Side:
        def forward() -> torch.Tensor:
            called.append((str(problem.case), torch.is_grad_enabled()))
            return problem.zoo()

        return Side(forward, problem.leaves)

    monkeypatch.setattr(ops_peers, "peers", lambda op: [Peer("one", (op,), make, on_cpu=True)])
    ops_prepare.first_call("one", small("aft_full", 9), CPU)
    assert called == [("B2 T9 H1 K16 V16", True), ("B2 T9 H1 K16 V16", False)]
    with pytest.raises(ZooError, match="unknown peer 'nobody'"):
        ops_prepare.first_call("nobody", small("aft_full"), CPU)
    with config.patch(autotune_local_cache=True):
        ops_prepare.compile_one("one", small("aft_full"), CPU)
        assert config.autotune_local_cache is False  # nothing is chosen by times taken in a crowd


def test_compiling_beforehand_is_bounded() -> None:
    """In other processes. One that fails is left to the measuring; those that are cut off, or not begun, are named."""
    failing = ("nobody", small("aft_simple", 4))
    assert ops_prepare.compile_all([failing], CPU, workers=2, limit=WAIT) == {}
    began = time.monotonic()
    work = [failing, ("nobody", small("aft_simple", 5))]
    unfinished = ops_prepare.compile_all(work, CPU, workers=1, limit=0.05)
    assert list(unfinished) == work
    assert "it took longer than 0 s; what it has compiled is kept" in unfinished[work[0]]
    assert "it had not begun within 0 s" in unfinished[work[1]]
    assert time.monotonic() - began < 2
    assert ops_prepare.compile_all([], CPU, workers=2, limit=1) == {}


def test_what_is_compiled_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [Peer("slow", ("aft_simple",), None, compiles=True), Peer("plain", ("aft_simple",), None),
            Peer("absent", ("aft_simple",), None, compiles=True, module="no_such_module")]
    monkeypatch.setattr(ops_peers, "peers", lambda op: many)
    planned = cases("aft_simple", GPU)
    units = ops_prepare.units(planned, GPU, peers=True)
    assert units[0] == ("slow", planned[LENGTHS.index(1024)])  # what comes first and takes longest
    assert [case.T for name, case in units if name == ZOO] == [min(LENGTHS), max(LENGTHS)]
    assert {case for name, case in units if name == "slow"} == set(planned)
    assert {name for name, _ in units} == {ZOO, "slow"}
    assert {name for name, _ in ops_prepare.units(planned, GPU, peers=False)} == {ZOO}
    losses = ops_prepare.units(cases("linear_cross_entropy", GPU), GPU, peers=False)
    assert [case.V for _, case in losses] == [8192, 50304, 256]


@pytest.mark.gpu
def test_a_call_that_cannot_be_captured_leaves_nothing() -> None:
    from zoo.bench.timing import captured

    x = torch.ones(1 << 26, device=GPU)  # 256 MiB

    def waits() -> None:
        if (x + 1).sum().item() < 0:
            raise AssertionError

    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="synchroniz"):
            captured(waits, GPU)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.memory_reserved() < before + x.nbytes // 2
    assert torch.cuda.get_sync_debug_mode() == 0
    y = torch.zeros_like(x)
    replay = captured(lambda: y.add_(x), GPU)
    y.zero_()
    replay()
    assert torch.equal(y, x)


@pytest.mark.gpu
def test_a_case_leaves_no_memory_in_use() -> None:
    """Products of matrices, of which a library keeps workspaces, on several streams and in graphs."""
    case = Case("linear_cross_entropy", 32, 1024, 1, 768, 8192, torch.bfloat16)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(2):
        found, sound = measuring.measure_case(case, GPU, False, 0.0, {})
        assert sound
        assert torch.cuda.memory_reserved() <= before
    assert {row.impl for row in found.rows} == {ZOO, EAGER}
    assert not found.launched


@pytest.mark.gpu
def test_a_gpu_s_rows_come_from_another_process() -> None:
    before = torch.cuda.memory_reserved()
    found = list(bench_ops(["aft_simple"], device=GPU, lengths=[64], peers=False, budget=0))
    rows = [row for each in found for row in each.rows]
    assert {(row.impl, row.direction) for row in rows} == {(impl, d) for impl in (ZOO, EAGER) for d in DIRECTIONS}
    assert all(row.peak_mib for row in rows)
    assert torch.cuda.memory_reserved() == before
