"""One token through each mixer's kernels, against the way it goes without them."""

from __future__ import annotations

import pytest
import torch
from cases import Case, tiny
from kernel_cases import interpreted, nan_memory

import zoo
from zoo.kernels import decode as kernels
from zoo.kernels import decode_attention, decode_rwkv, decode_sums
from zoo.ops import decode, decode_mixers
from zoo.ops.backend import Kernel, decisions, forget_decisions, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SELF_TESTS: list[tuple[Kernel, tuple[int, ...]]] = [
    (decode.KERNEL, (48,)), (decode.KERNEL, (128,)), (decode_mixers.ATTENTION, (24,)), (decode_mixers.ATTENTION, (64,)),
    (decode_mixers.BLOCKS, (16, 3, 10)), (decode_mixers.BLOCKS, (32, 16, 64)), (decode_mixers.FAVOR, (12, 40)),
    (decode_mixers.FAVOR, (32, 128)), (decode_mixers.AFT_LOCAL, (40, 5, 6)), (decode_mixers.AFT_LOCAL, (64, 32, 16)),
    (decode_mixers.RWKV, (24, 4, 10)), (decode_mixers.RWKV, (32, 16, 32))]


@pytest.mark.parametrize(("kernel", "sizes"), SELF_TESTS, ids=lambda x: getattr(x, "op", str(x)))
@pytest.mark.gpu
def test_self_tests(kernel: Kernel, sizes: tuple[int, ...]) -> None:
    assert kernel.self_test(torch.device(DEVICE), torch.float32, sizes) <= 1


@interpreted
@pytest.mark.parametrize(("kernel", "sizes"), SELF_TESTS[::2], ids=lambda x: getattr(x, "op", str(x)))
def test_kernels_are_the_ops(kernel: Kernel, sizes: tuple[int, ...]) -> None:
    """Awkward sizes, in Triton's interpreter."""
    with nan_memory():
        assert kernel.self_test(torch.device(DEVICE), torch.float32, sizes) <= 1


@interpreted
@pytest.mark.parametrize("model", zoo.list_models())
def test_a_model_reads_the_next_token_as_without_kernels(model: str) -> None:
    """Logits and state behind a prompt that ends where a block of Linformer's does, of rows with gaps between them."""
    made = tiny(Case(model, ()), scramble=True, layers=1)
    prompt, token, found = torch.randint(64, (2, 63)), torch.tensor([[3], [5]]), []
    with torch.inference_mode():
        for backend in ("eager", "triton"):
            with use_backend("eager"):
                _, state = made.extend(prompt, made.init_state(2))
            forget_decisions()
            with use_backend(backend), nan_memory():
                logits, state = made.extend(token, state)
            found.append({"logits": logits} | state)
    taken = [line.split()[0] for line in decisions() if line.endswith(": triton")]
    assert len(taken) == 2, taken  # the products' kernels and the mixer's
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=2e-5, atol=2e-5)


def builds() -> None:
    """The kernels of the models at base, as Hopper has them, for `kernel_builds.py`."""
    for module in (kernels, decode_attention, decode_rwkv, decode_sums):
        module.early = lambda x: {"EARLY": True, "launch_pdl": True}  # type: ignore[attr-defined]
    H, K, D, F = 8, 64, 512, 1344
    kinds = torch.bfloat16, torch.float32
    for kind in kinds:
        for B in (1, 8, 256) if kind == torch.bfloat16 else (1,):
            x, norm = torch.empty(B, 1, D), torch.nn.LayerNorm(D)
            wide, out = torch.empty(3 * D, D, dtype=kind), torch.empty(D, D, dtype=kind)
            inner, outer = torch.empty(2 * F, D, dtype=kind), torch.empty(D, F, dtype=kind)
            qkv, position = torch.empty(B, 1, 3 * D), torch.zeros(B, dtype=torch.int64)
            decode.embed(torch.zeros(B, 1, dtype=torch.int64), torch.empty(256, D), norm, position)
            decode.norm_linear(x, x, norm, wide)
            decode.norm_linear(x, x, norm, inner, glu=True)
            decode.linear(torch.empty(B, 1, F), outer)
            cache = torch.empty(B, 1024, H, K, dtype=kind)
            decode_mixers.attend_token(qkv, {"k": cache, "v": cache, "position": position}, H, out)
            own, past = torch.empty(B, 64, H, K, dtype=kind), torch.empty(B, 16, 16, H, K, dtype=kind)
            blocks = {"k": own, "v": own, "k_summary": past, "v_summary": past, "position": position}
            E = torch.empty(H, 16, 64)
            decode_mixers.attend_blocks_token(qkv, blocks, E, E, out)
            sums = {"sums": torch.empty(B, H, 256, K + 1), "position": position}
            decode_mixers.favor_token(qkv, torch.empty(256, K), torch.empty(H), 3.0, sums, out)
            window = torch.empty(B, 31, D, dtype=kind)
            sums = {"keys": window, "values": window, "position": position} | {
                name: torch.empty(B, D) for name in ("max", "num", "den")}
            decode_mixers.aft_local_token(qkv, torch.empty(1024, 128), torch.empty(1024, 128), sums, out)
            rwkv = {"shift": torch.empty(B, D), "wkv": torch.empty(B, H, K, K)}
            one, down, up = torch.empty(D), torch.empty(D, 160, dtype=kind), torch.empty(5, 32, D, dtype=kind)
            decode_mixers.time_mix_token(
                x, x, norm, rwkv, mix_base=one, mix_down=down, mix=torch.empty(5, D), mix_up=up,
                decay_down=torch.empty(D, 64, dtype=kind), decay_up=torch.empty(64, D, dtype=kind), decay=one,
                bonus=torch.empty(H, K), weights=(out, out, out, out), norm_weight=one, norm_bias=one, eps=1e-5,
                output=out)
            decode_mixers.channel_mix_token(x, x, norm, rwkv, torch.empty(2, D), torch.empty(F, D, dtype=kind), out,
                                            outer)
