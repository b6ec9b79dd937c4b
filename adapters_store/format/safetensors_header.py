"""Reads the header of a .safetensors file and checks it, before any tensor is read. Knows no adapter, no base.

Format: 8 bytes little-endian N, N bytes of JSON, then the tensors' bytes. safetensors 0.8 itself takes duplicate keys,
names like "../x" and 200,000 empty tensors. Here the offsets must cover the file exactly, without gap or overlap.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters_store.errors import AdapterRejected
from adapters_store.format.dtypes import TENSOR_TYPES
from adapters_store.format.limits import AdapterLimits
from adapters_store.parsing.adapter_files import HEAD_BYTES, refuse_foreign_weights
from adapters_store.parsing.strict_json import parse_strict_json, shown

_LENGTH_BYTES = 8
_MAX_DIM = 1 << 31
MAGNITUDE = "lora_magnitude_vector"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*(?:\.[A-Za-z0-9_\-]+)*")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file: safetensors dtype, [rows, cols], and the offset of its bytes in the file.

    DoRA's magnitudes, [n] in the file, are [1, n] here."""

    name: str
    dtype: str
    shape: tuple[int, int]
    file_offset: int

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * TENSOR_TYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header: tensors in file order, and the free texts of `__metadata__`."""

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


def read_header(path: Path, limits: AdapterLimits) -> SafetensorsHeader:
    """Read and check the header of the file at `path`; reads at most limits.max_header_bytes.

    Raises:
        AdapterRejected: missing_weights, too_large, truncated, a code of adapter_files, header_too_large, bad_header,
            a code of strict_json, too_many_tensors, bad_tensor_name, wrong_dtype, bad_shape, bad_offsets,
            overlapping_offsets, offsets_gap, trailing_bytes, no_tensors.
    """
    raw, file_bytes = _read_raw(path, limits)
    data_start = _LENGTH_BYTES + len(raw)
    max_objects = limits.max_tensors + 2  # the tensors, the metadata and the header itself
    body = parse_strict_json(
        raw,
        what="safetensors header",
        max_objects=max_objects,
        refused=partial(AdapterRejected, param="safetensors header"),
        too_many="too_many_tensors",
    )
    if not isinstance(body, dict):
        raise rejected("bad_header", "safetensors header: must be an object")
    metadata = _metadata(body.pop("__metadata__", {}))
    if not body:
        raise rejected("no_tensors", "weights: the file holds no tensor")
    spans = sorted((_entry(name, value, data_start, limits) for name, value in body.items()), key=lambda span: span[:2])
    _check_cover(spans, file_bytes - data_start)
    return SafetensorsHeader(tuple(entry for _, _, entry in spans), metadata)


def rejected(code: str, message: str) -> AdapterRejected:
    """The error for a weights file."""
    return AdapterRejected(code, message, param="weights")


def _read_raw(path: Path, limits: AdapterLimits) -> tuple[bytes, int]:
    """The header's JSON bytes and the file's size."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise rejected("missing_weights", "weights: there is no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise rejected("missing_weights", "weights: not a regular file")
    if status.st_size > limits.max_bytes:
        raise rejected("too_large", f"weights: {status.st_size} bytes, the limit is {limits.max_bytes}")
    with path.open("rb", buffering=0) as file:
        head = file.read(HEAD_BYTES)
        length = _header_length(head, status.st_size, limits)
        file.seek(_LENGTH_BYTES)
        raw = file.read(length)
    if len(raw) < length:
        raise rejected("truncated", f"weights: the header needs {length} bytes, the file ends after {len(raw)}")
    if not raw.startswith(b"{"):
        raise rejected("bad_header", "safetensors header: must begin with '{'")
    return raw, status.st_size


def _header_length(head: bytes, file_bytes: int, limits: AdapterLimits) -> int:
    if len(head) < _LENGTH_BYTES:
        raise rejected("truncated", f"weights: {file_bytes} bytes are too few for a safetensors file")
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if length > limits.max_header_bytes:
        refuse_foreign_weights(head)
        message = f"safetensors header: {length} bytes, the limit is {limits.max_header_bytes}"
        raise rejected("header_too_large", message)
    if length > file_bytes - _LENGTH_BYTES:
        raise rejected("truncated", f"weights: the header needs {length} bytes, the file has {file_bytes} in all")
    return length


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise rejected("bad_header", f"__metadata__: must be an object of texts, got {shown(value)}")
    for key, text in value.items():
        if not isinstance(text, str) or not _is_unicode(key + text):
            raise rejected("bad_header", f"__metadata__: {shown(key)} must be a text, got {shown(text)}")
    return value


def _is_unicode(text: str) -> bool:
    """False if an escape spells half a character ("\\ud800"), which no other reader of the file takes."""
    return text == text.encode("utf-8", "replace").decode("utf-8")


def _entry(name: str, value: object, data_start: int, limits: AdapterLimits) -> tuple[int, int, TensorEntry]:
    """One tensor of the header as (begin, end, entry); begin and end count from the data's start."""
    if len(name) > limits.max_tensor_name_chars or _NAME.fullmatch(name) is None:
        raise rejected("bad_tensor_name", f"weights: {shown(name)} is not a tensor name")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise rejected("bad_header", f"{name}: must have dtype, shape and data_offsets, got {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TENSOR_TYPES:
        raise rejected("wrong_dtype", f"{name}: dtype must be one of {', '.join(TENSOR_TYPES)}, got {shown(dtype)}")
    if MAGNITUDE in name and isinstance(shape, list) and len(shape) == 1:
        shape = [1, *shape]
    if not _are_sizes(shape, 1) or not _are_sizes(offsets, 0):
        wanted = f"shape must be two sizes from 1 to {_MAX_DIM} and data_offsets two positions"
        raise rejected("bad_shape", f"{name}: {wanted}, got {shown(shape)} and {shown(offsets)}")
    entry = TensorEntry(name, dtype, (shape[0], shape[1]), data_start + offsets[0])
    if offsets[1] - offsets[0] != entry.num_bytes:
        message = f"{name}: {dtype} of shape {shape} takes {entry.num_bytes} bytes, data_offsets are {offsets}"
        raise rejected("bad_offsets", message)
    return offsets[0], offsets[1], entry


def _are_sizes(value: object, low: int) -> bool:
    high = _MAX_DIM if low else 1 << 62
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(item) is int and low <= item <= high for item in value)  # a bool is an int to isinstance
    )


def _check_cover(spans: list[tuple[int, int, TensorEntry]], data_bytes: int) -> None:
    position = 0
    for begin, end, entry in spans:
        if begin < position:
            raise rejected("overlapping_offsets", f"{entry.name}: begins at {begin}, inside another tensor")
        if begin > position:
            raise rejected("offsets_gap", f"{entry.name}: begins at {begin}, {begin - position} bytes after the last")
        position = end
    if position > data_bytes:
        raise rejected("truncated", f"weights: tensors need {position} bytes, the file holds {data_bytes}")
    if position < data_bytes:
        raise rejected("trailing_bytes", f"weights: {data_bytes - position} bytes follow the last tensor")
