"""Background work beside an engine that uses every core: when it may compute, and reading and copying in small pieces.

A decode step on a CPU is about a hundred parallel regions, and each region waits for its slowest thread. A loader that
takes one core for 3 ms costs all of them 3 ms, whatever its priority. (Measured: niceness 19 and the idle class stretch
other requests' 95th percentile by 1.3, and starve the load: 170 ms instead of 4.) So the loader works between two
steps, when the cores are idle anyway, in CPU time slices that the engine grants.

A file is read and memory is copied in pieces. Each piece is one C call without the GIL (native/background.h) inside a
slice. That needs the C kernels; without them `is_available` is False. What is written is written in such pieces too.
Knows bytes and time; knows no adapters.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from ctypes import c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lora_kernels.native.build import native_build

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
SHARE = 0.05  # of a step's time, while background work is waiting
_MIN_SLICE_S = 0.0005  # a few pieces of work
_MAX_SLICE_S = 0.05
_PIECE_BYTES = 256 * 1024  # 0.05 to 0.15 ms; a multiple of 32


class Pace(Protocol):
    """When background work may compute: `wait()` before each piece of it, inside `work()`."""

    def work(self) -> AbstractContextManager[None]: ...
    def wait(self) -> None: ...


Later = Callable[[Callable[[Pace], None]], object]
"""Is given work that no request waits for, and that takes the pace it is done at."""


class TimeSlices:
    """CPU time that the engine grants to background threads. Thread-safe; one engine.

    A background thread wraps its work in `work()` and calls `wait()` before each piece (well below a millisecond). The
    engine calls `grant()` between two steps and `lift()` when it is idle.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_engine_idle = True
        self._num_at_work = 0
        self._until_s = 0.0
        self._last_s = time.perf_counter()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Holds while there are pieces left to do: only then does the engine grant slices."""
        with self._changed:
            self._num_at_work += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_at_work -= 1
                self._changed.notify_all()

    def wait(self, is_awaited: Callable[[], bool] = lambda: False) -> None:
        """Wait until the next piece may be done. Called between pieces, inside `work()`. is_awaited: asked after each
        step of the engine; if it is true, the piece may be done."""
        if self._may_work() or is_awaited():
            return
        with self._changed:
            self._changed.wait_for(lambda: self._may_work() or is_awaited())

    def grant(self) -> None:
        """The engine has ended a step: background work gets a share of the time since the last call, if there is
        any."""
        now_s = time.perf_counter()
        self._is_engine_idle = False
        if self._num_at_work:
            budget_s = min(max(SHARE * (now_s - self._last_s), _MIN_SLICE_S), _MAX_SLICE_S)
            self._until_s = now_s + budget_s
            with self._changed:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._num_at_work == 0, timeout=budget_s)
        self._last_s = time.perf_counter()

    def lift(self) -> None:
        """The engine is idle: background work runs without a limit until the next `grant()`."""
        if not self._is_engine_idle:
            with self._changed:
                self._is_engine_idle = True
                self._changed.notify_all()

    def _may_work(self) -> bool:
        return self._is_engine_idle or time.perf_counter() < self._until_s


@dataclass(frozen=True, slots=True)
class UntilAwaited:
    """Slices until something waits for the work; then it continues without them."""

    slices: TimeSlices
    is_awaited: Callable[[], bool]

    def work(self) -> AbstractContextManager[None]:
        return self.slices.work()

    def wait(self) -> None:
        self.slices.wait(self.is_awaited)


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


def read_file(path: Path, into: Bytes, slices: TimeSlices) -> int:
    """Fill `into` with the whole file; returns the XXH64 of its bytes.

    Raises OSError if it cannot be read or is not exactly as long as `into`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size != into.nbytes:
            raise OSError(f"{path}: {size} bytes, expected {into.nbytes}")
        return _run(_Job(fd=fd, target=into.ctypes.data, size=size), slices, str(path))
    finally:
        os.close(fd)


def copy_bytes(into: Bytes, source: Bytes, slices: TimeSlices) -> None:
    """Copy `source` to `into`; both have one length. If they overlap, `into` must begin first."""
    assert into.nbytes == source.nbytes, f"{source.nbytes} bytes into {into.nbytes}"
    _run(_Job(fd=-1, source=source.ctypes.data, target=into.ctypes.data, size=into.nbytes), slices, "copy")


def checksum(data: Bytes, pace: Pace) -> int:
    """XXH64 (seed 0) of the bytes: it finds damage; it is no signature."""
    return _run(_Job(fd=-1, source=data.ctypes.data, target=data.ctypes.data, size=data.nbytes), pace, "checksum")


def pieces(data: Bytes, pace: Pace) -> Iterator[memoryview]:
    """The bytes one piece after the other, each when it may be written."""
    with pace.work():
        for start in range(0, data.nbytes, _PIECE_BYTES):
            pace.wait()
            yield data[start : start + _PIECE_BYTES].data


def _run(job: _Job, pace: Pace, what: str) -> int:
    library = native_build().library
    assert library is not None, "the C kernels are not available; check is_available() first"
    with pace.work():
        while True:
            pace.wait()
            library.ml_background(ctypes.byref(job), c_int64(_PIECE_BYTES))
            if job.error:
                raise OSError(job.error, os.strerror(job.error), what)
            if job.done == job.size:
                return int(job.sum)
