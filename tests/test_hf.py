"""Models in `transformers`: the same text, the same ids, and back again."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cases import Case, listed, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import zoo
from zoo import ZooError
from zoo.cli import main
from zoo.hf.folder import save_hf
from zoo.model import LanguageModel
from zoo.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer

ROOT = Path(__file__).parent.parent
PROMPTS = ["It was", "", "a longer prompt than the others", "It has"]
SOME_TEXT = "the cat sat on the mat, the dog on the log: 'tis what it's, 123 times 4,567.\n\n  def f(x):\n\treturn x\n"


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies a folder's code before it imports it: not in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield


def load(folder: Path) -> tuple[Any, Any]:
    return (AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
            AutoTokenizer.from_pretrained(folder, trust_remote_code=True))


def written(model: Any, tokenizer: Any, prompts: list[str], **how: Any) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 24} | how)
    return tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = tiny(Case("rwkv", ()), vocab_size=256, scramble=True)
    return save_hf(tmp_path_factory.mktemp("hf") / "m", model, ByteTokenizer(), {"note": "a card"}, name="m")


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Any, Any]:
    return load(folder)


@pytest.mark.parametrize("case", listed(), ids=str)
def test_generate_writes_what_the_zoo_does(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, prompts of several lengths at once, from a state: after the prompts one token at a time is read."""
    torch.manual_seed(0)
    given = tiny(case, vocab_size=256, scramble=True)
    folder = save_hf(tmp_path / "m", given, ByteTokenizer(), {}, name="m")
    model, tokenizer = load(folder)
    assert model.dtype == torch.float32
    assert not model.training
    back = zoo.load_pretrained(folder)
    for key, value in given.state_dict().items():
        assert torch.equal(model.model.state_dict()[key], value), key
        assert torch.equal(back.state_dict()[key], value), key
    expected = zoo.generate(back, PROMPTS, max_tokens=24, temperature=0)
    assert len("".join(expected)) > 20  # it says something
    read: list[int] = []
    extend = LanguageModel.extend

    def counted(self: LanguageModel, tokens: torch.Tensor, state: Any) -> Any:
        read.append(tokens.shape[1])
        return extend(self, tokens, state)

    monkeypatch.setattr(LanguageModel, "extend", counted)
    assert written(model, tokenizer, PROMPTS) == expected
    assert sorted(read[:3]) == [1, 7, 32]  # each with the separator before it; two prompts are of one length
    assert set(read[3:]) == {1}
    assert len(read) >= 20
    assert written(model, tokenizer, PROMPTS[2:3]) == expected[2:3]


def test_a_published_model_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", "transformer.novels-6m", "--to", "hf", str(tmp_path / "m")])
    assert stop.value.code == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{tmp_path / 'm'}\n"
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}  # as it is published
    model, tokenizer = load(tmp_path / "m")
    assert model.dtype == torch.float32  # and computed in as the zoo does
    published = zoo.load_pretrained("transformer.novels-6m")
    prompts = ["It was", "Mr. Darcy said that"]
    assert written(model, tokenizer, prompts) == zoo.generate(published, prompts, max_tokens=24, temperature=0)
    assert zoo.load_pretrained(tmp_path / "m").card["limits"] == published.card["limits"]
    page = (tmp_path / "m" / "README.md").read_text()
    assert "# transformer.novels-6m" in page
    assert str(published.card["limits"]) in page
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True, dtype=torch.bfloat16)
    assert half.model.head.weight.dtype == torch.bfloat16


def tokenizers() -> list[Tokenizer]:
    return [ByteTokenizer(), BPETokenizer.train([SOME_TEXT.encode() * 30], 300)]


@pytest.mark.parametrize("own", tokenizers(), ids=lambda tokenizer: tokenizer.kind)
def test_the_tokenizer_gives_the_same_ids(own: Tokenizer, tmp_path: Path) -> None:
    """With the separator in front, which `zoo.generate` puts there, too; and the same text of any ids."""
    model = tiny(Case("rwkv", ()), vocab_size=own.vocab_size)
    folder = save_hf(tmp_path / "m", model, own, {}, name="m")
    assert zoo.load_pretrained(folder).tokenizer.encode(SOME_TEXT).tolist() == own.encode(SOME_TEXT).tolist()
    first = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    first.save_pretrained(tmp_path / "again")
    random.seed(0)
    ranges = (1, 128), (128, 0xD800), (0xE000, 0x110000)
    noise = "".join(chr(random.randrange(*random.choice(ranges))) for _ in range(2000))
    texts = ["It was", "", "a<|doc|>b", "世界 héllo\r\n\t x  y ", "\u2028 é", SOME_TEXT * 2000, noise]
    for theirs in (first, AutoTokenizer.from_pretrained(tmp_path / "again")):
        for text in texts:
            ids = own.encode(text).tolist()
            assert theirs(text).input_ids == [0, *ids], text[:20]
            assert theirs.encode(text, add_special_tokens=False) == ids
            assert theirs.decode([0, *ids], skip_special_tokens=True) == text
        some = [index for index in range(1, own.vocab_size) if own.to_bytes([index])]  # but for NUL, which no text has
        for _ in range(200):
            ids = random.choices(some, k=20)
            assert theirs.decode(ids, skip_special_tokens=True) == own.decode(ids)
        assert theirs(["a", "bcdefg"], padding=True).attention_mask[0][0] == 0  # on the left
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 0)
        with pytest.raises(Exception, match="NUL"):  # the library's own class, and our word
            theirs("a\0b")


def test_padding_changes_nothing(pair: tuple[Any, Any]) -> None:
    """Logits and losses of rows that are padded at either end, in parallel and from states."""
    model, _ = pair
    rows = [torch.randint(1, 256, (length,)) for length in (5, 9, 12)]
    alone = [model(row[None]).logits[0] for row in rows]
    left, right = torch.zeros(2, 3, 12, dtype=torch.int64)
    masks = torch.zeros(2, 3, 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        left[i, 12 - len(row):], masks[0, i, 12 - len(row):] = row, 1
        right[i, :len(row)], masks[1, i, :len(row)] = row, 1
    for tokens, mask, cached in ((left, masks[0], False), (right, masks[1], False), (left, masks[0], True)):
        logits = model(tokens, attention_mask=mask, use_cache=cached).logits
        assert logits.shape == (3, 12, 256)
        for i, expected in enumerate(alone):
            torch.testing.assert_close(logits[i][mask[i].bool()], expected)
    labels = left.masked_fill(masks[0] == 0, -100)
    labels[range(3), 12 - masks[0].sum(1)] = -100  # nothing stands before a row's first token to predict it
    loss = model(left, attention_mask=masks[0], labels=labels).loss
    with torch.no_grad():
        nats = sum(float(model.model.loss(row[None, :-1], row[None, 1:], reduction="sum")) for row in rows)
    assert loss.item() == pytest.approx(nats / (4 + 8 + 11), rel=1e-5)
    last = model(left, attention_mask=masks[0], use_cache=True, logits_to_keep=2)
    torch.testing.assert_close(last.logits[1], alone[1][-2:])
    assert last.state.columns == 12
    after = model(torch.full((3, 2), 7), state=last.state, attention_mask=torch.cat([masks[0], torch.ones(3, 2)], 1))
    whole = model(torch.cat([rows[0], torch.full((2,), 7)])[None]).logits
    torch.testing.assert_close(after.logits[0], whole[0, -2:])


def test_what_cannot_be_meant_is_refused(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    tokens = torch.ones(1, 4, dtype=torch.int64)
    between, behind, all_of_it = torch.tensor([[[1, 0, 1, 1]], [[1, 1, 1, 0]], [[0, 0, 0, 0]]])
    for mask, cached, message in ((between, False, "before or behind its tokens"), (between, True, "'left'"),
                                  (behind, True, "padding_side='left'"), (all_of_it, False, "has at least one")):
        with pytest.raises(ZooError, match=message) as caught:
            model(tokens, attention_mask=mask, use_cache=cached)
        assert "\n" not in str(caught.value)
    state = model(tokens, use_cache=True).state
    with pytest.raises(ZooError, match="padding between"):
        model(tokens[:, :2], state=state, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 1]]))
    with pytest.raises(ZooError, match="the state has read 4 columns"):
        model.generate(tokens, state=state, max_new_tokens=2)
    with pytest.raises(ZooError, match="takes no output_hidden_states; allowed: input_ids"):
        model(tokens, output_hidden_states=True)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens, assistant_model=model, max_new_tokens=2)


def test_every_way_of_choosing_goes_on_from_the_state(pair: tuple[Any, Any]) -> None:
    """Beams are moved with their states; sampling returns several; a state that was kept goes on as the text does."""
    model, tokenizer = pair
    for how in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        assert written(model, tokenizer, PROMPTS, **how) == written(model, tokenizer, PROMPTS, use_cache=False, **how)
    drawn = written(model, tokenizer, PROMPTS[:1], do_sample=True, num_return_sequences=3)
    assert len(set(drawn)) == 3
    inputs = tokenizer(["It was a"], return_tensors="pt")
    read = model(inputs.input_ids[:, :5], use_cache=True).state
    went_on = model.generate(**inputs, state=read, max_new_tokens=10, do_sample=False)
    assert torch.equal(went_on, model.generate(**inputs, max_new_tokens=10, do_sample=False))


def test_a_limit_is_told_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(save_hf(tmp_path / "m", tiny(Case("aft", ()), vocab_size=256, seq_len=32), ByteTokenizer(),
                                    {}, name="m"))
    assert tokenizer.model_max_length == 32
    inputs = tokenizer(["0123456789"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=22, min_new_tokens=22).shape == (1, 33)
    monkeypatch.setattr(LanguageModel, "extend", None)
    with pytest.raises(ZooError, match="33 tokens are past the limit of this aft: at most 32"):
        model.generate(**inputs, max_new_tokens=23)


def test_trained_there_and_loaded_here(folder: Path, tmp_path: Path) -> None:
    """A step of training in transformers, saved there: another hash, which the zoo knows, and the code comes along."""
    model, tokenizer = load(folder)
    model.train()
    tokens = torch.randint(1, 256, (2, 20))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data -= 0.1 * parameter.grad
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "modeling_zoo.py").read_bytes() == (folder / "modeling_zoo.py").read_bytes()
    back, again = zoo.load_pretrained(tmp_path / "tuned"), load(tmp_path / "tuned")[0]
    for key, value in model.model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)
        assert torch.equal(again.model.state_dict()[key], value)
    assert not torch.equal(back.head.weight, zoo.load_pretrained(folder).head.weight)
    assert back.card == {"saved_by": f"transformers {transformers.__version__}"}
    with pytest.raises(ZooError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "tuned", push_to_hub=True)


def test_merges_come_along(tmp_path: Path) -> None:
    own = tokenizers()[1]
    folder = save_hf(tmp_path / "m", tiny(Case("rwkv", ()), vocab_size=own.vocab_size), own, {}, name="m")
    load(folder)[0].save_pretrained(tmp_path / "tuned")
    ids = zoo.load_pretrained(tmp_path / "tuned").tokenizer.encode("the cat")
    assert ids.tolist() == own.encode("the cat").tolist()


def test_fresh_weights_are_the_zoos_own(folder: Path) -> None:
    """From a configuration alone: drawn as every zoo model is, not by transformers' normal distribution."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert config.tie_word_embeddings is False  # transformers 4 ties them unless told not to
    assert model.get_input_embeddings().weight.abs().max() <= 1e-4
    gram = model.get_output_embeddings().weight.T @ model.get_output_embeddings().weight
    assert torch.equal(gram.argmax(1), torch.arange(len(gram)))  # the head is orthogonal


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, change in (("missing", lambda tensors: tensors.pop("model.norm.weight")),
                         ("unexpected", lambda tensors: tensors.update({"model.spare": torch.ones(1)}))):
        target = tmp_path / name
        target.mkdir()
        for path in folder.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ZooError, match=f"do not fit the rwkv of config.json: {name} model"):
            load(target)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (({"zoo": None}, "has no 'zoo' with a `model`"),
                            ({"zoo": {"model": config["zoo"]["model"] | {"options": {"_target_": "os.system"}}}},
                             "no option '_target_'")):
        (target / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ZooError, match=message):
            load(target)
    (target / "config.json").write_text(json.dumps(config | {"zoo": []}))
    with pytest.raises(ZooError, match="for transformers and has no object 'zoo'"):
        zoo.load_pretrained(target)


def test_the_folder_is_replaced_whole_or_left_alone(folder: Path, tmp_path: Path) -> None:
    model = tiny(Case("transformer", ()), vocab_size=256)
    for _ in range(2):
        target = save_hf(tmp_path / "m", model, ByteTokenizer(), {}, name="m")
    assert {path.name for path in target.iterdir()} == {path.name for path in folder.iterdir()}
    (target / "notes").write_text("mine")
    with pytest.raises(ZooError, match="is not a saved model alone: it is left as it is"):
        save_hf(target, model, ByteTokenizer(), {}, name="m")
    assert (target / "notes").exists()


def test_without_the_zoo_it_says_what_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zoo.hf", None)
    with pytest.raises(ImportError, match=r"needs the project that it was exported from .*zoo-lm") as caught:
        runpy.run_path(str(folder / "modeling_zoo.py"))
    assert "\n" not in str(caught.value)


def test_what_the_docs_say_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "docs" / "pretrained.md").read_text().partition("\n## In transformers\n")[2].partition("\n## ")[0]
    (command,), (code,) = (re.findall(rf"^```{kind}\n(.*?)^```", section, re.M | re.S) for kind in ("bash", "python"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command)[1:])
    assert stop.value.code == 0
    exec(compile(code, "docs/pretrained.md", "exec"), {})


def test_no_socket_is_opened(tmp_path: Path) -> None:
    """A folder is written where transformers is not, then loaded and sampled there, all without a network."""
    code = f"""
import sys
def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise SystemExit(f"{{event}} {{arguments}}")
sys.addaudithook(refuse)
hidden = "transformers", "lightning", "hydra"
sys.modules.update(dict.fromkeys(hidden))
from zoo.export_hf import export_hf
folder = export_hf("rwkv.novels-6m", {str(tmp_path / 'm')!r})
for name in hidden:
    del sys.modules[name]
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print(tokenizer.decode(model.generate(**tokenizer("It was", return_tensors="pt"), max_new_tokens=5)[0]))
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<|doc|>It was")
