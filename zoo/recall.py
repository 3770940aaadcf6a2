"""How much an architecture recalls: MQAR (2312.04927) over a grid of lengths, pairs, widths and learning rates.

A loop of its own beside that of training: hundreds of small models, of ids that are no text, scored by accuracy, none
of them kept. The model, its groups of parameters, the schedule and the recording of a pass are those of training.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from zoo.data.recall import Recall
from zoo.errors import ZooError, choose
from zoo.files import replace
from zoo.mixers import list_mixers
from zoo.model import LanguageModel
from zoo.ops.add_norm import add_norm
from zoo.sizing import Size, create_model
from zoo.training.capture import Captured
from zoo.training.schedules import cosine

HEAD = 64  # channels a head, as far as the width has them
LAYERS = 2


@dataclass(frozen=True)
class Recipe:
    """How every model of a grid is trained. What is not Zoology's is said in docs/evaluation.md.

    steps: at most, of `batch` examples each, which are drawn from `examples` ones, in a new order each time all have
    been seen. Every `test_every` steps, and after the last, the accuracy on `tests` others is measured: above `enough`
    it ends.
    """

    steps: int = 12_500
    batch: int = 512
    examples: int = 100_000
    tests: int = 3_000
    test_every: int = 250
    enough: float = 0.99
    weight_decay: float = 0.1
    clip: float = 1.0
    vocab_size: int = 8192
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "examples", "tests", "test_every"):
            if getattr(self, name) < 1:
                raise ZooError(f"{name}={getattr(self, name)} is not allowed: 1 or more")
        if self.examples < self.batch:
            raise ZooError(f"{self.examples} examples are fewer than a batch of {self.batch}")


@dataclass(frozen=True)
class Result:
    """A trained model's score: the share of the test examples' queries that it answers, and what it cost.

    state_bytes: of one sequence of seq_len tokens, float32.
    """

    model: str
    seq_len: int
    pairs: int
    width: int
    lr: float
    accuracy: float
    steps: int
    parameters: int
    state_bytes: int
    seconds: float

    @property
    def job(self) -> tuple[str, int, int, int, float]:
        """What of the grid it is."""
        return self.model, self.seq_len, self.pairs, self.width, self.lr


def grid(models: Sequence[str], tasks: Sequence[tuple[int, int]], widths: Sequence[int], rates: Sequence[float],
         recipe: Recipe, device: torch.device, known: Sequence[Result] = ()) -> Iterator[Result]:
    """Train and score every model at every task (length, pairs), width and rate; what is `known` is passed over.

    Everything is checked before anything is trained. Raises ZooError for a model, task, width or rate that is not
    allowed, and where a width leaves a model no room (`zoo.sizing`).
    """
    for name in models:
        choose("model", name, list_mixers())
    for rate in rates:
        if not 0 < rate < 1:
            raise ZooError(f"a learning rate of {rate} is not allowed: above 0, below 1")
    settings = [Recall(length, pairs, recipe.vocab_size) for length, pairs in tasks]
    with torch.device("meta"):
        for setting, width, name in product(settings, widths, models):
            build(name, setting, width)
    done = {result.job for result in known}
    for setting in settings:
        jobs = [(name, setting.seq_len, setting.pairs, width, rate)
                for width, name, rate in product(widths, models, rates)]
        if left := [job for job in jobs if job not in done]:
            data = [prepared(setting, count, seed, device)
                    for count, seed in ((recipe.examples, 2 * recipe.seed), (recipe.tests, 2 * recipe.seed + 1))]
            for name, _, _, width, rate in left:
                yield train_one(name, setting, width, rate, recipe, data[0], data[1])


def build(name: str, setting: Recall, width: int) -> LanguageModel:
    """A fresh model of two layers for a task."""
    return create_model(name, Size(LAYERS, width, max(1, width // HEAD)), setting.vocab_size, setting.seq_len)


Examples = tuple[Tensor, Tensor, Tensor]


def prepared(setting: Recall, count: int, seed: int, device: torch.device) -> Examples:
    """`Recall.examples` as int64 on a device: all of them fit where the model does."""
    tokens, where, answers = (torch.from_numpy(each).to(device).long() for each in setting.examples(count, seed))
    return tokens, where, answers


def train_one(name: str, setting: Recall, width: int, rate: float, recipe: Recipe, examples: Examples,
              tests: Examples) -> Result:
    """Train one model, from weights and an order of examples that are functions of the recipe's seed."""
    begun, device = time.perf_counter(), examples[0].device
    torch.manual_seed(recipe.seed)
    model = build(name, setting, width).to(device)
    groups = model.parameter_groups(rate, recipe.weight_decay)
    peaks = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    parameters = list(model.parameters())
    run: Callable[..., Tensor] = lambda *batch: _pass(model, *batch)  # noqa: E731
    captured = Captured(run, parameters, adds=False) if device.type == "cuda" else None
    order, generator = torch.empty(0, dtype=torch.int64), torch.Generator().manual_seed(recipe.seed)
    accuracy = 0.0
    for step in range(recipe.steps):
        if len(order) < recipe.batch:  # an epoch's rest is left out
            order = torch.randperm(len(examples[0]), generator=generator).to(device)
        rows, order = order[:recipe.batch], order[recipe.batch:]
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * cosine(step, recipe.steps, final=0.0)
        model.set_step(step)
        (captured or run)(*(each[rows] for each in examples))
        clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        (captured or optimizer).zero_grad()
        if (step + 1) % recipe.test_every == 0 or step + 1 == recipe.steps:
            accuracy = score(model, tests, recipe.batch)
            if accuracy > recipe.enough:
                break
    state = model.init_state(1, setting.seq_len)
    return Result(name, setting.seq_len, setting.pairs, width, rate, accuracy, step + 1, model.num_parameters(),
                  sum(value.nbytes for key, value in state.items() if not key.endswith("position")),
                  time.perf_counter() - begun)


def answers_of(model: LanguageModel, tokens: Tensor, where: Tensor) -> Tensor:
    """Logits [B, Q, V] at positions `where` [B, Q] of tokens [B, T]; the head sees no others."""
    x, y = model.begin(tokens), None
    for block in model.blocks:
        x, y = block(x, y)
    assert y is not None  # there is a block
    at = where.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return model.head(add_norm(x.gather(1, at), y.gather(1, at), model.norm, narrow=True)[1])


def _pass(model: LanguageModel, tokens: Tensor, where: Tensor, answers: Tensor) -> Tensor:
    """Forward and back: the mean nats of the batch's queries."""
    loss = F.cross_entropy(answers_of(model, tokens, where).float().flatten(0, 1), answers.flatten())
    loss.backward()
    return loss.detach()


@torch.no_grad()
def score(model: LanguageModel, tests: Examples, batch: int) -> float:
    """The share of queries whose likeliest token is the answer."""
    model.eval()
    right = sum((answers_of(model, tokens, where).argmax(-1) == answers).sum()
                for tokens, where, answers in zip(*(each.split(batch) for each in tests), strict=True))
    model.train()
    return float(right) / tests[2].numel()


def best(results: Sequence[Result]) -> list[Result]:
    """Of each model, task and width the result of its best rate: the higher accuracy, then the fewer steps."""
    found: dict[tuple[str, int, int, int], Result] = {}
    for result in results:
        key = result.job[:4]
        if key not in found or (-result.accuracy, result.steps) < (-found[key].accuracy, found[key].steps):
            found[key] = result
    return list(found.values())


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Raises ZooError where the disk refuses."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [each.name for each in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) | {"accuracy": f"{result.accuracy:.5f}", "seconds": f"{result.seconds:.1f}"}
                     for result in results)
    try:
        replace(path, text.getvalue().encode())
    except OSError as error:
        raise ZooError(f"cannot write {path}: {error.strerror or error}") from None


def read_csv(path: Path) -> list[Result]:
    """What `write_csv` wrote; nothing where there is no file. Raises ZooError for another kind of file."""
    kinds: dict[str, Callable[[str], object]] = {"str": str, "int": int, "float": float}
    try:
        with path.open(newline="") as file:
            return [Result(**{each.name: kinds[str(each.type)](row[each.name]) for each in fields(Result)})  # type: ignore[arg-type]
                    for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, ValueError, TypeError):
        raise ZooError(f"{path} holds no results of recall; allowed: a file that this command wrote, or a new "
                       "one") from None
