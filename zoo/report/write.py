"""`zoo report`: runs, and tables of speed, into report.md, report.csv and report.html."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from zoo.errors import ZooError
from zoo.files import replace
from zoo.report import contents, contents_speed
from zoo.report.document import Bullets, Document, Section, to_html, to_markdown
from zoo.report.protocol import check
from zoo.report.ranking import Entry, labelled, rank
from zoo.report.runs import Refusal, Run, find_runs, read_run
from zoo.report.speed import DECODE, OURS, TRAIN, Row, read_table

COLUMNS = ("rank", "model", "run", "seed", "learning_rate", "best_rate", "validation_bits_per_byte",
           "test_bits_per_byte", "tokens", "seconds", "tokens_per_s", "parameters", "training_flops_per_token",
           "peak_memory_bytes", "size", "T", "batch_tokens", "data", "fingerprint", "device", "commit", "refused")


def write_report(given: Sequence[Path], out: Path, *, train_csv: Path | None = None, decode_csv: Path | None = None,
                 separate: bool = False, complain: Callable[[str], object] = print) -> list[Path]:
    """Compare the runs in folders, and write the report's files into `out`; returns them.

    A run that breaks the protocol or is not finished is told to `complain` in a line, and nothing is written; with
    `separate` such runs get a table of their own. Raises ZooError then, for folders without runs, and tables that are
    none. What is in `out` is replaced file by file.
    """
    read = [read_run(name, folder) for name, folder in find_runs(given).items()]
    refused = [found for found in read if isinstance(found, Refusal)]
    runs, breaking = check([found for found in read if isinstance(found, Run)])
    refused += breaking
    if refused and not separate:
        for refusal in refused:
            complain(f"{refusal.name}: {'; '.join(refusal.reasons)}")
        raise ZooError(f"{len(refused)} of {len(read)} runs cannot be compared with the others, and nothing was "
                       "written; allowed: to leave them out, or --separate for a table of their own")
    if not runs:
        raise ZooError("no run is finished, so there is nothing to compare: " + refused[0].name + ": "
                       + refused[0].reasons[0])
    train = None if train_csv is None else read_table(train_csv, TRAIN)
    decode = None if decode_csv is None else read_table(decode_csv, DECODE)
    entries = rank(runs)
    document = compose(entries, runs, refused, train, decode,
                       [file.name for file in (train_csv, decode_csv) if file is not None])
    files = {"report.md": to_markdown(document), "report.csv": to_csv(entries, runs, refused),
             "report.html": to_html(document)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace(out / name, text.encode())
    except OSError as error:
        raise ZooError(f"cannot write into {out}: {error.strerror or error}") from None
    return [out / name for name in files]


def compose(entries: Sequence[Entry], runs: Sequence[Run], refused: Sequence[Refusal],
            train: Sequence[Row] | None, decode: Sequence[Row] | None, files: Sequence[str]) -> Document:
    """The whole report. An architecture keeps its colour in all charts: by its place in the alphabet."""
    ours = {str(row["model"]) for row in [*(train or ()), *(decode or ())] if row["impl"] == OURS}
    names = sorted({entry.label for entry in entries} | ours)
    colours = {name: number for number, name in enumerate(names)}
    labels = _labels(runs)
    findings = contents.short(entries)
    for what, axis, rows in (("Training", "T", train), ("Decoding", "context", decode)):
        if rows and (said := contents_speed.crossovers(rows, axis)):
            findings.append(f"{what} speed {said}.")
    first = entries[0].runs[0]
    about = f"{len(entries)} architecture{'s' if len(entries) > 1 else ''} at size {first.config.size.name} on " + \
        f"{first.data['name']}, {first.tokens:,} tokens each"
    return Document(f"Head to head: {about}", [
        Section("In short", [Bullets(findings)]),
        contents.ranking(entries, colours),
        contents.learning(entries, colours),
        contents.positions(entries, colours),
        *contents.rates(entries, colours),
        contents_speed.training(train, colours),
        contents_speed.decoding(decode, entries, colours),
        contents.rules(runs, files),
        contents.provenance(entries, labels, runs, colours),
        *([contents.apart(refused)] if refused else []),
    ])


def _labels(runs: Sequence[Run]) -> dict[str, str]:
    """A run's name -> the label of its architecture."""
    return {run.name: label for label, mine in labelled(runs).items() for run in mine}


def to_csv(entries: Sequence[Entry], runs: Sequence[Run], refused: Sequence[Refusal]) -> str:
    """A line a run, `COLUMNS`; the best first, refused ones last. What is not known is an empty field."""
    labels = _labels(runs)
    places = {entry.label: place for place, entry in enumerate(entries, 1)}
    best = {run.name for entry in entries for run in entry.runs}
    lines: list[Sequence[object]] = [
        (places[labels[run.name]], labels[run.name], run.name, run.seed, run.rate,
         "yes" if run.name in best else "no", run.validation, run.test, run.tokens, run.seconds,
         round(run.tokens_per_second, 1), run.parameters, run.flops, run.peak_memory, run.config.size.name,
         run.config.seq_len, run.config.batch_tokens, run.data["name"], run.data["fingerprint"], run.about["device"],
         run.about["commit"], "")
        for run in sorted(runs, key=lambda run: (places[labels[run.name]], run.rate, run.seed))]
    lines += [(None, refusal.architecture, refusal.name, refusal.seed, None, None, refusal.validation, refusal.test,
               *[None] * 13, "; ".join(refusal.reasons)) for refusal in refused]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([COLUMNS, *lines])
    return out.getvalue()
