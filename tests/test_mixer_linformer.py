"""The two causal Linformers against their equations, their states at every border, and their cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.layers import rotary
from zoo.mixers.linformer import Linformer

DIM, HEADS, K = 24, 3, 8


def mixer(variant: str = "block", block: int = 8, rank: int = 3, seq_len: int = 40) -> Linformer:
    built = Linformer(DIM, HEADS, seq_len, variant=variant, block=block, rank=rank)  # type: ignore[arg-type]
    built.reset_parameters(0, 1)
    built.qkv.weight.data.mul_(3)  # sharp enough that a wrong weight shows
    return built.requires_grad_(False)


def heads(mix: Linformer, x: Tensor) -> list[Tensor]:
    return [p.unflatten(-1, (HEADS, K)) for p in (x @ mix.qkv.weight.mT).chunk(3, dim=-1)]


def block_definition(mix: Linformer, x: Tensor) -> Tensor:
    """Token by token and head by head, one softmax over the summaries of finished blocks and the tokens of its own."""
    E, F = mix.memory.E, mix.memory.F
    R, C = E.shape[1:]
    q, k, v = heads(mix, x)
    turn = lambda y, p: rotary(y.view(1, 1, 1, K), torch.tensor([p], dtype=torch.float64)).flatten()  # noqa: E731
    y = torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(HEADS):
            for t in range(x.shape[1]):
                start, keys, values = t // C * C, [], []
                for m in range(0, start, C):
                    for r in range(R):
                        keys.append(turn(E[h, r] @ k[b, m : m + C, h], m + (r + 0.5) * C / R - 0.5))
                        values.append(F[h, r] @ v[b, m : m + C, h])
                keys += [turn(k[b, s, h], s) for s in range(start, t + 1)]
                values += list(v[b, start : t + 1, h])
                p = (torch.stack(keys) @ turn(q[b, t, h], t) / K**0.5).softmax(0)
                y[b, t, h] = p @ torch.stack(values)
    return y.flatten(-2) @ mix.out.weight.mT


def prefix_definition(mix: Linformer, x: Tensor) -> Tensor:
    """The paper's eq. 7 for every token anew, with E, F and the sequence cut off after it."""
    E, F = mix.memory.E, mix.memory.F
    q, k, v = heads(mix, x)
    y = torch.zeros_like(q)
    for t in range(x.shape[1]):
        keys = torch.einsum("hrs,bshk->bhrk", E[..., : t + 1], k[:, : t + 1])
        values = torch.einsum("hrs,bshk->bhrk", F[..., : t + 1], v[:, : t + 1])
        p = (torch.einsum("bhk,bhrk->bhr", q[:, t], keys) / K**0.5).softmax(-1)
        y[:, t] = torch.einsum("bhr,bhrk->bhk", p, values)
    return y.flatten(-2) @ mix.out.weight.mT


@pytest.mark.parametrize(("variant", "definition"), [("block", block_definition), ("prefix", prefix_definition)])
@pytest.mark.parametrize("T", [1, 7, 8, 9, 27])
def test_forward_is_the_definition(variant: str, definition: object, T: int) -> None:
    mix, x = mixer(variant).double(), torch.randn(2, T, DIM, dtype=torch.float64)
    torch.testing.assert_close(mix(x), definition(mix, x), rtol=1e-9, atol=1e-9)  # type: ignore[operator]


@pytest.mark.parametrize("variant", ["block", "prefix"])
def test_the_paper_form_cut_off_is_causal_and_uncut_is_not(variant: str) -> None:
    """The planted mutant: prefix sums replaced by the sums over the whole sequence, as the paper has them."""
    mix, x = mixer(variant), torch.randn(1, 40, DIM)
    other = torch.cat([x[:, :20], 100 * torch.randn(1, 20, DIM)], dim=1)
    assert torch.equal(mix(x)[:, :20], mix(other)[:, :20])

    def whole(x: Tensor) -> Tensor:
        q, k, v = heads(mix, x)
        E = torch.randn(HEADS, 3, 40, generator=torch.Generator().manual_seed(1)) / 40**0.5
        keys, values = torch.einsum("hrs,bshk->bhrk", E, k), torch.einsum("hrs,bshk->bhrk", E, v)
        return torch.einsum("bhtr,bhrk->bthk", torch.einsum("bthk,bhrk->bhtr", q, keys).softmax(-1), values)

    assert (whole(x) - whole(other))[:, :20].abs().max() > 0.1


def test_far_blocks_are_seen_through_their_summaries() -> None:
    mix, x = mixer(), torch.randn(1, 32, DIM)
    mix.memory.requires_grad_(True)
    other = x.clone()
    other[:, 2] += 1
    assert (mix(other) - mix(x))[:, 24:].abs().max() > 1e-3
    mix(x).square().sum().backward()
    assert mix.memory.E.grad is not None
    assert mix.memory.F.grad is not None
    assert mix.memory.E.grad.abs().amin((0, 1)).max() > 0
    assert mix.memory.F.grad.abs().amax((0, 1)).min() > 0


@pytest.mark.parametrize("splits", [[1] * 27, [8, 8, 11], [7, 1, 1, 18], [9, 7, 8, 3], [3, 24]], ids=str)
@pytest.mark.parametrize(("variant", "block", "rank"),
                         [("block", 8, 3), ("block", 1, 1), ("block", 64, 64), ("prefix", 8, 3)])
def test_extend_is_forward_over_any_split(variant: str, block: int, rank: int, splits: list[int]) -> None:
    mix = mixer(variant, block, rank, seq_len=27)
    x = torch.randn(2, 27, DIM)
    state, parts = mix.init_state(2, 3), []  # room for less than comes
    for piece in x.split(splits, dim=1):
        y, state = mix.extend(piece, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), mix(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["block", "prefix"])
def test_rows_on_before_and_after_a_border_extend_together(variant: str) -> None:
    mix, starts = mixer(variant, seq_len=60), (0, 6, 7, 8, 9, 15, 16, 30)
    x = torch.randn(len(starts), 60, DIM)
    whole, states = mix(x), [mix.init_state(1, 60) for _ in starts]
    for row, start in enumerate(starts):
        if start:
            states[row] = mix.extend(x[row : row + 1, :start], states[row])[1]
    state = {name: torch.cat([s[name] for s in states]) for name in states[0]}
    rows = torch.arange(len(starts))[:, None]
    for t in (1, 1, 8, 2, 7, 11):
        at = state["position"][:, None] + torch.arange(t)
        y, state = mix.extend(x[rows, at], state)
        torch.testing.assert_close(y, whole[rows, at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["block", "prefix"])
def test_bf16_state_under_autocast(variant: str) -> None:
    """Keys and values may be kept in bf16; sums over the whole past are float32 all the same."""
    mix, x = mixer(variant), torch.randn(2, 30, DIM)
    state, parts = mix.init_state(2, 30, dtype=torch.bfloat16), []
    with torch.autocast("cpu", torch.bfloat16):
        for piece in x.split([7, 2, 21], dim=1):
            y, state = mix.extend(piece, state)
            parts.append(y)
    assert state["k"].dtype == (torch.bfloat16 if variant == "block" else torch.float32)
    assert (torch.cat(parts, dim=1) - mix(x)).abs().max() < 0.05 * mix(x).abs().max()


@pytest.mark.parametrize("lengths", [(8, 16), (27,), (0, 9, 0, 0, 7, 1, 24, 0), (1, 1, 1), (40, 0)], ids=str)
def test_documents_have_blocks_of_their_own(lengths: tuple[int, ...]) -> None:
    """In float64, and by the definition; documents' borders on, before and after those of blocks."""
    mix, x = mixer().double(), torch.randn(1, sum(lengths), DIM, dtype=torch.float64)
    y = mix(x, torch.tensor([0, *lengths]).cumsum(0))
    alone = [block_definition(mix, piece) for piece in x.split(lengths, dim=1) if piece.numel()]
    torch.testing.assert_close(y, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-9)


def test_memory_of_the_past() -> None:
    """Blocks: R entries in C tokens; prefix: the same size whatever the length."""
    block, prefix = mixer("block").init_state(1, 4000), mixer("prefix", seq_len=4000).init_state(1, 4000)
    assert block["k_summary"].shape == (1, 500, 3, HEADS, K)
    assert block["k"].shape == (1, 8, HEADS, K)
    assert prefix["k"].shape == (1, HEADS, K, 3)
    assert prefix["v"].shape == (1, HEADS, 3, K)
    assert mixer("block").max_len is None
    assert mixer("prefix").max_len == 40


@pytest.mark.parametrize(("variant", "length"), [("block", 64), ("prefix", 512)])
def test_initial_scales(variant: str, length: int) -> None:
    mix = Linformer(256, 4, 512, variant=variant)  # type: ignore[arg-type]
    mix.reset_parameters(0, 8)
    assert mix.qkv.weight.std().item() == pytest.approx((2 / (5 * 256)) ** 0.5, rel=0.02)
    assert mix.out.weight.std().item() == pytest.approx((2 / (5 * 256)) ** 0.5 / 4, rel=0.02)
    for projection in (mix.memory.E, mix.memory.F):
        assert projection.shape == (4, 16, length)
        assert projection.std().item() == pytest.approx((length + 16) ** -0.5, rel=0.05)
    assert not torch.equal(mix.memory.E, mix.memory.F)


@pytest.mark.parametrize("T", [5, 8, 16, 30])
def test_flops_count_what_the_mask_leaves(T: int) -> None:
    """The op multiplies whole squares inside a block: the counter sees the C (C - 1) / 2 masked pairs of each, too."""
    mix = mixer()
    with FlopCounterMode(display=False) as counter:
        mix(torch.randn(1, T, DIM))
    masked = sum(n * (n - 1) // 2 for n in [8] * (T // 8) + [T % 8])
    assert counter.get_total_flops() - mix.flops(T) == 4 * DIM * masked


def test_prefix_flops_are_linear() -> None:
    mix = mixer("prefix", seq_len=4000)
    assert mix.flops(4000) == 1000 * mix.flops(4)
    assert mixer("block").flops(4000) < 0.5 * mixer("block", block=4000).flops(4000)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rank": 9}, {"block": 0}, {"block": 2.5}, {"variant": "prefix", "rank": 41}], ids=str)
def test_wrong_options_say_what_is_allowed(wrong: dict) -> None:
    with pytest.raises(ZooError, match="whole number"):
        mixer(**wrong)
