"""Drawing tokens, and rows of different lengths drawn together."""

from __future__ import annotations

import pytest
import torch
from cases import Case, listed, tiny
from torch import Tensor

from zoo import ZooError
from zoo.model import LanguageModel
from zoo.sampling import prefill, row_generators, sample, select_rows, stream

CASES = pytest.mark.parametrize("case", listed(), ids=str)
PROMPTS = [[0, 5, 9], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [2, 7, 1], [8] * 40]


def draws(logits: list[float], count: int, **how: float) -> Tensor:
    """How often each token is drawn, as a share of `count`."""
    rows = torch.tensor([logits]).expand(count, -1)
    ids = sample(rows, row_generators(0, 1) * count, **how)
    return torch.bincount(ids, minlength=len(logits)) / count


def continuations(model: LanguageModel, prompts: list[list[int]], **how: float) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in prompts]
    for row, token in stream(model, prompts, **{"max_tokens": 12, "temperature": 0} | how):
        texts[row].append(token)
    return texts


def test_frequencies_are_the_softmax() -> None:
    logits = [2.0, 0.0, 1.0, -1.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / temperature).softmax(0)
        assert (draws(logits, 20_000, temperature=temperature) - expected).abs().max() < 0.012


def test_temperature_zero_is_the_likeliest() -> None:
    logits = torch.randn(50, 11)
    assert torch.equal(sample(logits, row_generators(0, 50), temperature=0), logits.argmax(-1))
    assert torch.equal(sample(logits, row_generators(0, 50), top_k=1), logits.argmax(-1))
    assert torch.equal(sample(logits, row_generators(0, 50), top_p=1e-9), logits.argmax(-1))


def test_top_k_and_top_p_keep_what_they_say() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = probabilities.log().tolist()
    kept = draws(logits, 5000, top_k=2)
    assert torch.allclose(kept, torch.tensor([0, 0.4, 0, 0.3, 0]) / 0.7, atol=0.03)
    for top_p, size in ((0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.86, 4), (0.96, 5), (1.0, 5)):
        wanted = probabilities.argsort(descending=True)[:size].sort().values
        assert draws(logits, 5000, top_p=top_p).nonzero().flatten().tolist() == wanted.tolist(), top_p
    # of the two that top_k leaves, the first alone has 0.57 of the probability
    assert draws(logits, 5000, top_k=2, top_p=0.5).nonzero().flatten().tolist() == [1]


def test_extreme_logits_are_sampled_without_overflow() -> None:
    assert draws([1e30, -1e30, 0.0], 100, temperature=1e-30).tolist() == [1, 0, 0]
    assert draws([1e30, 1e30, 0.0], 4000, temperature=1e-30).tolist() == pytest.approx([0.5, 0.5, 0], abs=0.05)
    assert draws([-1e4, -1e4 - 1, -torch.inf], 4000)[2] == 0
    assert draws([-1e4, -1e4, -torch.inf], 4000)[0] == pytest.approx(0.5, abs=0.05)


def test_a_rows_draw_does_not_depend_on_its_companions() -> None:
    logits = torch.randn(6, 97)
    together = [sample(logits, generators) for generators in [row_generators(3, 6)] for _ in range(4)]
    alone = row_generators(3, 6)[4:5]
    assert [sample(logits[4:5], alone).item() for _ in range(4)] == [ids[4].item() for ids in together]
    first = {torch.rand(1, generator=g).item() for seed in range(4) for g in row_generators(seed, 4)}
    assert len(first) == 16


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
        next(stream(model, [[1], [1] * 20], max_tokens=room + 1))


@pytest.mark.parametrize(("how", "message"), [
    ({"temperature": -0.1}, "temperature=-0.1 is not allowed"), ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": 0}, "top_k=0 is not allowed: 1 or above"), ({"top_p": 0.0}, "top_p=0.0 is not allowed"),
    ({"top_p": 1.1}, "top_p=1.1"), ({"max_tokens": 0}, "max_tokens=0"), ({"seed": -1}, "seed=-1 is not allowed"),
])
def test_values_without_a_meaning_are_refused(how: dict[str, float], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        continuations(tiny(Case("transformer", ())), [[1]], **how)


def test_there_must_be_something_to_continue() -> None:
    for prompts in ([], [[1], []]):
        with pytest.raises(ZooError, match="at least one token"):
            prefill(tiny(Case("transformer", ())), prompts)
