"""Long work of a call (a large body, a long prompt, a large answer) on threads: a few at once, and of no tenant all.

The event loop does only what takes less time than handing it to a thread. What runs here must come in pieces: one call
into C that holds the interpreter's lock stops the loop as well, whatever thread makes it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")

_FEWEST_SLOTS, _MOST_SLOTS = 2, 8


class HeavyWork:
    """slots: pieces of work at once. One tenant has at most half of them, so its many never keep another's one waiting.
    Used on the event loop only."""

    def __init__(self, slots: int | None = None) -> None:
        count = slots or min(max(os.cpu_count() or 1, _FEWEST_SLOTS), _MOST_SLOTS)
        self._slots = anyio.CapacityLimiter(count)
        self._of_tenant = max(1, count // 2)
        self._shares: dict[str, tuple[anyio.Semaphore, int]] = {}

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns; raises what it raises. It runs to its end, also where the client hangs up."""
        async with self._share(tenant):
            return await anyio.to_thread.run_sync(work, limiter=self._slots)

    @asynccontextmanager
    async def _share(self, tenant: str) -> AsyncIterator[None]:
        semaphore, count = self._shares.get(tenant) or (anyio.Semaphore(self._of_tenant), 0)
        self._shares[tenant] = semaphore, count + 1
        try:
            async with semaphore:
                yield
        finally:
            semaphore, count = self._shares[tenant]
            if count == 1:
                del self._shares[tenant]
            else:
                self._shares[tenant] = semaphore, count - 1

    def __len__(self) -> int:
        """Tenants with work here, under way or waiting."""
        return len(self._shares)
