"""What the base's embedding and head hold, as hashes: PEFT writes both whole beside an adapter of the head.

An upload that brings them unchanged is recognised by them. Few uploads do, so a hash is made for the first that does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapters_store.base.converted.shards import opened_weights
from adapters_store.base.description import BaseDescription
from adapters_store.base.digests import base_digest, remembered
from adapters_store.base.families import HEAD, UnsupportedBase, family_of

_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ROWS = 4096  # hashed at a time: 32 MiB of a hidden size of 4,096 in bfloat16


def token_weight_sha256(base: BaseDescription, module: str, dtype: str) -> str | None:
    """sha256 of all rows of the base's embedding or head in `dtype`, as safetensors calls it; remembered.

    A head that is tied to the embedding is the embedding. None: the base's files are not where they were, its tensor is
    not stored plain, or `dtype` loses what the base's type in use keeps (PEFT would answer with the rounded weight).
    """
    if not weights_are_there(base):
        return None
    (found,) = remembered(
        {f"token-weight:{base.dtype}:{base.digest}:{module}:{dtype}": partial(_sha256, base, module, dtype)}
    )
    return found or None


def weights_are_there(base: BaseDescription) -> bool:
    """Whether the base's files are where they were when it was described, and the same."""
    try:
        return base.folder is not None and base_digest(Path(base.folder)) == base.digest
    except (UnsupportedBase, OSError):
        return False


def _sha256(base: BaseDescription, module: str, dtype: str) -> str:
    """Empty: see `token_weight_sha256`."""
    served, stored_as = getattr(torch, base.dtype), _TYPES[dtype]
    names = [f"{module}.weight", *([f"{family_of(base.architecture).embedding}.weight"] if module == HEAD else [])]
    total, has_rows = hashlib.sha256(), False
    with opened_weights(Path(str(base.folder))) as owner:
        name = next((each for each in names if each in owner), None)
        for rows in () if name is None else _parts(owner[name].get_slice(name)):
            has_rows = True
            cast = rows.to(stored_as).contiguous()
            if not torch.equal(cast.to(served), rows.to(served)):
                return ""
            total.update(cast.view(torch.uint8).numpy().data)
    return total.hexdigest() if has_rows else ""


def _parts(tensor: Any) -> Iterator[torch.Tensor]:
    """Some rows at a time; none of a tensor that is not stored plain."""
    if tensor.get_dtype() in (*_TYPES, "F64"):
        for start in range(0, tensor.get_shape()[0], _ROWS):
            yield tensor[start : start + _ROWS]
