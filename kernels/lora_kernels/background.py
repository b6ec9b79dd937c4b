"""Reads files and copies memory with cycles nobody else wants. Knows bytes; knows neither adapters nor tensors.

The work is done by a thread in Linux's idle scheduling class that never holds the GIL (native/background.h): a decode
step on all cores goes on as if it were alone, and when the machine is full the work is late, not in the way. The
calling thread waits, without the GIL. Needs the C kernels; without them `is_available` is False.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_int64, c_uint64, c_void_p
from pathlib import Path

import numpy as np

from lora_kernels.native.build import native_build

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class _Job(ctypes.Structure):
    _fields_ = (
        ("path", c_char_p),
        ("source", c_void_p),
        ("target", c_void_p),
        ("size", c_int64),
        ("sum", c_uint64),
        ("error", c_int64),
    )


def is_available() -> bool:
    return native_build().library is not None


def read_file(path: Path, into: Bytes) -> int:
    """Fill `into` with the whole file; returns the XXH64 of its bytes.

    Raises OSError where it cannot be read, or is not exactly as long as `into`.
    """
    return _run(_Job(os.fsencode(path), None, into.ctypes.data, into.nbytes), str(path))


def copy_bytes(into: Bytes, source: Bytes) -> None:
    """Copy `source` to `into`; both of one length."""
    assert into.nbytes == source.nbytes, f"{source.nbytes} bytes into {into.nbytes}"
    _run(_Job(None, source.ctypes.data, into.ctypes.data, into.nbytes), "copy")


def checksum(data: Bytes) -> int:
    """XXH64 (seed 0) of the bytes: finds damage, proves no origin."""
    return _run(_Job(None, data.ctypes.data, data.ctypes.data, data.nbytes), "checksum")


def _run(job: _Job, what: str) -> int:
    library = native_build().library
    assert library is not None, "the C kernels are not available; ask is_available() first"
    library.ml_background(ctypes.byref(job))
    if job.error:
        raise OSError(job.error, os.strerror(job.error), what)
    return int(job.sum)
