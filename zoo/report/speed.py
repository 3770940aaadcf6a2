"""Tables of `zoo bench train`, and of decoding: rows into curves, and where one curve crosses another."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from zoo.errors import ZooError
from zoo.report.ranking import REFERENCE

OURS = "zoo"
TEXT = {"model", "impl", "size"}
TRAIN = ("model", "impl", "size", "T", "batch_tokens", "tokens_per_s", "mfu", "peak_mib", "first_step_s")
DECODE = ("model", "impl", "size", "batch", "context", "tokens_per_s", "ms_per_token", "gbytes_per_s", "state_bytes",
          "peak_mib")
Row = Mapping[str, str | float | None]
Curve = dict[int, float]


def read_table(file: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a benchmark's CSV; numbers as such, None where a field is empty. Other columns are left alone.

    Raises ZooError for a file that cannot be read, lacks a column, or has no number where one belongs.
    """
    try:
        lines = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ZooError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    if not lines or (missing := [column for column in columns if column not in lines[0]]):
        raise ZooError(f"{file} is no table to read here: {'no column ' + missing[0] if lines else 'it has no rows'}; "
                       f"allowed: columns {', '.join(columns)}")
    rows: list[Row] = []
    for number, line in enumerate(lines, 2):
        row: dict[str, str | float | None] = {}
        for column in columns:
            value = line[column] or ""
            try:
                row[column] = value if column in TEXT else float(value) if value else None
            except ValueError:
                raise ZooError(f"{file}, line {number}: {column}={value!r} is not a number") from None
        rows.append(row)
    return rows


def curves(rows: Sequence[Row], x: str, y: str) -> dict[tuple[str, str], Curve]:
    """{x: y} of each (model, impl), where both are there and above 0; of rows that repeat an x, the last counts."""
    found: dict[tuple[str, str], Curve] = {}
    for row in rows:
        across, up = row[x], row[y]
        if isinstance(across, float) and isinstance(up, float) and across > 0 and up > 0:
            found.setdefault((str(row["model"]), str(row["impl"])), {})[int(across)] = up
    return {who: dict(sorted(curve.items())) for who, curve in found.items()}


def side_name(who: tuple[str, str]) -> str:
    """What a curve is called: an architecture of ours by its name, anything else by its implementation."""
    model, impl = who
    return model if impl == OURS else impl


def crossing(mine: Curve, other: Curve) -> float | None:
    """Where `mine` comes to be above `other` and stays there, log-log linear between the x that both have.

    None where it is not above at the last one; the first x where it always was.
    """
    ratios = [(x, mine[x] / other[x]) for x in mine if x in other]
    if not ratios or ratios[-1][1] <= 1:
        return None
    where = float(ratios[0][0])
    for (x, ratio), (after, ratio_after) in pairwise(ratios):
        if ratio <= 1 < ratio_after:
            where = x * (after / x) ** (math.log(ratio) / math.log(ratio / ratio_after))
    return where


def compared(who: str, against: str, mine: Curve, other: Curve, axis: str, shown: Callable[[float], str]) -> str | None:
    """A sentence: where one is ahead of another, and by how much at both ends. None where no x is common."""
    ratios = {x: mine[x] / other[x] for x in mine if x in other}
    if not ratios:
        return None
    first, last = min(ratios), max(ratios)
    ends = f"{ratios[first]:.2f} times as fast at {axis}={shown(first)}"
    if last != first:
        ends += f", {ratios[last]:.2f} at {shown(last)}"
    if all(ratio > 1 for ratio in ratios.values()):
        verdict = "ahead at every one measured"
    elif all(ratio <= 1 for ratio in ratios.values()):
        verdict = "behind or level at every one measured"
    elif where := crossing(mine, other):
        verdict = f"crossover at {axis} = {shown(where)}, ahead from there on"
    else:
        slower = ", ".join(shown(x) for x, ratio in ratios.items() if ratio <= 1)
        verdict = f"behind or level at {axis} = {slower}"
    return f"`{who}` against `{against}`: {verdict} ({ends})."


def verdicts(found: Mapping[tuple[str, str], Curve], axis: str, shown: Callable[[float], str]) -> list[str]:
    """The sentences of a benchmark: each of ours against the reference, then ours against each peer of its kind."""
    ours = {model: curve for (model, impl), curve in found.items() if impl == OURS}
    pairs = [(model, REFERENCE, ours[model], ours[REFERENCE]) for model in ours if model != REFERENCE] \
        if REFERENCE in ours else []
    pairs += [(model, impl, ours[model], curve) for (model, impl), curve in found.items()
              if impl != OURS and model in ours]
    sentences = [compared(*pair, axis, shown) for pair in pairs]
    return [sentence for sentence in sentences if sentence is not None]
