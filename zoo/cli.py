"""The `zoo` command. It parses and prints; what it does is in the modules it calls, imported when they are needed."""

from __future__ import annotations

import io
import os
import sys
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from zoo import cli_decode, cli_eval, cli_generate
from zoo.cli_values import Device, console, listed, read_bytes, read_table, whole, write
from zoo.errors import ZooError

UsageError: Any = typer.BadParameter.__base__  # click's, or that of the copy of click inside newer versions of typer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Efficient language-model architectures: list, measure, sample, save.")
bench = typer.Typer(no_args_is_help=True, help="Measure speed.")
app.add_typer(bench, name="bench")


@app.command("list")
def list_command() -> None:
    """The architectures, and the published models."""
    from rich.table import Table

    import zoo
    from zoo.catalogue import CONTEXTS, SIZE, facts

    table = Table(title="Architectures (model=...); complexity: time to train, memory to decode; "
                        f"state of one sequence at size {SIZE}, float32")
    for column in ("model", "what it is", "paper", "complexity", *(f"state at T={context}" for context in CONTEXTS)):
        table.add_column(column, overflow="fold")
    for fact in map(facts, zoo.list_models()):
        table.add_row(fact.name, fact.summary, fact.paper, fact.complexity, *map(_bytes, fact.state_bytes))
    console().print(table)
    names = zoo.list_pretrained()
    print("Published models: " + (", ".join(names) or "none in this copy"))


@app.command()
def doctor() -> None:
    """What is installed and what works here. The exit status is 0 if training on a CPU does."""
    from zoo.doctor import examine

    raise typer.Exit(0 if examine(print) else 1)


cli_generate.register(app)
cli_eval.register(app)
cli_decode.register(bench)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run's folder, finished or not; for hf also a saved model's folder or "
                                              "a published name.")],
    out: Annotated[str, typer.Argument(help="The folder to write; hf://OWNER/NAME uploads to the Hugging Face hub.")],
    to: Annotated[str, typer.Option(help="Who reads it: zoo alone, or hf (transformers), too. The hub gets hf.")] = "",
    which: Annotated[str, typer.Option(help="last, or best by validation.")] = "last",
    dtype: Annotated[str, typer.Option(help="What weights are stored as: float32, bfloat16 or float16; as they are, if "
                                            "not given.")] = "",
    publish: Annotated[str, typer.Option(help="Publish a finished run; says what its architecture cannot do.")] = "",
    public: Annotated[bool, typer.Option("--public", help="A new repository on the hub is for all to see.")] = False,
) -> None:
    """Make a folder of a model, to load, share or publish."""
    from zoo.errors import choose
    from zoo.pretrained import DTYPES, REMOTE

    remote = out.startswith(REMOTE)
    if public and not remote:
        raise ZooError(f"--public is of an upload; allowed with {REMOTE}OWNER/NAME")
    to = choose("reader", to or ("hf" if remote else "zoo"), ("hf",) if remote else ("hf", "zoo"))
    kind = DTYPES[choose("dtype", dtype, DTYPES)] if dtype else None
    how: Any = {"which": which, "dtype": kind, "complain": lambda line: print(line, file=sys.stderr)}
    if to == "hf":
        from zoo.export_hf import export_hf, upload

        if publish:
            raise ZooError("--publish makes a folder of the zoo's own; allowed with --to zoo")
        print(upload(model, out, private=not public, **how) if remote else export_hf(model, out, **how))
        return
    from zoo.export import export_run, publish_run

    if publish:
        choose("checkpoint to publish", which, ("last",))
        print(publish_run(model, out, limits=publish, dtype=kind or DTYPES["float32"]))
    else:
        print(export_run(model, out, **how))


@app.command()
def reproduce(
    model: Annotated[str, typer.Argument(help="A published model's name, or its folder.")],
    steps: Annotated[int, typer.Option(min=1, help="How many of its run's steps to repeat, from the first.")] = 200,
    data: Annotated[str | None, typer.Option(help="Where the text it was trained on lies, as data.path.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the run in this folder.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto is what it was trained on, where there is one.")] =
        "auto",
) -> None:
    """Repeat the start of a published model's run.

    Its losses are compared with the stored curve; exit status 1 if they differ.
    """
    from zoo.reproduce import reproduce

    found = reproduce(model, steps, data=data, out=out, device=device)
    print("step  stored  here    difference")
    for step, stored, here in found.losses:
        print(f"{step:<5} {stored:.4f}  {here:.4f}  {here - stored:+.5f}")
    print(found.verdict())
    raise typer.Exit(0 if found.holds else 1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, or of whole sweeps.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.csv and report.html.")] = Path("report"),
    train_csv: Annotated[Path | None, typer.Option(help="A table of `zoo bench train`, for speed against T.")] = None,
    decode_csv: Annotated[Path | None, typer.Option(help="A table of decoding speed against the context.")] = None,
    separate: Annotated[bool, typer.Option(help="Runs that break the protocol get a table of their own.")] = False,
) -> None:
    """Compare runs: ranking, curves and speed, on one page."""
    from zoo.report.write import write_report

    for path in write_report(runs, out, train_csv=train_csv, decode_csv=decode_csv, separate=separate,
                             complain=lambda line: print("error:", line, file=sys.stderr)):
        print(path)


@bench.command("train")
def bench_train(
    device: Device = "auto",
    size: Annotated[str, typer.Option(help="With commas; nano on a CPU, small on a GPU if not given.")] = "",
    seq_len: Annotated[str, typer.Option(help="T, with commas; 256 on a CPU, 1024 on a GPU if not given.")] = "",
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens a step: 2048 on a CPU, 65536 on a GPU.")] = None,
    models: Annotated[str, typer.Option(help="Names with commas between; all if not given.")] = "",
    peers: Annotated[bool | None, typer.Option(help="Decoders from elsewhere, too; on a GPU if not given.")] = None,
    weights: Annotated[str, typer.Option(help="fresh, or published: speed may depend on what was learnt.")] = "fresh",
    text: Annotated[Path | None, typer.Option(help="Train on this file's bytes; fresh weights can do without.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure, for each size and T.")] = 60.0,
    csv: Annotated[Path | None, typer.Option(help="Write the rows into this file, too; its other rows stay.")] = None,
) -> None:
    """Training tokens/s of the architectures, interleaved in one process."""
    from rich.progress import Progress

    from zoo.bench import train
    from zoo.pretrained import find_device

    place = find_device(device)
    on_cpu = place.type == "cpu"
    rows = list[train.Row]()
    before = read_table(csv)
    train.to_csv([], before)
    lengths = whole("seq-len", seq_len) or [256 if on_cpu else 1024]
    for shape, length in product(listed(size) or ["nano" if on_cpu else "small"], lengths):
        with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task(f"training {shape}, T={length}", total=1.0)
            found, left_out = train.bench_train(
                listed(models) or None, device=place, size=shape, seq_len=length,
                batch_tokens=batch_tokens or (2048 if on_cpu else 65536), budget=seconds,
                peers=not on_cpu and weights == "fresh" if peers is None else peers, weights=weights,
                text=read_bytes(text) if text is not None else None,
                progress=lambda done, bar=bar, task=task: bar.update(task, completed=done))  # type: ignore[misc]
        console().print(train.table(found, place))
        for name, reason in left_out.items():
            print(f"left out: {name}: {reason}")
        sys.stdout.flush()
        rows += found
        if csv is not None:
            write(csv, train.to_csv(rows, before))


@bench.command("ops")
def bench_ops(
    device: Device = "auto",
    ops: Annotated[str, typer.Option(help="Names with commas between; all if not given.")] = "",
    peers: Annotated[bool, typer.Option(help="Compare with the libraries that are installed.")] = True,
    lengths: Annotated[str, typer.Option(help="T, with commas; 256,512 on a CPU, 512 to 32768 on a GPU.")] = "",
    seconds: Annotated[float, typer.Option(help="How long to measure an op; first calls are not counted.")] = 20.0,
    tuning: Annotated[float, typer.Option(help="Seconds to compile before, and for a library to tune itself.")] = 300.0,
    workers: Annotated[int, typer.Option(help="Processes that compile kernels before; 0: none.")] = 4,
    limit: Annotated[float, typer.Option(help="Seconds after which nothing more is measured.")] = float("inf"),
    csv: Annotated[Path | None, typer.Option(help="Write the rows into this file, too; its other rows stay.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time against T into this file (.svg, .png or .pdf).")] = None,
    commit: Annotated[str | None, typer.Option(help="For that column of the file; asked of git if not given.")] = None,
) -> None:
    """Times of every op, forward and backward, in the zoo's kernels, its reference and other libraries."""
    from rich.progress import Progress

    from zoo.bench import ops as measuring
    from zoo.bench import ops_report as report
    from zoo.pretrained import find_device
    from zoo.revision import source_commit
    from zoo.training.hardware import device_name

    place, names = find_device(device), listed(ops)
    wanted = whole("lengths", lengths)
    before = read_table(csv)
    if plot is not None:
        report.check_plot(plot)
    rows: list[measuring.Row] = []
    commit = (source_commit(12) or "") if commit is None else commit

    def keep(more: list[measuring.Row]) -> None:
        rows.extend(more)
        if csv is not None:
            write(csv, report.to_csv(rows, place, before=before, commit=commit))

    keep([])
    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("ceilings", total=1.0)
        ceilings = measuring.measure_ceilings(place)
        for found in measuring.bench_ops(names or None, device=place, lengths=wanted or None, peers=peers,
                                         budget=seconds, tuning=tuning, workers=workers, limit=limit, keep=keep,
                                         progress=lambda op, done: bar.update(task, description=op, completed=done)):
            if found.rows:
                console().print(report.table(found, ceilings))
            for line in report.left_out(found):
                print(line)
            sys.stdout.flush()
    if plot is not None:
        kept = report.to_csv(rows, place, before=before, commit=commit)
        report.plot(report.from_csv(kept, report.gpu_name(place)), plot, f"Ops of the zoo on {device_name(place)}")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit: 2 with one line for what the user can mend, 130 for Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    try:
        status = app(arguments, prog_name="zoo", standalone_mode=False)
        sys.stdout.flush()
    except ZooError as error:
        status = _refuse(str(error))
    except UsageError as error:
        status = _refuse(error.format_message())
    except BrokenPipeError:  # the reader has seen enough; nothing more may be flushed into its pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    sys.exit(status or 0)


def _refuse(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
