"""The rules of a fair comparison, checked: what must be equal in all of its runs, and which run breaks what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median_low
from typing import Any

from zoo.report.runs import Refusal, Run
from zoo.sizing import TOLERANCE

# What is said of a rule, and the value that must be the same.
RULES: dict[str, Callable[[Run], str]] = {
    "data": lambda run: f"{run.data['name']} {run.data['fingerprint']}",
    "tokenizer": lambda run: _plain(run.tokenizer),
    "tokens seen": lambda run: f"{run.tokens:,}",
    "context": lambda run: f"{run.config.seq_len:,}",
    "tokens a step": lambda run: f"{run.config.batch_tokens:,}",
    "schedule": lambda run: _plain(run.config.schedule),
    "optimiser but for its rate": lambda run: (
        f"{run.config.optim.name} with weight decay {run.config.optim.weight_decay:g}, betas "
        f"{' '.join(f'{beta:g}' for beta in run.config.optim.betas)}, eps {run.config.optim.eps:g}, clip "
        f"{run.config.optim.clip}"),
    "dropout": lambda run: f"{run.config.dropout:g}",
    "precision": lambda run: run.config.trainer.precision,
    "evaluation": lambda run: f"windows of {run.evaluated[0]:,}, {run.evaluated[1]}",
    "test split": lambda run: "measured" if run.test is not None else "none",
}


def check(runs: Sequence[Run]) -> tuple[list[Run], list[Refusal]]:
    """The runs that can be compared, and those that break a rule.

    What most runs have is the rule (of equally many, what the first has); parameters may be 2 % off the median run's.
    A run that repeats another (same model, options, rate and seed) would count a seed twice, and is refused.
    """
    if not runs:
        return [], []
    rule = {what: _most_common(value(run) for run in runs) for what, value in RULES.items()}
    size = median_low(run.parameters for run in runs)
    kept: dict[str, Run] = {}
    refused = []
    for run in runs:
        reasons = [f"{what}: {value(run)}, the others {rule[what]}" for what, value in RULES.items()
                   if value(run) != rule[what]]
        if abs(run.parameters - size) > TOLERANCE * size:
            reasons.append(f"parameters: {run.parameters:,}, {run.parameters / size - 1:+.1%} of the others' {size:,}; "
                           f"allowed: {TOLERANCE:.0%}")
        if run.config.debug.overfit:
            reasons.append("debug.overfit: trained on one batch")
        if not reasons and (twin := kept.setdefault(_identity(run), run)) is not run:
            reasons.append(f"the same model, options, learning rate and seed as {twin.name}")
        if reasons:
            refused.append(Refusal(run.name, tuple(reasons), run.model.model, run.seed, run.validation, run.test))
    return list(kept.values()), refused


def equal_in_all(runs: Sequence[Run]) -> dict[str, str]:
    """What the rules found in runs that passed them, and how far parameters are apart."""
    low, high = (bound(run.parameters for run in runs) for bound in (min, max))
    return {what: value(runs[0]) for what, value in RULES.items()} | {
        "parameters": f"{low:,}" if low == high else f"{low:,} to {high:,} ({high / low - 1:.1%} apart)"}


def _most_common(values: Iterable[str]) -> str:
    return Counter(values).most_common(1)[0][0]  # in order of first appearance where counts are equal


def _identity(run: Run) -> str:
    shape = {"layers": run.model.layers, "dim": run.model.dim, "heads": run.model.heads}
    return _plain(run.config.model | shape | {"seed": run.seed, "rate": run.rate})


def _plain(values: dict[str, Any]) -> str:
    """A flat group of settings as words: "cosine, warmup 0.01"."""
    first = [str(values[key]) for key in ("name", "kind") if key in values]
    rest = (f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in sorted(values.items())
            if key not in ("name", "kind"))
    return ", ".join([*first, *rest])
