"""What a report says of speed and memory: training against T, decoding and its state against the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from zoo.catalogue import state_bytes_of
from zoo.report.document import Block, Bullets, Chart, Folded, Section, Table
from zoo.report.ranking import REFERENCE, Colours, Entry
from zoo.report.speed import OURS, Curve, Row, crossing, curves, side_name, verdicts
from zoo.report.svg import Axis, Series, line_chart
from zoo.report.words import context_of, memory
from zoo.training.progress import count

Who = tuple[str, str]
STATES = tuple(2 ** power for power in range(7, 17))  # contexts of the state's table: 128 to 64k


def training(rows: Sequence[Row] | None, colours: Colours) -> Section:
    """Tokens/s, MFU and memory against T, for each size and number of tokens a step in the table."""
    if rows is None:
        return Section("Training speed against T", [
            "Not measured: `zoo bench train --seq-len 512,1024,... --csv FILE` does, `--train-csv FILE` shows it."])
    blocks: list[Block] = []
    kinds = dict.fromkeys((row["size"], row["batch_tokens"]) for row in rows)
    for size, tokens in kinds:
        mine = [row for row in rows if (row["size"], row["batch_tokens"]) == (size, tokens)]
        at = f"size {size}, {int(tokens):,} tokens a step" if isinstance(tokens, float) else f"size {size}"
        rate, use, peak = (curves(mine, "T", column) for column in ("tokens_per_s", "mfu", "peak_mib"))
        blocks.append(f"At {at}:")
        if said := verdicts(rate, "T", context_of):
            blocks.append(Bullets(said))
        blocks += _charts(rate, colours, "Training speed", "tokens/s", count, 10)
        blocks += _charts(use, colours, "Model FLOP utilisation", "share of the device's peak",
                          lambda value: f"{value:.0%}", None)
        blocks += _charts(peak, colours, "Peak memory of a step", "MiB", count, 10)
        table = _table(rate, use, peak)
        blocks.append(Folded(f"All figures at {at}: tokens/s, MFU, MiB", table))
    return Section("Training speed against T", [
        "Tokens a step are the same at every T; a k is 1024 tokens. Dotted lines are other implementations.", *blocks])


def _table(rate: Mapping[Who, Curve], use: Mapping[Who, Curve], peak: Mapping[Who, Curve]) -> Table:
    lengths = sorted({x for curve in rate.values() for x in curve})

    def cell(who: Who, x: int) -> str:
        parts = [count(rate[who][x])] if x in rate[who] else []
        parts += [f"{use[who][x]:.0%}"] if x in use.get(who, {}) else []
        parts += [f"{peak[who][x]:,.0f}"] if x in peak.get(who, {}) else []
        return ", ".join(parts)

    return Table(["", *(f"T={context_of(x)}" for x in lengths)],
                 [[side_name(who), *(cell(who, x) for x in lengths)] for who in rate], 1)


def _charts(found: Mapping[Who, Curve], colours: Colours, title: str, unit: str, shown: Callable[[float], str],
            base: int | None, axis: str = "T") -> list[Block]:
    """A chart, or nothing where nothing was measured."""
    if not found:
        return []
    series = [Series(side_name(who), [(x, y, f"{side_name(who)}: {' '.join([shown(y), unit]).strip()} at {axis} = "
                                                f"{context_of(x)}")
                                      for x, y in curve.items()], colours[who[0]] if who[1] == OURS else None)
              for who, curve in found.items()]
    label = {"T": "T, tokens of context in training", "context": "tokens read so far"}[axis]
    return [Chart(title, line_chart(series, Axis(label, context_of, 2), Axis(unit, shown, base), title))]


def decoding(rows: Sequence[Row] | None, entries: Sequence[Entry], colours: Colours) -> Section:
    """Decode speed from a benchmark, and the state: measured there, else by the models' own count."""
    counted = {(entry.label, OURS): {context: float(state_bytes_of(entry.runs[0].model, context)) for context in STATES}
               for entry in entries}
    if rows is None:
        return Section("Decoding", [
            "Decoding speed was not measured: `--decode-csv FILE` brings a table of it here. The state of one sequence "
            "by the models' own count, float32, each with room for that context:",
            *_state_charts(counted, colours), _state_table(counted, colours)])
    blocks: list[Block] = []
    for size, batch in dict.fromkeys((row["size"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["batch"]) == (size, batch)]
        at = f"size {size}, " + (f"{int(batch)} at once" if isinstance(batch, float) else "batch not said")
        rate = curves(mine, "context", "tokens_per_s")
        if said := verdicts(rate, "context", context_of):
            blocks += [f"At {at}:", Bullets(said)]
        blocks += _charts(rate, colours, f"Decoding, {at}", "tokens/s", count, 10, "context")
        blocks += _state_charts({who: curve for who, curve in curves(mine, "context", "state_bytes").items()
                                 if who[1] == OURS}, colours, f"State in memory, {at}")
    return Section("Decoding", [*blocks, "The state of one sequence by the compared models' own count, float32:",
                                _state_table(counted, colours)])


def _state_charts(found: Mapping[Who, Curve], colours: Colours, title: str = "State of one sequence") -> list[Block]:
    return _charts(found, colours, title, "", memory, 2, "context")


def _state_table(found: Mapping[Who, Curve], colours: Colours) -> Table:
    contexts = [context for context in STATES if context in (128, 1024, 4096, 16384, 65536)]
    return Table(["model", *(context_of(context) for context in contexts)],
                 [[label, *(memory(curve[context]) for context in contexts)] for (label, _), curve in found.items()], 1,
                 [colours[label] for label, _ in found])


def crossovers(rows: Sequence[Row], axis: str) -> str | None:
    """For the summary: where each of ours comes to be ahead of the reference, at the table's first size and batch."""
    kind = [(row["size"], row.get("batch_tokens", row.get("batch"))) for row in rows]
    found = curves([row for row, mine in zip(rows, kind, strict=True) if mine == kind[0]], axis, "tokens_per_s")
    reference = found.get((REFERENCE, OURS), {})
    places: dict[str, list[str]] = {}
    for model, curve in sorted((model, curve) for (model, impl), curve in found.items() if impl == OURS):
        if model == REFERENCE or not (common := curve.keys() & reference.keys()):
            continue
        where = crossing(curve, reference)
        place = f"behind at {axis} = {context_of(max(common))}, the longest" if where is None else \
            f"ahead from {axis} = {context_of(where)} on" if where > min(common) else f"ahead at every {axis} measured"
        places.setdefault(place, []).append(f"`{model}`")
    parts = [f"{', '.join(models)} {place}" for place, models in places.items()]
    return f"against `{REFERENCE}`: {'; '.join(parts)}" if parts else None
