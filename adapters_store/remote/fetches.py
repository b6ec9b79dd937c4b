"""Brings adapters from an object store to the disk, several at once: a slow object delays no other one. Knows digests
and a function that fetches; knows no bucket.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from adapters_store.base.description import AdapterDigest

NUM_THREADS = 8


class Fetches:
    """Threads start when they are needed. A process that ends does not wait for them: an object may take minutes."""

    def __init__(self, fetch: Callable[[AdapterDigest], object]) -> None:
        self._fetch = fetch
        self._queue: SimpleQueue[tuple[AdapterDigest, Future[None]] | None] = SimpleQueue()
        self._num_threads = 0

    def submit(self, digest: AdapterDigest) -> Future[None]:
        """Called by one thread at a time."""
        future: Future[None] = Future()
        self._queue.put((digest, future))
        if self._num_threads < NUM_THREADS:
            self._num_threads += 1
            threading.Thread(target=self._run, name="adapter-fetch", daemon=True).start()
        return future

    def close(self) -> None:
        """Threads end after the fetch they are in; it is not waited for."""
        for _ in range(self._num_threads):
            self._queue.put(None)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            digest, future = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self._fetch(digest)
            except Exception as error:  # noqa: BLE001 - the loader answers for it
                future.set_exception(error)
            else:
                future.set_result(None)
