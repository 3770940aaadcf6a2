"""Every architecture and the training loop on a GPU, against the CPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case, listed, tiny
from kernel_cases import compilations
from test_models import PACKED, borders, tokens_of
from torch import Tensor
from training_runs import ROOT, config, train, write_corpus

import zoo
from zoo.errors import ZooError
from zoo.model import LanguageModel
from zoo.ops.backend import decisions, forget_decisions, use_backend
from zoo.training.loggers import read_rows

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CASES = pytest.mark.parametrize("case", listed(), ids=str)


# The kernels, of all ops of a model together; what takes longest stands first, for tests that run side by side


def logits_and_gradients(model: LanguageModel, tokens: Tensor, cu_seqlens: Tensor | None = None,
                         dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of the model's own loss; float32, or under autocast."""
    model.zero_grad()
    targets = tokens.roll(-1, 1)
    with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(tokens, cu_seqlens)
        model.loss(tokens, targets, cu_seqlens=cu_seqlens).backward()
    return {"logits": logits.detach().float()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Relative, by name; where there is next to no gradient, relative to that of the others."""
    least = 1e-4 * sum(float(value.norm()) for name, value in b.items() if name not in ("logits", "loss")) / len(b)
    return {name: float((a[name] - b[name]).norm()) / max(float(b[name].norm()), least) for name in b}


def need_kernels(case: Case) -> None:
    """Skip where no op of a model has kernels (a variant's), so that it runs in PyTorch under any backend."""
    model = tiny(case, layers=1, dim=64, channel_dim=96).to(DEVICE)
    forget_decisions()
    with torch.no_grad(), use_backend("triton"):
        model(tokens_of(1, 8).to(DEVICE))
    if not any(line.endswith(": triton") for line in decisions()):
        pytest.skip(f"no kernels for {case}: {'; '.join(decisions()) or 'none written'}")


@CASES
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_kernels_compile_into_one_graph(case: Case, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile(fullgraph=True) of a training step's loss and gradients.

    Inductor, which takes a minute a model, on rows; documents, whose other operators are few, as far as the graphs go.
    """
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # tests run side by side as it is
    monkeypatch.setattr(torch._inductor.config.triton, "autotune_pointwise", False)  # half as many builds
    torch._dynamo.reset()
    need_kernels(case)
    model = tiny(case, layers=1, scramble=True, dim=64, channel_dim=96).to(DEVICE)
    tokens = (tokens_of(1, sum(PACKED)) if packed else tokens_of(2, 131)).to(DEVICE)
    cu_seqlens = borders(PACKED).to(DEVICE) if packed else None

    def loss(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return model.loss(tokens, tokens.roll(-1, 1), cu_seqlens=cu_seqlens)

    found = []
    with use_backend("triton"):
        for call in (torch.compile(loss, fullgraph=True, backend="aot_eager" if packed else "inductor"), loss):
            model.zero_grad()
            value = call(tokens, cu_seqlens)
            value.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            found.append({"loss": value.detach()} | gradients)
    far = {name: error for name, error in distance(*found).items() if not error < 1e-3}
    assert not far, far


@pytest.mark.parametrize("model", zoo.list_models())
def test_a_cold_start_takes_less_than_30_s(model: str, tmp_path: Path) -> None:
    """All kernels of a model, with their self-tests, compiled into an empty cache in a process of its own."""
    code = f"""
import time, torch, triton, zoo
seconds = []
def compiled(src, times, **facts):
    seconds.append((times.total / 1e6, src.name))
triton.knobs.compilation.listener = compiled
model = zoo.create_model({model!r}, "small", seq_len=1024).cuda()
tokens = torch.randint(256, (2, 1024)).cuda()
torch.cuda.synchronize()
began = time.perf_counter()
with torch.autocast("cuda", torch.bfloat16):
    model.loss(tokens, tokens).backward()
torch.cuda.synchronize()
spent = time.perf_counter() - began
total = sum(each for each, _ in seconds)
print(f"first step {{spent:.1f}} s, {{len(seconds)}} kernels {{total:.1f}} s", sorted(seconds)[-4:])
assert 0 < total < 30
"""
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    print(model, done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@CASES
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
def test_kernels_agree_with_eager(case: Case, packed: bool) -> None:
    """float32: logits and all gradients. bf16 autocast: as far from float32 as the eager path is."""
    model = tiny(case, scramble=True, dim=64, channel_dim=96).to(DEVICE)
    tokens = tokens_of(1, sum(PACKED)) if packed else tokens_of(3, 131)
    given = tokens.to(DEVICE), borders(PACKED).to(DEVICE) if packed else None
    with use_backend("eager"):
        exact, rough = logits_and_gradients(model, *given), logits_and_gradients(model, *given, dtype=torch.bfloat16)
    need_kernels(case)
    with use_backend("triton"):
        close, ours = logits_and_gradients(model, *given), logits_and_gradients(model, *given, dtype=torch.bfloat16)
    far = {name: error for name, error in distance(close, exact).items() if not error < 1e-3}
    assert not far, far
    allowed = distance(rough, exact)
    far = {name: (error, allowed[name]) for name, error in distance(ours, exact).items()
           if not error < 1.5 * allowed[name] + 0.01}
    assert not far, far


@CASES
@pytest.mark.parametrize("scale", [100.0, math.nan])
def test_kernels_keep_documents_apart(case: Case, scale: float) -> None:
    mixer = tiny(case, layers=1, scramble=True, dim=64).to(DEVICE).blocks[0].sequence_mixer
    x, cu_seqlens = torch.randn(1, sum(PACKED), 64, device=DEVICE), borders(PACKED).to(DEVICE)
    need_kernels(case)
    with use_backend("triton"), torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        y = mixer(x, cu_seqlens)
        for n in (0, 2, 3, 5):
            own = slice(sum(PACKED[:n]), sum(PACKED[: n + 1]))
            other, others = x.clone(), torch.ones(sum(PACKED), dtype=torch.bool, device=DEVICE)
            other[:, own] *= scale
            others[own] = False
            assert torch.equal(mixer(other, cu_seqlens)[:, others], y[:, others]), f"document {n}"


def forget_builds() -> None:
    """As in a new process, that is, but for the compiled code on the disk: what earlier tests built counts as new."""
    from triton.runtime import JITFunction

    for name in [name for name in sys.modules if name.startswith("zoo.kernels.")]:
        for kernel in vars(sys.modules[name]).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()


@CASES
def test_other_lengths_and_documents_compile_nothing_new(case: Case) -> None:
    need_kernels(case)
    model = tiny(case, scramble=True, dim=64, channel_dim=96).to(DEVICE)

    def step(lengths: tuple[int, ...]) -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            cu_seqlens = None if len(lengths) == 1 else borders(lengths).to(DEVICE)
            tokens = tokens_of(1, sum(lengths)).to(DEVICE)
            model.loss(tokens, tokens, cu_seqlens=cu_seqlens).backward()

    forget_builds()
    with use_backend("triton"):
        with compilations() as first:
            for lengths in ((97,), (97, 40), (1,), (1, 1)):  # rows that are cut into segments, and too short ones
                step(lengths)
        assert first, "no kernel ran"
        with compilations() as more:
            for lengths in ((160,), (33,), (128,), (2,), (7, 9), (16, 160, 0, 1, 1, 80), (64,) * 9, (5, 0), (160, 160)):
                step(lengths)
    assert not more, more


# A model and its training against the CPU


@CASES
def test_model_agrees_with_the_cpu(case: Case) -> None:
    """float32 logits and all gradients, at a length that is not a multiple of any chunk."""
    model, tokens = tiny(case, scramble=True), tokens_of(2, 130)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    logits = model(tokens).detach()
    model.zero_grad()
    model.to(DEVICE)
    there = tokens.to(DEVICE)
    torch.testing.assert_close(model(there).detach().cpu(), logits, rtol=1e-3, atol=1e-3)
    model.loss(there[:, :-1], there[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad.cpu() - expected[name]).norm() / expected[name].norm().clamp_min(1e-8)
        assert error < 1e-3, f"{name}: relative error {error:.1e}"


@CASES
def test_autocast_stays_close(case: Case) -> None:
    model, tokens = tiny(case, scramble=True).to(DEVICE), tokens_of(2, 160).to(DEVICE)
    exact = model(tokens).detach()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        rough = model(tokens).detach()
        loss = model.loss(tokens, tokens)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (rough.float() - exact).square().mean().sqrt() < 0.06 * exact.square().mean().sqrt()


@CASES
def test_extend_equals_forward(case: Case) -> None:
    """In pieces that cross chunk borders, with rows at different positions."""
    model, tokens = tiny(case, scramble=True).to(DEVICE), tokens_of(2, 160).to(DEVICE)
    with torch.inference_mode():
        expected = model(tokens)
        states = []
        for row, length in ((0, 70), (1, 33)):
            logits, state = model.extend(tokens[row : row + 1, :length], model.init_state(max_len=160))
            torch.testing.assert_close(logits, expected[row : row + 1, :length], rtol=1e-3, atol=1e-3)
            states.append(state)
        state = {name: torch.cat([each[name] for each in states]) for name in states[0]}
        for step in (0, 1, 2):
            new = torch.stack([tokens[0, 70 + step], tokens[1, 33 + step]]).unsqueeze(1)
            logits, state = model.extend(new, state)
            there = torch.stack([expected[0, 70 + step], expected[1, 33 + step]])
            torch.testing.assert_close(logits[:, 0], there, rtol=1e-3, atol=1e-3)


@CASES
def test_trains_and_resumes(case: Case, tmp_path: Path) -> None:
    """trainer=gpu under bf16 autocast, with micro-batches, cut at step 4 and gone on from there."""
    corpus = write_corpus(tmp_path)
    changes = {"model": {"name": case.model, **dict(case.options)}, "trainer__accelerator": "gpu",
               "trainer__precision": "bf16-mixed", "trainer__micro_batch": 64,
               "schedule": {"name": "wsd", "decay": 0.0}, "sample_tokens": 4}
    train(config(corpus, tmp_path / "run", steps=4, **changes))
    result = train(config(corpus, tmp_path / "run", steps=8, resume="auto", **changes))
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 9)]
    assert all(math.isfinite(float(row["loss"])) and float(row["peak_memory"]) > 0 for row in rows)
    assert result["validation"]["bits_per_byte"] < 8


def test_a_step_that_is_not_finite_reaches_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at one step late on a GPU; the checkpoint before it is what is kept."""
    corpus, loss, calls = write_corpus(tmp_path), LanguageModel.loss, []

    def broken(self: LanguageModel, *arguments: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        value = loss(self, *arguments, reduction=reduction)
        calls.append(self.training)
        return value * math.nan if sum(calls) == 6 else value

    monkeypatch.setattr(LanguageModel, "loss", broken)
    with pytest.raises(ZooError, match="step 6: loss nan"):
        train(config(corpus, tmp_path / "run", trainer__accelerator="gpu", trainer__precision="bf16-mixed"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000004.ckpt"]
