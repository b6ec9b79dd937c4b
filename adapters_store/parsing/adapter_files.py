"""The names of an adapter's two files; what another file is that a user sends in their place, and the way out. Reads a
few first bytes and keys; loads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from adapters_store.errors import AdapterRejected
from adapters_store.parsing.strict_json import shown

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
BIN_FILE = "adapter_model.bin"  # of a PEFT before 0.7

HEAD_BYTES = 64  # of a file: enough to recognise it

LFS_POINTER = b"version https://git-lfs"
MLX_LM_KEYS = frozenset({"fine_tune_type", "lora_parameters", "lora_layers"})
BIN_TO_SAFETENSORS = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "t = torch.load('adapter_model.bin', map_location='cpu', weights_only=True); "
    "save_file({k: v.clone().contiguous() for k, v in t.items()}, 'adapter_model.safetensors')\""
)
SHARDS_TO_ONE = (
    'python -c "import glob; from safetensors.torch import load_file, save_file; '
    "t = [load_file(f) for f in glob.glob('adapter_model-*-of-*.safetensors')]; "
    "save_file({k: v for s in t for k, v in s.items()}, 'adapter_model.safetensors')\""
)


def refuse_foreign_weights(head: bytes) -> None:
    """head: the first bytes of what should be a .safetensors file and is none.

    Raises AdapterRejected: git_lfs_pointer, pickle, unsupported_format. Returns if it is nothing known.
    """
    refuse_lfs_pointer(head, "weights", WEIGHTS_FILE)
    if _is_pickle(head):
        raise AdapterRejected("pickle", f"weights: {PICKLE_ADVICE}", param="weights")
    for start, what in _KNOWN_STARTS.items():
        if head.lstrip().lower().startswith(start):
            raise AdapterRejected("unsupported_format", f"weights: {what}", param="weights")


def refuse_shard(filename: str) -> None:
    """filename: what the client called its weights. Raises AdapterRejected: sharded_weights.

    One shard alone is a sound file: it would be served as an adapter without the layers of the others.
    """
    if _SHARD.search(filename):
        message = f"weights: {shown(filename)} is one of several shards. {SHARDS_ADVICE}"
        raise AdapterRejected("sharded_weights", message, param="weights")


def refuse_foreign_keys(body: Mapping[str, object]) -> None:
    """body: a config without peft_type. Raises AdapterRejected: unsupported_format if MLX-LM wrote it."""
    if found := sorted(MLX_LM_KEYS & body.keys()):
        message = (
            f"adapter_config.json: made by MLX-LM (it has {found[0]}), whose tensors have another layout than "
            "PEFT's; fuse it into its base (mlx_lm fuse) and serve that as a base, or train it with PEFT"
        )
        raise AdapterRejected("unsupported_format", message, param="config")


def refuse_lfs_pointer(head: bytes, param: str, name: str) -> None:
    """Raises AdapterRejected: git_lfs_pointer. name: the file that it stands for."""
    if head.startswith(LFS_POINTER):
        message = f"{param}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, then send {name}"
        raise AdapterRejected("git_lfs_pointer", message, param=param)


def _is_pickle(head: bytes) -> bool:
    """torch.save writes a zip; older ones a bare pickle."""
    return head.startswith(b"PK\x03\x04") or (len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5)


_SHARD = re.compile(r"-\d+-of-(?!0*1\D)\d+\.")
SHARDS_ADVICE = f"An adapter is one file; join its shards in their folder: {SHARDS_TO_ONE}"
PICKLE_ADVICE = f"a pickle (.bin) is never opened by the server; if you trust it, convert it: {BIN_TO_SAFETENSORS}"

_KNOWN_STARTS = {
    b"gguf": "a GGUF file; send the adapter as PEFT saved it, before it was converted for llama.cpp",
    b"<!doctype html": "a web page, as a failed download leaves it; download the file again",
    b"<html": "a web page, as a failed download leaves it; download the file again",
}
