"""The rows of `zoo bench ops` as a table, a CSV and a plot."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from zoo.bench.ops import EAGER, ZOO, Ceilings, Found, Row
from zoo.bench.ops_cases import DIRECTIONS, OPS, Case
from zoo.bench.timing import Timing
from zoo.errors import ZooError
from zoo.revision import source_commit

COLUMNS = ("op", "impl", "direction", "B", "T", "H", "K", "V", "dtype", "ms_p50", "ms_p20", "ms_p80", "peak_mib", "gpu",
           "torch", "triton", "commit")
FORMATS = ".svg", ".png", ".pdf"
PANELS = 3  # in a row of the plot


def to_csv(rows: Sequence[Row], device: torch.device, *, before: str = "", commit: str | None = None) -> str:
    """`COLUMNS`; peak_mib is empty where it cannot be measured, triton and commit where there are none.

    `before`: such a table, whose rows stay but where one of `rows` is of the same side, shape, direction and GPU.
    `commit`: of the measured code; found out if None. Raises ZooError for a table of another kind.
    """
    commit = source_commit(12) if commit is None else commit
    same = gpu_name(device), torch.__version__, _version("triton"), commit or ""
    lines = {_key(line): line for line in _lines(before)}
    for row in rows:
        case, timing = row.case, row.timing
        line = [str(value) for value in (
            case.op, row.impl, row.direction, case.B, case.T, case.H, case.K, case.V, _dtype(case),
            *(f"{1e3 * value:.5g}" for value in (timing.p50, timing.p20, timing.p80)),
            "" if row.peak_mib is None else f"{row.peak_mib:.1f}", *same)]
        lines[_key(line)] = line
    ordered = sorted(lines.values(), key=_order)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([COLUMNS, *ordered])
    return out.getvalue()


def from_csv(text: str, gpu: str) -> list[Row]:
    """The rows of such a table that were measured on a kind of device; what a plot does not show is 0."""
    found = []
    for line in _lines(text):
        cell = dict(zip(COLUMNS, line, strict=True))
        if cell["gpu"] == gpu:
            B, T, H, K, V = _shape_of(cell)
            p50, p20, p80 = (float(cell[f"ms_p{q}"]) / 1e3 for q in (50, 20, 80))
            found.append(Row(Case(cell["op"], B, T, H, K, V, getattr(torch, cell["dtype"])), cell["impl"],
                             cell["direction"], Timing(p50, p20, p80, 0), None, 0.0, 0.0, 0.0))
    return found


def _lines(text: str) -> list[list[str]]:
    """Those after the head. Raises ZooError where they are not what this program writes."""
    lines = list(csv.reader(text.splitlines()))
    try:
        for line in lines[1:]:
            cell = dict(zip(COLUMNS, line, strict=True))
            if min(_shape_of(cell)) < 1 or not isinstance(getattr(torch, cell["dtype"]), torch.dtype):
                raise ValueError
            for q in (50, 20, 80):
                float(cell[f"ms_p{q}"])
        if lines and tuple(lines[0]) != COLUMNS:
            raise ValueError
    except (ValueError, AttributeError):
        raise ZooError(f"rows cannot be added to this file: allowed is a table of {', '.join(COLUMNS)}") from None
    return lines[1:]


def _shape_of(cell: Mapping[str, str]) -> tuple[int, int, int, int, int]:
    B, T, H, K, V = (int(cell[name]) for name in "BTHKV")
    return B, T, H, K, V


def _key(line: Sequence[str]) -> tuple[str, ...]:
    """What a row is of: all columns before the times, and the GPU."""
    return (*line[:COLUMNS.index("ms_p50")], line[COLUMNS.index("gpu")])


def _order(line: Sequence[str]) -> Any:
    """By GPU and op; head sizes ascending, tokens descending, T ascending; forward first; the zoo before the others."""
    cell = dict(zip(COLUMNS, line, strict=True))
    B, T, H, K, V = _shape_of(cell)
    op = OPS.index(cell["op"]) if cell["op"] in OPS else len(OPS)
    rank = [ZOO, EAGER].index(cell["impl"]) if cell["impl"] in (ZOO, EAGER) else 2
    return cell["gpu"], op, cell["op"], H, K, V, -B * T, T, cell["direction"], rank, cell["impl"]


def gpu_name(device: torch.device) -> str:
    """What the column `gpu` says."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def table(found: Found, ceilings: Ceilings) -> Table:
    """One op for a terminal. `of zoo`: how many times as long as the zoo's kernels take, or its reference without."""
    shown = Table(title=f"{found.op}: milliseconds; floor at {ceilings.flops / 1e12:.4g} TFLOP/s, "
                        f"{ceilings.bytes / 1e12:.3g} TB/s")
    for column in ("shape", "impl", "direction"):
        shown.add_column(column)
    for column in ("ms", "20 to 80 %", "of zoo", "peak MiB", "TFLOP/s", "TB/s", "of floor", "error"):
        shown.add_column(column, justify="right")
    base = {(row.case, row.direction): row.timing.p50 for impl in (EAGER, ZOO) for row in found.rows
            if row.impl == impl}
    last: tuple[Case, str] | None = None
    for row in found.rows:
        key, timing = (row.case, row.direction), row.timing
        if last not in (None, key):
            shown.add_section()
        own = base.get(key)
        shown.add_row(
            "" if last == key else str(row.case), row.impl, row.direction, f"{1e3 * timing.p50:.4g}",
            f"{1e3 * timing.p20:.4g} to {1e3 * timing.p80:.4g}", f"{timing.p50 / own:.2f}" if own else "",
            "" if row.peak_mib is None else f"{row.peak_mib:,.0f}",
            f"{row.flops / timing.p50 / 1e12:.3g}" if row.flops else "", f"{row.bytes / timing.p50 / 1e12:.3g}",
            f"{ceilings.floor(row.flops, row.bytes) / timing.p50:.0%}", f"{row.error:.1e}" if row.error else "")
        last = key
    return shown


def left_out(found: Found) -> list[str]:
    """A line for everything that could not be measured, or not as the others were, and why."""
    lines = []
    for (who, why), cases in found.left_out.items():
        kinds: dict[tuple[int, int, int], list[str]] = {}
        for case in cases:
            kinds.setdefault(case.kind, []).append(str(case.T))
        shapes = "; ".join(f"H{H} K{K} V{V} T={','.join(dict.fromkeys(T))}" for (H, K, V), T in kinds.items())
        lines.append(f"left out: {who} ({found.op}, {shapes}): {why}")
    return lines + [f"timed with its launches: {impl} ({found.op}): no CUDA graph holds it: {why}"
                    for impl, why in sorted(found.launched)]


def check_plot(path: Path) -> None:
    """Raise ZooError if no plot can be drawn, or not into this file."""
    if path.suffix not in FORMATS:
        raise ZooError(f"a plot in {path} is not allowed: a name that ends in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ZooError("a plot needs matplotlib, which is not installed: pip install 'zoo-lm[bench]'")


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Forward and backward, a panel an op: ms against T for the head size with most lengths, both logarithmic. Where
    there is only one length, its shapes stand side by side.
    """
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

    both = [row for row in rows if row.direction == DIRECTIONS[-1]]
    ops, impls = (list(dict.fromkeys(names)) for names in ([row.case.op for row in both], [row.impl for row in both]))
    if not ops:
        raise ZooError("nothing was measured, so there is nothing to plot")
    across = min(PANELS, len(ops))
    down = -(-len(ops) // across)
    palette = matplotlib.colormaps["tab20"]  # ten dark colours, each with a light one after it: the dark ones first
    colours = {impl: palette((2 * index + index // 10) % 20) for index, impl in enumerate(impls)}
    figure = Figure(figsize=(5 * across, 3.6 * down + 0.4), layout="constrained")
    figure.suptitle(title)
    for place, op in enumerate(ops, 1):
        panel = figure.add_subplot(down, across, place)
        shown = _widest([row for row in both if row.case.op == op])
        lengths = sorted({row.case.T for row in shown})
        along_lengths = len(lengths) > 1
        shapes = list(dict.fromkeys(_shape(row.case) for row in shown))
        for impl in dict.fromkeys(row.impl for row in shown):
            mine = [row for row in shown if row.impl == impl]
            panel.plot([row.case.T if along_lengths else shapes.index(_shape(row.case)) for row in mine],
                       [1e3 * row.timing.p50 for row in mine], color=colours[impl], label=impl, marker="o",
                       markersize=4 if along_lengths else 7, linewidth=2.2 if impl == ZOO else 1.2,
                       zorder=3 if impl == ZOO else 2,
                       linestyle=("--" if impl == EAGER else "-") if along_lengths else "none")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        if along_lengths:
            panel.set_xscale("log", base=2)
            panel.set_xticks(lengths, [str(T) for T in lengths])
        else:
            panel.set_xticks(range(len(shapes)), shapes)
            panel.margins(x=0.3)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(labelsize=8)
        panel.set_title(f"{op} ({_heads(shown[0].case)})" if along_lengths else op, fontsize=10)
        panel.set_xlabel("T" if along_lengths else "", fontsize=9)
        panel.set_ylabel("ms, forward + backward", fontsize=9)
        panel.grid(True, which="major", linewidth=0.4, alpha=0.6)
        panel.legend(fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "zoo"}):
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:
            raise ZooError(f"cannot write {path}: {error}") from None


def _widest(rows: list[Row]) -> list[Row]:
    """The rows of the heads and number of tokens with most lengths; the loss has no lengths, and keeps all."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*row.case.kind, row.case.B * row.case.T), []).append(row)
    best = max(groups.values(), key=lambda group: len({row.case.T for row in group}))
    return best if len({row.case.T for row in best}) > 1 else rows


def _shape(case: Case) -> str:
    return f"{case.B * case.T} tokens\nK{case.K} V{case.V}"


def _heads(case: Case) -> str:
    return f"{case.B * case.T:,} tokens, H{case.H} K{case.K} V{case.V}, {_dtype(case)}"


def _dtype(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
