"""Writes a GGUF file of the llama architecture as a folder of transformers: config, bfloat16 weights, tokenizer.

The package `gguf` dequantises a tensor, some rows at a time; a shard of the weights is the most that memory holds.
The tokenizer is transformers' own reading of the file, with the rules of cutting text that llama.cpp has for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters_store.base.converted.header import Header, TensorInfo
from adapters_store.base.converted.llama import names_of
from adapters_store.base.converted.shards import write_shards
from adapters_store.base.folder import CONFIG, reading
from adapters_store.parsing.strict_json import shown

_ROWS_AT_ONCE = 4096
_SENTENCEPIECE, _BYTE_LEVEL = "llama", "gpt2"  # tokenizer.ggml.model
_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # a space, in a SentencePiece vocabulary
_DIGITS_ALONE = ("smollm", "starcoder", "refact", "codeshell")  # then GPT-2's rule
_WHOLE_WORDS_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3")  # before merges
_PRE = ("gpt-2", *_DIGITS_ALONE, *_WHOLE_WORDS_FIRST)


def write_folder(header: Header, config: dict[str, Any], folder: Path) -> None:
    """config: `config_of(header)`. Raises UnsupportedBase, OSError."""
    names = names_of(header, config)
    _write_tokenizer(header, folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    _write_weights(header, config, names, folder)


def _write_weights(header: Header, config: dict[str, Any], names: dict[str, str], folder: Path) -> None:
    tensors = {names[tensor.name]: tensor for tensor in header.tensors}
    sizes = {name: tensor.plain_bytes for name, tensor in tensors.items()}
    write_shards(folder, sizes, lambda name: _weight(header, tensors[name], config))


def _weight(header: Header, tensor: TensorInfo, config: dict[str, Any]) -> torch.Tensor:
    """In bfloat16, in transformers' order of rows."""
    weight = torch.empty(tensor.shape, dtype=torch.bfloat16)
    rows = weight.view(-1, tensor.shape[-1])
    done = 0
    for values in _values(header, tensor, len(rows)):
        if not np.isfinite(values).all():
            raise header.refuse(f"the tensor {shown(tensor.name)} has values that are not finite")
        rows[done : done + len(values)] = torch.from_numpy(values)
        done += len(values)
    if ".attn_q." in tensor.name:
        return _halves_apart(weight, config["num_attention_heads"])
    if ".attn_k." in tensor.name:
        return _halves_apart(weight, config["num_key_value_heads"])
    return weight


def _values(header: Header, tensor: TensorInfo, num_rows: int) -> Iterator[np.ndarray]:
    """Its rows as float32 [rows, columns], some at a time."""
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.stored.number)
    row_bytes = tensor.num_bytes // num_rows
    with header.path.open("rb") as stream:
        stream.seek(tensor.start)
        for start in range(0, num_rows, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, num_rows - start)
            raw = np.fromfile(stream, dtype=np.uint8, count=count * row_bytes)
            if len(raw) != count * row_bytes:
                raise header.refuse(f"cut short while it was read, in the tensor {shown(tensor.name)}")
            yield dequantize(raw.reshape(count, row_bytes), kind).astype(np.float32)


def _halves_apart(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[O, H]: llama.cpp rotates neighbouring rows of a head together, transformers row i and row i + half."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _write_tokenizer(header: Header, folder: Path) -> None:
    model, pre = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model not in (_SENTENCEPIECE, _BYTE_LEVEL):
        raise header.refuse(f"tokenizer.ggml.model is {shown(model)}; read are {_SENTENCEPIECE} and {_BYTE_LEVEL}")
    if model == _BYTE_LEVEL and pre not in _PRE:
        reason = f"tokenizer.ggml.pre is {shown(pre)}, a way to cut text that is not read; read are {', '.join(_PRE)}"
        raise header.refuse(reason)
    begins = {"add_bos_token": True} if model == _BYTE_LEVEL and pre in _WHOLE_WORDS_FIRST else {}
    with reading(header.path, "the tokenizer"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            header.path.parent,
            gguf_file=header.path.name,
            local_files_only=True,
            trust_remote_code=False,
            **begins,
        )
        _cut_as_llama_cpp(tokenizer.backend_tokenizer, header, model, pre)
        tokenizer.save_pretrained(folder)


def _cut_as_llama_cpp(backend: Any, header: Header, model: str, pre: object) -> None:
    """transformers takes GPT-2's rule for byte-level vocabularies that it does not know, and cuts words at blanks."""
    if model == _SENTENCEPIECE:
        has_blank = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
        blanks = [normalizers.Prepend(_BLANK)] if has_blank else []
        backend.normalizer = normalizers.Sequence([*blanks, normalizers.Replace(" ", _BLANK)])
        backend.pre_tokenizer = None
    elif pre in _DIGITS_ALONE:
        own = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own])
    elif pre in _WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True
