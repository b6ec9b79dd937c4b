"""Follows changes that commands or other servers make to the store: frees unloaded adapters, counts the quarantine.

Every request asks the store which adapter it may use. The watch only frees host and device memory of adapters that no
request can reach any more. Knows digests; knows no names.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from prometheus_client import Gauge

from adapters_store.errors import StoreError
from adapters_store.store import AdapterStore
from server.api.engine_client import EngineClient

_log = logging.getLogger(__name__)


class StoreWatch:
    """Checks every `poll_s` whether the store changed, then whether the engine holds adapters that are out of service.

    Without a change it checks every `at_least_s`: a load may end after the check that should have seen it.
    """

    def __init__(
        self,
        store: AdapterStore,
        engine: EngineClient,
        quarantined: Gauge,
        *,
        poll_s: float = 0.5,
        at_least_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._engine = engine
        self._quarantined = quarantined
        self._poll_s = poll_s
        self._at_least_s = at_least_s
        self._clock = clock
        self._generation: int | None = None
        self._looked_s = float("-inf")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """Free adapters that left service, count quarantined ones. Raises StoreError (the database does not answer)."""
        generation, now_s = self._store.generation(), self._clock()
        if generation == self._generation and now_s - self._looked_s < self._at_least_s:
            return
        if generation != self._generation:
            self._engine.retry_adapters()  # a push of the same content heals what could not be loaded
        self._store.forget_answers()  # or a name that was just unloaded could still be resolved, and loaded again
        gone = self._store.not_in_service(list(self._engine.stats().held_adapters))
        if gone:
            _log.info("freeing %d adapters that are not in service any more", len(gone))
            self._engine.forget_adapters(gone)
        self._quarantined.set(len(self._store.quarantine.entries()))
        self._generation, self._looked_s = generation, now_s

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            try:
                self.look()
            except StoreError as error:
                _log.warning("the store does not answer; adapters out of service stay in memory: %s", error)
