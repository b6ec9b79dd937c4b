"""Tokens that were served and are to be billed: summed in memory, saved in batches by a thread of its own.

Tokens count once they have been handed to the client's socket. A killed process loses the counts after its last
flush, and never saves any twice: the sum is never more than what was served.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime

from adapters_store.accounts.usage import UsageCounts, UsageKey, UsageStore
from adapters_store.errors import StoreError
from server.api.telemetry.metrics import OTHER, SEVERAL

_log = logging.getLogger(__name__)
FLUSH_EVERY_S = 1.0
MAX_SETS = 64  # of adapters that one tenant's requests name together, with a row of their own each day


class UsageLog:
    """Thread-safe. Without `start()` only `flush()` writes."""

    def __init__(
        self, store: UsageStore, *, flush_every_s: float = FLUSH_EVERY_S, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._flush_every_s = flush_every_s
        self._clock = clock
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._used: dict[UsageKey, UsageCounts] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._day = ("", 0.0)  # the day, and when it ends
        self._sets: defaultdict[str, set[str]] = defaultdict(set)  # today's with a row of their own

    def add(self, tenant: str, adapter: str, counts: UsageCounts) -> None:
        """Costs a microsecond or two; never waits for the database."""
        with self._lock:
            key = UsageKey(self._today(), tenant, self._row_of(tenant, adapter))
            self._used.setdefault(key, UsageCounts()).add(counts)

    def flush(self) -> None:
        """Save what was added until now; keep what cannot be saved. Raises StoreError."""
        with self._flushing:
            with self._lock:
                used, self._used = self._used, {}
            try:
                self._store.add(used)
            except StoreError:
                with self._lock:
                    for key, counts in used.items():
                        self._used.setdefault(key, UsageCounts()).add(counts)
                raise

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Save the rest and end the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._stop.wait(self._flush_every_s)
            try:
                self.flush()
            except StoreError as error:
                _log.error("usage of %d tenants and adapters is not saved yet: %s", len(self._used), error)

    def _row_of(self, tenant: str, adapter: str) -> str:
        """The first sets of adapters keep their names: a hundred adapters make four million sets. A token is in one
        row, so that rows add up to what was served."""
        if SEVERAL not in adapter:
            return adapter
        named = self._sets[tenant]
        if adapter not in named and len(named) >= MAX_SETS:
            return OTHER
        named.add(adapter)
        return adapter

    def _today(self) -> str:
        now_s = self._clock()
        if not 0 <= self._day[1] - now_s <= 86_400:
            today = datetime.fromtimestamp(now_s, UTC).date()
            self._day = (today.isoformat(), (now_s // 86_400 + 1) * 86_400)
            self._sets.clear()
        return self._day[0]
