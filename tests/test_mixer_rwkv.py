"""RWKV-6 against its paper's equations, token by token, and RWKV-LM's initial values, written out per channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.mixers import rwkv
from zoo.mixers.rwkv import ChannelMix, TimeMix

D, H = 24, 3
K = D // H


def scrambled(mixer: torch.nn.Module) -> torch.nn.Module:
    """Off the initial values, whose zeros hide what stands before them; in float64."""
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return mixer.double()


def time_mix_by_the_paper(m: TimeMix, x: Tensor) -> Tensor:
    """x [T, D] of one row, one token and one head at a time."""
    rank, before, ys = m.mix_up.shape[1], torch.zeros(D).double(), []
    state = torch.zeros(H, K, K).double()
    for now in x:
        low = torch.tanh((now + (before - now) * m.mix_base) @ m.mix_down).split(rank)
        w, k, v, r, g = (now + (before - now) * (m.mix[i] + low[i] @ m.mix_up[i]) for i in range(5))
        decay = torch.exp(-torch.exp(m.decay + torch.tanh(w @ m.decay_down) @ m.decay_up)).view(H, K)
        k, v, r, g = ((linear.weight @ z).view(H, K) for linear, z in
                      ((m.key, k), (m.value, v), (m.receptance, r), (m.gate, g)))
        heads = []
        for h in range(H):
            kv = torch.outer(k[h], v[h])
            y = r[h] @ (state[h] + torch.diag(m.bonus[h]) @ kv)
            state[h] = torch.diag(decay[h]) @ state[h] + kv
            y = (y - y.mean()) / (y.var(unbiased=False) + 64e-5).sqrt()
            heads.append(y * m.norm_weight.view(H, K)[h] + m.norm_bias.view(H, K)[h])
        ys.append(m.output.weight @ (F.silu(g) * torch.stack(heads)).flatten())
        before = now
    return torch.stack(ys)


def test_time_mix_is_the_papers() -> None:
    mixer = scrambled(TimeMix(D, H, 64))
    x = torch.randn(2, 40, D, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([time_mix_by_the_paper(mixer, row) for row in x])
        torch.testing.assert_close(mixer(x), expected, rtol=1e-9, atol=1e-9)


def test_channel_mix_is_the_papers() -> None:
    mixer = scrambled(ChannelMix(D, 40))
    x = torch.randn(1, 9, D, dtype=torch.float64)
    before, ys = torch.zeros(D).double(), []
    for now in x[0]:
        k, r = (now * (1 - mix) + before * mix for mix in mixer.mix)
        k = (mixer.key.weight @ k).clamp(min=0) ** 2
        ys.append(torch.sigmoid(mixer.receptance.weight @ r) * (mixer.value.weight @ k))
        before = now
    torch.testing.assert_close(mixer(x)[0], torch.stack(ys), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("layer", "layers"), [(0, 1), (0, 4), (2, 4), (3, 4)])
def test_initial_values_are_rwkv_lms(layer: int, layers: int) -> None:
    mixer, channel = TimeMix(D, H, 64), ChannelMix(D, 40)
    mixer.reset_parameters(layer, layers)
    channel.reset_parameters(layer, layers)
    depth, bend = layer / (layers - 1) if layers > 1 else 0.0, 1 - layer / layers
    for i in range(D):
        lerp = 1 - (i / D) ** bend
        gentle = 1 - (i / D) ** (bend / 2)
        assert mixer.mix_base[i].item() == pytest.approx(lerp, abs=1e-6)
        assert mixer.mix[:, i].tolist() == pytest.approx([lerp, lerp, lerp - 0.3 * depth, gentle, gentle], abs=1e-6)
        assert channel.mix[:, i].tolist() == pytest.approx([lerp, lerp], abs=1e-6)
        assert mixer.decay[i].item() == pytest.approx(-6 + 5 * (i / (D - 1)) ** (0.7 + 1.3 * depth), abs=1e-5)
        bonus = depth * (1 - i / (D - 1)) + (0.0, 0.1, -0.1)[i % 3]
        assert mixer.bonus[i // K, i % K].item() == pytest.approx(bonus, abs=1e-6)
    for zero in (mixer.output.weight, channel.value.weight, channel.receptance.weight, mixer.mix_down,
                 mixer.decay_down, mixer.norm_bias):
        assert not zero.any()
    for linear, gain in ((mixer.receptance, 1.0), (mixer.value, 1.0), (mixer.key, 0.1), (mixer.gate, 0.1),
                         (channel.key, 1.0)):
        gram = linear.weight.mT @ linear.weight
        torch.testing.assert_close(gram, gain**2 * torch.eye(D), rtol=0, atol=1e-5 * gain**2)
    for uniform in (mixer.mix_up, mixer.decay_up):
        assert 0.009 < uniform.abs().max() <= 0.01
        assert abs(uniform.mean()) < 0.002
    assert torch.equal(mixer.norm_weight, torch.full((D,), ((1 + layer) / layers) ** 0.7))


def test_optimiser_groups_are_rwkv_lms() -> None:
    """Twice the rate for the decay; weight decay for the projections alone."""
    model = zoo.create_model("rwkv", size="nano", seq_len=64)
    group_of = {id(p): g for g in model.parameter_groups(1e-3, 0.1) for p in g["params"]}
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        projection = name.endswith(("key.weight", "value.weight", "receptance.weight", "gate.weight", "output.weight"))
        assert group["weight_decay"] == (0.1 if projection or name == "head.weight" else 0.0), name
        assert group["lr"] == (2e-3 if name.endswith("sequence_mixer.decay") else 1e-3), name


def test_ranks_shrink_below_512_channels() -> None:
    def ranks(dim: int, **given: int) -> tuple[int, int]:
        mixer = TimeMix(dim, 2, 64, **given)
        return mixer.mix_up.shape[1], mixer.decay_up.shape[0]

    assert [ranks(dim) for dim in (32, 128, 256, 512, 768)] == [(4, 8), (8, 16), (16, 32), (32, 64), (32, 64)]
    assert ranks(64, mix_rank=3, decay_rank=5) == (3, 5)
    for wrong in ({"mix_rank": 0}, {"decay_rank": -1}, {"mix_rank": 2.5}):
        with pytest.raises(zoo.ZooError, match="not a positive whole number"):
            zoo.create_model("rwkv", size="nano", **wrong)


def test_flops_are_the_matrix_products_and_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, channel = TimeMix(D, H, 64), ChannelMix(D, 40)
    monkeypatch.setattr(rwkv, "wkv6_of", lambda r, k, v, d, base, u, state, documents: (v, state))
    x = torch.randn(1, 50, D)
    with FlopCounterMode(display=False) as counter:
        mixer(x)
    assert mixer.flops(50) == counter.get_total_flops() + 50 * H * 4 * K * K
    with FlopCounterMode(display=False) as counter:
        channel(x)
    assert channel.flops(50) == counter.get_total_flops()


def test_one_token_costs_one_token() -> None:
    """Decoding does not pad to a chunk, and its state does not grow."""
    for mixer in (TimeMix(64, 2, 64), ChannelMix(64, 96)):
        mixer.reset_parameters(0, 1)
        _, prefilled = mixer.extend(torch.randn(1, 300, 64), mixer.init_state(1, 300))
        with FlopCounterMode(display=False) as counter:
            _, decoded = mixer.extend(torch.randn(1, 1, 64), prefilled)
        assert counter.get_total_flops() <= mixer.flops(1)
        for state in (prefilled, decoded):
            for name, value in mixer.init_state(1, 1).items():
                assert state[name].shape == value.shape
                assert state[name].untyped_storage().nbytes() == value.untyped_storage().nbytes(), "a view of more"


def test_states_stay_float32_under_autocast() -> None:
    mixer = TimeMix(D, H, 64)
    mixer.reset_parameters(0, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = mixer.extend(torch.randn(2, 20, D), mixer.init_state(2, 20))[1]
    assert all(value.dtype == torch.float32 for value in state.values())
