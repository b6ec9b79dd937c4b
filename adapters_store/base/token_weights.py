"""What the base's embedding and head hold, as hashes: PEFT writes both whole beside an adapter of the head.

An upload that brings them unchanged is recognised without the base's files at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from adapters_store.base.families import HEAD, family_of

_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ROWS = 4096  # hashed at a time: 32 MiB of a hidden size of 4,096 in bfloat16


def token_weights(config: PretrainedConfig, files: Iterable[Path], served: torch.dtype) -> dict[str, dict[str, str]]:
    """Module -> type as safetensors calls it -> sha256 of all rows in that type, [vocabulary, hidden].

    A head that is tied to the embedding is the embedding. Left out: a tensor that is not stored plain, and a type that
    loses what `served`, the base's type in use, keeps (PEFT would answer with the rounded weight).
    """
    embedding = family_of(config.architectures).embedding
    hashes = {module: found for module in (embedding, HEAD) if (found := _hashes(files, f"{module}.weight", served))}
    if embedding in hashes and HEAD not in hashes and config.tie_word_embeddings:
        hashes[HEAD] = hashes[embedding]
    return hashes


def _hashes(files: Iterable[Path], name: str, served: torch.dtype) -> dict[str, str]:
    sums = {dtype: hashlib.sha256() for dtype in _TYPES}
    is_there = False
    for rows in _rows(files, name):
        is_there = True
        for dtype in list(sums):
            cast = rows.to(_TYPES[dtype]).contiguous()
            if torch.equal(cast.to(served), rows.to(served)):
                sums[dtype].update(cast.view(torch.uint8).numpy().data)
            else:
                del sums[dtype]
    return {dtype: total.hexdigest() for dtype, total in sums.items()} if is_there else {}


def _rows(files: Iterable[Path], name: str) -> Iterator[torch.Tensor]:
    """The tensor, some rows at a time."""
    for file in files:
        with safe_open(file, framework="pt") as stored:
            if name in stored.keys():  # noqa: SIM118  no mapping
                tensor = stored.get_slice(name)
                if tensor.get_dtype() not in (*_TYPES, "F64"):
                    return
                for start in range(0, tensor.get_shape()[0], _ROWS):
                    yield tensor[start : start + _ROWS]
