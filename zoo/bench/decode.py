"""Decoding speed of the architectures side by side: greedy tokens from a state that has read a context.

The state behind a context is drawn, not read: no time depends on what it holds. On a GPU matrices and caches are bf16
and a step is a CUDA graph, as `zoo.generate` has it of such a model; on a CPU all is float32 and called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from zoo.bench.decode_peers import VOCABULARY, Llama, PlainSteps
from zoo.bench.table import joined
from zoo.bench.timing import Timing, interleave
from zoo.contract import State
from zoo.decoding import Recorded, narrowed
from zoo.errors import ZooError, choose
from zoo.mixers import list_mixers
from zoo.model import LanguageModel
from zoo.ops.backend import use_backend
from zoo.sampling import Sampling, Steps
from zoo.sizing import SIZES, create_model
from zoo.training.hardware import device_name

COLUMNS = ("model", "impl", "size", "batch", "context", "tokens_per_s", "ms_per_token", "gbytes_per_s", "state_bytes",
           "peak_mib")
KEY = 5  # of them say which row it is
TOKENS = 32  # of a measurement, from the context's end on
EAGER_TOKENS = 4  # where each is hundreds of launches
PEERS = ("plain-decoder", "hf-llama")
LEAST_WINDOW = 1024  # tokens that a model is built for, whatever the context


@dataclass(frozen=True)
class Row:
    """One side's figures: tokens/s of all rows together at the median, and at the 80 % and 20 % quantiles (slow, fast).

    A step takes ms_per_token whatever the batch. gbytes_per_s: what a step must read at least, over its time: matrices,
    and what each row's state holds at this context. state_bytes: of one row.
    """

    model: str
    impl: str
    size: str
    batch: int
    context: int
    tokens_per_s: float
    slow: float
    fast: float
    ms_per_token: float
    gbytes_per_s: float
    state_bytes: int | None
    peak_mib: float | None


@dataclass(frozen=True)
class Side:
    """call() is `tokens` steps; read: bytes of a step, at least."""

    model: str
    impl: str
    call: Callable[[], object]
    tokens: int
    read: int
    state_bytes: int | None


def drawn_state(model: LanguageModel, batch: int, context: int, room: int, dtype: torch.dtype) -> State:
    """A state as if `context` tokens had been read, with room for `room`."""
    state = model.init_state(batch, room, dtype=dtype)
    for value in state.values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)  # sums of weights are positive
        else:
            value.fill_(context)
    return state


def bytes_read(model: LanguageModel, batch: int, context: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of a step, at least: all parameters but the embedding, and the rows' states; and bytes of one row's state."""
    held = sum(value.nbytes for value in model.init_state(1, context, device="meta", dtype=dtype).values())
    weights = sum(p.nbytes for p in (*model.parameters(), *model.buffers())) - model.embedding.weight.nbytes
    return weights + batch * held, held


def zoo_side(name: str, size: str, batch: int, context: int, device: torch.device, recorded: bool) -> Side:
    """An architecture of the zoo; not recorded: PyTorch's operators, called one after the other."""
    tokens = TOKENS if recorded else EAGER_TOKENS
    room, dtype = context + TOKENS, torch.bfloat16 if device.type == "cuda" else torch.float32
    model = narrowed(create_model(name, size, VOCABULARY, max(room, LEAST_WINDOW)).to(device).eval(), dtype)
    read, held = bytes_read(model, batch, context, dtype)
    _check_memory(batch * held, device)
    state = drawn_state(model, batch, context, room, dtype)
    logits, greedy = torch.zeros(batch, VOCABULARY, device=device), Sampling(temperature=0)
    if recorded and device.type == "cuda":
        steps = Recorded(model, logits, state, greedy)
        positions = [value for value in steps.static.values() if not value.is_floating_point()]
        start = [value.clone() for value in positions]

        def replay() -> None:
            torch._foreach_copy_(positions, start)
            for _ in range(tokens):
                steps.advance()

        return Side(name, "zoo", replay, tokens, read, held)

    draws = torch.zeros(batch, device=device)

    def called() -> None:
        for value in state.values():
            if not value.is_floating_point():
                value.fill_(context)
        with use_backend("auto" if recorded else "eager"):
            steps = Steps(model, logits, state, greedy)
            for _ in range(tokens + 1):  # the first draws, and reads nothing
                steps.next(draws)

    return Side(name, "zoo" if recorded else "zoo-eager", called, tokens, read, held)


def plain_side(size: str, batch: int, context: int, device: torch.device) -> Side:
    """The plain decoder, compiled and recorded on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = PlainSteps(SIZES[size], batch, context, context + TOKENS).to(device, dtype).eval()
    made.decoder.cos, made.decoder.sin = made.decoder.cos.float(), made.decoder.sin.float()
    weights = sum(p.nbytes for p in made.decoder.parameters()) - made.decoder.embedding.weight.nbytes
    held = 2 * made.k[:, 0, :, :context].numel() * made.k.element_size()
    step = made.recorded(device)

    def call() -> None:
        made.position.fill_(context)
        for _ in range(TOKENS):
            step()

    return Side("transformer", "plain-decoder", call, TOKENS, weights + batch * held, held)


def bench_decode(models: Sequence[str] | None = None, *, device: torch.device, size: str = "small", batch: int = 1,
                 context: int = 1024, budget: float = 10.0, eager: bool = True, peers: bool = False,
                 progress: Callable[[float], object] = lambda done: None) -> tuple[list[Row], dict[str, str]]:
    """Time decoding of each model at one size, batch and context, interleaved for `budget` seconds.

    -> (rows in order of speed, what was left out with the reason). All architectures if `models` is None; of those, one
    that cannot be built is left out, while one asked for by name raises its ZooError.
    """
    choose("size", size, SIZES)
    for what, value in (("batch", batch), ("context", context)):
        if value < 1:
            raise ZooError(f"{what}={value} is not allowed: 1 or above")
    with torch.inference_mode():
        sides: dict[tuple[str, str], Side] = {}
        left_out: dict[str, str] = {}
        peaks: dict[tuple[str, str], float | None] = {}
        builders: list[tuple[str, Callable[[], Side]]] = []
        for name in models or list_mixers():
            builders.append((name, lambda name=name: zoo_side(name, size, batch, context, device, True)))  # type: ignore[misc]
            if eager and device.type == "cuda":
                builders.append((name, lambda name=name: zoo_side(name, size, batch, context, device, False)))  # type: ignore[misc]
        if peers:
            builders.append(("plain-decoder", lambda: plain_side(size, batch, context, device)))
        for name, build in builders:
            before = _memory(device)
            try:
                side = build()
                side.call()
                side.call()
            except (ZooError, torch.OutOfMemoryError) as error:
                if models and name in models:
                    raise error if isinstance(error, ZooError) else ZooError(_too_large(batch, context)) from None
                left_out[name] = str(error) if isinstance(error, ZooError) else _too_large(batch, context)
                continue
            sides[side.model, side.impl] = side
            peaks[side.model, side.impl] = _peak(device, before)
        if not sides:
            raise ZooError(f"nothing can be measured at size={size}, batch={batch}, context={context}: "
                           f"{next(iter(left_out.values()))}")
        timings = interleave({f"{model} {impl}": side.call for (model, impl), side in sides.items()}, device=device,
                             budget=budget, warmup=1, progress=progress)
    rows = [_row(side, timings[f"{model} {impl}"], size, batch, context, peaks[model, impl])
            for (model, impl), side in sides.items()]
    if peers:
        sides.clear()
        try:
            rows.append(llama_row(size, batch, context, device))
        except ZooError as error:
            left_out["hf-llama"] = str(error)
    return sorted(rows, key=lambda row: -row.tokens_per_s), left_out


def llama_row(size: str, batch: int, context: int, device: torch.device) -> Row:
    """Llama by itself: what `TOKENS` more tokens take beyond the first, over runs of both."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = _memory(device)
    try:
        llama = Llama(SIZES[size], batch, context, context + TOKENS + 8, device, dtype)
        with torch.inference_mode():
            for tokens in (1, TOKENS + 1):
                llama.generate(tokens)
            timings = interleave({"first": lambda: llama.generate(1), "all": lambda: llama.generate(TOKENS + 1)},
                                 device=device, budget=0.0, warmup=1, least=5)
    except ZooError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise ZooError(f"it does not generate here: {' '.join(str(error).split())[:120]}") from None
    weights = sum(p.nbytes for p in llama.model.parameters()) - llama.model.get_input_embeddings().weight.nbytes
    held = 2 * SIZES[size].layers * SIZES[size].dim * context * dtype.itemsize
    first, whole = timings["first"], timings["all"]
    timing = Timing(whole.p50 - first.p50, whole.p20 - first.p50, whole.p80 - first.p50, whole.samples)
    side = Side("transformer", "hf-llama", lambda: None, TOKENS, weights + batch * held, held)
    return _row(side, timing, size, batch, context, _peak(device, before))


def _row(side: Side, timing: Timing, size: str, batch: int, context: int, peak: float | None) -> Row:
    step = timing.p50 / side.tokens
    return Row(side.model, side.impl, size, batch, context, batch / step, batch * side.tokens / timing.p80,
               batch * side.tokens / timing.p20, step * 1e3, side.read / step / 1e9, side.state_bytes, peak)


def _memory(device: torch.device) -> int:
    """Bytes in use, with the counter of the most set to them."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device, before: int) -> float | None:
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20 if device.type == "cuda" else None


def _check_memory(needed: int, device: torch.device) -> None:
    if device.type == "cuda" and needed > torch.cuda.mem_get_info(device)[0]:
        raise ZooError(f"states of {needed / 2**30:.1f} GiB do not fit this GPU; allowed: a smaller batch or context")


def _too_large(batch: int, context: int) -> str:
    return f"batch={batch} at context={context} does not fit this GPU; allowed: a smaller batch or context"


def to_csv(rows: Sequence[Row], before: str = "") -> str:
    """The rows as a CSV text of `COLUMNS`, joined to `before`; a field is empty where nothing could be measured."""
    def line(row: Row) -> list[str]:
        figures = row.tokens_per_s, row.ms_per_token, row.gbytes_per_s, row.state_bytes, row.peak_mib
        return [row.model, row.impl, row.size, str(row.batch), str(row.context),
                *("" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"
                  for value in figures)]

    return joined(COLUMNS, KEY, map(line, rows), before)


def table(rows: Sequence[Row], device: torch.device, bandwidth: float | None) -> Table:
    """The rows for a terminal; bandwidth in bytes/s, of a copy on this device, is the floor's."""
    first = rows[0]
    shown = Table(title=f"Decoding at size {first.size}, batch {first.batch}, context {first.context}, on "
                        f"{device_name(device)}")
    for column in ("model", "impl", "tokens/s", "slow to fast", "ms a token", "GB/s", "of the floor", "state",
                   "peak MiB"):
        shown.add_column(column, justify="left" if column in ("model", "impl") else "right")
    for row in rows:
        shown.add_row(row.model, row.impl, f"{row.tokens_per_s:,.0f}", f"{row.slow:,.0f} to {row.fast:,.0f}",
                      f"{row.ms_per_token:.3f}", f"{row.gbytes_per_s:,.1f}",
                      f"{row.gbytes_per_s * 1e9 / bandwidth:.1%}" if bandwidth else "",
                      "" if row.state_bytes is None else f"{row.state_bytes / 2**20:.2f} MiB",
                      "" if row.peak_mib is None else f"{row.peak_mib:,.0f}")
    return shown
