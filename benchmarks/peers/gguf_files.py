"""GGUF files of Llama models and of adapters, written with llama.cpp's own package as its converters write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map, quantize
from gguf.constants import MODEL_ARCH, GGUFType, Keys
from safetensors.torch import load_file

BF16, F32, Q8_0 = GGMLQuantizationType.BF16, GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
Q4_1 = GGMLQuantizationType.Q4_1


def write_gguf(
    base: Path,
    target: Path,
    kind: GGMLQuantizationType = BF16,
    *,
    arch: str = "llama",
    more: Mapping[str, Any] = {},
    with_head: bool = False,
    leave_out: str = "",
) -> Path:
    """`base`, a folder of a Llama with a byte-level vocabulary, as one GGUF file of matrices in `kind`.

    more: further keys, or other values. with_head: the embeddings, upside down, as the head. leave_out: a tensor.
    """
    config = json.loads((base / "config.json").read_text())
    writer = GGUFWriter(target, arch)
    _write_keys(writer, base, config, more)
    weights = load_file(base / "model.safetensors")
    if with_head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in weights.items():
        ours = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        if ours != leave_out:
            _write_tensor(writer, ours, _paired(weight.float(), ours, config), kind)
    _finish(writer)
    return target


def write_adapter_gguf(adapter: Path, base: Path, target: Path) -> Path:
    """`adapter`, a folder as PEFT saves it for the Llama in `base`, as one GGUF file in float32, as llama.cpp's
    converter writes it."""
    config = json.loads((base / "config.json").read_text())
    writer = GGUFWriter(target, "llama")
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in load_file(adapter / "adapter_model.safetensors").items():
        module, _, matrix = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        ours = f"{names.get_name(module)}.weight"
        ordered = _paired(weight.float(), ours, config) if matrix == "lora_B" else weight.float()
        writer.add_tensor(f"{ours}.{matrix.lower()}", np.ascontiguousarray(ordered.numpy()))
    _finish(writer)
    return target


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_keys(writer: GGUFWriter, base: Path, config: dict[str, Any], more: Mapping[str, Any]) -> None:
    vocabulary = json.loads((base / "tokenizer.json").read_text())
    model, control = vocabulary["model"], {token["id"] for token in vocabulary["added_tokens"]}
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ends, template = config["eos_token_id"], base / "chat_template.jinja"
    keys: dict[str, Any] = {
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": ends[0] if isinstance(ends, list) else ends,
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
        "tokenizer.ggml.add_bos_token": True,
        **({"tokenizer.chat_template": template.read_text()} if template.exists() else {}),
        **more,
    }
    for key, value in keys.items():
        _write_key(writer, key, value)
    writer.add_token_list(tokens)
    kinds = [TokenType.CONTROL if id_ in control else TokenType.NORMAL for id_ in range(len(tokens))]
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)


def _write_key(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write_tensor(writer: GGUFWriter, name: str, weight: torch.Tensor, kind: GGMLQuantizationType) -> None:
    """Vectors stay float32, as llama.cpp keeps them."""
    stored = F32 if weight.ndim == 1 else kind
    writer.add_tensor(name, quantize(np.ascontiguousarray(weight.numpy()), stored), raw_dtype=stored)


def _paired(weight: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    """Rows of a head in llama.cpp's order: row i beside row i + half."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for part, count in heads.items():
        if f".{part}." in name:
            halves = weight.view(count, 2, -1, weight.shape[-1])
            return halves.transpose(1, 2).reshape(weight.shape)
    return weight
