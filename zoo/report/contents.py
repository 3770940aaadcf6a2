"""What a report says of the runs themselves: the order, learning, positions, rates, and where all of it is from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from zoo.report.document import Block, Bullets, Chart, Folded, Section, Table
from zoo.report.protocol import equal_in_all
from zoo.report.ranking import REFERENCE, Colours, Entry, Spread, at_cost, by_position, curve
from zoo.report.runs import Point, Refusal, Run
from zoo.report.svg import Axis, Series, dot_chart, line_chart
from zoo.report.words import bits, context_of, large, memory, quoted, spread
from zoo.training.progress import count, duration

BITS = "bits per byte"
# What a run spends: by name, how much of it by a validation, and a value in words.
COSTS: dict[str, tuple[Callable[[Run, Point], float], Callable[[float], str]]] = {
    "training tokens": (lambda run, point: point.tokens, count),
    "training seconds": (lambda run, point: point.seconds, count),
    "training FLOPs": (lambda run, point: point.tokens * run.flops, large),
}


def reference_of(entries: Sequence[Entry]) -> Entry | None:
    return next((entry for entry in entries if entry.runs[0].model.model == REFERENCE), None)


def devices(entries: Sequence[Entry]) -> list[str]:
    return sorted({run.about["device"] for entry in entries for run in entry.runs})


def short(entries: Sequence[Entry]) -> list[str]:
    """The findings in a sentence each; what weakens them with them."""
    best, reference = entries[0], reference_of(entries)
    said = [f"**`{best.label}` is best on validation: {bits(best.validation.mean)} {BITS}**"
            + (f", {bits(abs(best.validation.mean - reference.validation.mean))} below `{reference.label}`"
               if reference is not None and reference is not best else "") + "."]
    for entry, after in pairwise(entries):
        if entry.validation.overlaps(after.validation):
            said.append(f"The seeds of `{entry.label}` and `{after.label}` overlap: their order may be chance.")
    counts = {len(entry.runs) for entry in entries}
    if counts == {1}:
        said.append("One seed each: how far apart seeds of one architecture are is not known, so small differences may "
                    "be chance.")
    elif len(counts) > 1:
        said.append("Not all have as many seeds: " + ", ".join(
            f"`{entry.label}` {len(entry.runs)}" for entry in entries) + ".")
    speeds = sorted(entries, key=lambda entry: -entry.tokens_per_second)
    if len(speeds) > 1 and len(devices(entries)) == 1:
        said.append(f"In training `{speeds[0].label}` was fastest ({count(speeds[0].tokens_per_second)} tokens/s), "
                    f"`{speeds[-1].label}` slowest ({count(speeds[-1].tokens_per_second)}), on {devices(entries)[0]}.")
        along, shown = COSTS["training seconds"]
        seconds, there = _at_the_least(entries, along)
        if len(there) == len(entries):
            best_then = min(there, key=lambda label: there[label].mean)
            said.append(f"After {shown(seconds)} seconds of training, when the fastest was done, `{best_then}` was "
                        f"best: {bits(there[best_then].mean)} {BITS}.")
    return said


def _at_the_least(entries: Sequence[Entry], along: Callable[[Run, Point], float]) -> tuple[float, dict[str, Spread]]:
    """What the run that spent least had spent in all, and bits at that cost of each that has validations around it."""
    cost = min(along(run, run.curve[-1]) for entry in entries for run in entry.runs)
    there = {entry.label: at_cost(entry.runs, along, cost) for entry in entries}
    return cost, {label: seen for label, seen in there.items() if seen is not None}


def ranking(entries: Sequence[Entry], colours: Colours) -> Section:
    reference = reference_of(entries)
    length = entries[0].runs[0].config.seq_len
    rows = []
    for place, entry in enumerate(entries, 1):
        run = entry.runs[0]
        gap = "" if reference is None else "0" if entry is reference else \
            f"{entry.validation.mean - reference.validation.mean:+.4f}"
        rows.append([str(place), entry.label, spread(entry.validation),
                     "not measured" if entry.test is None else spread(entry.test), gap, str(len(entry.runs)),
                     f"{entry.rate:g}", count(run.parameters), count(run.flops), count(entry.tokens_per_second),
                     "" if entry.peak_memory is None else memory(entry.peak_memory)])
    against = f"against {reference.label}" if reference else "against none"
    dots = [Series(entry.label, [(run.validation, 0.0, f"{run.name}: {bits(run.validation)} {BITS}, seed {run.seed}")
                                 for run in entry.runs], colours[entry.label]) for entry in entries]
    frequencies, gzip = entries[0].runs[0].baselines
    return Section("Ranking", [
        f"Mean {BITS} over seeds, least and greatest in brackets; validation decides the order and the learning rate, "
        f"test nothing. Without a model the validation text costs {bits(frequencies)} by its bytes' frequencies, "
        f"{bits(gzip)} by `gzip -9`.",
        Table(["#", "model", "validation", "test", against, "seeds", "learning rate", "parameters", "FLOPs/token",
               "tokens/s", "memory"], rows, 2, [colours[entry.label] for entry in entries], 1),
        Chart("Validation: every seed a dot, a bar at the mean",
              dot_chart(dots, Axis(f"{BITS} (less is better)"), "validation by architecture")),
        f"FLOPs and tokens/s are of training, forward and backward, at T={length}; validation, samples and saves are "
        "not in tokens/s; memory is the most that any run of that row had in use."])


def learning(entries: Sequence[Entry], colours: Colours) -> Section:
    charts: list[Block] = []
    costs = dict(COSTS)
    left_out = ""
    if len(devices(entries)) > 1:
        del costs["training seconds"]
        left_out = f"Runs were on different devices ({', '.join(devices(entries))}): their seconds are not compared."
    once = all(len(run.curve) == 1 for entry in entries for run in entry.runs)
    about = "The runs were validated at their ends alone, so there are no curves." if once else \
        "Lines are means over seeds, bands reach from the least to the greatest."
    head, cells = ["model"], [[entry.label] for entry in entries]
    for what, (along, shown) in costs.items():
        if not once:
            charts.append(Chart(f"Validation against {what}", _learning_chart(entries, colours, what, along, shown)))
        cost, there = _at_the_least(entries, along)
        head.append(f"at {shown(cost)} {what.removeprefix('training ')}")
        for entry, row in zip(entries, cells, strict=True):
            row.append(bits(there[entry.label].mean) if entry.label in there else "not yet")
    return Section("What learning costs", [
        *charts,
        f"{about} At equal cost, which is what the one "
        f"that spent least had spent in all ({BITS}, between two validations interpolated; the others had a higher "
        "learning rate then than at their end, and look worse than a run planned for that cost would; not yet: no "
        "validation by then):",
        Table(head, cells, 1, [colours[entry.label] for entry in entries]), *([left_out] if left_out else [])])


def _learning_chart(entries: Sequence[Entry], colours: Colours, what: str, along: Callable[[Run, Point], float],
                    shown: Callable[[float], str]) -> str:
    lines = {entry.label: curve(entry.runs, along) for entry in entries}
    # The first drop would flatten all that tells the lines apart: what is shown begins at a tenth of the longest.
    longest = max(line[-1][0] for line in lines.values())
    later = [seen for line in lines.values() for x, seen in line if x >= longest / 10]
    limits = (min(seen.low for seen in later), max(seen.high for seen in later))
    series = [Series(label, [(x, seen.mean, f"{label}: {spread(seen)} {BITS} at {shown(x)} {what}")
                             for x, seen in line],
                     colours[label], [(x, seen.low, seen.high) for x, seen in line if seen.count > 1])
              for label, line in lines.items()]
    return line_chart(series, Axis(what, shown, 10), Axis(BITS, limits=limits),
                      f"validation against {what}")


def positions(entries: Sequence[Entry], colours: Colours) -> Section:
    unit = "bits per byte" if entries[0].runs[0].tokenizer.get("kind") == "bytes" else "bits per token"
    places = {entry.label: [(upto, seen.times(1 / math.log(2))) for upto, seen in by_position(entry.runs)]
              for entry in entries}
    length = entries[0].runs[0].config.seq_len
    later = [seen for line in places.values() for upto, seen in line if upto >= min(8, length)]
    limits = (min(seen.low for seen in later), max(seen.high for seen in later))
    series = [Series(label, [(upto, seen.mean, f"{label}: {bits(seen.mean)} {unit} with up to {upto} tokens before")
                             for upto, seen in line], colours[label],
                     [(upto, seen.low, seen.high) for upto, seen in line if seen.count > 1])
              for label, line in places.items()]
    x = Axis("tokens of context", context_of, 2)
    blocks: list[Block] = [
        "Loss on validation by how many tokens of the same window stand before the target: how much an architecture "
        "makes of a longer context.",
        Chart("Loss by position in the context",
              line_chart(series, x, Axis(unit, limits=limits), "loss by position"))]
    reference = reference_of(entries)
    if reference is not None and len(entries) > 1:
        there = {upto: seen.mean for upto, seen in places[reference.label]}
        differences = [
            Series(label, [(upto, seen.mean - there[upto], f"{label}: {seen.mean - there[upto]:+.4f} {unit} with up to "
                            f"{upto} tokens before") for upto, seen in line if upto in there], colours[label])
            for label, line in places.items()]
        blocks.append(Chart(f"The same, less that of `{reference.label}`", line_chart(
            differences, x, Axis(f"{unit} above {reference.label}", signed=True),
            "difference to the reference by position")))
    wanted = [4 ** power for power in range(12) if 4 ** power < length] + [length]
    bins = sorted({min((upto for upto, _ in next(iter(places.values())) if upto >= want), default=0)
                   for want in wanted} - {0})
    rows = [[label, *(bits(dict(line)[upto].mean) if upto in dict(line) else "" for upto in bins)]
            for label, line in places.items()]
    table = Table(["model", *(f"to {context_of(upto)}" for upto in bins)], rows, 1,
                  [colours[label] for label in places])
    return Section("Loss by position", [*blocks, Folded(f"The same in {unit}, by tokens before the target", table)])


def rates(entries: Sequence[Entry], colours: Colours) -> list[Section]:
    """A table of the learning rates that were tried; none where each architecture has one."""
    tried = sorted({rate for entry in entries for rate in entry.rates})
    if all(len(entry.rates) == 1 for entry in entries):
        return []
    rows = [[entry.label, *((f"**{text}**" if rate == entry.rate else text) if rate in entry.rates else ""
                            for rate, text in ((rate, bits(entry.rates[rate].mean) if rate in entry.rates else "")
                                               for rate in tried))] for entry in entries]
    notes = [f"`{entry.label}` is best at {entry.rate:g}, an end of what was tried for it: a rate beyond may be better."
             for entry in entries if entry.at_an_edge]
    if any(sorted(entry.rates) != tried for entry in entries):
        notes.append("Not all were tried at the same rates, which is no fair choice of one.")
    lines = [Series(entry.label, [(rate, seen.mean, f"{entry.label}: {spread(seen)} {BITS} at {rate:g}")
                                  for rate, seen in entry.rates.items()], colours[entry.label],
                    [(rate, seen.low, seen.high) for rate, seen in entry.rates.items() if seen.count > 1])
             for entry in entries]
    chart = Chart("Validation against the peak learning rate", line_chart(
        lines, Axis("learning rate", lambda value: f"{value:g}", 10, ticks=tried), Axis(BITS),
        "validation against learning rate"))
    return [Section("Learning rates", [
        chart, f"Validation in {BITS}, mean over seeds; the best of each, in bold, is the one that all else is of:",
        Table(["model", *(f"{rate:g}" for rate in tried)], rows, 1, [colours[entry.label] for entry in entries]),
        *([Bullets(notes)] if notes else [])])]


def rules(runs: Sequence[Run], files: Sequence[str]) -> Section:
    commits = sorted({run.about["commit"] for run in runs})
    equal = [[what, quoted(value)] for what, value in equal_in_all(runs).items()]
    notes = ["The order of the data is a function of the seed and the step alone: runs of one seed read the same "
             "windows in the same order.",
             "Held-out text is read in windows that follow each other without overlap, every byte once; sums are "
             "float64. Bits per byte are nats / ln 2 / bytes of text."]
    if len(commits) > 1:
        notes.append(f"The runs are of {len(commits)} commits: {', '.join(commit[:12] for commit in commits)}.")
    if any(commit.endswith("+changes") for commit in commits):
        notes.append("Some ran on files that were edited since their commit (`+changes`).")
    notes += [f"From `{file}`." for file in files]
    return Section("What is equal in all runs", [Table(["rule", "in all runs"], equal, 2), Bullets(notes)])


def provenance(entries: Sequence[Entry], labels: Mapping[str, str], runs: Sequence[Run], colours: Colours) -> Section:
    """Every run that was compared, also those at other rates than the best."""
    order = {entry.label: place for place, entry in enumerate(entries)}
    listed = sorted(runs, key=lambda run: (order[labels[run.name]], run.rate, run.seed))
    rows = [[run.name, labels[run.name], str(run.seed), f"{run.rate:g}", bits(run.validation),
             "" if run.test is None else bits(run.test), duration(run.seconds), count(run.tokens_per_second),
             run.about["device"], run.about["commit"][:12] + ("+changes" if "+" in run.about["commit"] else "")]
            for run in listed]
    keys = [colours[labels[run.name]] for run in listed]
    return Section("The runs", [
        Table(["run", "model", "seed", "learning rate", "validation", "test", "training time", "tokens/s", "device",
               "commit"], rows, 2, keys, 1),
        Folded("Their commands", Table(["run", "command"], [[run.name, quoted(run.about["command"])] for run in listed],
                                       2))])


def apart(refused: Sequence[Refusal]) -> Section:
    rows = [[refusal.name, refusal.architecture, "" if refusal.seed is None else str(refusal.seed),
             "" if refusal.validation is None else bits(refusal.validation),
             "" if refusal.test is None else bits(refusal.test), "; ".join(refusal.reasons)] for refusal in refused]
    return Section("Not comparable", [
        "These break a rule or are not finished, and are in no figure above:",
        Table(["run", "model", "seed", "validation", "test", "why"], rows, 2)])
