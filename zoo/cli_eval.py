"""`zoo eval` and `zoo recall`, registered on the command's app by zoo/cli.py. They parse and print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli_values import Device, console, listed, whole
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.evaluation import Excerpt, Reading
    from zoo.pretrained import PretrainedModel
    from zoo.recall import Result


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("eval")(eval_command)
    app.command("recall")(recall_command)


def eval_command(
    model: Annotated[str, typer.Argument(help="A published model's name, a saved model's folder or a run's folder.")],
    data: Annotated[str | None, typer.Option(help="The corpus: novels, text, wikitext2, lambada, ...")] = None,
    path: Annotated[str | None, typer.Option(help="Where the corpus lies, as data.path=; of text, your file.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test; text has none, all of it is read.")] = "test",
    lengths: Annotated[str, typer.Option(help="Tokens a window, with commas; none: as in training.")] = "",
    stride: Annotated[str, typer.Option(help="Tokens from a window to the next, with commas: windows overlap.")] = "",
    carried: Annotated[bool, typer.Option("--carried", help="Carry the state through every document.")] = False,
    tokens: Annotated[int | None, typer.Option(min=1, help="Only the first so many of the split.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Through the model at once; less takes less "
                                                                 "memory.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bf16 as training on a GPU does, not in float32.")] =
        False,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, with commas: lambada_openai, ...")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Where yaml files of further tasks lie.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in a task's prompt; none: as it says.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many documents of a task.")] = None,
    cache: Annotated[str | None, typer.Option(help="Where prepared tokens are kept; ~/.cache/zoo if not said.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything into this file.")] = None,
    device: Device = "auto",
) -> None:
    """Measure a model on a text, or on tasks.

    Bits per byte over every byte once, perplexity of a token and of a word, the loss by position and context length.
    Tasks are lm-evaluation-harness's own (pip install 'zoo-lm[eval]'); it fetches their data.
    """
    from zoo.evaluation import write_json
    from zoo.pretrained import find_device, load_pretrained

    if data is None and not tasks:
        raise ZooError("nothing to measure on is given; allowed: --data NAME, --tasks NAMES, or both")
    if json is not None and not json.parent.is_dir():  # before anything is measured
        raise ZooError(f"cannot write {json}: no such folder")
    sizes, strides = whole("--lengths", lengths), whole("--stride", stride)
    loaded = load_pretrained(model, device=find_device(device))
    precision, place = "bf16" if bf16 else "float32", str(loaded.head.weight.device)
    headline = (f"{model}: {loaded.num_parameters():,} parameters, trained at T={loaded.config.seq_len}; "
                f"{precision} on {place}")
    found: dict[str, Any] = {"model": model, "device": place, "precision": precision}
    if data is not None:
        excerpt, readings = _read(loaded, data, path, split, cache, tokens, strides, sizes, carried, batch_tokens, bf16)
        what = "all" if data == "text" else f"the {split} split"
        print(f"{headline}\n{what} of {data}{f', its first {tokens:,} tokens' if tokens else ''}: {excerpt.bytes:,} "
              f"bytes, {excerpt.words:,} words, {readings[0].found.tokens:,} tokens")
        console().print(_table(readings), _by_position(readings))
        found |= {"data": excerpt.about, "readings": [reading.to_dict() for reading in readings]}
    if tasks:
        from zoo.harness import run_tasks

        results = run_tasks(loaded, listed(tasks), folder=task_folder, fewshot=fewshot,
                            limit=limit, max_length=sizes[0] if sizes else None, batch_tokens=batch_tokens, bf16=bf16)
        if data is None:
            print(headline)
        for task, values in results["results"].items():
            for name, value in values.items():
                if isinstance(value, float) and "_stderr" not in name:
                    error = values.get(name.replace(",", "_stderr,", 1))
                    print(f"{task}: {name.partition(',')[0]} {value:.4f}"
                          f"{f' +- {error:.4f}' if isinstance(error, float) else ''}")
        found["tasks"] = {key: results[key] for key in ("results", "versions", "n-shot", "n-samples")}
    if json is not None:
        write_json(json, found)


def recall_command(
    models: Annotated[str, typer.Option(help="With commas; none: all architectures.")] = "",
    grid: Annotated[str, typer.Option(help="Tokens:pairs, with commas.")] = "64:4",
    widths: Annotated[str, typer.Option(help="Channels, with commas.")] = "64",
    rates: Annotated[str, typer.Option(help="Peak learning rates, with commas; the best of each counts.")] = "3e-3",
    vocab: Annotated[int, typer.Option(help="Ids; half are keys, half values. Zoology has 8192.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps of a model, at most.")] = 400,
    batch: Annotated[int, typer.Option(help="Examples a step.")] = 64,
    examples: Annotated[int, typer.Option(help="Different examples to train on.")] = 20_000,
    tests: Annotated[int, typer.Option(help="Examples to score on.")] = 1_000,
    test_every: Annotated[int, typer.Option(help="Steps from a score to the next; above 0.99 a model is done.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Decides weights and examples.")] = 1,
    csv: Annotated[Path | None, typer.Option(help="Keep results in this file; what it holds is not run.")] = None,
    device: Device = "auto",
) -> None:
    """Train on associative recall, and score.

    Multi-query associative recall (MQAR) as Zoology defines it, a model of two layers at a time; as it stands a small
    grid, minutes on a CPU. docs/evaluation.md has Zoology's own.
    """
    from zoo.mixers import list_mixers
    from zoo.pretrained import find_device
    from zoo.recall import Recipe, best, read_csv, write_csv
    from zoo.recall import grid as trained

    recipe = Recipe(steps=steps, batch=batch, examples=examples, tests=tests, test_every=test_every, vocab_size=vocab,
                    seed=seed)
    tasks = [whole("--grid", part.replace(":", ",")) for part in grid.split(",")]
    if wrong := [task for task in tasks if len(task) != 2]:
        raise ZooError(f"--grid: {wrong[0]} is not allowed: tokens:pairs with commas between, 64:4,128:8")
    if csv is not None and not csv.parent.is_dir():  # before anything is trained
        raise ZooError(f"cannot write {csv}: no such folder")
    results = [] if csv is None else read_csv(csv)
    known = len(results)
    for result in trained(listed(models) or list_mixers(), [(task[0], task[1]) for task in tasks],
                          whole("--widths", widths), _numbers("--rates", rates), recipe, find_device(device), results):
        results.append(result)
        print(f"{result.model} {result.seq_len}:{result.pairs} width {result.width} at {result.lr:g}: "
              f"{result.accuracy:.3f} after {result.steps} steps, {result.seconds:.0f} s", flush=True)
        if csv is not None:
            write_csv(csv, results)
    if known:
        print(f"{known} results were in {csv}")
    console().print(_recalled(best(results)))


def _recalled(results: list[Result]) -> object:
    from rich.table import Table

    table = Table(title="share of queries answered, at the best rate")
    for column in ("model", "tokens:pairs", "width", "accuracy", "rate", "steps", "parameters", "state bytes"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for each in sorted(results, key=lambda each: (each.seq_len, each.pairs, each.width, -each.accuracy)):
        table.add_row(each.model, f"{each.seq_len}:{each.pairs}", str(each.width), f"{each.accuracy:.3f}",
                      f"{each.lr:g}", str(each.steps), f"{each.parameters:,}", f"{each.state_bytes:,}")
    return table


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ZooError(f"{option}: {text!r} is not allowed: numbers with commas between") from None


def _read(loaded: PretrainedModel, data: str, path: str | None, split: str, cache: str | None, tokens: int | None,
          strides: list[int], sizes: list[int], carried: bool, batch_tokens: int | None,
          bf16: bool) -> tuple[Excerpt, list[Reading]]:
    """Open and read a corpus, with a bar on the terminal."""
    from rich.progress import Progress

    from zoo.evaluation import open_excerpt, read

    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(data, total=None)
        excerpt = open_excerpt(data, loaded.tokenizer, path=path, split=split, cache=cache, limit=tokens,
                               progress=lambda done, total: bar.update(task, completed=done, total=total))
        return excerpt, list(read(
            loaded, excerpt, strides=strides, lengths=sizes, carried=carried, batch_tokens=batch_tokens, bf16=bf16,
            progress=lambda how, done, total: bar.update(task, description=how, completed=done, total=total)))


def _table(readings: list[Reading]) -> object:
    from rich.table import Table

    table = Table()
    table.add_column("read in")
    for column in ("bits/byte", "token perplexity", "word perplexity", "seconds"):
        table.add_column(column, justify="right")
    for reading in readings:
        words = "no words" if reading.word_perplexity is None else f"{reading.word_perplexity:.2f}"
        table.add_row(reading.how, f"{reading.found.bits_per_byte:.4f}", f"{reading.found.perplexity:.4f}", words,
                      f"{reading.seconds:.1f}")
    return table


def _by_position(readings: list[Reading]) -> object:
    """Doublings down, readings across: nats a token by the tokens that its window, or its document, has up to it."""
    from rich.table import Table

    table = Table(title="nats a token, by the tokens before it")
    table.add_column("at most", justify="right")
    for reading in readings:
        table.add_column(reading.how, justify="right")
    for edge in sorted({edge for reading in readings for edge in reading.found.upto}):
        means = [dict(zip(reading.found.upto, reading.found.nats, strict=True)).get(edge) for reading in readings]
        table.add_row(f"{edge:,}", *("" if mean is None else f"{mean:.4f}" for mean in means))
    return table
