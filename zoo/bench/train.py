"""Training speed of the architectures side by side: a bare loop of forward, backward, clipping and AdamW.

On a GPU each side is compiled, the zoo's in pieces as training does it and the peers' whole, and the passes of both are
replayed as a CUDA graph by what training uses. Weights are fresh and get a rate of 1e-3 on random bytes; or published
ones, which stay as they are on a text, as a kernel's time may depend on what has been learnt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from zoo.bench import train_peers
from zoo.bench.table import joined
from zoo.bench.timing import interleave, synchronize
from zoo.errors import ZooError, choose
from zoo.mixers import list_mixers
from zoo.model import LanguageModel
from zoo.pretrained import list_pretrained, load_pretrained
from zoo.sizing import SIZES, Size, create_model
from zoo.training.capture import Captured
from zoo.training.compiling import compiled_loss
from zoo.training.hardware import device_name, peak_flops

WEIGHTS = "fresh", "published"
COLUMNS = ("model", "impl", "size", "T", "batch_tokens", "tokens_per_s", "mfu", "peak_mib", "first_step_s")
KEY = 5  # of them say which row it is


@dataclass(frozen=True)
class Row:
    """One side's figures; tokens/s at the median step and at its 80 % and 20 % quantiles (slow, fast)."""

    model: str
    impl: str
    size: str
    seq_len: int
    batch_tokens: int
    tokens_per_s: float
    slow: float
    fast: float
    mfu: float | None
    peak_mib: float | None
    first_step_s: float


@dataclass(frozen=True)
class Side:
    """A model to train. loss(tokens [B, T], targets [B, T]) -> mean nats; flops: forward, of one sequence."""

    model: str
    impl: str
    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    flops: int
    lr: float = 1e-3


def zoo_side(name: str, size: str, seq_len: int, device: torch.device, compiled: bool) -> Side:
    """An architecture of the zoo, compiled as training compiles it."""
    return _own_side(name, create_model(name, size, seq_len=seq_len).to(device), seq_len, compiled, Side.lr)


def published_side(name: str, size: str, seq_len: int, device: torch.device, compiled: bool) -> Side:
    """The same with the weights that are published for it, under their name; raises ZooError where there are none.

    Its rate is 0: AdamW's work is the same, and the weights of the last step are still those of the first.
    """
    shape = SIZES[choose("size", size, SIZES)]
    for known in list_pretrained():
        if known.partition(".")[0] == name:
            model = load_pretrained(known, device=device)
            if Size(model.config.layers, model.config.dim, model.config.heads) == shape:
                model.check_length(seq_len)
                return _own_side(known, model, seq_len, compiled, 0.0)
    raise ZooError(f"no weights of {name} are published at size={size}")


def _own_side(name: str, model: LanguageModel, seq_len: int, compiled: bool, lr: float) -> Side:
    model.train()
    nats: Callable[..., Tensor] = compiled_loss(model) if compiled else model.loss

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return nats(inputs, targets, reduction="sum") / targets.numel()

    return Side(name, "zoo", model, loss, model.flops(seq_len), lr)


def peer_side(impl: str, size: str, seq_len: int, device: torch.device, compiled: bool) -> Side:
    """A decoder from elsewhere, compiled whole, with its loss."""
    shape = SIZES[choose("size", size, SIZES)]
    model = train_peers.PEERS[impl](shape, 256, seq_len).to(device).train()
    loss = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    return Side("transformer", impl, model, loss, train_peers.decoder_flops(model, shape, seq_len))


class Step:
    """One optimiser step on tokens [B, T + 1] as a call; bf16 autocast on a GPU, float32 on a CPU, as in training.

    beside: another model's, not called in the middle of this one, whose memory the recorded passes use again.
    """

    def __init__(self, side: Side, batch: Tensor, beside: Step | None = None):
        module, self.device = side.module, batch.device
        groups: Any = module.parameter_groups(lr=side.lr, weight_decay=0.1) if isinstance(module, LanguageModel) else \
            module.parameters()
        self.optimizer = torch.optim.AdamW(groups, lr=side.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.batch = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        self.loss, self.parameters = side.loss, list(module.parameters())
        self.captured: Captured | None = None
        if self.device.type == "cuda":
            self.captured = Captured(self.passes, self.parameters, adds=False,
                                     beside=None if beside is None else beside.captured)

    def passes(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Forward and back."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.loss(inputs, targets)
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        (self.captured or self.passes)(*self.batch)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        (self.captured or self.optimizer).zero_grad()


def two_steps(step: Step, device: torch.device) -> tuple[float, int | None]:
    """Seconds of the first, compiling included; the most bytes in use in the second, None on a CPU.

    The second is recorded, and the optimiser's state, which the first only made, stands beside its activations.
    """
    start = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - start
    if device.type != "cuda":
        return first, None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return first, torch.cuda.max_memory_allocated(device)


def windows(text: bytes, rows: int, length: int) -> Tensor:
    """[rows, length] int64: bytes of a text, windows as far from each other as it allows."""
    if len(text) < length:
        raise ZooError(f"a text of {len(text)} bytes is not allowed: at least {length}, those of one window")
    every = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    firsts = torch.linspace(0, len(text) - length, rows).long()
    return torch.stack([every[first : first + length] for first in firsts]).long()


def bench_train(models: Sequence[str] | None = None, *, device: torch.device, size: str = "nano", seq_len: int = 256,
                batch_tokens: int = 2048, budget: float = 60.0, peers: bool = False, weights: str = "fresh",
                text: bytes | None = None,
                progress: Callable[[float], object] = lambda done: None) -> tuple[list[Row], dict[str, str]]:
    """Time a training step of each model at one size, context and number of tokens, interleaved for `budget` seconds.

    -> (rows in order of speed, what was left out with the reason). All architectures if `models` is None; of those, one
    that cannot be built at this size and length, or does not train there, is left out, while one asked for by name
    raises its error. With `peers` the decoders of `train_peers` take part. weights: of `WEIGHTS`; published ones need
    the text that they are timed on, fresh ones get random bytes where none is given.
    """
    if seq_len < 1 or batch_tokens < seq_len or batch_tokens % seq_len:
        raise ZooError(f"batch_tokens={batch_tokens} is not allowed at seq_len={seq_len}: a multiple of it")
    published = choose("weights", weights, WEIGHTS) == "published"
    if published and text is None:
        raise ZooError("published weights without a text are not allowed: what they have learnt shows on one")
    on_gpu, rows = device.type == "cuda", batch_tokens // seq_len
    if text is None:
        tokens = torch.randint(256, (rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    else:
        tokens = windows(text, rows, seq_len + 1)
    tokens = tokens.to(device)
    steps: dict[str, Step] = {}
    built: dict[str, tuple[Side, float, float | None]] = {}
    left_out: dict[str, str] = {}
    for name in (*(models or list_mixers()), *(train_peers.PEERS if peers else ())):
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        foreign = name in train_peers.PEERS
        try:
            if foreign and (reason := train_peers.missing(name)):
                raise ZooError(reason)
            make = peer_side if foreign else published_side if published else zoo_side
            side = make(name, size, seq_len, device, compiled=on_gpu)
        except ZooError as error:
            if models and not foreign:
                raise
            left_out[name] = str(error)
            continue
        step = Step(side, tokens, beside=next(iter(steps.values()), None))
        try:
            first_step, most = two_steps(step, device)
        except RuntimeError as error:
            if models and not foreign:
                raise
            left_out[name] = f"it does not train, or cannot be recorded: {' '.join(str(error).split())[:100]}"
            continue
        steps[name], built[name] = step, (side, first_step, None if most is None else (most - before) / 2**20)
    if not steps:
        raise ZooError(f"no architecture can be built at size={size} and seq_len={seq_len}: {min(left_out.values())}")
    best = peak_flops(torch.cuda.get_device_name(device)) if on_gpu else None
    found = []
    for name, timing in interleave(steps, device=device, budget=budget, warmup=3 if on_gpu else 0,
                                   progress=progress).items():
        side, first_step, peak = built[name]
        flops = 3 * rows * side.flops  # the backward pass costs two forward passes
        found.append(Row(side.model, side.impl, size, seq_len, batch_tokens, batch_tokens / timing.p50,
                         batch_tokens / timing.p80, batch_tokens / timing.p20,
                         flops / timing.p50 / best if best else None, peak, first_step))
    return sorted(found, key=lambda row: -row.tokens_per_s), left_out


def to_csv(rows: Sequence[Row], before: str = "") -> str:
    """The rows as a CSV text of `COLUMNS`, joined to `before`; a field is empty where nothing could be measured."""
    def line(row: Row) -> list[str]:
        return [row.model, row.impl, row.size, str(row.seq_len), str(row.batch_tokens), f"{row.tokens_per_s:.0f}",
                *("" if value is None else f"{value:.4g}" for value in (row.mfu, row.peak_mib)),
                f"{row.first_step_s:.3f}"]

    return joined(COLUMNS, KEY, map(line, rows), before)


def table(rows: Sequence[Row], device: torch.device) -> Table:
    """The rows for a terminal; the ratio is to `transformer`, if it is among them."""
    first = rows[0]
    shown = Table(title=f"Training at size {first.size}, T={first.seq_len}, {first.batch_tokens} tokens a step, on "
                        f"{device_name(device)}")
    for column in ("model", "impl", "tokens/s", "slow to fast", "of transformer", "MFU", "peak MiB", "first step"):
        shown.add_column(column, justify="left" if column in ("model", "impl") else "right")
    reference = next((row.tokens_per_s for row in rows
                      if (row.model.partition(".")[0], row.impl) == ("transformer", "zoo")), None)
    for row in rows:
        shown.add_row(row.model, row.impl, f"{row.tokens_per_s:,.0f}", f"{row.slow:,.0f} to {row.fast:,.0f}",
                      f"{row.tokens_per_s / reference:.2f}" if reference else "",
                      "" if row.mfu is None else f"{row.mfu:.1%}",
                      "" if row.peak_mib is None else f"{row.peak_mib:,.0f}", f"{row.first_step_s:.2f} s")
    return shown
