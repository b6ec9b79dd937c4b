"""Reads files and copies memory beside a decode step that uses all cores. Knows bytes, not adapters.

Bit by bit, each bit one C call without the GIL (native/background.h) in a turn that the engine gives. Needs the C
kernels; without them `is_available` is False.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_int64, c_uint64, c_void_p
from pathlib import Path

import numpy as np

from lora_kernels.native.build import native_build
from lora_kernels.turns import Turns

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

_PIECE_BYTES = 256 * 1024  # 0.05 to 0.15 ms; a multiple of 32


class _Job(ctypes.Structure):
    _fields_ = (
        ("fd", c_int64),
        ("source", c_void_p),
        ("target", c_void_p),
        ("size", c_int64),
        ("done", c_int64),
        ("lanes", c_uint64 * 4),
        ("sum", c_uint64),
        ("error", c_int64),
    )


def is_available() -> bool:
    return native_build().library is not None


def read_file(path: Path, into: Bytes, turns: Turns) -> int:
    """Fill `into` with the whole file; returns the XXH64 of its bytes.

    Raises OSError where it cannot be read, or is not exactly as long as `into`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size != into.nbytes:
            raise OSError(f"{path}: {size} bytes, expected {into.nbytes}")
        return _run(_Job(fd=fd, target=into.ctypes.data, size=size), turns, str(path))
    finally:
        os.close(fd)


def copy_bytes(into: Bytes, source: Bytes, turns: Turns) -> None:
    """Copy `source` to `into`; both of one length. Where they overlap, `into` must begin first."""
    assert into.nbytes == source.nbytes, f"{source.nbytes} bytes into {into.nbytes}"
    _run(_Job(fd=-1, source=source.ctypes.data, target=into.ctypes.data, size=into.nbytes), turns, "copy")


def checksum(data: Bytes, turns: Turns) -> int:
    """XXH64 (seed 0) of the bytes: finds damage, proves no origin."""
    return _run(_Job(fd=-1, source=data.ctypes.data, target=data.ctypes.data, size=data.nbytes), turns, "checksum")


def _run(job: _Job, turns: Turns, what: str) -> int:
    library = native_build().library
    assert library is not None, "the C kernels are not available; ask is_available() first"
    with turns.work():
        while True:
            turns.turn()
            library.ml_background(ctypes.byref(job), c_int64(_PIECE_BYTES))
            if job.error:
                raise OSError(job.error, os.strerror(job.error), what)
            if job.done == job.size:
                return int(job.sum)
