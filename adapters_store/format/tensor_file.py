"""Reads one tensor at a time out of an open safetensors file. Knows bytes and shapes; checks nothing but their count.

Reads with pread into memory of our own: what was hashed is then what is packed, and a file that is cut short meanwhile
is an error here; with a memory map it would end the process (SIGBUS).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from adapters_store.format.dtypes import TENSOR_TYPES, Bits
from adapters_store.format.safetensors_header import TensorEntry

_BUFFER_BYTES = 1 << 20
_PART_BYTES = 1 << 25  # more than any A or B of a usual base


class WeightsFile(AbstractContextManager["WeightsFile"]):
    """An open .safetensors file; a context manager."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, entry: TensorEntry) -> Bits:
        """The tensor's bit patterns, [rows, cols]. Raises OSError if the file is shorter than its header says."""
        return self._rows(entry, 0, entry.shape[0])

    def parts(self, entry: TensorEntry) -> Iterator[Bits]:
        """The same, some rows at a time: a whole head can have gigabytes."""
        rows = max(1, _PART_BYTES * entry.shape[0] // entry.num_bytes)
        for first in range(0, entry.shape[0], rows):
            yield self._rows(entry, first, min(rows, entry.shape[0] - first))

    def _rows(self, entry: TensorEntry, first: int, count: int) -> Bits:
        bits = np.empty((count, entry.shape[1]), dtype=TENSOR_TYPES[entry.dtype].bits)
        view = bits.data.cast("B")
        start, done = entry.file_offset + first * (entry.num_bytes // entry.shape[0]), 0
        while done < len(view):
            size = os.preadv(self._fd, [view[done:]], start + done)
            if size == 0:
                raise OSError(f"{entry.name}: file ends {len(view) - done} bytes before the tensor does")
            done += size
        return bits

    def sha256(self, entry: TensorEntry) -> str:
        """Of the tensor's bytes, hex; its memory is one buffer's. Raises OSError as `read` does."""
        total = hashlib.sha256()
        buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(entry.num_bytes, 1))))
        done = 0
        while done < entry.num_bytes:
            part = buffer[: entry.num_bytes - done]
            count = os.preadv(self._fd, [part], entry.file_offset + done)
            if count == 0:
                raise OSError(f"{entry.name}: file ends {entry.num_bytes - done} bytes before the tensor does")
            total.update(part[:count])
            done += count
        return total.hexdigest()

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
