"""A `LanguageModel` as `transformers` wants one: `generate` decodes from the model's state, as `zoo.generate` does.

Imported by the modeling_zoo.py of an exported folder; nothing else of the zoo needs `transformers`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from zoo.contract import State
from zoo.errors import ZooError
from zoo.hf.folder import reseal
from zoo.model import LanguageModel, ModelConfig
from zoo.pretrained import HF_PREFIX, HF_TYPE
from zoo.sampling import PREFILL, select_rows

BEAMS = Version("5.13")  # the first whose beam search asks `_reorder_cache` for caches of any name


class ZooConfig(PretrainedConfig):
    """config.json of an exported folder: `zoo` is what the zoo itself reads, the rest what transformers looks for."""

    model_type = HF_TYPE
    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012 - transformers reads it of the class


@dataclass
class ZooState:
    """What a model remembers of the first `columns` columns of input_ids, for rows [B] that may be padded before."""

    tensors: State
    columns: int


@dataclass
class ZooOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    state: ZooState | None = None


class ZooForCausalLM(PreTrainedModel, GenerationMixin):
    """The model of config.zoo["model"], under `model`. With `use_cache` it hands out its state, a ZooState."""

    config_class = ZooConfig
    base_model_prefix = HF_PREFIX.removesuffix(".")
    main_input_name = "input_ids"
    _is_stateful = True  # no assisted generation: a state does not go back
    _no_split_modules = ["LanguageModel"]  # noqa: RUF012 - decoding calls mixers, past the hooks that would move tensors

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        about = getattr(config, HF_TYPE, None)
        if not isinstance(about, dict) or not isinstance(about.get("model"), dict):
            raise ZooError(f"this configuration has no {HF_TYPE!r} with a `model`: no folder of `zoo export --to hf`")
        self.model = LanguageModel(ModelConfig.from_dict(about["model"]))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a LanguageModel has drawn its own, and transformers' own draw would be another model's."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but ZooError where the file lacks a weight, or has one too many or of another shape."""
        model, found = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = [f"{what} {key}" for what in ("missing", "unexpected", "mismatched")
                 for key in sorted(found[f"{what}_keys"], key=str)]
        if wrong:
            raise ZooError(f"the weights do not fit the {model.model.config.model} of config.json: "
                           + "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
        return (model, found) if output_loading_info else model

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, *args: Any,
                        push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers; and config.json then says the hash of the new weights, for `zoo.load_pretrained`."""
        if push_to_hub:
            raise ZooError("save_pretrained uploads before all files are right; allowed: model.push_to_hub(...)")
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            reseal(Path(save_directory), f"transformers {transformers.__version__}", Path(self.config.name_or_path))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # a state is no list of keys and values

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.model.head = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, state: ZooState | None = None,
                labels: Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int = 0,
                return_dict: bool | None = None, **kwargs: Any) -> ZooOutput | tuple[Any, ...]:
        """input_ids [B, t] int64 -> logits [B, t, V], or [B, k, V] with logits_to_keep=k.

        attention_mask [B, T]: 0 where a row is padded, T being t and the columns that `state` has read. A row's padding
        stands at one of its ends; with a state, at its beginning. What padding itself predicts means nothing.
        state, use_cache: go on from a state (its tensors may be overwritten), and return the new one. Without either
        the sequence is read in parallel, as in training.
        labels [B, t]: -100 where there is none; they are shifted here, as everywhere in transformers.
        Raises ZooError for padding elsewhere, past the model's limit, and for arguments of other models.
        """
        foreign = [key for key, value in kwargs.items()
                   if key != "num_items_in_batch" and value is not None and value is not False]
        if foreign:
            raise ZooError(f"this model takes no {', '.join(foreign)}; allowed: input_ids, attention_mask, state, "
                           "labels, use_cache, logits_to_keep")
        if use_cache or state is not None:
            logits, state = self._extend(input_ids, attention_mask, state, logits_to_keep)
        else:
            logits = self._whole(input_ids, attention_mask)[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = ZooOutput(loss=loss, logits=logits, state=state)
        return output.to_tuple() if return_dict is False else output

    def _whole(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [B, T, V] of whole rows. Padding before a row is turned behind it, where no token can see it."""
        before = None if mask is None else _padding(mask, either_end=True)
        if before is None or not before.any():
            return self.model(tokens)
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        turned = tokens.gather(1, (columns + before[:, None]) % tokens.shape[1])
        back = (columns - before[:, None]) % tokens.shape[1]
        return self.model(turned).take_along_dim(back[:, :, None], 1)

    def _extend(self, tokens: Tensor, mask: Tensor | None, state: ZooState | None,
                keep: int) -> tuple[Tensor, ZooState]:
        """Logits [B, t, V], or of the last `keep` columns, and the state behind them.

        From no state, rows that are padded alike are read together, and their padding not at all: as alone.
        """
        if state is not None:
            # One more token is never padding in `generate`, and to look would be to wait for the device each time.
            if mask is not None and tokens.shape[1] > 1 and not mask[:, -tokens.shape[1]:].all():
                raise ZooError("padding between what a state has read and what is to come; allowed: before a row alone")
            logits, tensors = self._in_pieces(tokens, state.tensors, keep)
            return logits, ZooState(tensors, state.columns + tokens.shape[1])
        rows, width = tokens.shape
        room = max(width, self.model.config.seq_len)
        before = [0] * rows if mask is None else _padding(mask, either_end=False).tolist()
        groups: dict[int, list[int]] = defaultdict(list)
        for row, count in enumerate(before):
            groups[count].append(row)
        parts, states = [], []
        for count, members in groups.items():
            own = tokens[members, count:] if len(groups) > 1 else tokens[:, count:]
            logits, tensors = self._in_pieces(own, self.model.init_state(len(members), room), keep)
            missing = (keep or width) - logits.shape[1]
            parts.append(nn.functional.pad(logits, (0, 0, max(missing, 0), 0)))
            states.append(tensors)
        if len(groups) == 1:
            return parts[0], ZooState(states[0], width)
        back = torch.tensor([row for members in groups.values() for row in members], device=tokens.device).argsort()
        merged = {name: torch.cat([part[name] for part in states]) for name in states[0]}
        return torch.cat(parts)[back], ZooState(select_rows(merged, back), width)

    def _in_pieces(self, tokens: Tensor, state: State, keep: int) -> tuple[Tensor, State]:
        """`extend`, a long prompt in pieces, so that logits which nobody keeps are never in memory together."""
        kept: list[Tensor] = []
        for piece in tokens.split(PREFILL, dim=1):
            logits, state = self.model.extend(piece, state)
            kept = [torch.cat([*kept, logits], 1)[:, -keep:]] if keep else [*kept, logits]
        return torch.cat(kept, 1), state

    # What `generate` calls

    def prepare_inputs_for_generation(self, input_ids: Tensor, state: ZooState | None = None,
                                      attention_mask: Tensor | None = None, use_cache: bool | None = None,
                                      logits_to_keep: int = 0, **kwargs: Any) -> dict[str, Any]:
        """What `forward` gets: the columns that the state has not read yet, all of them without one."""
        if state is not None and state.columns >= input_ids.shape[1]:
            raise ZooError(f"the state has read {state.columns} columns, and input_ids have no more; allowed: the ones "
                           "it has read and at least one new one")
        return {"input_ids": input_ids[:, state.columns if state is not None else 0:], "attention_mask": attention_mask,
                "state": state, "use_cache": use_cache, "logits_to_keep": logits_to_keep}

    def _update_model_kwargs_for_generation(self, outputs: ZooOutput, model_kwargs: dict[str, Any],
                                            *args: Any, **kwargs: Any) -> dict[str, Any]:
        if outputs.state is not None:
            model_kwargs["state"] = outputs.state
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _reorder_cache(self, state: ZooState, beam_idx: Tensor) -> ZooState:
        return ZooState(select_rows(state.tensors, beam_idx), state.columns)

    def _validate_generated_length(self, generation_config: Any, input_ids_length: int, *args: Any) -> None:
        """Refuse at once what would go wrong later: beams whose states nobody moves, rows past the model's limit."""
        super()._validate_generated_length(generation_config, input_ids_length, *args)
        if generation_config.num_beams > 1 and Version(transformers.__version__) < BEAMS:
            raise ZooError(f"num_beams={generation_config.num_beams} is not allowed with transformers "
                           f"{transformers.__version__}, which moves no states between beams; {BEAMS} and later do")
        self.model.check_length(generation_config.max_length - 1)  # the last token drawn is not read


def _padding(mask: Tensor, *, either_end: bool) -> Tensor:
    """How many columns are padded before each row: mask [B, T] of 0 and 1 -> [B] int64. ZooError for other padding."""
    width = mask.shape[1]
    real = mask.bool()
    before = width - real.sum(1)
    columns = torch.arange(width, device=mask.device)
    left = (real == (columns >= before[:, None])).all(1)
    right = (real == (columns < (width - before)[:, None])).all(1)
    if not (left | right if either_end else left).all() or not real.any(1).all():
        allowed = "before or behind its tokens" if either_end else "before its tokens (padding_side='left')"
        raise ZooError(f"attention_mask: a row may be padded {allowed}, and has at least one")
    return before.where(left, 0)
