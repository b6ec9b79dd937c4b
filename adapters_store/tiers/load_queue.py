"""The loads of a host tier: queued, or running. Decides which is next, and fetches from an object store first; loads
nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue

from adapters_store.base.description import AdapterDigest

NUM_THREADS = 8


@dataclass(slots=True, eq=False)
class Load:
    """One load, queued or running. If its digest is dropped, its result is discarded.

    turn: the lowest is next; a tenant's loads have one each, also those that have ended, so that tenants alternate.
    fetched: done when the disk has it; None: it is there. is_outdated: the store has changed since it began, so its
    failure is ignored.
    """

    digest: AdapterDigest
    since_s: float
    turn: int
    fetched: Future[None] | None = None
    is_outdated: bool = False

    @property
    def is_fetched(self) -> bool:
        return self.fetched is None or self.fetched.done()


class LoadQueue:
    """Tenants alternate, however many loads one of them has queued. Its user holds a lock around each call but
    `has_next`.

    fetch: brings an adapter to the disk before its load; None: all are there. on_fetched: called after it, anywhere.
    """

    def __init__(self, fetch: Callable[[AdapterDigest], object] | None, on_fetched: Callable[[], None]) -> None:
        self._fetches = None if fetch is None else _Fetches(fetch)
        self._on_fetched = on_fetched
        self._queued: list[Load] = []
        self._by_digest: dict[AdapterDigest, Load] = {}  # queued and running
        self._turn = 0  # the highest that was begun
        self._next_turn: dict[str, int] = {}  # of each tenant, since the queue was last empty
        self.running: Load | None = None
        self._busy_since_s: float | None = None

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, digest: AdapterDigest) -> bool:
        return digest in self._by_digest

    def has_next(self) -> bool:
        """Whether a queued load has its adapter on the disk."""
        return any(each.is_fetched for each in list(self._queued))

    def add(self, digest: AdapterDigest, tenant: str, now_s: float) -> None:
        if not self._queued:
            self._next_turn.clear()  # what was loaded while no other waited is held against none
        turn = max(self._turn, self._next_turn.get(tenant, 0))
        self._next_turn[tenant] = turn + 1
        load = self._by_digest[digest] = Load(digest, now_s, turn)
        self._queued.append(load)
        if self._fetches is not None:
            load.fetched = self._fetches.submit(digest)
            load.fetched.add_done_callback(lambda _: self._on_fetched())

    def begin(self, now_s: float) -> Load | None:
        """The next one, which runs until `end`; None: no queued one has its adapter on the disk."""
        load = min((each for each in self._queued if each.is_fetched), key=lambda each: each.turn, default=None)
        if load is not None:
            self._queued.remove(load)
            self._turn = max(self._turn, load.turn)
            self.running = load
            self._busy_since_s = now_s
        return load

    def end(self, load: Load) -> bool:
        """False if it was dropped meanwhile. The thread is busy with work after it until `rest`."""
        self.running = None
        if self._by_digest.get(load.digest) is not load:
            return False
        del self._by_digest[load.digest]
        return True

    def rest(self) -> None:
        self._busy_since_s = None

    def drop(self, digest: AdapterDigest) -> None:
        """From the queue; or the result of the one that runs."""
        load = self._by_digest.pop(digest, None)
        if load is not None and load in self._queued:
            self._queued.remove(load)
            if load.fetched is not None:
                load.fetched.cancel()

    def keep(self, digests: Collection[AdapterDigest]) -> None:
        """Drop every other one that is queued and is not being fetched: asking again would take a second thread."""
        for load in [each for each in self._queued if each.digest not in digests]:
            if load.fetched is None or not load.fetched.running():
                self.drop(load.digest)

    def outdate(self) -> None:
        """The store has changed: a load that has begun does not count if it fails."""
        for load in self._by_digest.values():
            load.is_outdated = load is self.running or load.fetched is not None

    def waits(self, digest: AdapterDigest) -> tuple[str, float] | None:
        """For what its load waits ("object store", or "disk": the load under way, or work after one), and since when.
        None: for nothing."""
        load = self._by_digest.get(digest)
        if load is None:
            return None
        if not load.is_fetched:
            return "object store", load.since_s
        if self._busy_since_s is None:
            return None
        return "disk", load.since_s if self.running is None else self._busy_since_s

    def close(self) -> None:
        if self._fetches is not None:
            self._fetches.close()


class _Fetches:
    """Brings adapters from an object store to the disk, several at once: a slow object delays no other one.

    Threads start when they are needed. A process that ends does not wait for them: an object may take minutes.
    """

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
