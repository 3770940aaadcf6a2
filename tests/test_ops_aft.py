"""AFT's ops against equation 2 of the paper written out in float64, at the inputs that break such code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ZooError
from zoo.ops.aft import EMPTY, Cache, Sums, absorb, aft_conv, aft_full, aft_local, aft_simple, slide

VARIANTS = ("local", "full", "simple", "conv")
LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129)
H, K = 2, 3  # D = 6
Op = Callable[..., Tensor]


def definition(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Equation 2 for the last T of S tokens: q [B, T, D], k, v [B, S, D], w [T, S, 1 or D] or [B, T, S, 1 or D]."""
    new, old = q.shape[1], k.shape[1]
    future = torch.ones(new, old, dtype=torch.bool).triu(old - new + 1)
    p = (k.unsqueeze(1) + w).masked_fill(future.unsqueeze(-1), -torch.inf).softmax(2)
    return q.sigmoid() * (p.nan_to_num() * v.unsqueeze(1)).sum(2)


def banded(bias: Tensor, old: int) -> Tensor:
    """bias [..., T, W] at distances, 0 outside the window -> w [..., T, old]."""
    new, window = bias.shape[-2:]
    distance = (old - new + torch.arange(new)).unsqueeze(1) - torch.arange(old)
    seen = (distance >= 0) & (distance < window)
    index = distance.clamp(0, window - 1).expand(*bias.shape[:-2], -1, -1)
    return torch.where(seen, bias.gather(-1, index), 0)


def define(variant: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The variant's op, from the definition. Shapes as the op takes them."""
    old = k.shape[1]
    if variant == "conv":
        w = banded(bias.unsqueeze(1).expand(-1, q.shape[1], -1), old).repeat_interleave(q.shape[-1], 0).movedim(0, -1)
        q_flat, v_flat = q.flatten(2), v.flatten(2)
        return definition(q_flat, k.repeat_interleave(q.shape[-1], -1), v_flat, w).view_as(q)
    if variant == "simple":
        return definition(q, k, v, q.new_zeros(1, 1, 1))
    return definition(q, k, v, (bias if variant == "full" else banded(bias, old)).unsqueeze(-1))


def op(variant: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    run: dict[str, Op] = {"local": aft_local, "full": aft_full, "conv": aft_conv}
    return aft_simple(q, k, v) if variant == "simple" else run[variant](q, k, v, bias)


def inputs(variant: str, length: int, window: int = 32, batch: int = 2, heads: int = H, dim: int = K) -> list[Tensor]:
    """q, k, v, bias in float64, keys of some spread."""
    torch.manual_seed(length)
    channels = (heads, dim) if variant == "conv" else (heads * dim,)
    q, v = (torch.randn(batch, length, *channels, dtype=torch.float64) for _ in range(2))
    k = 3 * torch.randn(batch, length, *channels[:1], dtype=torch.float64)
    shape = {"local": (length, window), "full": (length, length), "conv": (heads, window), "simple": (1,)}[variant]
    return [q, k, v, torch.randn(shape, dtype=torch.float64)]


def gradients(f: Callable[..., Tensor], tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    y = f(*leaves)
    grads = torch.autograd.grad(y, leaves, weight.to(y.dtype), allow_unused=True, materialize_grads=True)
    return [y.detach(), *grads]


def check(variant: str, tensors: list[Tensor], tolerance: float = 1e-5) -> None:
    """Forward and all gradients of the float32 op against the float64 definition, relative to each one's largest."""
    weight = torch.randn_like(tensors[0])
    expected = gradients(lambda *x: define(variant, *x), tensors, weight)
    actual = gradients(lambda *x: op(variant, *x), [x.float() for x in tensors], weight)
    for name, a, e in zip(("y", "dq", "dk", "dv", "dbias"), actual, expected, strict=True):
        assert a.dtype is torch.float32
        assert a.isfinite().all(), name
        assert (a - e).abs().max() <= tolerance * max(1, e.abs().max()), (name, length_of(tensors))


def length_of(tensors: list[Tensor]) -> int:
    return tensors[0].shape[1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_definition(variant: str, length: int) -> None:
    check(variant, inputs(variant, length))


@pytest.mark.parametrize("variant", VARIANTS)
def test_long(variant: str) -> None:
    check(variant, inputs(variant, 1000, batch=1, heads=1, dim=2))


@pytest.mark.parametrize("variant", ["local", "conv"])
@pytest.mark.parametrize("window", [1, 2, 7, 33, 34, 100])
def test_any_window(variant: str, window: int) -> None:
    check(variant, inputs(variant, 97, window))


@pytest.mark.parametrize("length", [33, 96, 97, 160])
def test_full_of_any_number_of_blocks(length: int) -> None:
    check("full", inputs("full", length))


@pytest.mark.parametrize(("batch", "heads", "dim"), [(1, 1, 16), (3, 1, 20), (1, 3, 24), (1, 1, 256)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_head_sizes(variant: str, batch: int, heads: int, dim: int) -> None:
    check(variant, inputs(variant, 35, batch=batch, heads=heads, dim=dim))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("keys", ["-90 and 90", "outlier first", "outlier inside", "outlier last", "rising", "falling"])
def test_extreme_keys(variant: str, keys: str) -> None:
    q, k, v, bias = inputs(variant, 81)
    if keys == "-90 and 90":
        k = 90 * k.sign()
    elif keys.startswith("outlier"):
        k[:, {"outlier first": 0, "outlier inside": 40, "outlier last": 80}[keys]] = 90
    else:
        ramp = torch.linspace(-90, 90, 81, dtype=torch.float64)
        k = k + (ramp if keys == "rising" else -ramp).view(1, -1, 1)
    check(variant, [q, k, v, bias], 2e-5)


@pytest.mark.parametrize("variant", ["local", "full", "conv"])
def test_extreme_biases(variant: str) -> None:
    q, k, v, bias = inputs(variant, 70)
    check(variant, [q, k, v, 8 * bias], 2e-5)
    for value in (-1e4, 1e4):
        spiked = bias.clone()
        spiked[..., 3] = value
        tensors = [x.float() for x in (q, k, v, spiked)]
        assert all(x.isfinite().all() for x in gradients(lambda *x: op(variant, *x), tensors, torch.ones_like(q)))


def moved(f: Callable[..., Tensor], tensors: list[Tensor], cut: int, future: str) -> float:
    """How far the outputs before `cut` move when q, k and v from there on are replaced. NaN counts as infinity."""
    before = f(*tensors)[:, :cut]
    changed, scale = [x.clone() for x in tensors[:3]], {"random": 1, "outliers": 100, "nan": torch.nan}[future]
    for x in changed:
        x[:, cut:] = scale * torch.randn_like(x[:, cut:])
    return (f(*changed, *tensors[3:])[:, :cut] - before).abs().nan_to_num(torch.inf).max().item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("future", ["random", "outliers", "nan"])
def test_no_output_knows_the_future(variant: str, future: str) -> None:
    tensors = [x.float() for x in inputs(variant, 130)]
    for cut in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129):
        assert moved(lambda *x: op(variant, *x), tensors, cut, future) == 0, cut


def test_the_causality_test_catches_mutants() -> None:
    tensors = [x.float() for x in inputs("local", 130)]

    def unmasked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:  # the paper's equation 2 as it is printed
        p = (k.unsqueeze(1) + banded(bias, 130).unsqueeze(-1)).softmax(2)
        return q.sigmoid() * (p * v.unsqueeze(1)).sum(2)

    def sequence_maximum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = (k - k.amax(1, keepdim=True)).exp()
        return q.sigmoid() * (p * v).cumsum(1) / (p.cumsum(1) + 1e-6)

    assert moved(unmasked, tensors, 64, "random") > 1e-3
    assert moved(sequence_maximum, tensors, 64, "outliers") > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_batch_do_not_touch(variant: str) -> None:
    tensors = [x.float() for x in inputs(variant, 70, batch=3)]
    y = op(variant, *tensors)
    changed = [x.clone() for x in tensors[:3]]
    for x in changed:
        x[1] = torch.nan
    after = op(variant, *changed, tensors[3])
    assert torch.equal(after[0], y[0])
    assert torch.equal(after[2], y[2])


@pytest.mark.parametrize("variant", ["local", "conv"])
def test_the_past_outside_the_window_is_seen(variant: str) -> None:
    q, k, v, bias = inputs(variant, 200, window=8)
    for x in (q, k, v):
        x.requires_grad_()
    dk, dv = torch.autograd.grad(op(variant, q, k, v, bias)[:, -1].sum(), (k, v))
    for far in (0, 100, 150, 191):
        assert dk[:, far].abs().min() > 0
        assert dv[:, far].abs().min() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_strides_and_expanded_gradients(variant: str) -> None:
    q, k, v, bias = (x.float() for x in inputs(variant, 67))
    shapes = [x.shape[2:] for x in (q, k, v)]
    fused = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    wide = torch.cat([torch.full_like(fused[:, :1], torch.nan), fused], 1)[:, 1:]  # a storage offset, rows apart
    parts = wide.split([shape.numel() for shape in shapes], -1)
    split = [x.unflatten(-1, tuple(shape)) for x, shape in zip(parts, shapes, strict=True)]
    plain = gradients(lambda *x: op(variant, *x), [q, k, v, bias], torch.ones_like(q))

    leaves = [x.detach().requires_grad_() for x in (*split, bias)]
    assert not leaves[0].is_contiguous()
    y = op(variant, *leaves)
    y.sum().backward()
    torch.testing.assert_close(y, plain[0])
    for x, expected in zip(leaves, plain[1:], strict=True):
        torch.testing.assert_close(torch.zeros_like(x) if x.grad is None else x.grad, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_computed_in_float32(variant: str) -> None:
    tensors = [x.bfloat16() for x in inputs(variant, 65)]
    exact = define(variant, *(x.double() for x in tensors))
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [x.requires_grad_() for x in tensors]
        y = op(variant, *leaves)
        y.float().square().sum().backward()
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, exact.bfloat16(), atol=1e-6, rtol=2**-7)  # a rounding of the output, no more
    assert all(x.grad.dtype is torch.bfloat16 for x in leaves[:3] if x.grad is not None)


@pytest.mark.parametrize("variant", ["local", "simple", "conv"])
def test_work_is_linear_in_length(variant: str) -> None:
    def work(length: int) -> int:
        tensors = [x.float() for x in inputs(variant, length)]
        if variant != "simple":
            with FlopCounterMode(display=False) as counter:
                op(variant, *tensors)
            return counter.get_total_flops()
        with torch.profiler.profile(profile_memory=True) as profile:
            op(variant, *tensors)
        return sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())

    assert work(1024) < 2.2 * work(512)


# The state. Sums stand for one token with the key max + log den and the value num / den, and its bias is 0.


def state(variant: str, window: int, batch: int = 2) -> list[Tensor]:
    """max, num, den, and where the variant has a cache, keys and values; float64."""
    channels = (H, K) if variant == "conv" else (H * K,)
    torch.manual_seed(1)
    top, num = 2 * torch.randn(batch, channels[0]), torch.randn(batch, *channels)
    sums = [top, num, 1 + torch.rand(batch, channels[0])]
    if variant == "simple":
        return [x.double() for x in sums]
    cache = [3 * torch.randn(batch, window - 1, channels[0]), torch.randn(batch, window - 1, *channels)]
    return [x.double() for x in sums + cache]


def op_from_state(variant: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *parts: Tensor) -> Tensor:
    if variant == "simple":
        return aft_simple(q, k, v, Sums(*parts))
    return (aft_local if variant == "local" else aft_conv)(q, k, v, bias, Sums(*parts[:3]), Cache(*parts[3:]))


def define_from_state(variant: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, top: Tensor, num: Tensor,
                      den: Tensor, *cache: Tensor) -> Tensor:
    key, value = top + den.log(), num / (den.unsqueeze(-1) if variant == "conv" else den)
    keys = torch.cat([key.unsqueeze(1), *cache[:1], k], 1)
    values = torch.cat([value.unsqueeze(1), *cache[1:], v], 1)
    return define(variant, q, keys, values, bias)


@pytest.mark.parametrize("variant", ["local", "simple", "conv"])
@pytest.mark.parametrize(("length", "window"), [(1, 32), (1, 1), (3, 2), (16, 5), (33, 32), (65, 7), (70, 40)])
def test_gradients_of_the_state(variant: str, length: int, window: int) -> None:
    tensors = inputs(variant, length, window) + state(variant, window)
    weight = torch.randn_like(tensors[0])
    expected = gradients(lambda *x: define_from_state(variant, *x), tensors, weight)
    actual = gradients(lambda *x: op_from_state(variant, *x), [x.float() for x in tensors], weight)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e.numel():  # a window of 1 has no cache
            assert (a - e).abs().max() <= 1e-5 * max(1, e.abs().max()), i


@pytest.mark.parametrize("per_row", [False, True])
def test_full_continues_from_a_cache(per_row: bool) -> None:
    q, k, v, _ = inputs("full", 40)
    bias = torch.randn(2, 15, 40, dtype=torch.float64) if per_row else torch.randn(15, 40, dtype=torch.float64)
    weight = torch.randn_like(q[:, 25:])

    def continued(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return aft_full(q[:, 25:], k[:, 25:], v[:, 25:], bias, Cache(k[:, :25], v[:, :25]))

    expected = gradients(lambda q, k, v, w: definition(q[:, 25:], k, v, w.unsqueeze(-1)), [q, k, v, bias], weight)
    actual = gradients(continued, [x.float() for x in (q, k, v, bias)], weight)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 1e-5 * max(1, e.abs().max())


def test_local_takes_a_bias_for_every_row() -> None:
    q, k, v, _ = inputs("local", 50)
    bias = torch.randn(2, 50, 9, dtype=torch.float64)
    weight = torch.randn_like(q)
    expected = gradients(lambda *x: define("local", *x), [q, k, v, bias], weight)
    actual = gradients(aft_local, [x.float() for x in (q, k, v, bias)], weight)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 1e-5 * max(1, e.abs().max())


@pytest.mark.parametrize("variant", ["local", "conv"])
@pytest.mark.parametrize("split", [[1] * 80, [3, 1, 50, 26], [31, 32, 17], [80]])
def test_slide_carries_the_state_through_any_split(variant: str, split: list[int]) -> None:
    window = 12
    q, k, v, bias = (x.float() for x in inputs(variant, 80, window))
    k[:, 20] = 90  # all later sums are multiples of exp(90), and the last tokens underflow beside it
    k[1] = -90 * torch.rand_like(k[1])
    expected = op(variant, q, k, v, bias)
    sums = Sums(torch.full_like(k[:, 0], EMPTY), torch.zeros_like(v[:, 0]), torch.zeros_like(k[:, 0]))
    cache = Cache(torch.full_like(k[:, : window - 1], EMPTY), torch.zeros_like(v[:, : window - 1]))
    pieces = []
    for first, length in zip([sum(split[:i]) for i in range(len(split))], split, strict=True):
        at = slice(first, first + length)
        part = bias[at] if variant == "local" else bias
        pieces.append(op_from_state(variant, q[:, at], k[:, at], v[:, at], part, *sums, *cache))
        sums, cache = slide(sums, cache, k[:, at], v[:, at])
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-5)
    assert sums.max.isfinite().all()
    assert torch.equal(cache.keys, k[:, -window + 1 :])


def test_absorb_is_the_sum_of_the_tokens() -> None:
    _, k, v, _ = inputs("simple", 40)
    empty = Sums(torch.full_like(k[:, 0], EMPTY), torch.zeros_like(v[:, 0]), torch.zeros_like(k[:, 0]))
    for sums in (absorb(empty, k, v), absorb(absorb(empty, k[:, :7], v[:, :7]), k[:, 7:], v[:, 7:])):
        torch.testing.assert_close(sums.max, k.amax(1))
        torch.testing.assert_close(sums.num, ((k - sums.max.unsqueeze(1)).exp() * v).sum(1))
        torch.testing.assert_close(sums.den, (k - sums.max.unsqueeze(1)).exp().sum(1))


def position_bias(variant: str, bias: Tensor, length: int) -> Tensor:
    """The part of a table that a document of some length uses."""
    if variant == "full":
        return bias[:length, :length]
    return bias[:length] if variant == "local" else bias


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [[5, 0, 33, 1, 64], [0, 40], [70, 0], [0, 0]])
def test_documents_in_a_row_do_not_touch(variant: str, lengths: list[int]) -> None:
    total = sum(lengths)
    q, k, v, bias = inputs(variant, max(total, 1), window=9, batch=1)
    tensors = [q[:, :total], k[:, :total], v[:, :total], bias]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    ops: dict[str, Op] = {"local": aft_local, "full": aft_full, "conv": aft_conv}

    def packed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if variant == "simple":
            return aft_simple(q, k, v, cu_seqlens=cu_seqlens)
        return ops[variant](q, k, v, bias, cu_seqlens=cu_seqlens)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths, 1) for x in (q, k, v)), lengths, strict=True)
        return torch.cat([q * v if not n else define(variant, q, k, v, position_bias(variant, bias, n))
                          for q, k, v, n in parts], 1)

    weight = torch.randn_like(tensors[0])
    expected, actual = gradients(one_by_one, tensors, weight), gradients(packed, [x.float() for x in tensors], weight)
    for name, a, e in zip(("y", "dq", "dk", "dv", "dbias"), actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, atol=1e-5, rtol=1e-5, msg=name)


def test_documents_are_not_continued() -> None:
    q, k, v, _ = (x.float() for x in inputs("simple", 8, batch=1))
    sums = Sums(k[:, 0], v[:, 0], torch.ones_like(v[:, 0]))
    with pytest.raises(ZooError, match="no sums and no cache"):
        aft_simple(q, k, v, sums, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ZooError, match=r"allowed: \[1, T, ...\]"):
        aft_simple(q.expand(2, -1, -1), k, v, cu_seqlens=torch.tensor([0, 8]))
