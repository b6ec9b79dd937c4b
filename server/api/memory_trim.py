"""Keeps what the C library holds of freed memory small. Knows the C library; knows nothing of who used the memory.

glibc gives every thread an arena, eight a core at most, and each stays as large as it ever was: under a mixed load a
server grew by a megabyte a minute while what it used stayed the same. So threads share a few arenas, and what is free
within them goes back to the system now and then (not what is free at their ends: glibc does that for the first alone).
A trim takes 1 to 2 ms.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable

TRIM_EVERY_S = 10.0
MAX_ARENAS = 4
_M_ARENA_MAX = -8  # malloc.h


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's own; None where the C library is another, which needs none of this."""
    if not sys.platform.startswith("linux"):
        return None
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return found


def c_library_trim() -> Callable[[], object] | None:
    """malloc_trim(0)."""
    trim = _of_glibc("malloc_trim")
    return None if trim is None else lambda: trim(ctypes.c_size_t(0))


def share_arenas() -> None:
    """All threads to come share MAX_ARENAS, unless MALLOC_ARENA_MAX says otherwise."""
    set_option = _of_glibc("mallopt") if c_library_trim() is not None else None  # others have a mallopt of their own
    if set_option is not None and "MALLOC_ARENA_MAX" not in os.environ:
        set_option(_M_ARENA_MAX, MAX_ARENAS)


class MemoryTrim:
    """A thread that trims every `every_s`; none where there is nothing to call."""

    def __init__(self, *, every_s: float = TRIM_EVERY_S) -> None:
        self._every_s = every_s
        self._trim = c_library_trim()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-trim", daemon=True)

    def start(self) -> None:
        if self._trim is not None:
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        assert self._trim is not None
        while not self._stop.wait(self._every_s):
            self._trim()
