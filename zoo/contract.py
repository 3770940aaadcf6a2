"""What every mixer is: a map [B, T, D] -> [B, T, D] whose output at t depends on inputs 0..t only.

The sequence slot of a block (attention, AFT, WKV, ...) and its channel slot (an MLP, or RWKV's channel mix, which looks
one token back) keep the same contract, so that one `LanguageModel` trains, prefills and decodes all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.ops.add_norm import add_norm

State = dict[str, Tensor]
"""A mixer's memory of a sequence. Every entry is [B, ...], so that rows can be selected, stacked, cloned and restored;
the entries' meaning belongs to the mixer alone. Rows may stand at different positions."""


class SequenceMixer(nn.Module, ABC):
    """One mixer of a block. Built as `Mixer(dim, heads, seq_len, **options)`; options are keyword-only with defaults.

    A keyword annotated with `typing.Literal` is a variant: the tests run every value of it.
    """

    max_len: int | None = None
    """The longest sequence it can see, None for any."""

    channel_mixer: ClassVar[type[SequenceMixer] | None] = None
    """What stands in the channel slot, built as `channel_mixer(dim, channel_dim)`; None: the SwiGLU MLP."""

    paper: ClassVar[str] = ""
    """Name and arXiv number of its source, for the tables."""

    complexity: ClassVar[str] = ""
    """Time to train on T tokens and memory to decode, for the tables: "O(T^2), O(T)"."""

    projects_input: ClassVar[bool] = False
    """Whether all that `forward` does with its x is projecting it, so that autocast's dtype will do."""

    @abstractmethod
    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences from their beginning, x [B, T, D] -> [B, T, D].

        With cu_seqlens [N + 1] (int32 or int64, on x's device, ascending from 0 to T; documents may be empty) x is one
        row [1, T, D] of N documents, one after the other, and each is mixed as if it were alone, forward and backward.
        """

    @abstractmethod
    def init_state(self, batch_size: int, max_len: int, *, device: torch.device | str | None = None,
                   dtype: torch.dtype = torch.float32) -> State:
        """The state before the first token. `max_len` is how many tokens to make room for, not a limit."""

    @abstractmethod
    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix the next t >= 1 tokens, x [B, t, D] -> (y [B, t, D], new state).

        `forward(x)` equals `extend` over any split of x, from `init_state`. The tensors of the state passed in may be
        overwritten (a key-value cache is): clone them first to come back to it.

        A state that t tokens outgrow is enlarged, but for one: on a GPU, t = 1 never waits for the device, so that it
        can be recorded, and room for the token must be there already (`reserve`).
        """

    def extend_normed(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm,
                      state: State) -> tuple[Tensor, Tensor, State]:
        """`extend` of norm(x + y), x, y [B, t, D] (y None: nothing to add) -> x + y, the mixer's output, new state.

        For mixers to override where kernels take one token's norm together with what reads it.
        """
        x, normed = add_norm(x, y, norm, self.projects_input)
        y, state = self.extend(normed, state)
        return x, y, state

    def reserve(self, state: State, tokens: int) -> State:
        """The state with room for so many tokens from its first on; itself where it does not grow, or has the room."""
        return state

    @abstractmethod
    def flops(self, seq_len: int) -> int:
        """Forward FLOPs of one sequence, projections included, two to a multiply-add."""

    def reset_parameters(self, layer_idx: int, num_layers: int) -> None:
        """Draw the parameters anew as the mixer's paper says, for layer `layer_idx` of `num_layers`."""

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would harm (vectors and scalars are spared without being named)."""
        return set()

    def matrices(self) -> set[str]:
        """Names of the parameters that are factors of products alone: a copy to decode may hold them in bf16."""
        return {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Linear)}

    def lr_multipliers(self) -> dict[str, float]:
        """Parameters whose paper asks for a multiple of the learning rate, by name."""
        return {}

    def set_step(self, step: int) -> None:
        """Told before each optimiser step in training; what a mixer derives from it is a pure function of `step`."""
