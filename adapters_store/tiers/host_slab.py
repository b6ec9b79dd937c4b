"""Host memory for adapters as one range, page-locked once for a GPU's copies and cut by `ArenaAllocator`.

Locking memory for each adapter stalls every launch of the process for as long as the driver locks its pages (128 MB: 30
to 60 ms), and torch's own cache of locked memory rounds up to powers of two and never gives a size back: an adapter of
84 MB took 128, and a change of ranks kept both. A buffer comes back when its last reference is dropped, on any thread.
"""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from adapters_store.tiers.arena_allocator import ArenaAllocator

CACHE_LINE = 64
_PAGE = 4096
_TOUCHED_AT_ONCE = 256 * 1024 * 1024
_MAX_THREADS = 8

_log = logging.getLogger(__name__)
Bytes = NDArray[np.uint8]


class HostMemoryFull(Exception):
    """No room for a buffer of num_bytes now; capacity: of the slab when it is empty."""

    def __init__(self, num_bytes: int, capacity: int) -> None:
        super().__init__(f"{num_bytes} bytes do not fit into what is free of {capacity}")
        self.num_bytes = num_bytes
        self.capacity = capacity


class HostSlab:
    """num_bytes, locked if `lock`. Thread-safe. make_room: called if nothing fits; drops one buffer that it holds, or
    returns False."""

    def __init__(self, num_bytes: int, *, lock: bool) -> None:
        self.make_room: Callable[[], bool] = lambda: False
        self._allocator = ArenaAllocator(num_bytes, CACHE_LINE)
        self._memory = np.frombuffer(_pages(num_bytes), dtype=np.uint8)
        self._returned: deque[int] = deque()  # by the thread that dropped the last reference, without a lock
        self._lock = threading.Lock()
        self.is_locked = lock and _page_locked(self._memory)

    @property
    def capacity(self) -> int:
        return self._allocator.capacity

    @property
    def num_free_bytes(self) -> int:
        with self._lock:
            self._take_back()
            return self._allocator.num_free

    def take(self, num_bytes: int) -> Bytes:
        """A range that starts on a cache line; its content is left from its last user. Raises HostMemoryFull."""
        if num_bytes > self.capacity:
            raise HostMemoryFull(num_bytes, self.capacity)
        while (offset := self._allocate(num_bytes)) is None:
            if not self.make_room():
                raise HostMemoryFull(num_bytes, self.capacity)
        part = self._memory[offset : offset + num_bytes]
        weakref.finalize(part, self._returned.append, offset).atexit = False
        return part

    def close(self) -> None:
        """Unlock. No copy may read it any more."""
        if self.is_locked:
            self.is_locked = False
            torch.cuda.cudart().cudaHostUnregister(self._memory.ctypes.data)

    def _allocate(self, num_bytes: int) -> int | None:
        with self._lock:
            self._take_back()
            return self._allocator.allocate(num_bytes)

    def _take_back(self) -> None:
        while self._returned:
            self._allocator.free(self._returned.popleft())


def _pages(num_bytes: int) -> mmap.mmap:
    """New memory in large pages where the system has them: a quarter of the time to fault it in."""
    pages = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _page_locked(memory: Bytes) -> bool:
    """Lock it for CUDA. If the system refuses, copies work and make the host wait; a warning says so."""
    _fault_in(memory)
    error = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, len(memory), 0))
    if error == 0:
        return True
    try:
        torch.zeros(1, device="cuda")  # CUDA reports its last error once more, at the next launch
    except RuntimeError as reported:
        _log.debug("cleared: %s", reported)
    _log.warning(
        "the system does not lock %d MiB of host memory for the GPU (CUDA error %d): each adapter's copy makes the "
        "engine wait; lower --host-cache-mib or raise ulimit -l",
        len(memory) >> 20,
        error,
    )
    return False


def _fault_in(memory: Bytes) -> None:
    """On several threads: the driver does it on one, while every launch waits."""
    starts = range(0, len(memory), _TOUCHED_AT_ONCE)
    with ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="fault-in") as threads:
        list(threads.map(lambda start: memory[start : start + _TOUCHED_AT_ONCE : _PAGE].fill(0), starts))
