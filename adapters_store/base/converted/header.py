"""The header of a GGUF file: its metadata, and where its tensors lie. The file is not trusted: everything has a limit.

The format is ggml's (docs/gguf.md of llama.cpp), versions 2 and 3, little-endian. Reads no tensor and imports no torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters_store.base.families import UnsupportedBase
from adapters_store.parsing.strict_json import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 64 << 20  # the largest vocabularies take 12 MiB
MAX_TEXT_BYTES = 1 << 20  # of one text: chat templates are the longest
MAX_KEYS = 4096
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 40  # of one tensor

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9
_ARRAYS = {number: code[1] for number, code in _SCALARS.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """How a tensor is stored: `block` values in `num_bytes` bytes. number: ggml's own."""

    number: int
    name: str
    block: int
    num_bytes: int


STORED = {
    stored.number: stored
    for stored in (
        Stored(0, "F32", 1, 4),
        Stored(1, "F16", 1, 2),
        Stored(2, "Q4_0", 32, 18),
        Stored(3, "Q4_1", 32, 20),
        Stored(6, "Q5_0", 32, 22),
        Stored(7, "Q5_1", 32, 24),
        Stored(8, "Q8_0", 32, 34),
        Stored(10, "Q2_K", 256, 84),
        Stored(11, "Q3_K", 256, 110),
        Stored(12, "Q4_K", 256, 144),
        Stored(13, "Q5_K", 256, 176),
        Stored(14, "Q6_K", 256, 210),
        Stored(20, "IQ4_NL", 32, 18),
        Stored(23, "IQ4_XS", 256, 136),
        Stored(30, "BF16", 1, 2),
    )
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """shape: as torch has it, the fastest dimension last. start: its first byte, counted from the file's."""

    name: str
    shape: tuple[int, ...]
    stored: Stored
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.stored.block * self.stored.num_bytes

    @property
    def plain_bytes(self) -> int:
        """In bfloat16."""
        return 2 * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """metadata: key -> number, bool, text, or a list of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    def refuse(self, reason: str) -> UnsupportedBase:
        """The error to raise."""
        return UnsupportedBase(f"--base {self.path}: {reason}")


def read_header(path: Path) -> Header:
    """Raises UnsupportedBase for a file that is no GGUF, is cut short, or breaks the format or a limit; OSError."""
    with path.open("rb") as stream:
        return _Reader(path, stream, path.stat().st_size).header()


class _Reader:
    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path = path
        self._stream = stream
        self._size = size
        self._at = 0

    def header(self) -> Header:
        if self._bytes(len(MAGIC)) != MAGIC:
            raise self._fault("no GGUF file: it does not begin with the letters GGUF")
        version = self._number("<I")
        if version not in VERSIONS:
            swapped = version and version & 0xFFFF == 0
            found = "a big-endian file" if swapped else f"GGUF version {version}"
            raise self._fault(f"{found}; versions 2 and 3 are read, little-endian")
        num_tensors = self._count(MAX_TENSORS, "tensors")
        num_keys = self._count(MAX_KEYS, "keys")
        metadata = self._metadata(num_keys)
        entries = [self._entry() for _ in range(num_tensors)]
        tensors = tuple(self._placed(entries, metadata.get("general.alignment", 32)))
        return Header(self._path, metadata, tensors)

    def _metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._text()
            if key in found:
                raise self._fault(f"the key {shown(key)} is there twice")
            found[key] = self._value(self._number("<I"), key)
        return found

    def _value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            raise self._fault(f"the key {shown(key)} has a value of type {kind}, which GGUF does not know")
        element, count = self._number("<I"), self._number("<Q")
        if element == _TEXT:
            self._refuse_beyond(count * 8)
            return [self._text() for _ in range(count)]
        if element not in _ARRAYS:
            raise self._fault(f"the key {shown(key)} is a list of type {element}; numbers and texts are read")
        width = struct.calcsize(_SCALARS[element])
        self._refuse_beyond(count * width)
        return list(struct.unpack(f"<{count}{_ARRAYS[element]}", self._bytes(count * width)))

    def _entry(self) -> tuple[str, tuple[int, ...], Stored, int]:
        name = self._text()
        num_dimensions = self._number("<I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._fault(
                f"the tensor {shown(name)} has {num_dimensions} dimensions; 1 to {MAX_DIMENSIONS} are read"
            )
        shape = tuple(self._number("<Q") for _ in range(num_dimensions))[::-1]
        if not 1 <= math.prod(shape) <= MAX_ELEMENTS:
            raise self._fault(f"the tensor {shown(name)} has the shape {shown(list(shape))}")
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in STORED:
            known = ", ".join(stored.name for stored in STORED.values())
            raise self._fault(f"the tensor {shown(name)} is stored as ggml type {kind}; read are {known}")
        stored = STORED[kind]
        if shape[-1] % stored.block:
            raise self._fault(f"the tensor {shown(name)} has rows of {shape[-1]}, no multiple of {stored.name}'s block")
        return name, shape, stored, offset

    def _placed(
        self, entries: list[tuple[str, tuple[int, ...], Stored, int]], alignment: object
    ) -> Iterator[TensorInfo]:
        """Every byte of the file belongs to one tensor at most: what comes out has a size that the file pays for."""
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._fault(f"general.alignment must be a power of two up to 65536, got {shown(alignment)}")
        end = start_of_data = -(-self._at // alignment) * alignment
        names: set[str] = set()
        for name, shape, stored, offset in sorted(entries, key=lambda entry: entry[3]):
            tensor = TensorInfo(name, shape, stored, start_of_data + offset)
            if name in names:
                raise self._fault(f"the tensor {shown(name)} is there twice")
            if tensor.start < end or offset % alignment:
                raise self._fault(f"the tensor {shown(name)} lies on another one's bytes, or is not aligned")
            names.add(name)
            end = tensor.start + tensor.num_bytes
            if end > self._size:
                missing = f"the tensor {shown(name)} ends at byte {end}, the file has {self._size}"
                raise self._fault(f"cut short: {missing}; download it again")
            yield tensor

    def _count(self, limit: int, what: str) -> int:
        count: int = self._number("<Q")
        if count > limit:
            raise self._fault(f"{count} {what}, at most {limit} are read")
        return count

    def _text(self) -> str:
        length = self._number("<Q")
        if length > MAX_TEXT_BYTES:
            raise self._fault(f"a text of {length} bytes at byte {self._at}; at most {MAX_TEXT_BYTES} are read")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise self._fault(f"the text before byte {self._at} is not UTF-8") from None

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, count: int) -> bytes:
        self._refuse_beyond(count)
        data = self._stream.read(count)
        if len(data) != count:
            raise self._fault(f"cut short at byte {self._at + len(data)}, in its header; download it again")
        self._at += count
        return data

    def _refuse_beyond(self, count: int) -> None:
        """Before memory is taken for it."""
        if self._at + count > min(self._size, MAX_HEADER_BYTES):
            if self._at + count > self._size:
                raise self._fault(f"cut short: its header goes beyond the file's {self._size} bytes; download it again")
            raise self._fault(f"a header of more than {MAX_HEADER_BYTES >> 20} MiB")

    def _fault(self, reason: str) -> UnsupportedBase:
        return UnsupportedBase(f"--base {self._path}: {reason}")
