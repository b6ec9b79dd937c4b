"""Which adapters have been used lately, and how much room they take together. Decides nothing.

When they no longer fit into the pool, each further adapter evicts one that is about to be used again. A few adapters
more then raise the time to first token many times over. So a warning is logged before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from adapters_store.base.description import AdapterDigest

_log = logging.getLogger(__name__)
WARN_AT = 0.8  # of the pool


class WorkingSet:
    """Two halves of a window: an adapter counts for half a window to a whole one after its last use."""

    def __init__(self, capacity_elements: int, clock: Callable[[], float], *, window_s: float = 60.0) -> None:
        self._capacity = capacity_elements
        self._clock = clock
        self._half_s = window_s / 2
        self._turn_s = clock() + self._half_s
        self._now: dict[AdapterDigest, int] = {}
        self._before: dict[AdapterDigest, int] = {}
        self._is_warned = False

    def note(self, digest: AdapterDigest, num_elements: int) -> None:
        """Record a use of the adapter."""
        self._now[digest] = num_elements

    def ratio(self) -> float:
        """The size of lately used adapters as a share of the pool; above 1 they do not fit together. Logs a warning
        each time the share passes WARN_AT."""
        now_s = self._clock()
        if now_s >= self._turn_s:
            was_idle = now_s >= self._turn_s + self._half_s
            self._before, self._now = {} if was_idle else self._now, {}
            self._turn_s = now_s + self._half_s
        everything = {**self._before, **self._now}
        ratio = sum(everything.values()) / max(1, self._capacity)
        if ratio >= WARN_AT and not self._is_warned:
            _log.warning(
                "adapters in use take %.0f %% of the device pool (%d adapters): beyond 100 %% they evict each other; "
                "enlarge --adapter-pool-mib",
                100 * ratio,
                len(everything),
            )
        self._is_warned = ratio >= WARN_AT
        return ratio
