"""Reads a base's tensors by name, and writes them as one weight file, or as several with an index, as transformers
reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapters_store.base.folder import CONFIG, INDEX, WEIGHTS, reading, weight_files

SHARD_BYTES = 2 << 30  # what memory holds at most
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")


@contextmanager
def opened_weights(folder: Path) -> Iterator[dict[str, Any]]:
    """The name of every tensor -> the open file that holds it. Raises UnsupportedBase for what cannot be read."""
    with ExitStack() as stack, reading(folder, "the weights"):
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in weight_files(folder)]
        yield {name: file for file in files for name in file.keys()}  # noqa: SIM118  (no mapping)


def copy_companions(folder: Path, target: Path) -> None:
    """Tokenizer, chat template and whatever else lies beside config and weights."""
    for file in folder.iterdir():
        if file.is_file() and file.suffix not in _NOT_COPIED and file.name not in (CONFIG, INDEX):
            shutil.copyfile(file, target / file.name)


def write_shards(folder: Path, sizes: Mapping[str, int], load: Callable[[str], torch.Tensor]) -> None:
    """sizes: name -> bytes of the tensor that `load` returns for it."""
    shards = list(_shards(sizes))
    files = [WEIGHTS] if len(shards) == 1 else [_shard_name(index, len(shards)) for index in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file({name: load(name).contiguous() for name in shard}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        owner = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(sizes.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": owner}))


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _shards(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for name, num_bytes in sizes.items():
        if shard and filled + num_bytes > SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += num_bytes
    yield shard
