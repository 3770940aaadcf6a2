"""`zoo bench decode`, registered on the command's app by zoo/cli.py. It parses and prints."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from zoo.cli_values import Device, console, listed, read_table, whole, write


def register(bench: typer.Typer) -> None:
    """Add the command to `zoo bench`."""
    bench.command("decode")(decode)


def decode(
    device: Device = "auto",
    size: Annotated[str, typer.Option(help="With commas; nano on a CPU, base on a GPU if not given.")] = "",
    batch: Annotated[str, typer.Option(help="Rows decoded together, with commas.")] = "1",
    context: Annotated[str, typer.Option(help="Tokens read before, with commas; 128,1024 on a CPU, 128 to 65536 on a "
                                              "GPU if not given.")] = "",
    models: Annotated[str, typer.Option(help="Names with commas between; all if not given.")] = "",
    eager: Annotated[bool, typer.Option(help="On a GPU in PyTorch's operators, not recorded, too.")] = True,
    peers: Annotated[bool | None, typer.Option(help="Decoders from elsewhere, too; on a GPU if not given.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure, for each size, batch and context.")] = 5.0,
    csv: Annotated[Path | None, typer.Option(help="Write the rows into this file, too; its other rows stay.")] = None,
) -> None:
    """Greedy tokens/s of the architectures behind a context, interleaved in one process."""
    from rich.progress import Progress

    from zoo.bench import decode as measuring
    from zoo.bench.ops import measure_ceilings
    from zoo.pretrained import find_device

    place = find_device(device)
    on_cpu = place.type == "cpu"
    contexts = whole("context", context) or ([128, 1024] if on_cpu else [128, 1024, 4096, 16384, 65536])
    sizes = listed(size) or ["nano" if on_cpu else "base"]
    names = listed(models) or None
    before = read_table(csv)
    rows: list[measuring.Row] = []
    measuring.to_csv(rows, before)  # a file of another kind is refused before anything is measured
    bandwidth = measure_ceilings(place).bytes
    for shape, count, length in product(sizes, whole("batch", batch), contexts):
        with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task(f"decoding {shape}, batch {count}, context {length}", total=1.0)
            found, left_out = measuring.bench_decode(
                names, device=place, size=shape, batch=count, context=length, budget=seconds, eager=eager,
                peers=not on_cpu if peers is None else peers,
                progress=lambda done, bar=bar, task=task: bar.update(task, completed=done))  # type: ignore[misc]
        console().print(measuring.table(found, place, bandwidth))
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}")
        sys.stdout.flush()
        rows += found
        if csv is not None:
            write(csv, measuring.to_csv(rows, before))
