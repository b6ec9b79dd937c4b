"""The packed form of an adapter, kept beside its blob, so that a load is one read. Knows files; knows no registry.

    packed-<layout key>.bin    the buffer, byte for byte
    packed-<layout key>.json   sha256 of the second line; then digest, length, XXH64 of the buffer, and the modules

Derived from the blob and made again from it whenever it is missing or damaged: nothing here is synced or promised, and
no failure to write it is an error. The buffer is summed with a fast checksum where the blob is hashed with sha256: it
finds damage; a user who may write here may write the database as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from adapters_store.base.description import AdapterDigest, BaseDescription
from adapters_store.filesystem import Filesystem
from adapters_store.format.dtypes import type_of_base
from adapters_store.packed.host_buffers import HostBuffers
from adapters_store.packed.layout import PackedAdapter, PackedModule
from lora_kernels import background
from lora_kernels.background import Pace, TimeSlices

_log = logging.getLogger(__name__)

UNUSED_S = 7 * 86_400
_PREFIX = "packed-"


class _Damaged(Exception):
    """The file differs from what was written."""


def read_packed(
    folder: Path, digest: AdapterDigest, base: BaseDescription, *, buffers: HostBuffers, slices: TimeSlices
) -> PackedAdapter | None:
    """The adapter as kept for this base's layout; None if it was not kept, or is damaged (logged)."""
    if not background.is_available():
        return None
    stem = _stem(folder, base)
    try:
        index = _read_index(stem.with_suffix(".json"), digest)
        buffer = buffers.take(index["num_elements"], type_of_base(base.dtype).torch_dtype)
        if background.read_file(stem.with_suffix(".bin"), as_bytes(buffer), slices) != index["xxh64"]:
            raise _Damaged("checksum differs")
        _note_use(stem)
    except FileNotFoundError:
        return None
    except (OSError, _Damaged) as error:
        _log.warning("adapter %s: packed form not used, reading the upload instead: %s", digest, error)
        return None
    modules = tuple(PackedModule(*module) for module in index["modules"])
    return PackedAdapter(digest, buffer, modules, index.get("int8", False))


def keep_packed(folder: Path, adapter: PackedAdapter, base: BaseDescription, pace: Pace) -> None:
    """Write it for the next load. If that fails (disk full, blob deleted meanwhile), the next load is slower."""
    if not background.is_available():
        return
    data = as_bytes(adapter.buffer)
    index = {
        "digest": adapter.digest,
        "num_elements": adapter.buffer.numel(),
        "xxh64": background.checksum(data, pace),
        "modules": [_stored(module) for module in adapter.modules],
        "int8": adapter.is_int8,
    }
    body = json.dumps(index, separators=(",", ":")).encode()
    files, stem = Filesystem(), _stem(folder, base)
    try:
        files.write_atomic(stem.with_suffix(".bin"), background.pieces(data, pace), durable=False)
        files.write_atomic(
            stem.with_suffix(".json"), hashlib.sha256(body).hexdigest().encode() + b"\n" + body, durable=False
        )
    except OSError as error:
        _log.info("adapter %s: packed form not kept: %s", adapter.digest, error)


def sweep_packed(folder: Path, layouts: Collection[str], grace_s: float) -> int:
    """Remove what killed processes left half written, and forms of other layouts that no load has used for UNUSED_S.
    Returns the number of files.

    layouts: those that are kept. grace_s: a writer writes more often, so an older file has none.
    """
    try:
        old = [path for path in folder.iterdir() if _is_left_over(path, layouts, grace_s)]
    except (FileNotFoundError, NotADirectoryError):
        return 0  # the adapter was deleted meanwhile
    for path in old:
        path.unlink(missing_ok=True)
    return len(old)


def _is_left_over(path: Path, layouts: Collection[str], grace_s: float) -> bool:
    name = path.name.lstrip(".")
    if not name.startswith(_PREFIX):
        return False
    if name == path.name:  # whole: a half written file is hidden
        if name.removeprefix(_PREFIX).partition(".")[0] in layouts:
            return False
        grace_s = UNUSED_S
    try:
        return time.time() - path.stat().st_mtime > grace_s
    except FileNotFoundError:
        return False  # its owner was faster


def _note_use(stem: Path) -> None:
    with suppress(OSError):  # a folder that cannot be written is not swept either
        for suffix in (".bin", ".json"):
            os.utime(stem.with_suffix(suffix))


def as_bytes(buffer: torch.Tensor) -> background.Bytes:
    """The tensor's own memory (contiguous, on the host)."""
    view: background.Bytes = buffer.view(torch.uint8).numpy()
    return view


def _stored(module: PackedModule) -> tuple[Any, ...]:
    """Without factors as it was before there were any: an older server may read it."""
    return astuple(module) if module.factor_offset else astuple(module)[:-1]


def _stem(folder: Path, base: BaseDescription) -> Path:
    return folder / f"{_PREFIX}{base.layout_key}"


def _read_index(path: Path, digest: AdapterDigest) -> dict[str, Any]:
    checksum, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        raise _Damaged(f"{path.name}: checksum differs")
    index: dict[str, Any] = json.loads(body)
    if index["digest"] != digest:
        raise _Damaged(f"{path.name}: belongs to {index['digest']}")
    return index
