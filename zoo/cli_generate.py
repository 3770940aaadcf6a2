"""`zoo generate`, registered on the command's app by zoo/cli.py. It parses and prints, as all of the command does."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zoo.cli_values import Device, read_bytes
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.generation import Context, Options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(generate)


def generate(
    model: Annotated[str, typer.Argument(help="A published model's name, a saved model's folder or a run's folder.")],
    prompt: Annotated[list[str], typer.Option(help="What to continue; may be given several times.")] = [],  # noqa: B006
    prompt_file: Annotated[list[Path], typer.Option(help="A prompt in a file, as it is; after those above.")] = [],  # noqa: B006
    max_tokens: Annotated[int | None, typer.Option(help="Tokens a prompt; 256 if its model can. 0 only reads.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many of the likeliest tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens of this joint probability.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Leave out what has less than this share of the likeliest one's "
                                              "probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that were there before are less likely.")] =
        1.0,
    stop: Annotated[list[str], typer.Option(help="End before this text; may be given several times.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    window: Annotated[bool, typer.Option("--window", help="Read the end of a prompt that is past the model's limit.")] =
        False,
    state: Annotated[Path | None, typer.Option(help="Go on from a state that was saved before.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Save what was read and written, to go on later.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Continue each line that is typed.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the weights' matrices: float32, or bfloat16 or float16, which a GPU "
                                            "reads sooner.")] = "float32",
    device: Device = "auto",
) -> None:
    """Continue prompts, writing while the model does. Without a prompt it begins a document of its own.

    Interactive, each line is read and continued, after all that came before; Ctrl-C ends an answer, Ctrl-D the session.
    """
    import zoo
    from zoo.decoding import narrowed
    from zoo.errors import choose
    from zoo.generation import Context
    from zoo.pretrained import DTYPES, find_device

    prompts = [*prompt, *map(_read_text, prompt_file)]
    if len(prompts) > 1 and (interactive or save_state is not None):
        raise ZooError(f"{len(prompts)} prompts are not allowed with --interactive or --save-state: one at most")
    if save_state is not None and not save_state.parent.is_dir():
        raise ZooError(f"cannot write {save_state}: no such folder")
    kind = DTYPES[choose("dtype", dtype, DTYPES)]
    loaded = narrowed(zoo.load_pretrained(model, device=find_device(device)), kind)
    context = Context(loaded) if state is None else Context.load(state, loaded)
    how: Options = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
                    "min_p": min_p, "repetition_penalty": repetition_penalty, "stop": stop, "seed": seed,
                    "window": window, "complain": lambda line: print(line, file=sys.stderr)}
    zoo.generate(loaded, [], **how)  # refuses what has no meaning before anything is read
    if interactive:
        if prompts:
            context.read(prompts[0], window=window)
        try:
            _converse(context, how)
        finally:
            if save_state is not None:
                context.save(save_state)
        return
    prompts = prompts or [""]
    unsaid = [prompts[0]]  # until the first text comes, so that a refused prompt leaves nothing on stdout

    def show(row: int, piece: str) -> None:
        if row == 0:  # rows are drawn together: the first is shown as it comes, the others in turn
            print((unsaid.pop() if unsaid else "") + piece, end="", flush=True)

    how["on_text"] = show
    if save_state is not None:
        context.write(prompts[0], **how)
        context.save(save_state)
        written = [""]
    else:
        written = zoo.generate(loaded, prompts, context=context, **how)
    print("".join(unsaid))
    for given, text in zip(prompts[1:], written[1:], strict=True):
        print(f"---\n{given}{text}")


def _converse(context: Context, how: Options) -> None:
    """Read lines from stdin and continue each; the model has read what the terminal shows, line ends included."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # where there is none, lines are edited as the terminal does it
            import readline  # noqa: F401 - makes `input` edit lines and remember them
    while True:
        try:
            line = _read_line(terminal)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            continue
        shown: list[str] = []

        def show(_row: int, piece: str, shown: list[str] = shown) -> None:
            shown.append(piece)
            print(piece, end="", flush=True)

        how["on_text"] = show
        asked = f"{'' if _at_line_start(context) else chr(10)}{line}\n"
        try:
            context.write(asked, **how)
        except KeyboardInterrupt:  # which left the context as it was
            if not terminal:
                raise
            context.read(asked + "".join(shown), window=how["window"])
        if not _at_line_start(context):
            print(flush=True)
    if terminal:
        print()


def _at_line_start(context: Context) -> bool:
    return len(context.tokens) == 1 or context.tokenizer.to_bytes(context.tokens[-1:]).endswith(b"\n")


def _read_line(terminal: bool) -> str:
    """The next line, without its end. Raises EOFError behind the last."""
    try:
        if terminal:
            return input("> ")
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise ZooError(f"the input is not text in UTF-8: {error.reason}") from None
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ZooError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None
