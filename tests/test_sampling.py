"""Drawing tokens, and rows of different lengths drawn together."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import Case, listed, tiny
from torch import Tensor

from zoo import ZooError
from zoo.model import LanguageModel
from zoo.sampling import Continuation, Sampling, draw, prefill, resize, row_generators, sample, select_rows, stream

CASES = pytest.mark.parametrize("case", listed(), ids=str)
PROMPTS = [[0, 5, 9], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [2, 7, 1], [8] * 40]
GRID = 4096  # draws at even distances, so that shares are exact to 1 / GRID


def shares(logits: list[float], seen: list[int] | None = None, **how: Any) -> Tensor:
    """How often each token is drawn, as a share of all draws."""
    rows = torch.tensor([logits]).expand(GRID, -1)
    held = torch.zeros(GRID, len(logits), dtype=torch.bool)
    held[:, seen or []] = True
    draws = (torch.arange(GRID) + 0.5) / GRID
    return torch.bincount(sample(rows, draws, Sampling(**how), held), minlength=len(logits)) / GRID


def defined(logits: list[float], seen: list[int], options: Sampling) -> Tensor:
    """The distribution as its definitions say it, token by token in float64."""
    scores = torch.tensor(logits, dtype=torch.float64)
    for token in set(seen):
        factor = options.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    p = (scores / options.temperature).softmax(0)
    order = sorted(range(len(logits)), key=lambda token: -p[token])[: options.top_k]
    nucleus, total = [], 0.0
    for token in order:
        if total < options.top_p:
            nucleus.append(token)
        total += float(p[token] / p[order].sum())
    kept = [token for token in nucleus if p[token] >= options.min_p * p.max()]
    result = torch.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


def continuations(model: LanguageModel, prompts: list[list[int]], *, max_tokens: int = 12, seed: int = 0,
                  stop: int | None = None, **how: Any) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in prompts]
    options = Sampling(**{"temperature": 0} | how)
    for row, token in stream(model, prompts, max_tokens=max_tokens, sampling=options, seed=seed, stop=stop):
        texts[row].append(token)
    return texts


@pytest.mark.parametrize("trial", range(25))
def test_every_filter_is_as_it_is_defined(trial: int) -> None:
    pick = random.Random(trial)
    logits = [pick.gauss(0, 2) for _ in range(pick.choice((2, 5, 30)))]
    seen = pick.sample(range(len(logits)), pick.randrange(len(logits)))
    how = {"temperature": pick.choice((0.5, 1.0, 1.7)), "top_k": pick.choice((None, 1, 3, 10, 100)),
           "top_p": pick.choice((1.0, 0.3, 0.8)), "min_p": pick.choice((0.0, 0.05, 0.4, 1.0)),
           "repetition_penalty": pick.choice((1.0, 1.3, 5.0, 0.7))}
    expected, found = defined(logits, seen, Sampling(**how)), shares(logits, seen, **how)
    assert not found[expected == 0].any()
    assert (found - expected).abs().max() < 2 / GRID


def test_filters_apply_in_the_order_that_is_documented() -> None:
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().tolist()
    # of the two that top_k leaves, the first alone has 0.57 of the probability
    assert shares(logits, top_k=2, top_p=0.5).tolist() == [0, 1, 0, 0, 0]
    # min_p compares with the likeliest after the temperature: (0.3 / 0.4)^(1 / T)
    assert (shares(logits, min_p=0.7) > 0).tolist() == [False, True, False, True, False]
    assert (shares(logits, min_p=0.7, temperature=0.5) > 0).tolist() == [False, True, False, False, False]
    # and the penalty comes before all: what was likeliest leaves the two likeliest
    assert shares([2.0, 1.9, 1.8, -1.0], [0], repetition_penalty=1.5, top_k=2)[0] == 0


def test_a_penalty_makes_a_token_less_likely_whatever_its_sign() -> None:
    for logits in ([1.0, 1.0, 0.0], [-1.0, -1.0, -2.0]):
        first, second, _ = shares(logits, [0], repetition_penalty=2.0)
        assert first < second
        assert shares(logits, [0], repetition_penalty=2.0, temperature=0).tolist() == [0, 1, 0]


def test_temperature_zero_is_the_likeliest() -> None:
    logits, draws = torch.randn(50, 11), torch.rand(50)
    for how in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert torch.equal(sample(logits, draws, Sampling(**how)), logits.argmax(-1))


def test_extreme_logits_are_sampled_without_overflow() -> None:
    assert shares([1e30, -1e30, 0.0], temperature=1e-30).tolist() == [1, 0, 0]
    assert shares([1e30, 1e30, 0.0], temperature=1e-30).tolist() == [0.5, 0.5, 0]
    assert shares([-1e4, -1e4 - 1, -torch.inf])[2] == 0
    assert shares([-1e4, -1e4, -torch.inf]).tolist() == [0.5, 0.5, 0]


def test_sampling_waits_for_no_device_and_takes_shapes_alone() -> None:
    """On the meta device a value that anything waited for would be an error, so a captured step may call it."""
    logits, draws = torch.empty(3, 97, device="meta"), torch.empty(3, device="meta")
    seen = torch.empty(3, 97, dtype=torch.bool, device="meta")
    for options in (Sampling(temperature=0), Sampling(), Sampling(0.8, 40, 0.9, 0.05, 1.1)):
        assert sample(logits, draws, options, seen).shape == (3,)


@pytest.mark.gpu
def test_sampling_can_be_recorded() -> None:
    """In a CUDA graph, which a wait for the device would break, with the tokens seen kept up to date in it."""
    options, rows, vocabulary = Sampling(0.8, 40, 0.9, 0.05, 1.3), 3, 97
    logits, draws = torch.randn(rows, vocabulary, device="cuda"), torch.rand(rows, device="cuda")
    seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device="cuda")

    def step() -> Tensor:
        ids = sample(logits, draws, options, seen)
        seen.scatter_(1, ids.unsqueeze(1), True)
        return ids

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        step()
    aside.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = step()
    for trial in range(20):
        if not trial % 5:
            seen.zero_()
        logits.copy_(torch.randn(rows, vocabulary))
        draws.copy_(torch.rand(rows))
        before = seen.clone()
        graph.replay()
        assert torch.equal(ids, sample(logits, draws, options, before))
        assert torch.equal(seen, before.scatter(1, ids.unsqueeze(1), True))


def test_a_rows_draw_does_not_depend_on_its_companions() -> None:
    logits, generators = torch.randn(6, 97), row_generators(3, [0] * 6)
    draws = torch.cat([draw(generators, 3), draw(generators, 5)], 1)
    together = [sample(logits, column, Sampling()) for column in draws.T]
    later = draw(row_generators(3, [9, 9, 9, 9, 2]), 6)[4]  # taken up again at the third
    assert torch.equal(later, draws[4, 2:])
    assert [sample(logits[4:5], number, Sampling()).item() for number in later.split(1)] == [
        ids[4].item() for ids in together[2:]]
    first = {x.item() for seed in range(4) for x in draw(row_generators(seed, [0] * 4), 1)}
    assert len(first) == 16


@CASES
@torch.inference_mode()
def test_a_prefix_is_read_once_for_many_rows(case: Case) -> None:
    """From one state with little room, of which rows of other lengths go on; it is left as it was."""
    model, prefix = tiny(case, seq_len=64, scramble=True), PROMPTS[2]
    _, state = prefill(model, [prefix])
    before = {name: value.clone() for name, value in state.items()}
    rows = [prefix + prompt for prompt in PROMPTS]
    logits, behind = prefill(model, rows, 62, state)
    expected, other = prefill(model, rows, 62)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert {name: value.shape for name, value in behind.items()} == {k: v.shape for k, v in other.items()}
    assert all(torch.equal(state[name], value) for name, value in before.items())
    with pytest.raises(ZooError, match="18 tokens does not go on after the 18"):
        prefill(model, [prefix], state=state)


@CASES
@torch.inference_mode()
def test_a_state_is_the_same_in_any_room(case: Case) -> None:
    model, tokens = tiny(case, seq_len=64, scramble=True), torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    _, state = model.extend(tokens, model.init_state(2, 50))
    smallest = resize(model, state, tokens.shape[1])
    assert {k: v.shape for k, v in smallest.items()} == {
        k: v.shape for k, v in model.init_state(2, tokens.shape[1]).items()}
    expected, _ = model.extend(tokens, {name: value.clone() for name, value in state.items()})
    for other in (smallest, resize(model, smallest, 40)):
        torch.testing.assert_close(model.extend(tokens, other)[0], expected, rtol=1e-5, atol=1e-6)


@CASES
@torch.inference_mode()
def test_prompts_of_many_lengths_are_read_as_if_alone(case: Case) -> None:
    model = tiny(case, seq_len=64, scramble=True)
    logits, state = prefill(model, PROMPTS, 60)
    steps = torch.tensor([[1, 2, 3]]).expand(len(PROMPTS), -1)
    after, _ = model.extend(steps, {name: value.clone() for name, value in state.items()})
    for row, prompt in enumerate(PROMPTS):
        expected, own = model.extend(torch.tensor([prompt]), model.init_state(1))
        torch.testing.assert_close(logits[row], expected[0, -1], rtol=1e-4, atol=1e-5)
        expected, _ = model.extend(steps[:1], own)
        torch.testing.assert_close(after[row], expected[0], rtol=1e-4, atol=1e-5)
        picked, _ = model.extend(steps[:1], select_rows({k: v.clone() for k, v in state.items()}, torch.tensor([row])))
        torch.testing.assert_close(picked[0], expected[0], rtol=1e-4, atol=1e-5)


@CASES
def test_together_gives_the_same_tokens_as_one_by_one(case: Case) -> None:
    model = tiny(case, seq_len=64, scramble=True)
    alone = [continuations(model, [prompt])[0] for prompt in PROMPTS]
    assert continuations(model, PROMPTS) == alone
    with torch.inference_mode():  # and the same as from whole forward passes without a state
        tokens = list(PROMPTS[2])
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert tokens[len(PROMPTS[2]) :] == alone[2]
    assert len({tuple(text) for text in alone}) > 1  # the prompts matter


def test_long_prompts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(Case("transformer", ()), scramble=True)
    expected = continuations(model, PROMPTS)
    monkeypatch.setattr("zoo.sampling.PREFILL", 7)
    assert continuations(model, PROMPTS) == expected


def test_a_row_ends_at_its_stop_and_the_others_go_on() -> None:
    model = tiny(Case("transformer", ()), scramble=True)
    free = continuations(model, PROMPTS, temperature=1.0, max_tokens=60)
    stop = free[0][5]
    expected = [text[: text.index(stop)] if stop in text else text for text in free]
    assert len(expected[0]) < 6 < max(map(len, expected))
    assert continuations(model, PROMPTS, temperature=1.0, max_tokens=60, stop=stop) == expected


def test_seeds_decide() -> None:
    model = tiny(Case("transformer", ()))
    prompts = [[1, 2]] * 3
    texts = continuations(model, prompts, temperature=1.0, seed=1)
    assert texts == continuations(model, prompts, temperature=1.0, seed=1)
    assert texts != continuations(model, prompts, temperature=1.0, seed=2)
    assert len({tuple(text) for text in texts}) == 3  # rows have draws of their own


@CASES
def test_a_limit_is_named_before_the_first_token(case: Case) -> None:
    model = tiny(case, seq_len=32)
    if model.max_len is None:
        assert len(continuations(model, [[1] * 30], max_tokens=40)[0]) == 40
        return
    room = model.max_len - 20 + 1  # the last token drawn is never read
    assert len(continuations(model, [[1] * 20], max_tokens=room)[0]) == room
    with pytest.raises(ZooError, match=f"past the limit of this {case.model}: at most {model.max_len}"):
        Continuation(model, [[1], [1] * 20], max_tokens=room + 1)


@pytest.mark.parametrize(("how", "message"), [
    ({"temperature": -0.1}, "temperature=-0.1 is not allowed"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": 0}, "top_k=0 is not allowed: 1 or above"), ({"top_p": 0.0}, "top_p=0.0 is not allowed"),
    ({"top_p": 1.1}, "top_p=1.1"), ({"max_tokens": -1}, "max_tokens=-1"), ({"seed": -1}, "seed=-1 is not allowed"),
    ({"min_p": -0.1}, "min_p=-0.1 is not allowed: 0 to 1"), ({"min_p": float("nan")}, "min_p=nan"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is not allowed: above 0"),
    ({"repetition_penalty": -1.2}, "repetition_penalty=-1.2"), ({"repetition_penalty": float("inf")}, "penalty=inf"),
])
def test_values_without_a_meaning_are_refused(how: dict[str, float], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        continuations(tiny(Case("transformer", ())), [[1]], **how)


def test_there_must_be_something_to_continue() -> None:
    for prompts in ([], [[1], []]):
        with pytest.raises(ZooError, match="at least one token"):
            prefill(tiny(Case("transformer", ())), prompts)


@pytest.mark.parametrize("token", [-1, 64])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    for how in ({}, {"repetition_penalty": 1.1}):
        with pytest.raises(ZooError, match=r"token ids of this model lie in 0 \.\. 63; got"):
            continuations(tiny(Case("transformer", ())), [[1], [2, token]], **how)


def test_the_penalty_counts_what_was_read_and_what_was_written() -> None:
    model = tiny(Case("transformer", ()), scramble=True)
    free = continuations(model, PROMPTS, max_tokens=20)
    for prompt, text in zip(PROMPTS, continuations(model, PROMPTS, max_tokens=20, repetition_penalty=1e6), strict=True):
        assert len({*text, *prompt}) == len(text) + len(set(prompt))  # every token a new one
    assert any(len(set(text)) < len(text) for text in free)
    how = {"max_tokens": 30, "repetition_penalty": 1.5}
    alone = [continuations(model, [prompt], **how)[0] for prompt in PROMPTS]
    stop = alone[0][3]  # rows that end early do not move what others have seen
    expected = [text[: text.index(stop)] if stop in text else text for text in alone]
    assert len(expected[0]) < max(map(len, expected))
    assert continuations(model, PROMPTS, stop=stop, **how) == expected


def test_nothing_is_written_where_no_tokens_are_asked_for() -> None:
    assert continuations(tiny(Case("transformer", ())), PROMPTS, max_tokens=0) == [[]] * len(PROMPTS)
