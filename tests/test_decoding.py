"""The recorded step: on a GPU the plain path's tokens; on a CPU what of it needs no recording."""

from __future__ import annotations

import pytest
import torch
from cases import Case, listed, tiny
from torch import Tensor, nn

import zoo
from zoo.decoding import Recorded, narrowed
from zoo.model import LanguageModel
from zoo.ops.backend import use_backend
from zoo.sampling import Continuation, Sampling, Steps, prefill, stream

CASES = pytest.mark.parametrize("case", listed(), ids=str)
PROMPTS = [[0, 5, 9], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [2, 7, 1], [8] * 63]
GREEDY = Sampling(temperature=0)
COUNT = 12


def plain(model: LanguageModel, prompts: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, count] and the logits behind the last but one [B, V], by `extend` in PyTorch's operators."""
    with torch.inference_mode(), use_backend("eager"):
        steps = Steps(model, *prefill(model, prompts, 160), GREEDY)
        ids = [steps.next(torch.zeros(len(prompts))) for _ in range(count)]
    return torch.stack(ids, 1), steps.logits


@CASES
@torch.inference_mode()
def test_one_token_is_read_without_a_look_at_its_position(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, made to run on a CPU: the same logits, and no look but that of `reserve`."""
    model = tiny(case, seq_len=160, scramble=True)
    expected, last = plain(model, PROMPTS, COUNT)
    for place in ("zoo.layers", "zoo.mixers.linformer", "zoo.mixers.aft"):
        monkeypatch.setattr(f"{place}.unasked", lambda position, tokens: tokens == 1)
    logits, state = prefill(model, PROMPTS, 63 + COUNT)
    state = model.reserve(state, COUNT)

    def asked(self: Tensor, *_: object) -> None:
        raise AssertionError("the device was asked")

    found = []
    for name in ("__int__", "tolist", "item", "__bool__"):
        monkeypatch.setattr(Tensor, name, asked)
    for _ in range(COUNT):
        found.append(logits.argmax(-1))
        logits, state = model.read(found[-1].unsqueeze(1), state)
        logits = logits[:, -1]
        if len(found) == COUNT - 1:
            before_last = logits
    monkeypatch.undo()
    assert torch.equal(torch.stack(found, 1), expected)
    torch.testing.assert_close(before_last, last, rtol=1e-4, atol=1e-4)


@CASES
def test_a_narrow_copy_has_narrow_matrices_alone(case: Case) -> None:
    model = tiny(case, scramble=True)
    twin = narrowed(model, torch.bfloat16)
    kept = {name for name, parameter in twin.named_parameters() if parameter.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in kept} <= {
        "weight", "bias", "row", "column", "E", "F", "gain", "offset", "mix", "mix_base", "decay", "bonus",
        "norm_weight", "norm_bias"}
    assert all(module.weight.dtype == torch.bfloat16 for module in twin.modules() if isinstance(module, nn.Linear))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert narrowed(model, torch.float32) is model
    tokens = torch.randint(64, (2, 30))
    with torch.inference_mode():
        logits, state = twin.extend(tokens, twin.init_state(2, 30))
        exact = model(tokens)
    assert (logits - exact).norm() / exact.norm() < 0.03
    caches = [value.dtype for name, value in state.items() if name.rpartition(".")[2] in ("k", "v", "keys", "values")]
    assert set(caches) <= {torch.bfloat16} or case.model == "linformer"
    assert all(value.dtype == torch.float32 for name, value in state.items() if name.endswith(("sums", "wkv", "den")))


def test_a_small_models_step_is_one_threads_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than the step is: the caller finds the threads there were."""
    model, threads = tiny(Case("rwkv", ())), []
    read = LanguageModel.extend
    monkeypatch.setattr(LanguageModel, "extend", lambda *given: threads.append(torch.get_num_threads()) or read(*given))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            for alone in (True, False):
                steps = Steps(model, torch.zeros(1, 64), model.init_state(1), GREEDY)
                steps.alone = steps.alone and alone
                for _ in range(2):
                    steps.next(torch.zeros(1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 2]


def test_room_is_made_once() -> None:
    """As much as is asked for, and none past a model's limit."""
    model = tiny(Case("transformer", ()))
    state = model.reserve(model.init_state(2, 8), 20)
    assert state["blocks.0.sequence_mixer.k"].shape[1] == 20
    assert model.reserve(state, 20)["blocks.0.sequence_mixer.k"] is state["blocks.0.sequence_mixer.k"]
    local = tiny(Case("aft", ()), seq_len=32)
    with pytest.raises(zoo.ZooError, match="33 tokens are past the limit"):
        local.reserve(local.init_state(1), 33)


@pytest.mark.gpu
@CASES
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_replays_are_the_plain_path(case: Case, backend: str) -> None:
    """Greedy in float32: the tokens, the logits and the state; with kernels and without, for rows of many lengths."""
    model = tiny(case, seq_len=160, scramble=True, dim=64, channel_dim=96).cuda()
    expected, last = plain(model, PROMPTS, COUNT)
    with torch.inference_mode(), use_backend(backend):
        steps = Recorded(model, *prefill(model, PROMPTS, 63 + COUNT), GREEDY)
        found = [steps.next(torch.zeros(len(PROMPTS), device="cuda")) for _ in range(COUNT)]
    assert steps.graph is not None
    assert torch.equal(torch.stack(found, 1), expected)
    torch.testing.assert_close(steps.logits, last, rtol=1e-3, atol=1e-3)
    assert steps.state["position"].tolist() == [len(prompt) + COUNT - 1 for prompt in PROMPTS]


@pytest.mark.gpu
@pytest.mark.parametrize("model", zoo.list_models())
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_narrow_replays_are_close(model: str, rows: int) -> None:
    """bf16 matrices and caches: logits after 40 tokens beside those of float64."""
    made = tiny(Case(model, ()), seq_len=160, scramble=True, dim=128, heads=2, channel_dim=192).cuda()
    tokens = torch.randint(64, (rows, 80), device="cuda")
    with torch.inference_mode():
        exact = made.double()(tokens)[:, -1]
        twin = narrowed(made.float(), torch.bfloat16)
        state = twin.init_state(rows, 80)
        logits, state = twin.extend(tokens[:, :40], state)
        steps = Recorded(twin, logits[:, -1].float(), state, GREEDY)
        for at in range(40, 80):
            steps.ids.copy_(tokens[:, at])
            steps.advance()
    assert (steps.logits - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_rows_that_end_are_left_out(device: str, ahead: int) -> None:
    """Of many rows some stop early, most later, with steps under way: the others' tokens are what they are without."""
    model = tiny(Case("transformer", ()), scramble=True).to(device)
    prompts = [[row] for row in range(9)]
    how = Sampling(temperature=1.0, repetition_penalty=1.2)
    rows = Continuation(model, prompts, max_tokens=40, sampling=how)
    rows.ahead = ahead
    texts: list[list[int]] = [[] for _ in prompts]
    while drawn := rows.step():
        for row, token in drawn:
            texts[row].append(token)
            if len(texts[row]) > 3 * row:
                rows.end(row)
    whole: list[list[int]] = [[] for _ in prompts]
    for row, token in stream(model, prompts, max_tokens=40, sampling=how):
        whole[row].append(token)
    assert [len(text) for text in texts] == [min(40, 3 * row + 1) for row in range(9)]
    assert all(text == other[: len(text)] for text, other in zip(texts, whole, strict=True))


@pytest.mark.gpu
def test_a_step_asks_nothing_of_the_device() -> None:
    """Not one of a replay, nor of the first step's launches (their self-tests apart)."""
    model = tiny(Case("transformer", ()), scramble=True).cuda()
    draws = torch.zeros(1, device="cuda")
    with torch.inference_mode():
        steps = Recorded(model, *prefill(model, [[1, 2]], 60), GREEDY)
        for _ in range(3):
            steps.next(draws)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                steps.next(draws)
        finally:
            torch.cuda.set_sync_debug_mode("default")
