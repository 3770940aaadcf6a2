"""The language model that all architectures share: embedding, residual blocks of two mixers, norm, head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from zoo.contract import SequenceMixer, State
from zoo.errors import ZooError
from zoo.layers import SwiGLU, head_dim
from zoo.mixers import build_mixer, check_options
from zoo.ops import decode
from zoo.ops.add_norm import add_norm
from zoo.ops.cross_entropy import linear_cross_entropy
from zoo.ops.documents import check_documents


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's shapes and mathematics; `config.json` of a saved model is this."""

    model: str
    vocab_size: int
    seq_len: int
    layers: int
    dim: int
    heads: int
    channel_dim: int
    dropout: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "layers", "dim", "heads", "channel_dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ZooError(f"{name}={value!r} is not a positive whole number")
        if not 0 <= self.dropout < 1:
            raise ZooError(f"dropout={self.dropout} is not in [0, 1)")
        head_dim(self.dim, self.heads)
        check_options(self.model, self.options)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelConfig:
        """Raises ZooError for keys that are missing or unknown."""
        known = {f.name for f in fields(cls)}
        missing = {"model", "vocab_size", "seq_len", "layers", "dim", "heads", "channel_dim"} - config.keys()
        if missing or config.keys() - known:
            wrong = [f"no {k}" for k in sorted(missing)] + [f"unknown {k}" for k in sorted(config.keys() - known)]
            raise ZooError(f"not a model configuration: {', '.join(wrong)}; allowed: {', '.join(sorted(known))}")
        return cls(**config)


class Block(nn.Module):
    """x + sequence_mixer(norm(x)), then the same with the channel mixer, whose output is for the next norm to add."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.sequence_norm = nn.LayerNorm(config.dim)
        self.sequence_mixer = build_mixer(config.model, config.dim, config.heads, config.seq_len, config.options)
        self.channel_norm = nn.LayerNorm(config.dim)
        self.channel_mixer = (self.sequence_mixer.channel_mixer or SwiGLU)(config.dim, config.channel_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, y: Tensor | None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The residual stream x [B, T, D] and what is to be added to it, y [B, T, D] -> the two behind the block."""
        for _, norm, mixer in self.slots():
            x, normed = add_norm(x, y, norm, mixer.projects_input)
            y = self.dropout(mixer(normed, cu_seqlens))
        return x, y

    def slots(self) -> tuple[tuple[str, nn.LayerNorm, SequenceMixer], ...]:
        """Name, norm and mixer of the two slots, in the order they are applied."""
        return (("sequence_mixer", self.sequence_norm, self.sequence_mixer),
                ("channel_mixer", self.channel_norm, self.channel_mixer))


class LanguageModel(nn.Module):
    """A causal language model. `model(tokens)`: tokens [B, T] int64 -> logits [B, T, V].

    `model(tokens, cu_seqlens)`: N documents one after the other in a row, tokens [1, T]; cu_seqlens [N + 1] (int32 or
    int64, on the same device) says where they begin and end, ascending from 0 to T. Each is read as if it were alone,
    positions anew from 0, forward and backward. Documents may be empty.

    The embedding is drawn tiny and normalised at once (the RWKV papers' initialisation, 2305.13048 section 3.4), the
    head orthogonal; both, the LayerNorms and the residual wiring are the same for every architecture, so that a
    comparison compares the mixers.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim, _weight=torch.empty(config.vocab_size, config.dim))
        self.embedding_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if not self.head.weight.is_meta:  # shapes alone have nothing to draw, and trying imports torch._dynamo: seconds
            self.reset_parameters()

    def mixers(self) -> Iterator[tuple[str, SequenceMixer]]:
        """Every mixer with its name: ("blocks.0.sequence_mixer", ...), ("blocks.0.channel_mixer", ...), ..."""
        for i, block in enumerate(self.blocks):
            for slot, _, mixer in block.slots():
                yield f"blocks.{i}.{slot}", mixer

    def reset_parameters(self) -> None:
        """Draw every parameter anew from torch's generator."""
        nn.init.uniform_(self.embedding.weight, -1e-4, 1e-4)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for name, mixer in self.mixers():
            mixer.reset_parameters(int(name.split(".")[1]), self.config.layers)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(1.0, self.config.vocab_size / self.config.dim) ** 0.5)

    @property
    def max_len(self) -> int | None:
        """The longest sequence the model can see, None for any."""
        limits = [mixer.max_len for _, mixer in self.mixers() if mixer.max_len is not None]
        return min(limits) if limits else None  # min(..., default=None) would break torch.compile's graph

    def check_length(self, length: int) -> None:
        """Raise ZooError where `length` tokens are past the model's limit."""
        if self.max_len is not None and length > self.max_len:
            raise ZooError(f"{length} tokens are past the limit of this {self.config.model}: at most {self.max_len}")

    def check_documents(self, tokens: Tensor, cu_seqlens: Tensor) -> None:
        """Raise ZooError where packed documents are not as `forward` wants them.

        That a document is past the model's limit can be seen at once on a CPU. Elsewhere, where T itself is past it,
        the device looks, and stops the process with an assertion: nobody waits for it.
        """
        check_documents(tokens, cu_seqlens)
        if self.max_len is None or tokens.shape[1] <= self.max_len:
            return
        longest = cu_seqlens.diff().max()
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_length(int(longest))
        else:
            torch._assert_async(longest <= self.max_len, f"a document of more than {self.max_len} tokens")

    def begin(self, tokens: Tensor) -> Tensor:
        """What the first block reads: tokens [B, T] -> [B, T, D]."""
        return self.dropout(self.embedding_norm(self.embedding(tokens)))

    def end(self, x: Tensor, y: Tensor | None, targets: Tensor, reduction: str) -> Tensor:
        """The loss, from what the last block wrote, two of [B, T, D]."""
        hidden = add_norm(x, y, self.norm, narrow=True)[1]
        return linear_cross_entropy(hidden, self.head.weight, targets, reduction=reduction)

    def _through_blocks(self, tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the last block wrote: tokens [B, T] -> two of [B, T, D]."""
        if cu_seqlens is None:
            self.check_length(tokens.shape[1])
        else:
            self.check_documents(tokens, cu_seqlens)
        x, y = self.begin(tokens), None
        for block in self.blocks:
            x, y = block(x, y, cu_seqlens)
        return x, y

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.head(add_norm(*self._through_blocks(tokens, cu_seqlens), self.norm, narrow=True)[1])

    def loss(self, tokens: Tensor, targets: Tensor, reduction: str = "mean",
             cu_seqlens: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats of targets [B, T], -100 where there is none; "mean", "sum" or "none" [B, T]."""
        return self.end(*self._through_blocks(tokens, cu_seqlens), targets, reduction)

    def init_state(self, batch_size: int = 1, max_len: int | None = None, *, device: torch.device | str | None = None,
                   dtype: torch.dtype | None = None) -> State:
        """The state before the first token, every entry [B, ...]: rows can be selected, stacked, cloned, restored.

        `max_len`: how many tokens to make room for at once (`seq_len` if None); a state that outgrows it is enlarged.
        dtype: of what is kept of single tokens, a cache say; sums are float32 at least. None: float32, but the
        matrices' own type where only they are narrow (`zoo.decoding.narrowed`).
        """
        device = self.head.weight.device if device is None else device
        dtype = (self.head.weight.dtype if self.narrow else torch.float32) if dtype is None else dtype
        room = min(max_len or self.config.seq_len, self.max_len or 1 << 62)
        state = {"position": torch.zeros(batch_size, dtype=torch.int64, device=device)}
        for name, mixer in self.mixers():
            part = mixer.init_state(batch_size, room, device=device, dtype=dtype)
            state |= {f"{name}.{entry}": value for entry, value in part.items()}
        return state

    def extend(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read the next t >= 1 tokens [B, t] int64 -> (logits [B, t, V], new state): prefill and decode alike.

        Tensors of the state passed in may be overwritten: clone it first to come back to it.
        Raises ZooError past the model's limit.
        """
        return self.read(tokens, self.reserve(state, tokens.shape[1]))

    def reserve(self, state: State, tokens: int) -> State:
        """The state with room for so many tokens more in every row. Raises ZooError past the model's limit.

        It has to ask the device how far the rows are.
        """
        length = int(state["position"].max()) + tokens
        self.check_length(length)
        parts, new = self._parts(state), {"position": state["position"]}
        for name, mixer in self.mixers():
            new |= _named(name, mixer.reserve(parts[name], length))
        return new

    def read(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """`extend` of a state that has the room (`reserve`): of one token a GPU is asked nothing, so that it can be
        recorded."""
        if self.narrow:
            weight = self.head.weight
            with torch.autocast(weight.device.type, weight.dtype, cache_enabled=False):  # a recording keeps no casts
                return self._read(tokens, state)
        return self._read(tokens, state)

    @property
    def narrow(self) -> bool:
        """Whether the matrices alone are of a narrow type, as those of `zoo.decoding.narrowed`."""
        return self.head.weight.dtype != self.embedding.weight.dtype

    def _read(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        parts = self._parts(state)
        y: Tensor | None = None
        if decode.takes_ids(tokens, self.embedding.weight):
            x = decode.embed(tokens, self.embedding.weight, self.embedding_norm, state["position"])
            new: State = {"position": state["position"]}
        else:
            x = self.embedding_norm(self.embedding(tokens))
            new = {"position": state["position"] + tokens.shape[1]}
        for i, block in enumerate(self.blocks):
            for slot, norm, mixer in block.slots():
                name = f"blocks.{i}.{slot}"
                x, y, part = mixer.extend_normed(x, y, norm, parts[name])
                new |= _named(name, part)
        if decode.takes(x, self.head.weight):
            return decode.norm_linear(x, y, self.norm, self.head.weight)[1], new
        return self.head(add_norm(x, y, self.norm, narrow=True)[1]), new

    def _parts(self, state: State) -> dict[str, State]:
        """Each mixer's own state, by the mixer's name."""
        parts: dict[str, State] = {name: {} for name, _ in self.mixers()}
        for key, value in state.items():
            if key != "position":
                owner, _, entry = key.rpartition(".")
                parts[owner][entry] = value
        return parts

    def set_step(self, step: int) -> None:
        """Tell the mixers the number of the optimiser step to come (Performer redraws its features by it)."""
        for _, mixer in self.mixers():
            mixer.set_step(step)

    def flops(self, seq_len: int) -> int:
        """Forward FLOPs of one sequence, from each mixer's own count and the head; two to a multiply-add."""
        return sum(mixer.flops(seq_len) for _, mixer in self.mixers()) + 2 * seq_len * self.head.weight.numel()

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW's groups: matrices decay but for the embedding and what a mixer spares; `lr` by a mixer's multiple."""
        spared, multiple = {"embedding.weight"}, dict[str, float]()
        for name, mixer in self.mixers():
            spared |= {f"{name}.{own}" for own in mixer.no_weight_decay()}
            multiple |= {f"{name}.{own}": by for own, by in mixer.lr_multipliers().items()}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self.named_parameters():
            decay = weight_decay if parameter.ndim >= 2 and name not in spared else 0.0
            groups.setdefault((lr * multiple.get(name, 1.0), decay), []).append(parameter)
        return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def _named(owner: str, part: State) -> State:
    """A mixer's state as part of the model's."""
    return {f"{owner}.{entry}": value for entry, value in part.items()}
