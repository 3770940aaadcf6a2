"""Saved models under lm-evaluation-harness, on small tasks of a folder: what it reports, worked out by hand."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, tiny

import zoo
from zoo.cli import main
from zoo.errors import ZooError
from zoo.pretrained import PretrainedModel, save_pretrained
from zoo.tokenizers import BPETokenizer, ByteTokenizer

pytest.importorskip("lm_eval", reason="zoo eval --tasks needs lm_eval: pip install 'zoo-lm[eval]'")

from zoo.harness import ZooLM, run_tasks

T = 64
PASSAGES = ["the cat sat on the mat and looked at the cat", "she gave him the pen , and he took the pen",
            "a word of old", "one two three four five six seven eight nine ten eleven twelve thirteen " * 2 + "end"]
CHOICES = [{"goal": "What is red?", "sol1": "a rose", "sol2": "the deep blue sea", "label": 0},
           {"goal": "What is wet?", "sol1": "a stone on a dry road", "sol2": "rain", "label": 1},
           {"goal": "What is é?", "sol1": "a letter", "sol2": "世", "label": 1}]
TASKS = {
    "cloze": """
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "choose": """
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
""",
    "write": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


def build(name: str, **shape: int) -> PretrainedModel:
    torch.manual_seed(2)
    plain = tiny(Case(name, ()), scramble=True, **{"vocab_size": 256, "seq_len": T, **shape})
    model = PretrainedModel(plain.config, ByteTokenizer(), {})
    model.load_state_dict(plain.state_dict())
    return model.eval()


def asked(*arguments: Any) -> Any:
    """What the harness hands to a model."""
    return SimpleNamespace(args=arguments)


def nats(model: PretrainedModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logs = model(ids[:, :-1])[0].double().log_softmax(-1)[-len(continuation):]
    return (float(logs.gather(-1, torch.tensor(continuation)[:, None]).sum()),
            logs.argmax(-1).tolist() == continuation)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    model = build("rwkv")
    written = zoo.generate(model, PASSAGES, max_tokens=12, temperature=0, stop=["e", "\n\n"])
    rows = {"cloze": [{"text": text} for text in PASSAGES], "choose": CHOICES,
            "whole": [{"text": text} for text in PASSAGES],
            "write": [{"text": text, "target": target if place else "not this"}
                      for place, (text, target) in enumerate(zip(PASSAGES, written, strict=True))]}
    for name, body in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (folder / f"{name}.yaml").write_text(
            f"task: zoo_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
            f"test_split: test\n{body}metadata: {{version: 1.0}}\n")
    save_pretrained(folder / "model", model, model.tokenizer, {})
    return folder


@pytest.fixture(autouse=True)
def no_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Local tasks look no host up, and `datasets` keeps what it converts in a folder of this test."""
    import datasets

    def refuse(host: str, *rest: Any, **more: Any) -> None:
        raise AssertionError(f"looked up {host}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", zoo.list_models())
@pytest.mark.parametrize("batch", [1, 200, 100_000])
def test_loglikelihoods(name: str, batch: int) -> None:
    model = build(name)
    pairs = [("the cat sat on the", " mat"), ("", "mat"), ("ends with spaces  ", "here"), ("é", "世!"), ("a", " b"),
             ("long " * 40, "end")]
    expected = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        whole = [0, *(context + continuation).encode()]
        count = len(whole) - 1 - len(stripped.encode())
        window = whole[-T - 1:]  # the beginning of what is too long is not seen
        expected.append(nats(model, window[:-count], window[-count:]))
    found = ZooLM(model, batch_tokens=batch).loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    best = int(model(torch.tensor([[0, 97]]))[0, -1].argmax())
    if 0 < best < 128:
        assert ZooLM(model).loglikelihood([asked("a", chr(best))], disable_tqdm=True)[0][1]


@pytest.mark.parametrize("batch", [1, 100_000])
def test_rolling(batch: int) -> None:
    model = build("transformer")
    text = "Of old, é and 世. " * 9
    tokens = [0, *text.encode()]
    expected = sum(nats(model, tokens[start:start + 1], tokens[start + 1:start + T + 1])[0]
                   for start in range(0, len(tokens) - 1 - T, T))
    rest = (len(tokens) - 1) % T
    expected += nats(model, tokens[-T - 1:-rest], tokens[-rest:])[0]
    asker = ZooLM(model, batch_tokens=batch)
    found = asker.loglikelihood_rolling([asked(text), asked(""), asked("a")], disable_tqdm=True)
    assert found == pytest.approx([expected, 0.0, nats(model, [0], [97])[0]], rel=1e-5)


def test_writing(tasks: Path) -> None:
    model = build("rwkv")
    how = {"until": ["e"], "max_gen_toks": 20, "do_sample": False}
    other = {"until": "x", "max_gen_toks": 5, "do_sample": False}
    found = ZooLM(model, batch_tokens=70).generate_until(
        [asked(PASSAGES[0], how), asked(PASSAGES[2], other), asked(PASSAGES[1], how), asked("é" * 100, how)],
        disable_tqdm=True)
    first, second = zoo.generate(model, PASSAGES[:2], max_tokens=20, temperature=0, stop=["e"])
    third = zoo.generate(model, PASSAGES[2], max_tokens=5, temperature=0, stop=["x"])
    assert found[:3] == [first, third, second]
    assert found[3] == zoo.generate(model, "é" * 21, max_tokens=20, temperature=0, stop=["e"])  # 43 of 44 are 42 bytes
    for name in zoo.list_models():  # one of which has a limit
        (text,) = ZooLM(build(name)).generate_until([asked("word " * 50, how)], disable_tqdm=True)
        assert "e" not in text


def test_every_kind_of_task(tasks: Path) -> None:
    model = build("rwkv")
    results = run_tasks(model, ["zoo_cloze", "zoo_choose", "zoo_whole", "zoo_write"], folder=tasks)["results"]
    scored = []
    for text in PASSAGES:
        whole = [0, *text.encode()]
        count = len(text.split(" ")[-1]) + 1
        window = whole[-T - 1:]
        scored.append(nats(model, window[:-count], window[-count:]))
    perplexity = math.exp(-np.mean([value for value, _ in scored]))
    assert results["zoo_cloze"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-5)
    assert results["zoo_cloze"]["acc,none"] == np.mean([greedy for _, greedy in scored])
    right, normed = [], []
    for row in CHOICES:
        context = [0, *f"Question: {row['goal']}\nAnswer:".encode()]
        values = [nats(model, context, list(f" {row[key]}".encode()))[0] for key in ("sol1", "sol2")]
        right.append(int(np.argmax(values)) == row["label"])
        normed.append(int(np.argmax(np.array(values) / [len(row["sol1"]), len(row["sol2"])])) == row["label"])
    assert results["zoo_choose"]["acc,none"] == pytest.approx(np.mean(right))
    assert results["zoo_choose"]["acc_norm,none"] == pytest.approx(np.mean(normed))
    total = sum(ZooLM(model).loglikelihood_rolling([asked(text) for text in PASSAGES], disable_tqdm=True))
    size = sum(len(text.encode()) for text in PASSAGES)
    assert results["zoo_whole"]["bits_per_byte,none"] == pytest.approx(-total / math.log(2) / size, rel=1e-6)
    words = sum(len(text.split()) for text in PASSAGES)
    assert results["zoo_whole"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-6)
    assert results["zoo_write"]["exact_match,none"] == 0.75  # the first was asked for something else


def test_merged_tokens() -> None:
    tokenizer = BPETokenizer.train([text.encode() for text in PASSAGES] * 9, 280)
    plain = tiny(Case("rwkv", ()), scramble=True, vocab_size=280, seq_len=T)
    model = PretrainedModel(plain.config, tokenizer, {})
    model.load_state_dict(plain.state_dict())
    whole = [0, *tokenizer.encode("the cat sat")]
    context = [0, *tokenizer.encode("the cat")]
    assert whole[:len(context)] == context
    (found,) = ZooLM(model.eval()).loglikelihood([asked("the cat", " sat")], disable_tqdm=True)
    assert found[0] == pytest.approx(nats(model, context, whole[len(context):])[0], rel=1e-5)


def test_the_command(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(tasks / "model"), "--tasks", "zoo_cloze,zoo_choose", "--task-folder", str(tasks),
              "--limit", "2", "--json", str(tasks / "found.json"), "--device", "cpu"])
    out, _ = capsys.readouterr()
    assert stop.value.code == 0
    found = json.loads((tasks / "found.json").read_text())["tasks"]
    assert found["n-samples"]["zoo_choose"]["effective"] == 2
    assert f"zoo_cloze: perplexity {found['results']['zoo_cloze']['perplexity,none']:.4f}" in out
    assert f"zoo_choose: acc {found['results']['zoo_choose']['acc,none']:.4f}" in out


@pytest.mark.parametrize(("words", "message"), [
    (["--tasks", "zoo_riddles", "--task-folder", "@"], "unknown task 'zoo_riddles'; allowed: one of the "),
    (["--tasks", "zoo_cloze", "--task-folder", "@/none"], "no such folder of tasks"),
    (["--tasks", "zoo_broken", "--task-folder", "@"], "cannot load zoo_broken: "),
    (["--tasks", "zoo_cloze", "--task-folder", "@", "--lengths", "0"], "a length of 0 tokens is not allowed: 1"),
    (["--tasks", "zoo_cloze", "--task-folder", "@", "--lengths", "3"], "tokens is past the length of 3"),
    (["--tasks", "zoo_write", "--task-folder", "@", "--lengths", "12"], "leave no room for a prompt"),
])
def test_mistakes_are_one_line_and_status_2(tasks: Path, words: list[str], message: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    (tasks / "broken.yaml").write_text("task: zoo_broken\ndataset_path: json\noutput_type: loglikelihood\n"
                                       "dataset_kwargs: {data_files: {test: nowhere.jsonl}}\ntest_split: test\n"
                                       "doc_to_text: a\ndoc_to_target: b\n")
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(tasks / "model"), "--device", "cpu", *(word.replace("@", str(tasks)) for word in words)])
    _, err = capsys.readouterr()
    assert stop.value.code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err
    with pytest.raises(ZooError, match=f"65 tokens are past the limit of this aft: at most {T}"):
        ZooLM(build("aft"), max_length=T + 1)


HELD = {  # a row as each data set has it
    "lambada_openai": ("test", {"text": "she gave him the pen , and he took the pen"}),
    "piqa": ("validation", {"goal": "Dry a plate.", "sol1": "Use a towel.", "sol2": "Use a stone.", "label": 0}),
    "hellaswag": ("validation", {"activity_label": "Washing up", "ctx_a": "A man stands at a sink.", "ctx_b": "he",
                                 "ctx": "", "endings": ["dries a plate.", "flies.", "sings a plate.", "is a sink."],
                                 "label": "0", "split": "val", "source_id": "x"}),
}


@pytest.mark.parametrize("name", zoo.list_pretrained())
def test_published_models_run_the_harnesss_own_tasks(name: str, tmp_path: Path) -> None:
    """Its prompts, metrics and code for these three; of the data a row, as there is no network here."""
    import lm_eval

    for task, (split, row) in HELD.items():
        (own,) = Path(lm_eval.__file__).parent.glob(f"tasks/*/{task}.yaml")
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
        splits = "".join(f"{kind}_split: {split if kind == split else 'null'}\n"
                         for kind in ("training", "validation", "test"))
        (tmp_path / f"{task}.yaml").write_text(
            f"include: {own}\ntask: zoo_{task}\ndataset_path: json\ndataset_name: null\n{splits}"
            f"dataset_kwargs: {{data_files: {{{split}: {tmp_path}/{task}.jsonl}}}}\n")
    model = zoo.load_pretrained(name)
    results = run_tasks(model, [f"zoo_{task}" for task in HELD], folder=tmp_path)["results"]
    passage = HELD["lambada_openai"][1]["text"]
    expected, greedy = nats(model, [0, *passage.removesuffix(" pen").encode()], list(b" pen"))
    assert results["zoo_lambada_openai"]["perplexity,none"] == pytest.approx(math.exp(-expected), rel=1e-4)
    assert results["zoo_lambada_openai"]["acc,none"] == greedy
    for task, metric in (("piqa", "acc,none"), ("piqa", "acc_norm,none"), ("hellaswag", "acc_norm,none")):
        assert results[f"zoo_{task}"][metric] in (0, 1)
    context = [0, *b"Question: Dry a plate.\nAnswer:"]
    values = [nats(model, context, list(answer))[0] for answer in (b" Use a towel.", b" Use a stone.")]
    assert results["zoo_piqa"]["acc,none"] == (values[0] > values[1])
