"""Decides which adapters are kept in host memory. Knows bytes, digests and a queue of loads; knows neither disk format
nor device. Loading runs on one background thread, so no other thread waits for a disk.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import AdapterUnavailable, StoreError
from adapters_store.tiers.entries import HostEntry
from adapters_store.tiers.host_slab import HostMemoryFull
from adapters_store.tiers.load_queue import Load, LoadQueue
from adapters_store.tiers.stats import HostTierStats

if TYPE_CHECKING:
    from adapters_store.packed.layout import PackedAdapter

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HostTierSettings:
    """max_bytes: budget of all buffers. max_queue: loads waiting at once.

    retry_s: how long a failure is remembered before the disk is tried again. stuck_s: a load that takes longer counts
    as failed, and so does every load queued behind it, until it ends.
    """

    max_bytes: int
    max_queue: int = 256
    retry_s: float = 5.0
    stuck_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stuck_s <= 0:
            raise ValueError(f"stuck_s must be above 0, got {self.stuck_s}")


@dataclass(frozen=True, slots=True)
class _Unstored:
    """A load that found no room for num_bytes. Its memory was full at this version of the room, if it was: then the
    load is not tried again before until_s, unless room was given up since."""

    num_bytes: int
    full_at: int | None = None
    until_s: float = 0.0


class HostTier:
    """A bytes-budgeted LRU of packed adapters. Thread-safe.

    load: digest -> adapter, called on the loader thread; its StoreError is reported by `failure`. It may call
    `make_room`, and raise HostMemoryFull.
    fetch: brings an adapter to the disk before its load; its StoreError is reported by `failure` too. None: all are
    there. after_load: called on the loader thread after each load, for work that no request waits for; its argument
    says whether a load waits. Without `start()` nothing runs by itself, and `load_next()` does one load by hand.
    """

    def __init__(
        self,
        settings: HostTierSettings,
        load: Callable[[AdapterDigest], PackedAdapter],
        *,
        clock: Callable[[], float] = time.monotonic,
        fetch: Callable[[AdapterDigest], object] | None = None,
        after_load: Callable[[Callable[[], bool]], object] = lambda _: None,
    ) -> None:
        self.settings = settings
        self._load = load
        self._clock = clock
        self._notify: Callable[[], None] = lambda: None
        self._after_load = after_load
        self._changed = threading.Condition()
        self._entries: OrderedDict[AdapterDigest, HostEntry] = OrderedDict()  # least recently used first
        self._loads = LoadQueue(fetch, self._wake_loader)
        self._failures: OrderedDict[AdapterDigest, tuple[StoreError, float]] = OrderedDict()  # with expiry, in order
        self._unstored: dict[AdapterDigest, _Unstored] = {}
        self._room_version = 0  # changes whenever more may be evicted than before
        self._urgency: dict[AdapterDigest, int] = {}
        self._stats = HostTierStats()
        self._version = 0
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def version(self) -> int:
        """Changes whenever a load ends or an entry is removed."""
        return self._version

    def start(self, notify: Callable[[], None] = lambda: None) -> None:
        """Start the loader thread. notify: called there after each load, so that an idle engine wakes."""
        assert self._thread is None, "started twice"
        self._notify = notify
        self._thread = threading.Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the loader thread, after the load it is in."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._loads.close()
        if self._thread is not None:
            self._thread.join()

    def request(self, digest: AdapterDigest, tenant: str = "") -> bool:
        """Queue a load for a tenant, unless the adapter is here or under way, failed lately, or is known to find no
        room now.

        False if the queue is full.
        """
        with self._changed:
            if digest in self._entries or digest in self._loads or self._would_fail_again(digest):
                return True
            if len(self._loads) >= self.settings.max_queue:
                return False
            self._loads.add(digest, tenant, self._clock())
            self._stats.misses += 1
            self._changed.notify()
            return True

    def find(self, digest: AdapterDigest) -> PackedAdapter | None:
        """The adapter if it is in host memory."""
        with self._changed:
            entry = self._entries.get(digest)
            if entry is None:
                return None
            self._entries.move_to_end(digest)
            return entry.adapter

    def pin(self, adapter: PackedAdapter) -> HostEntry:
        """Hold an adapter returned by find() for a copy, until unpin(). It may have been evicted since."""
        with self._changed:
            entry = self._entries.get(adapter.digest) or HostEntry(adapter)
            entry.pins += 1
            self._stats.hits += entry.was_used
            entry.was_used = True
            return entry

    def unpin(self, entry: HostEntry) -> None:
        """The copy is complete."""
        with self._changed:
            assert entry.pins > 0, f"{entry.adapter.digest} unpinned more often than pinned"
            entry.pins -= 1
            self._room_version += 1

    def failure(self, digest: AdapterDigest) -> StoreError | None:
        """Why the last load failed, while that is remembered; or that the load under way is stuck."""
        with self._changed:
            known = self._failures.get(digest)
            if known is not None and self._clock() < known[1]:
                return known[0]
            waits = self._loads.waits(digest)
            if waits is None or self._clock() - waits[1] < self.settings.stuck_s:
                return None
            message = f"the {waits[0]} has not given an adapter within {self.settings.stuck_s:g} s; try again later"
            return AdapterUnavailable("adapter_load_stuck", message, param="model")

    def forget_failures(self) -> None:
        """Try the disk again for all failed adapters; a load that began before this does not count if it fails."""
        with self._changed:
            self._failures.clear()
            self._loads.outdate()

    def prioritise(self, digests: Sequence[AdapterDigest]) -> None:
        """Set the wanted adapters, the most urgent first: no less urgent one takes their room. A queued load of another
        one is dropped."""
        with self._changed:
            urgency = {digest: rank for rank, digest in enumerate(digests)}
            self._room_version += urgency != self._urgency
            self._urgency = urgency
            for digest in self._unstored.keys() - urgency.keys():
                del self._unstored[digest]
            self._loads.keep(urgency.keys())

    def drop(self, digest: AdapterDigest) -> None:
        """Forget the adapter: from memory, from the queue, its failure, and the result of a load under way."""
        with self._changed:
            self._loads.drop(digest)
            self._failures.pop(digest, None)
            self._unstored.pop(digest, None)
            if digest in self._entries:
                self._remove(digest)

    def make_room(self) -> bool:
        """For the load under way: drop the longest unused adapter that it may evict; False if there is none."""
        with self._changed:
            load = self._loads.running
            victim = None if load is None else next(self._evictable(load.digest), None)
            if victim is None:
                return False
            self._remove(victim)
            self._stats.evictions += 1
            return True

    def held(self) -> list[AdapterDigest]:
        """Adapters in host memory."""
        with self._changed:
            return list(self._entries)

    def stats(self) -> HostTierStats:
        """A snapshot."""
        with self._changed:
            return replace(self._stats)

    def load_next(self) -> bool:
        """Do the next queued load whose adapter is on the disk, on this thread; False if there is none."""
        with self._changed:
            load = self._loads.begin(self._clock())
        if load is None:
            return False
        error = None if load.fetched is None else load.fetched.exception()
        outcome = error if isinstance(error, StoreError) else self._try_load(load.digest)
        with self._changed:
            self._end_load(load, outcome)
        self._notify()
        self._do_rest()
        return True

    def _do_rest(self) -> None:
        try:
            self._after_load(self._is_awaited)
        except Exception:  # noqa: BLE001 - as in `_try_load`; nothing was promised of this work
            _log.exception("work after a load failed")
        self._loads.rest()

    def _run(self) -> None:
        while not self._is_closed:
            if not self.load_next():
                with self._changed:
                    self._changed.wait_for(self._is_awaited)

    def _is_awaited(self) -> bool:
        """Whether the loader thread has something else to do: a load, or to end."""
        return self._is_closed or self._loads.has_next()

    def _wake_loader(self) -> None:
        with self._changed:
            self._changed.notify()

    def _try_load(self, digest: AdapterDigest) -> PackedAdapter | StoreError | HostMemoryFull:
        try:
            return self._load(digest)
        except (StoreError, HostMemoryFull) as error:
            return error
        except Exception:  # noqa: BLE001 - one adapter's error must not end the thread that loads for every tenant
            _log.exception("loading adapter %s failed", digest)
            message = f"adapter {digest} could not be loaded; see the server's log"
            return AdapterUnavailable("adapter_load_failed", message)

    def _end_load(self, load: Load, outcome: PackedAdapter | StoreError | HostMemoryFull) -> None:
        self._version += 1
        if not self._loads.end(load):
            return
        if isinstance(outcome, StoreError):
            if not load.is_outdated:
                self._fail(load.digest, outcome)
            return
        self._stats.loads += not isinstance(outcome, HostMemoryFull)
        if outcome.num_bytes > self.settings.max_bytes:
            message = f"adapter has {outcome.num_bytes} bytes, host memory for adapters is {self.settings.max_bytes}"
            self._fail(load.digest, AdapterUnavailable("adapter_too_large_for_host", message))
        elif isinstance(outcome, HostMemoryFull):
            until_s = self._clock() + self.settings.retry_s
            self._unstored[load.digest] = _Unstored(outcome.num_bytes, self._room_version, until_s)
        else:
            self._store(outcome)

    def _fail(self, digest: AdapterDigest, error: StoreError) -> None:
        now_s = self._clock()
        while self._failures and next(iter(self._failures.values()))[1] <= now_s:
            self._failures.popitem(last=False)
        self._failures.pop(digest, None)
        self._failures[digest] = (error, now_s + self.settings.retry_s)
        self._stats.failures += 1

    def _would_fail_again(self, digest: AdapterDigest) -> bool:
        failed = self._failures.get(digest)
        if failed is not None and self._clock() < failed[1]:
            return True
        unstored = self._unstored.get(digest)
        if unstored is None:
            return False
        if unstored.full_at == self._room_version and self._clock() < unstored.until_s:
            return True
        return self._victims_for(digest, unstored.num_bytes) is None

    def _store(self, adapter: PackedAdapter) -> None:
        digest, num_bytes = adapter.digest, adapter.num_bytes
        victims = self._victims_for(digest, num_bytes)
        if victims is None:
            self._unstored[digest] = _Unstored(num_bytes)
            return
        for victim in victims:
            self._remove(victim)
        self._stats.evictions += len(victims)
        self._unstored.pop(digest, None)
        self._entries[digest] = HostEntry(adapter)
        self._stats.num_bytes += num_bytes

    def _victims_for(self, wanted: AdapterDigest, num_bytes: int) -> list[AdapterDigest] | None:
        """Adapters to evict: the longest unused that may be evicted. None if that is not enough."""
        short = self._stats.num_bytes + num_bytes - self.settings.max_bytes
        victims: list[AdapterDigest] = []
        for digest in self._evictable(wanted):
            if short <= 0:
                break
            victims.append(digest)
            short -= self._entries[digest].adapter.num_bytes
        return None if short > 0 else victims

    def _evictable(self, wanted: AdapterDigest) -> Iterator[AdapterDigest]:
        """Adapters that are neither pinned nor more urgent, the longest unused first."""
        last = len(self._urgency)
        urgency = self._urgency.get(wanted, last)
        for digest, entry in self._entries.items():
            if entry.pins == 0 and self._urgency.get(digest, last) >= urgency:
                yield digest

    def _remove(self, digest: AdapterDigest) -> None:
        self._stats.num_bytes -= self._entries.pop(digest).adapter.num_bytes
        self._version += 1
        self._room_version += 1
