"""What every architecture owes its users, for each one that the listing finds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import yaml
from cases import CONF, Case, listed, tiny, train_on
from kernel_cases import interpreted
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo import mixers
from zoo.contract import State
from zoo.mixers import build_mixer
from zoo.ops.backend import decisions, forget_decisions, use_backend
from zoo.sizing import SIZES, TOLERANCE, model_config

CASES = pytest.mark.parametrize("case", listed(), ids=str)
BORDERS = (0, 1, 14, 15, 16, 30, 31, 32, 63, 64, 126, 127, 128, 158)  # on, before and after chunks of 16, 32, 64, 128


def tokens_of(batch: int, length: int, vocab: int = 64) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def leak(mixer: Callable[[Tensor], Tensor], scale: float) -> float:
    """How far replacing everything after t, for t around every chunk border, moves outputs up to t: 0 if causal."""
    x, worst = torch.randn(2, 160, 32), 0.0
    with torch.no_grad():
        y = mixer(x)
        for t in BORDERS:
            other = torch.cat([x[:, : t + 1], scale * torch.randn(2, 159 - t, 32)], dim=1)
            worst = max(worst, ((mixer(other) - y)[:, : t + 1].abs().max() / y.abs().mean()).item())
    return worst


@CASES
@pytest.mark.parametrize("scale", [1.0, 3.0, 100.0])
def test_mixer_is_causal(case: Case, scale: float) -> None:
    assert leak(tiny(case, layers=1, scramble=True).blocks[0].sequence_mixer, scale) < 1e-4


def sequence_maximum(x: Tensor) -> Tensor:
    """A Performer whose keys are stabilised by the maximum over the sequence, an eps added after."""
    scores = x @ torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    query = torch.exp(scores - scores.amax(-1, keepdim=True)) + 1e-4
    key = torch.exp(scores - scores.amax((-1, -2), keepdim=True)) + 1e-4
    weights = (query @ key.mT).tril()
    return weights / weights.sum(-1, keepdim=True) @ x


def full_projection(x: Tensor) -> Tensor:
    """Linformer's own projection of all keys, which holds the future."""
    projected = torch.randn(8, 160, generator=torch.Generator().manual_seed(3)) / 160**0.5 @ x
    return (x @ projected.mT).softmax(-1) @ projected


def triangular_projection(x: Tensor) -> Tensor:
    """The same with a triangular mask on the [n, k] scores, as if slot j were token j."""
    projected = torch.randn(8, 160, generator=torch.Generator().manual_seed(3)) / 160**0.5 @ x
    mask = torch.ones(160, 8).tril().bool()
    return (x @ projected.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ projected


def unmasked_aft(x: Tensor) -> Tensor:
    return x.sigmoid() * (x.softmax(dim=1) * x).sum(1, keepdim=True)


@pytest.mark.parametrize("mutant", [sequence_maximum, full_projection, triangular_projection, unmasked_aft])
def test_planted_leaks_are_caught(mutant: Callable[[Tensor], Tensor]) -> None:
    assert leak(mutant, 3.0) > 0.01


@CASES
def test_model_is_causal_and_rows_do_not_touch(case: Case) -> None:
    model = tiny(case, scramble=True)
    tokens = tokens_of(2, 160)
    with torch.no_grad():
        logits = model(tokens)
        for t in (0, 31, 64, 100):
            other = tokens.clone()
            other[:, t + 1 :] = 63 - other[:, t + 1 :]
            torch.testing.assert_close(model(other)[:, : t + 1], logits[:, : t + 1], rtol=1e-5, atol=1e-5)
        other = torch.stack([63 - tokens[0], tokens[1]])
        torch.testing.assert_close(model(other)[1], logits[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(tokens[1:])[0], logits[1], rtol=1e-5, atol=1e-5)


@CASES
def test_the_past_matters(case: Case) -> None:
    """The last output of one mixer depends on every input before it, the oldest included."""
    mixer = tiny(case, layers=1, scramble=True).double().blocks[0].sequence_mixer
    x = torch.randn(1, 160, 32, dtype=torch.float64, requires_grad=True)
    mixer(x)[0, -1].square().sum().backward()
    reach = x.grad[0].norm(dim=-1)
    assert reach.min() > 0, f"no influence of positions {(reach == 0).nonzero().flatten().tolist()}"


@CASES
@pytest.mark.parametrize("sizes", [(160,), (1,) * 160, (64, 1, 63, 32), (17, 15, 100, 28), (1, 127, 31, 1)],
                         ids=lambda sizes: "-".join(map(str, sizes[:4])))
def test_extend_equals_forward(case: Case, sizes: tuple[int, ...]) -> None:
    model, tokens = tiny(case, scramble=True), tokens_of(2, 160)
    with torch.no_grad():
        state, pieces = model.init_state(2), []
        for piece in tokens.split(sizes, dim=1):
            logits, state = model.extend(piece, state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-3, atol=1e-4)
    assert all(v.shape[0] == 2 for v in state.values())
    assert all(v.dtype == torch.float32 for v in state.values() if v.is_floating_point())


@CASES
def test_extend_to_four_times_the_length(case: Case) -> None:
    """Past the training length where the architecture has no limit; a clear refusal where it has one."""
    model, tokens = tiny(case, seq_len=48, scramble=True), tokens_of(1, 192)
    with torch.no_grad():
        if model.max_len is not None:
            assert model.max_len == 48
            with pytest.raises(zoo.ZooError, match="at most 48"):
                model(tokens[:, :49])
            state = model.extend(tokens[:, :48], model.init_state())[1]
            with pytest.raises(zoo.ZooError, match="at most 48"):
                model.extend(tokens[:, :1], state)
            return
        state, pieces = model.init_state(), []
        for piece in tokens.split([40, 1, 1, 100, *[1] * 50], dim=1):
            logits, state = model.extend(piece, state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-3, atol=1e-4)


def select(state: State, rows: list[int]) -> State:
    return {k: v[rows].clone() for k, v in state.items()}


@CASES
def test_rows_at_different_positions(case: Case) -> None:
    """Prompts of different lengths, read one by one and stacked, go on as they would alone; a snapshot goes back."""
    model, tokens = tiny(case, scramble=True), tokens_of(3, 120)
    lengths = [(0, 5), (1, 64), (2, 83)]
    with torch.no_grad():
        states = [model.extend(tokens[i : i + 1, :n], model.init_state(max_len=160))[1] for i, n in lengths]
        state = {k: torch.cat([s[k] for s in states]) for k in states[0]}
        snapshot = select(state, [0, 1, 2])
        for attempt in range(2):
            logits, after = model.extend(tokens[:, 100:103], state if attempt == 0 else snapshot)
            logits = torch.cat([logits, model.extend(tokens[:, 103:104], after)[0]], dim=1)
            for i, n in lengths:
                alone = model(torch.cat([tokens[i : i + 1, :n], tokens[i : i + 1, 100:104]], dim=1))[:, -4:]
                torch.testing.assert_close(logits[i : i + 1], alone, rtol=1e-3, atol=1e-4)


PACKED = (70, 0, 1, 129, 17, 64, 0)  # tokens of documents, some empty; more together than a model with a limit can see


def borders(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens of documents."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


@CASES
def test_documents_in_a_row_are_as_if_alone(case: Case) -> None:
    """Logits, and the gradients of all parameters, in float64."""
    model, tokens, weights = tiny(case, scramble=True).double(), tokens_of(1, sum(PACKED)), torch.randn(sum(PACKED), 64)
    found = []
    for read in (lambda: model(tokens, borders(PACKED)), lambda: model(tokens, borders(PACKED, torch.int64)),
                 lambda: torch.cat([model(piece) for piece in tokens.split(PACKED, dim=1) if piece.numel()], dim=1)):
        model.zero_grad()
        logits = read()
        (logits[0] * weights).sum().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters())])
    names = ["logits", *(name for name, _ in model.named_parameters())]
    for packed in found[:2]:
        for name, here, alone in zip(names, packed, found[2], strict=True):
            torch.testing.assert_close(here, alone, rtol=1e-8, atol=1e-10, msg=name)


@CASES
@pytest.mark.parametrize("scale", [1.0, 100.0, math.nan])
def test_documents_do_not_touch(case: Case, scale: float) -> None:
    """Whatever stands in a document, no other's outputs move, nor do its gradients reach there; in both slots."""
    for _, _, mixer in tiny(case, layers=1, scramble=True).blocks[0].slots():
        x, cu_seqlens = torch.randn(1, sum(PACKED), 32), borders(PACKED)
        y = mixer(x, cu_seqlens)
        for n in (0, 2, 3, 5):
            own = slice(sum(PACKED[:n]), sum(PACKED[: n + 1]))
            other = x.clone()
            other[:, own] = scale * torch.randn(1, PACKED[n], 32)
            others = torch.ones(sum(PACKED), dtype=torch.bool)
            others[own] = False
            assert torch.equal(mixer(other, cu_seqlens)[:, others], y[:, others]), f"document {n}"
            leaf = x.clone().requires_grad_()
            mixer(leaf, cu_seqlens)[:, own].square().sum().backward()
            assert not leaf.grad[:, others].any(), f"document {n}"
            assert leaf.grad[:, own].any()


@CASES
def test_one_document_is_a_sequence(case: Case) -> None:
    model, tokens = tiny(case, scramble=True), tokens_of(1, 130)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, borders([130])), model(tokens))
        torch.testing.assert_close(model(tokens, borders([0, 130, 0])), model(tokens))
        loss = model.loss(tokens, tokens, reduction="none", cu_seqlens=borders([130]))
        torch.testing.assert_close(loss, model.loss(tokens, tokens, reduction="none"))


@CASES
def test_wrong_documents_are_refused(case: Case) -> None:
    model, tokens = tiny(case, seq_len=48), tokens_of(1, 60)
    for wrong, said in ((borders([60]).float(), "int32 or int64"), (borders([60]).view(1, 2), r"\[N \+ 1\]"),
                        (borders([60])[:1], r"\[N \+ 1\]")):
        with pytest.raises(zoo.ZooError, match=said):
            model(tokens, wrong)
    with pytest.raises(zoo.ZooError, match="one row"):
        model(tokens.expand(2, -1), borders([60]))
    if model.max_len is not None:
        with pytest.raises(zoo.ZooError, match=r"49 tokens are past .* at most 48"):
            model(tokens, borders([11, 49]))


@interpreted
@CASES
def test_kernels_agree_with_eager(case: Case) -> None:
    """Through the whole model, one row and two documents, forward and backward; in float32 by Triton's interpreter.

    Past AFT's window of 32 tokens: within it AFT-conv's offset moves all weights alike, and has no gradient to compare.
    """
    model, tokens, found = tiny(case, layers=1, scramble=True, seq_len=40), tokens_of(1, 40), []
    forget_decisions()
    for backend in ("eager", "triton"):
        model.zero_grad()
        with use_backend(backend):
            logits = [model(tokens), model(tokens, borders([3, 37]))]
            (logits[0].square() + logits[1].square()).sum().backward()
        found.append([*(y.detach() for y in logits), *(p.grad for p in model.parameters())])
    if not any(line.endswith(": triton") for line in decisions()):
        pytest.skip(f"no op of {case} has kernels yet")
    names = ["logits", "of documents", *(name for name, _ in model.named_parameters())]
    for name, plain, kernel in zip(names, *found, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()), msg=name)


@CASES
def test_gradients_by_finite_differences(case: Case) -> None:
    """float64, every parameter along a random direction, at a length that is not a multiple of any chunk."""
    model = tiny(case, scramble=True).double()
    tokens = tokens_of(2, 70)

    def loss() -> Tensor:
        return model.loss(tokens[:, :-1], tokens[:, 1:])

    loss().backward()
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        direction /= direction.norm()
        assert parameter.grad is not None, name
        expected = (parameter.grad * direction).sum()
        with torch.no_grad():
            step, sides = 1e-4, []
            for sign in (1, -2, 1):
                parameter.add_(direction, alpha=sign * step)
                sides.append(loss())
        torch.testing.assert_close((sides[0] - sides[1]) / (2 * step), expected, rtol=2e-3, atol=2e-6, msg=name)


@CASES
def test_float32_gradients_against_float64(case: Case) -> None:
    model, tokens = tiny(case, scramble=True), tokens_of(2, 129)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    single = {n: p.grad.double() for n, p in model.named_parameters()}
    model.zero_grad()
    model.double().loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        error = (single[name] - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-8)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


@CASES
def test_initialisation(case: Case) -> None:
    """Fresh models begin near the uniform distribution, keep the stream's scale, and follow torch's seed."""
    torch.manual_seed(7)
    model = tiny(case, layers=4, dim=64, channel_dim=128)
    torch.manual_seed(7)
    again = tiny(case, layers=4, dim=64, channel_dim=128)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    tokens = tokens_of(4, 160)
    with torch.no_grad():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
        assert abs(loss - math.log(64)) < 0.4
        x = model.embedding_norm(model.embedding(tokens))
        for block in model.blocks:
            for _, norm, mixer in block.slots():
                y = mixer(norm(x))
                assert y.square().mean().sqrt() < 1.5, "a mixer's first output drowns the residual stream"
                x = x + y
    assert all(p.isfinite().all() for p in model.parameters())


@CASES
def test_overfits_one_batch(case: Case) -> None:
    losses = train_on(tiny(case, seq_len=64), tokens_of(2, 65), 150, lr=1e-2)
    assert any(loss < 0.1 for loss in losses), "128 tokens are not learnt by heart in 150 steps"


@CASES
def test_training_moves_every_parameter(case: Case) -> None:
    """After some steps nothing is left where it began: no bias that never trains, no dead projection."""
    model = tiny(case).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tokens = tokens_of(2, 161)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):  # what stands behind a projection that starts at zero moves some steps later
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert not still


@CASES
def test_autocast_stays_close(case: Case) -> None:
    """bf16 autocast changes logits by bf16's rounding and no more; its loss is float32."""
    model, tokens = tiny(case, scramble=True), tokens_of(2, 160)
    with torch.no_grad():
        exact = model(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(tokens)
            assert model.loss(tokens, tokens).dtype == torch.float32
    assert (rough.float() - exact).square().mean().sqrt() < 0.06 * exact.square().mean().sqrt()


@CASES
def test_flops_follow_torchs_count(case: Case) -> None:
    model, tokens = tiny(case, dim=64, channel_dim=128), tokens_of(1, 160)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    assert 0.4 < model.flops(160) / counter.get_total_flops() < 2.5
    assert model.flops(320) >= 2 * model.flops(160)


@CASES
def test_names_of_parameter_groups_exist(case: Case) -> None:
    model = tiny(case)
    for name, mixer in model.mixers():
        own = {n for n, _ in mixer.named_parameters()}
        assert mixer.no_weight_decay() <= own, name
        assert mixer.lr_multipliers().keys() <= own, name
    groups = model.parameter_groups(1e-3, 0.1)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(("size", "vocab"), itertools.product(SIZES, (256, 8192)))
def test_parameters_agree_at_a_size(size: str, vocab: int) -> None:
    """Within 2 % between any two architectures, variants included."""
    counts = {}
    for case in listed():
        config = model_config(case.model, size, vocab, 256 if size == "nano" else 1024, **dict(case.options))
        with torch.device("meta"):
            counts[str(case)] = zoo.model.LanguageModel(config).num_parameters()
    assert max(counts.values()) <= (1 + TOLERANCE) * min(counts.values()), counts
    if size == "nano" and vocab == 256:
        assert max(counts.values()) < 1_000_000


def test_every_mixer_has_a_yaml_that_mirrors_it() -> None:
    """conf/model/<name>.yaml exists for every mixer and sets options that the mixer takes, at their defaults."""
    for name in mixers.list_mixers():
        given = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
        assert given.pop("name") == name
        assert given == mixers.options(name), name
    for name in mixers.list_mixers():
        assert mixers.get_mixer(name).paper, name
        assert mixers.get_mixer(name).complexity, name


@pytest.mark.parametrize("model", zoo.list_models())
def test_wrong_use_is_one_clear_line(model: str) -> None:
    odd = zoo.sizing.Size(layers=1, dim=32, heads=5)
    for call, said in (
        (lambda: zoo.create_model("mamba9"), "allowed: .*transformer"),
        (lambda: zoo.create_model(model, size="huge"), "allowed: base, medium, nano, small"),
        (lambda: zoo.create_model(model, size="nano", wings=2), "no option 'wings'; allowed"),
        (lambda: zoo.create_model(model, size=odd), "heads=5 does not divide dim=32; allowed: 1, 2"),
        (lambda: zoo.create_model(model, size="nano", seq_len=0), "seq_len=0"),
        (lambda: build_mixer(model, 32, 2, 64, {"wings": 2}), "no option"),
    ):
        with pytest.raises(zoo.ZooError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
