"""Performer: what it approximates, its random projections, its initialisation and its FLOP count."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.errors import ZooError
from zoo.mixers.performer import MAX_NORM, Performer
from zoo.ops.rotary import turn
from zoo.sizing import Size

TINY = Size(layers=2, dim=64, heads=2)


def mixer(dim: int = 32, heads: int = 2, layer: int = 0, **options) -> Performer:
    built = Performer(dim, heads, 64, **options)
    torch.manual_seed(0)
    built.reset_parameters(layer, 4)
    return built


def test_it_approximates_softmax_attention_of_bounded_queries_and_keys():
    """It converges to the regularised kernel, as rows of W have one length in each plane, which is near the softmax."""
    x, errors = 0.6 * torch.randn(2, 50, 32), []  # at larger norms it takes millions of features
    for features in (32, 512, 8192):
        performer = mixer(features=features)
        z = performer.qkv(x).unflatten(-1, (3, 2, 16))
        z, v = z[:, :, :2] / 2, z[:, :, 2]  # 16^(1/4) = 2
        angle = torch.arange(50)[:, None] * torch.pi * torch.arange(1, 16, 2) / 16
        z = (z / (1 + z.square().sum(-1, keepdim=True) / MAX_NORM**2).sqrt()).flatten(2, 3)
        q, k = turn(z, torch.stack([angle.cos(), angle.sin()], 1)).chunk(2, dim=2)
        q, k, v = (h.transpose(1, 2) for h in (q, k, v))
        bias = (torch.arange(50) - torch.arange(50)[:, None]) * 0.6931 * torch.tensor([1 / 16, 1 / 256])[:, None, None]
        bias = bias.masked_fill(torch.ones(50, 50, dtype=torch.bool).triu(1), float("-inf"))
        softmax = performer.out(F.scaled_dot_product_attention(q, k, v, bias, scale=1.0).transpose(1, 2).flatten(-2))
        planes = (q.unsqueeze(3) + k.unsqueeze(2)).unflatten(-1, (2, 8)).norm(dim=-2)
        logits = torch.special.i0(2**0.5 * planes).log().sum(-1) - k.square().sum(-1).unsqueeze(2) / 2
        limit = performer.out(((logits + bias).softmax(-1) @ v).transpose(1, 2).flatten(-2))
        errors.append(((performer(x) - limit).norm() / limit.norm()).item())
        assert (softmax - limit).norm() < 0.05 * softmax.norm()
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_inputs_of_any_size_stay_finite(scale):
    performer, x = mixer(), (scale * torch.randn(2, 80, 32)).requires_grad_()
    y = performer(x)
    y.sum().backward()
    assert all(t.isfinite().all() for t in (y, x.grad, *(p.grad for p in performer.parameters())))


def test_initialisation():
    performer = mixer(256, 4)
    assert performer.qkv.weight.std().item() == pytest.approx((2 / (5 * 256)) ** 0.5, rel=0.02)
    assert performer.out.weight.std().item() == pytest.approx((2 / (5 * 256) / 8) ** 0.5, rel=0.02)
    assert performer.projection.shape == (256, 64)  # four times the head
    assert performer.projection.square().sum(-1).mean().item() == pytest.approx(64, rel=0.05)


def test_projections_differ_between_layers_and_seeds_and_follow_from_them():
    drawn = [mixer(layer=layer, feature_seed=seed).projection for layer in (0, 1) for seed in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    torch.manual_seed(5)  # the weights' seed is another matter
    other = Performer(32, 2, 64, feature_seed=1)
    other.reset_parameters(1, 4)
    assert torch.equal(other.projection, drawn[3])


def test_a_draw_is_a_function_of_the_step():
    performer, draws = mixer(redraw_every=10), []
    for step in range(35):
        performer.set_step(step)
        draws.append(performer.projection.clone())
    for step, draw in enumerate(draws):
        assert torch.equal(draw, draws[10 * (step // 10)])
    assert len({draw.sum().item() for draw in draws}) == 4
    for step in (34, 3, 20):  # in any order, and in a model that begins there
        for built in (performer, mixer(redraw_every=10)):
            built.set_step(step)
            assert torch.equal(built.projection, draws[step])


def test_the_first_draw_stays_by_default():
    performer = mixer()
    first = performer.projection.clone()
    performer.set_step(10**6)
    assert torch.equal(performer.projection, first)


def test_saved_weights_hold_the_projection():
    tokens = torch.randint(64, (1, 40))
    saved = zoo.create_model("performer", TINY, 64, 64, redraw_every=5)
    saved.set_step(12)
    other = zoo.create_model("performer", TINY, 64, 64, feature_seed=9)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(tokens), saved(tokens))
    other.set_step(3)  # one that keeps its projection keeps a loaded one
    assert torch.equal(other(tokens), saved(tokens))
    resumed = zoo.create_model("performer", TINY, 64, 64, redraw_every=5)
    resumed.load_state_dict(saved.state_dict())
    assert torch.equal(resumed(tokens), saved(tokens))
    for step in (14, 15, 2):
        for model in (saved, resumed):
            model.set_step(step)
        assert torch.equal(resumed(tokens), saved(tokens))


def test_a_loaded_draw_is_not_taken_for_the_one_before():
    saved, resumed = mixer(redraw_every=5), mixer(redraw_every=5)
    first = resumed.projection.clone()
    saved.set_step(12)
    resumed.load_state_dict(saved.state_dict())
    resumed.set_step(0)
    assert torch.equal(resumed.projection, first)


def test_shapes_alone_become_a_model_by_loading():
    tokens, saved = torch.randint(64, (1, 40)), zoo.create_model("performer", TINY, 64, 64)
    with torch.device("meta"):
        shapes = zoo.create_model("performer", TINY, 64, 64)
    assert shapes.num_parameters() == saved.num_parameters()
    shapes.to_empty(device="cpu").load_state_dict(saved.state_dict())
    assert torch.equal(shapes(tokens), saved(tokens))


def test_the_state_does_not_grow():
    performer = mixer()
    state = performer.init_state(2, 1000)
    assert state["sums"].shape == (2, 2, 64, 17)
    with torch.no_grad():
        state = performer.extend(torch.randn(2, 100, 32), state)[1]
    assert state["sums"].shape == (2, 2, 64, 17)
    assert state["position"].tolist() == [100, 100]


def test_flops_are_those_of_one_token_after_another():
    performer = mixer(256, 4).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        performer.extend(torch.randn(1, 1, 256), performer.init_state(1, 1))
    assert counter.get_total_flops() == pytest.approx(performer.flops(1), rel=0.01)
    assert performer.flops(1000) == 1000 * performer.flops(1)


@pytest.mark.parametrize("option", [{"features": 0}, {"features": 2.5}, {"feature_seed": -1}, {"redraw_every": -1},
                                    {"redraw_every": True}])
def test_options_that_make_no_sense_are_refused(option):
    with pytest.raises(ZooError, match="allowed: whole numbers from"):
        mixer(**option)
