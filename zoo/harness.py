"""Saved models in EleutherAI's lm-evaluation-harness: its tasks, prompts and metrics, our model behind its `LM`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.errors import ZooError
from zoo.evaluate import at_once, reading
from zoo.evaluation import enough_memory
from zoo.pretrained import PretrainedModel

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ZooError(f"tasks need the package lm_eval: pip install 'zoo-lm[eval]' ({error})") from None

Scored = tuple[Any, list[int], list[int]]  # what was asked, the tokens before, the tokens to score


class ZooLM(TemplateLM):
    """What the harness asks a model for. Every context is read as the beginning of a document, a separator before it.

    max_length: tokens that a prediction sees at most, the training length if None; contexts lose their beginning past
    it, and `loglikelihood_rolling` cuts long texts into windows of it, as the harness has it. batch_tokens: through the
    model at once; changes rounding alone. bf16: autocast.
    """

    def __init__(self, model: PretrainedModel, *, max_length: int | None = None, batch_tokens: int | None = None,
                 bf16: bool = False):
        super().__init__()
        self.model, self.bf16 = model, bf16
        self.max_length = model.config.seq_len if max_length is None else max_length
        if self.max_length < 1:
            raise ZooError(f"a length of {self.max_length} tokens is not allowed: 1 or more")
        model.check_length(self.max_length)
        self._device = model.head.weight.device
        self.batch_tokens = batch_tokens or at_once(self._device)
        self.asked = False  # whether the harness has come so far as to ask anything

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.separator

    @property
    def tokenizer_name(self) -> str:
        return "-".join(map(str, self.model.tokenizer.spec.values()))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, as the beginning of a document unless `add_special_tokens` is False."""
        before = [] if add_special_tokens is False else [self.eot_token_id]
        return before + self.model.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Sequence[Scored], disable_tqdm: bool = False,
                              **kwargs: Any) -> list[tuple[float, bool]]:
        """The nats of each continuation, negative, and whether greedy decoding would write it."""
        self.asked = True
        windows = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ZooError(f"a continuation of {len(continuation)} tokens is past the length of {self.max_length}")
            windows.append((context + continuation)[-self.max_length - 1:])
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        scored = [place for place, (_, _, continuation) in enumerate(requests) if continuation]
        scored.sort(key=lambda place: -len(windows[place]))
        with (enough_memory(self.model, self.batch_tokens, self.max_length), reading(self.model, self.bf16),
              tqdm(total=len(scored), disable=disable_tqdm, desc="loglikelihood") as bar):
            while scored:
                rows = max(1, self.batch_tokens // max(1, len(windows[scored[0]]) - 1))
                batch, scored = scored[:rows], scored[rows:]
                counts = [len(requests[place][2]) for place in batch]
                for place, answer in zip(batch, self._score([windows[place] for place in batch], counts), strict=True):
                    found[place] = answer
                bar.update(len(batch))
        return found

    def _score(self, windows: list[list[int]], counts: list[int]) -> Iterator[tuple[float, bool]]:
        """The last `counts` tokens of each window. What pads the shorter ones comes after them, and nothing sees it."""
        inputs = torch.full((len(windows), max(map(len, windows)) - 1), self.eot_token_id)
        for row, window in enumerate(windows):
            inputs[row, :len(window) - 1] = torch.tensor(window[:-1])
        logits = self.model(inputs.to(self._device))
        for row, (window, count) in enumerate(zip(windows, counts, strict=True)):
            wanted = torch.tensor(window[-count:], device=self._device)
            logs = logits[row, len(window) - 1 - count:len(window) - 1].float().log_softmax(-1)
            nats = logs.gather(-1, wanted.unsqueeze(-1)).double().sum()
            yield float(nats), bool((logs.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, every token once, in windows of max_length side by side."""
        pieces, owners = list[Scored](), list[int]()
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                pieces.append((None, *make_disjoint_window(window)))
                owners.append(place)
        total = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            total[owner] += nats
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, greedy unless the task samples. Equal settings go together."""
        self.asked = True
        groups: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[repr(request.args[1])].append(place)
        written, rows = [""] * len(requests), max(1, self.batch_tokens // self.max_length)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until", delay=1) as bar:
            for places in groups.values():
                how = normalize_gen_kwargs(dict(requests[places[0]].args[1]))
                room = self.max_length - how["max_gen_toks"]
                if room < 1:
                    raise ZooError(f"{how['max_gen_toks']} tokens to write leave no room for a prompt in a length of "
                                   f"{self.max_length}")
                for batch in (places[first:first + rows] for first in range(0, len(places), rows)):
                    texts = zoo.generate(self.model, [self._last(requests[place].args[0], room) for place in batch],
                                         max_tokens=how["max_gen_toks"], temperature=how["temperature"],
                                         top_k=how.get("top_k"), top_p=how.get("top_p", 1.0), window=True,
                                         stop=[stop for stop in how.get("until") or [] if stop])
                    for place, text in zip(batch, texts, strict=True):
                        written[place] = text
                    bar.update(len(batch))
        return written

    def _last(self, text: str, room: int) -> str:
        """The end of a text that fits, the separator before it counted; a character that was cut is left out."""
        ids = self.model.tokenizer.encode(text)
        return text if len(ids) < room else self.model.tokenizer.to_bytes(ids[len(ids) - room + 1:]).decode(
            "utf-8", "ignore")


def run_tasks(model: PretrainedModel, tasks: Sequence[str], *, folder: Path | None = None, fewshot: int | None = None,
              limit: int | None = None, max_length: int | None = None, batch_tokens: int | None = None,
              bf16: bool = False) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` makes of a model: its dictionary of results.

    tasks: names that the harness knows, whose data it fetches; folder: of further tasks' yaml files, which come first.
    fewshot: examples in the prompt; limit: documents a task, its first ones; None: as each task says. Raises ZooError
    for a task that is not there or cannot be loaded, and as `ZooLM` does.
    """
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would report every use of a reader, local files included
    if folder is not None and not folder.is_dir():
        raise ZooError(f"no such folder of tasks: {folder}")
    manager = None if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):  # to read thousands of yaml files takes seconds
        manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in tasks:
        if name not in manager.all_tasks:
            raise ZooError(f"unknown task {name!r}; allowed: one of the {len(manager.all_tasks)} that `lm-eval ls "
                           "tasks` lists, or of a yaml in --task-folder")
    asked = ZooLM(model, max_length=max_length, batch_tokens=batch_tokens, bf16=bf16)
    try:
        results = simple_evaluate(asked, tasks=list(tasks), task_manager=manager, num_fewshot=fewshot, limit=limit,
                                  log_samples=False)
    except ZooError:
        raise
    except Exception as error:  # of whatever kind the harness, `datasets` or a task's own code raises
        if asked.asked:
            raise
        raise ZooError(f"cannot load {', '.join(tasks)}: {(str(error) or type(error).__name__).splitlines()[0]}"
                       ) from None
    assert results is not None  # as in every process but the first of several
    return dict(results)
