"""The folder that `transformers` loads: what the zoo's own holds, in that library's files. Needs no transformers.

config.json has the zoo's configuration under "zoo". Names of weights begin with "model.", where zoo/hf/causal_lm.py has
the model. tokenizer.json is what the `tokenizers` library reads, so that no code of ours encodes text there; byte-pair
merges in the zoo's own form go along as zoo_tokenizer.json. modeling_zoo.py imports zoo/hf/causal_lm.py, no more.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from zoo.files import replace
from zoo.model import LanguageModel
from zoo.pretrained import (
    DTYPES,
    FORMAT,
    HF_PREFIX,
    HF_TYPE,
    SAFETENSORS,
    check_vocabulary,
    digest,
    read_json,
    replace_folder,
    serialise_weights,
    to_json,
)
from zoo.tokenizers import BYTE_TO_CHAR, SEPARATOR_TEXT, BPETokenizer, Tokenizer

OWN_MERGES = "zoo_tokenizer.json"  # tokenizer.json is transformers' here
REFUSED = "NUL (this is no text)"  # the library's own error says it, of a byte that is in no vocabulary


def save_hf(folder: str | Path, model: LanguageModel, tokenizer: Tokenizer, card: dict[str, Any], *, name: str,
            dtype: torch.dtype | None = None) -> Path:
    """Write a folder that both `transformers` and `zoo.load_pretrained` load, whole or not at all; returns it.

    name: the model's, for README.md. The rest, and what is refused, as in `zoo.pretrained.save_pretrained`.
    """
    folder = Path(folder)
    check_vocabulary(tokenizer, model.config)
    about = to_json(card)
    data, weights = serialise_weights(model, dtype, HF_PREFIX)

    def fill(new: Path) -> None:
        spec = tokenizer.spec
        if isinstance(tokenizer, BPETokenizer):
            spec |= {"file": OWN_MERGES}
            (new / OWN_MERGES).write_bytes(tokenizer.content)
        own = {"format": FORMAT, "model": model.config.to_dict(), "tokenizer": spec, "weights": weights}
        (new / "model.safetensors").write_bytes(data)
        (new / "config.json").write_bytes(to_json(_config(model, tokenizer) | {HF_TYPE: own}))
        (new / "generation_config.json").write_bytes(to_json(_special_ids(tokenizer)))
        (new / "tokenizer.json").write_text(json.dumps(library_tokenizer(tokenizer), ensure_ascii=False), "utf-8")
        (new / "tokenizer_config.json").write_bytes(to_json(_tokenizer_config(model)))
        (new / "card.json").write_bytes(about)
        (new / "README.md").write_text(_readme(name, model, card), "utf-8")
        shutil.copyfile(Path(__file__).with_name("modeling_zoo.py"), new / "modeling_zoo.py")

    replace_folder(folder, fill)
    return folder


def reseal(folder: Path, by: str, origin: Path) -> None:
    """Make a folder whose weights transformers has written anew one of the zoo again, if it is one.

    config.json gets their hash, card.json says by what they were written, and byte-pair merges come from `origin`, if
    that is a folder which has them. Adapters alone, shards and other formats are left as they are.
    """
    path, where = folder / "model.safetensors", folder / "config.json"
    if not path.is_file() or not where.is_file():
        return
    config = read_json(where)
    with safe_open(path, framework="pt") as file:
        kind = file.get_slice(f"{HF_PREFIX}head.weight").get_dtype()
    dtype = next((key for key, value in DTYPES.items() if SAFETENSORS[value] == kind), kind)
    config[HF_TYPE]["weights"] = {"sha256": digest(path), "bytes": path.stat().st_size, "dtype": dtype}
    replace(where, to_json(config))
    replace(folder / "card.json", to_json({"saved_by": by}))
    if (origin / OWN_MERGES).is_file() and not (folder / OWN_MERGES).exists():
        shutil.copyfile(origin / OWN_MERGES, folder / OWN_MERGES)


def library_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json of the `tokenizers` library that gives the ids of `tokenizer`, with the separator before a text.

    Bytes are a byte-level encoding without merges. The one special token is the separator, id 0; transformers is told
    not to look for its spelling in a text. NUL is in no vocabulary, and an unknown token that is none is an error.
    """
    model: dict[str, Any] = {"vocab": {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}, "merges": []}
    if isinstance(tokenizer, BPETokenizer):
        model = json.loads(tokenizer.content)["model"]
    vocab = {SEPARATOR_TEXT: tokenizer.separator} | {token: index for token, index in model["vocab"].items()
                                                     if token not in (SEPARATOR_TEXT, BYTE_TO_CHAR[0])}
    begin, byte_level = {"SpecialToken": {"id": SEPARATOR_TEXT, "type_id": 0}}, {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": tokenizer.separator, "content": SEPARATOR_TEXT, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": isinstance(tokenizer, BPETokenizer)},
        "post_processor": {
            "type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, begin, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {SEPARATOR_TEXT: {"id": SEPARATOR_TEXT, "ids": [tokenizer.separator],
                                                "tokens": [SEPARATOR_TEXT]}}},
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "merges": model["merges"],
                  "vocab": vocab, "unk_token": REFUSED},
    }


def _config(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    config = model.config
    return {
        "architectures": ["ZooForCausalLM"], "model_type": HF_TYPE,
        "auto_map": {"AutoConfig": "modeling_zoo.ZooConfig", "AutoModelForCausalLM": "modeling_zoo.ZooForCausalLM"},
        "dtype": "float32",  # to compute in, whatever the weights are stored in: as `zoo.load_pretrained` does
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "max_position_embeddings": config.seq_len,
        "tie_word_embeddings": False, "use_cache": True,
    } | _special_ids(tokenizer)


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {f"{name}_token_id": tokenizer.separator for name in ("bos", "eos", "pad")}


def _tokenizer_config(model: LanguageModel) -> dict[str, Any]:
    return {f"{name}_token": SEPARATOR_TEXT for name in ("bos", "eos", "pad")} | {
        "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "split_special_tokens": True,
        "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model.config.seq_len if model.max_len is None else model.max_len}


def _readme(name: str, model: LanguageModel, card: dict[str, Any]) -> str:
    """The page that the hub shows: what the card says, and how to use the model."""
    data = card.get("data")
    facts = {
        "architecture": model.config.model, "parameters": f"{model.num_parameters():,}",
        "trained on": data.get("name") if isinstance(data, dict) else None, "tokens": card.get("tokens"),
        "validation, bits per byte": card.get("validation_bits_per_byte"),
        "test, bits per byte": card.get("test_bits_per_byte"), "commit": card.get("commit"),
        "limits": card.get("limits"),
    }
    rows = [f"| {key} | {value} |" for key, value in facts.items() if value is not None]
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- zoo",
        f"- {model.config.model}", "---", "", f"# {name}", "", "| | |", "|---|---|", *rows, "",
        "The code is that of the Python package `zoo-lm`, which has to be installed; `modeling_zoo.py` imports it.", "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_REPOSITORY", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPOSITORY", trust_remote_code=True)',
        'inputs = tokenizer(["It was", "Once upon a time"], return_tensors="pt", padding=True)',
        "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=100), skip_special_tokens=True))",
        "```", ""])
