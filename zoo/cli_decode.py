"""`zoo bench decode`, registered on the command's app by zoo/cli.py. It parses and prints."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from zoo.errors import ZooError


def register(bench: typer.Typer) -> None:
    """Add the command to `zoo bench`."""
    bench.command("decode")(decode)


def decode(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is a GPU where there is one.")] = "auto",
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
    from rich.console import Console
    from rich.progress import Progress

    from zoo.bench import decode as measuring
    from zoo.bench.ops import measure_ceilings
    from zoo.pretrained import find_device

    place = find_device(device)
    on_cpu = place.type == "cpu"
    contexts = _whole("context", context) or ([128, 1024] if on_cpu else [128, 1024, 4096, 16384, 65536])
    sizes = [part.strip() for part in size.split(",")] if size else ["nano" if on_cpu else "base"]
    names = [part.strip() for part in models.split(",")] if models else None
    before = _read(csv) if csv is not None and csv.is_file() else ""
    rows: list[measuring.Row] = []
    measuring.to_csv(rows, before)  # a file of another kind is refused before anything is measured
    bandwidth = measure_ceilings(place).bytes
    terminal = sys.stdout.isatty()
    for shape, count, length in product(sizes, _whole("batch", batch), contexts):
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task(f"decoding {shape}, batch {count}, context {length}", total=1.0)
            found, left_out = measuring.bench_decode(
                names, device=place, size=shape, batch=count, context=length, budget=seconds, eager=eager,
                peers=not on_cpu if peers is None else peers,
                progress=lambda done, bar=bar, task=task: bar.update(task, completed=done))  # type: ignore[misc]
        Console(width=None if terminal else 160, highlight=False).print(measuring.table(found, place, bandwidth))
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}")
        sys.stdout.flush()
        rows += found
        if csv is not None:
            _write(csv, measuring.to_csv(rows, before))


def _whole(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise ZooError(f"{option}: {wrong[0]!r} is not allowed: whole numbers with commas between")
    return [int(part) for part in parts]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror}") from None
