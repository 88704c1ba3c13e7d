"""Tiny random models of transformers, and directories of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from padconvert.__main__ import main

_BERT = {
    "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 1}
_T5 = {"vocab_size": 99, "d_model": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "d_ff": 24}
_GPT2 = {"vocab_size": 99, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1}
_DISTIL = {"vocab_size": 99, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32}
_VIT = {**_BERT, "image_size": 12, "patch_size": 4}

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00015.safetensors"  # of the tiny BertModel in shards of 2KB

#: class → its config's class and settings
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel": ("BertConfig", _BERT),
    "BertForSequenceClassification": ("BertConfig", _BERT),
    "RobertaForMaskedLM": ("RobertaConfig", _BERT),
    "AlbertModel": ("AlbertConfig", {**_BERT, "embedding_size": 8, "num_hidden_layers": 3}),
    "ElectraModel": ("ElectraConfig", {**_BERT, "embedding_size": 8}),
    "DistilBertModel": ("DistilBertConfig", _DISTIL),
    "GPT2LMHeadModel": ("GPT2Config", {**_GPT2, "eos_token_id": 2}),
    "LlamaForCausalLM": ("LlamaConfig", _LLAMA),
    "Qwen2ForCausalLM": ("Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "T5ForConditionalGeneration": ("T5Config", _T5),
    "T5EncoderModel": ("T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "ViTModel": ("ViTConfig", _VIT),
    "ResNetModel": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "MixtralForCausalLM": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
}


def tiny(name: str = "BertModel", **settings: object) -> Any:
    """A model of this class with random weights, in eval mode; the same each time."""
    config, own = MODELS[name]
    torch.manual_seed(1)
    made = getattr(transformers, name)(getattr(transformers, config)(**{**own, **settings})).eval()
    assert isinstance(made, nn.Module)
    return made


def saved(model: Any, folder: Path, *, pickled: bool = False, shards: str = "1GB") -> Path:
    """A directory as save_pretrained writes it; `pickled`, with its weights as the .bin files of old."""
    model.save_pretrained(folder, max_shard_size=shards)
    if not pickled:
        return folder
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in _load_file(path).items()}
        torch.save(tensors, path.with_name(path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")))
        path.unlink()
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text())
        renamed = {k: v.replace("model", "pytorch_model").replace("safetensors", "bin") for k, v in
                   index["weight_map"].items()}  # fmt: skip
        path.with_name("pytorch_model.bin.index.json").write_text(json.dumps({**index, "weight_map": renamed}))
        path.unlink()
    return folder


def _load_file(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def edited(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json") -> Path:
    """The directory with a JSON file of it changed in place."""
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    return folder


def audit(
    path: Path, code: int, verdict: str, capsys: pytest.CaptureFixture[str], kind: str = "transformers"
) -> dict[str, Any]:
    """What `inspect --audit --json` says of the directory, held against its exit code and verdict."""
    capsys.readouterr()
    assert main(["inspect", str(path), "--audit", "--json"]) == code
    captured = capsys.readouterr()
    document: dict[str, Any] = json.loads(captured.out)
    assert (document["verdict"], document["kind"]) == (verdict, kind)
    assert captured.err == ("" if code == 0 else f"error: {document['detail']}\n")
    return document
