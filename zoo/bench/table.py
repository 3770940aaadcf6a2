"""A benchmark's table as a CSV text that grows: new rows join those of earlier runs, and replace their like."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from zoo.errors import ZooError


def joined(columns: Sequence[str], key: int, lines: Iterable[Sequence[str]], before: str = "") -> str:
    """A table of `columns`, the first `key` of which say what a row is of: the rows of `before`, then `lines`.

    before: such a table; a row of it goes where one of `lines` is of the same. Raises ZooError for a text of another
    kind.
    """
    try:
        head, *old = list(csv.reader(before.splitlines())) or [list(columns)]
    except csv.Error:
        head, old = [], []
    if tuple(head) != tuple(columns) or any(len(line) != len(columns) for line in old):
        raise ZooError(f"rows cannot be added to this file: allowed is a table of {', '.join(columns)}")
    kept = {tuple(line[:key]): line for line in old}
    for line in lines:
        kept.pop(tuple(line[:key]), None)
        kept[tuple(line[:key])] = list(line)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([columns, *kept.values()])
    return out.getvalue()
