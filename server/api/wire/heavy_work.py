"""Runs long work (a large body, a long prompt, a large answer) on a few threads; no tenant can use all of them.

The event loop does only work that is shorter than a thread switch. Work here must be many short steps: one long call
into C that holds the interpreter's lock stops the event loop too, from any thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import anyio.to_thread

from lora_kernels.cgroups import usable_cpus

T = TypeVar("T")

_FEWEST_SLOTS, _MOST_SLOTS = 2, 8


class HeavyWork:
    """One tenant uses at most half of the slots, so others always find a free one. Used on the event loop only."""

    def __init__(self) -> None:
        count = min(max(usable_cpus(), _FEWEST_SLOTS), _MOST_SLOTS)
        self._slots = anyio.CapacityLimiter(count)
        self._of_tenant = max(1, count // 2)
        self._shares: dict[str, tuple[anyio.Semaphore, int]] = {}

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns; raises what it raises. It runs to its end, also if the client hangs up."""
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
