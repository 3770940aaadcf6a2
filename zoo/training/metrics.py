"""metrics.csv, for those who read it: what its columns are, and its whole rows."""

from __future__ import annotations

import csv
import io
from pathlib import Path

COLUMNS = ("step", "tokens", "loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "mfu", "peak_memory",
           "seconds", "validation_bits_per_byte", "validation_perplexity")


def read_rows(file: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv; a last line that a kill cut off is none."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [row for row in rows if row.keys() == set(COLUMNS) and (row["step"] or "").isdigit()]
