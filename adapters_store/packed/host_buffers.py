"""Allocates host memory for adapters, and reuses the memory of dropped ones. Knows bytes; knows no adapters.

New memory costs more than filling it: its pages are faulted in one by one (7 MB: 2.5 of 3.6 ms, and reading
and summing the file the rest), and the C library keeps little of the memory that large adapters free. With 100 adapters
of 7 MB that come and go a load takes 1.6 ms instead of 3.7, with adapters of 84 MB 1.3 for every 7 MB instead of 3.9. A
buffer comes back when its last reference is dropped, on any thread, so it is never written while a copy still reads it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

LEAST_BYTES = 256 * 1024  # below it new memory costs less than keeping books
_STEPS = 16  # size classes per power of two: a buffer is at most a sixteenth larger than was asked for


class HostBuffers:
    """Buffers for adapters. Thread-safe.

    max_bytes: limit of memory in use plus memory kept for the next adapter, unless more was in use at once.
    cut: gives every buffer instead, from memory of its own (num_bytes -> bytes; `adapters_store.tiers.host_slab`).
    """

    def __init__(self, max_bytes: int = 0, *, cut: Callable[[int], NDArray[np.uint8]] | None = None) -> None:
        self._max_bytes = max_bytes
        self._cut = cut
        self._lock = threading.Lock()
        self._spare: list[torch.Tensor] = []  # the longest unused first
        self._num_leased_bytes = 0
        self._returned: deque[torch.Tensor] = deque()  # by the thread that dropped the last reference, without a lock

    @property
    def num_spare_bytes(self) -> int:
        """Memory kept for the next adapter."""
        with self._lock:
            self._take_back()
            return self._num_spare_bytes

    def take(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D tensor on the host, starting on a cache line; its content is left from its last user."""
        num_bytes = num_elements * dtype.itemsize
        if self._cut is not None:
            return torch.from_numpy(self._cut(num_bytes)).view(dtype)
        if num_bytes < LEAST_BYTES:
            return torch.empty(num_elements, dtype=dtype)
        memory = self._lease(_size_class(num_bytes))
        part = memory.numpy()[:num_bytes]
        weakref.finalize(part, self._returned.append, memory).atexit = False
        return torch.from_numpy(part).view(dtype)

    def _lease(self, num_bytes: int) -> torch.Tensor:
        with self._lock:
            self._take_back()
            self._num_leased_bytes += num_bytes
            for index in reversed(range(len(self._spare))):  # the last one used is in the caches
                if self._spare[index].nbytes == num_bytes:
                    return self._spare.pop(index)
            self._keep_within(self._max_bytes - self._num_leased_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    def _take_back(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            self._num_leased_bytes -= memory.nbytes
            self._spare.append(memory)
        self._keep_within(self._max_bytes)

    def _keep_within(self, num_bytes: int) -> None:
        while self._spare and self._num_spare_bytes > num_bytes:
            del self._spare[0]

    @property
    def _num_spare_bytes(self) -> int:
        return sum(memory.nbytes for memory in self._spare)


def _size_class(num_bytes: int) -> int:
    step = (1 << (num_bytes.bit_length() - 1)) // _STEPS
    return -(-num_bytes // step) * step
