"""Decides which adapter is copied when from host memory to the device. Knows digests, ranges and the wanted list; knows
no disk, no tensors and no requests. One engine thread owns it; only the host tier behind it is shared.

The wanted list is ordered, the most urgent first. An adapter never takes the room of a more urgent one, in either tier,
so the first one always makes progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import LimitReached, StoreError
from adapters_store.packed.layout import PackedAdapter
from adapters_store.tiers.device_pool import DevicePool
from adapters_store.tiers.entries import (
    NO_OWNER,
    AdapterSnapshot,
    DeviceCopier,
    Owner,
    PoolEntry,
    Residency,
)
from adapters_store.tiers.host_tier import HostTier
from adapters_store.tiers.placement import Placement
from adapters_store.tiers.stats import AdapterTiersSettings, AdapterTiersStats
from adapters_store.tiers.transfers import Transfers
from adapters_store.tiers.working_set import WorkingSet

MAX_WARMING = 4  # adapters of one tenant on their way to the device that no request wants
_COPY_POLL_S = 0.0005


class AdapterTiers:
    """Brings adapters from host memory to the device and keeps them there while they are used."""

    def __init__(
        self,
        host: HostTier,
        pool: DevicePool,
        copier: DeviceCopier,
        *,
        settings: AdapterTiersSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._pool = pool
        self._copier = copier
        self._settings = settings or AdapterTiersSettings()
        self._clock = clock
        self._transfers = Transfers(host, pool, copier, self._settings.max_copies, self._note_arrival)
        self._pins: set[AdapterDigest] = set()
        self._wanted: tuple[AdapterDigest, ...] = ()
        self._limit = 0
        self._warming: dict[AdapterDigest, Owner] = {}  # wanted by warm() alone: given up where there is no room
        self._failures: dict[AdapterDigest, StoreError] = {}
        self._no_room_since: dict[AdapterDigest, float] = {}
        self._must_advance = False
        self._is_incomplete = False  # a wanted adapter is not on the device
        self._last_advance_s = clock()
        self._host_version = host.version
        self._num_misses = 0
        self._placement = Placement(pool)
        self._loads_left = 0  # in the current pass
        self._working_set = WorkingSet(pool.capacity_elements, clock)

    @property
    def poll_due_s(self) -> float | None:
        """Seconds an engine with nothing to run may sleep before it polls again; None: until it is woken."""
        if self._transfers or self._must_advance:
            return _COPY_POLL_S
        return self._settings.recheck_s if self._is_incomplete else None

    def ready(self) -> Collection[AdapterDigest]:
        """Adapters on the device: acquire() gives their slot now."""
        return self._pool.ready()

    def update(self, wanted: Collection[AdapterDigest], limit: int | None = None) -> AdapterSnapshot:
        """Replace the list of adapters to bring to the device, the most urgent first.

        wanted: in a mapping, each with its owner. Only the first `limit` may take room; the rest keep their position
        and wait. Cheap if nothing has changed.
        """
        self._placement.owners = wanted if isinstance(wanted, Mapping) else {}
        digests, limit = tuple(wanted), len(wanted) if limit is None else limit
        if digests != self._wanted or limit != self._limit:
            self._replace_wanted(digests, limit)
        if self._must_advance and (self._wanted or self._warming):
            self._advance()
        return self._snapshot(self._take_failures(digests) if self._failures else {})

    def acquire(self, digest: AdapterDigest) -> int | None:
        """Take one reference and return the adapter's slot; None if it is not on the device."""
        entry = self._pool.acquire(digest)
        if entry is None:
            return None
        self._working_set.note(digest, entry.num_elements)
        return entry.slot

    def release(self, digest: AdapterDigest) -> None:
        """Give up one reference."""
        entry = self._pool.release(digest)
        if entry.ref_count == 0:
            self._must_advance |= self._is_incomplete
            if entry.is_deleted:
                self._remove(entry)

    def warm(self, digest: AdapterDigest, owner: Owner) -> None:
        """Bring it to the device after all others, if there is room then; without room it stays in host memory.

        Raises LimitReached (too_many_warming); StoreError if it cannot be loaded.
        """
        if self.residency(digest).state in ("device", "loading"):
            return
        num_warming = sum(each.tenant == owner.tenant for each in self._warming.values())
        if num_warming >= MAX_WARMING:
            message = (
                f"{num_warming} adapters of the tenant are being warmed, the limit is {MAX_WARMING}; try again soon"
            )
            raise LimitReached("too_many_warming", message)
        self._warming[digest] = owner
        self._advance()
        error = self._failures.pop(digest, None)
        if error is not None:
            raise error

    def residency(self, digest: AdapterDigest) -> Residency:
        """Where it is now."""
        pinned = digest in self._pins
        if digest in self._pool.ready():
            return Residency("device", pinned)
        if self._pool.get(digest) is not None or digest in {*self._wanted, *self._warming}:
            return Residency("loading", pinned)
        return Residency("host" if digest in self._host.held() else "disk", pinned)

    def pin(self, digest: AdapterDigest) -> None:
        """Keep an adapter that is on the device there, whatever the limit."""
        entry = self._pool.get(digest)
        assert entry is not None, f"{digest} is not on the device"
        entry.pinned = True
        self._pins.add(digest)

    def pin_resident(self, digest: AdapterDigest) -> None:
        """The same within the limit. Raises Conflict (adapter_not_resident, pin_limit)."""
        self._pool.check_pin(digest)
        self.pin(digest)

    def unpin(self, digest: AdapterDigest) -> None:
        """Allow its eviction again."""
        self._pins.discard(digest)
        entry = self._pool.get(digest)
        if entry is not None:
            entry.pinned = False
            self._must_advance |= self._is_incomplete

    def forget(self, digest: AdapterDigest) -> None:
        """Remove a deleted adapter from both tiers, from the device as soon as no request uses it.

        Earlier requests do not bring it back. A new request for it is answered by the loader, which knows whether the
        version exists again (the same content has the same digest).
        """
        self.unpin(digest)
        self._warming.pop(digest, None)
        self._failures.pop(digest, None)
        self._no_room_since.pop(digest, None)
        self._stop_wanting((digest,))
        self._host.drop(digest)
        entry = self._pool.get(digest)
        if entry is None:
            return
        entry.is_deleted = True
        if entry.is_evictable:
            self._remove(entry)

    def retry_failed(self) -> None:
        """The store has changed, so adapters that failed may load now. Try them again."""
        self._host.forget_failures()
        self._must_advance |= self._is_incomplete

    def poll(self) -> AdapterSnapshot:
        """Once per engine step: finish copies, and give room to adapters that have been loaded since."""
        self._transfers.begin()
        if self._host.version != self._host_version:
            self._host_version = self._host.version
            self._must_advance |= self._is_incomplete
        if self._is_incomplete and self._clock() - self._last_advance_s >= self._settings.recheck_s:
            self._must_advance = True
        if self._must_advance:
            self._advance()
        return self._snapshot({}, loads=self._transfers.take_loads())

    def resident(self) -> list[PoolEntry]:
        """Adapters on the device, the least recently used first."""
        return self._pool.entries()

    def held(self) -> tuple[AdapterDigest, ...]:
        """Adapters in either tier, each once."""
        return tuple({*self._host.held(), *(entry.digest for entry in self._pool.entries())})

    def stats(self) -> AdapterTiersStats:
        """A snapshot of both tiers' counters."""
        pool = self._pool
        return AdapterTiersStats(
            hits=pool.stats.hits,
            misses=self._num_misses,
            evictions=pool.stats.evictions,
            activations=pool.stats.activations,
            num_resident=len(pool.ready()),
            num_more=pool.num_more,
            used_elements=pool.capacity_elements - pool.num_free_elements,
            largest_free_elements=pool.largest_hole,
            capacity_elements=pool.capacity_elements,
            working_set_ratio=self._working_set.ratio(),
            host=self._host.stats(),
        )

    def _snapshot(
        self, failures: Mapping[AdapterDigest, StoreError], loads: Sequence[tuple[Owner, int]] = ()
    ) -> AdapterSnapshot:
        return AdapterSnapshot(
            ready=self._pool.ready(),
            num_activations=self._pool.stats.activations,
            loads=loads,
            failures=failures,
            no_room_since=self._no_room_since.copy(),
            over_share=frozenset(self._placement.over_share),
            over_share_tenants=self._placement.over_share_tenants,
        )

    def _replace_wanted(self, wanted: tuple[AdapterDigest, ...], limit: int) -> None:
        missing = [digest for digest in wanted if digest not in self._pool.ready()]
        known = set(self._wanted)
        self._num_misses += sum(digest not in known for digest in missing)
        for digest in self._no_room_since.keys() - set(wanted):
            del self._no_room_since[digest]
        self._wanted, self._limit = wanted, limit
        self._must_advance |= bool(missing)

    def _take_failures(self, wanted: Collection[AdapterDigest]) -> Mapping[AdapterDigest, StoreError]:
        failures, self._failures = self._failures, {}
        self._stop_wanting(failures)
        return {digest: error for digest, error in failures.items() if digest in wanted}

    def _stop_wanting(self, digests: Collection[AdapterDigest]) -> None:
        """Drop these from the list. The next update() that names one counts as a change, so it is tried again."""
        may_take_room = [digest for digest in self._wanted[: self._limit] if digest not in digests]
        others = [digest for digest in self._wanted[self._limit :] if digest not in digests]
        self._wanted, self._limit = (*may_take_room, *others), len(may_take_room)

    def _advance(self) -> None:
        """Go through the wanted adapters in order, and advance those that are missing."""
        self._must_advance = self._is_incomplete = False
        self._last_advance_s = self._clock()
        self._loads_left = self._settings.max_loads
        self._placement.begin(self._wanted[: self._limit])
        in_order = dict.fromkeys((*self._wanted[: self._limit], *self._warming))
        more_urgent: set[AdapterDigest] = set()
        for digest in in_order:
            if self._pool.get(digest) is None and self._advance_one(digest, more_urgent):
                self._is_incomplete = True
            more_urgent.add(digest)
        self._is_incomplete |= self._limit < len(self._wanted)
        self._placement.end(len(self._no_room_since))
        # Adapters on the device need no room in host memory.
        urgent = dict.fromkeys((*in_order, *self._wanted))
        self._host.prioritise([digest for digest in urgent if self._pool.get(digest) is None])

    def _owner_of(self, digest: AdapterDigest) -> Owner:
        return self._placement.owners.get(digest) or self._warming.get(digest, NO_OWNER)

    def _advance_one(self, digest: AdapterDigest, more_urgent: Collection[AdapterDigest]) -> bool:
        """One step for an adapter that is not on the device; returns whether more remains to be done."""
        adapter = self._host.find(digest)
        if adapter is None:
            error = self._host.failure(digest)
            if error is not None:
                self._fail(digest, error)
                return False
            if self._loads_left:
                self._loads_left -= 1
                self._host.request(digest, self._owner_of(digest).tenant)
            return True
        if not self._transfers.may_start:
            self._must_advance = True
            return True
        owner = self._warming.get(digest, NO_OWNER)
        reservation = self._placement.reserve(digest, adapter.buffer.numel(), more_urgent, owner)
        if reservation is None:
            return self._note_no_room(digest, adapter)
        self._no_room_since.pop(digest, None)
        self._transfers.copy(reservation.entry, reservation.evicted, adapter)
        return False

    def _note_no_room(self, digest: AdapterDigest, adapter: PackedAdapter) -> bool:
        """It waits for room, unless it was only to be warmed; returns whether it waits."""
        error = self._placement.refusal(adapter, has_pins=bool(self._pins))
        if error is not None:
            self._fail(digest, error)
            return False
        if self._warming.pop(digest, None) is not None and digest not in self._wanted[: self._limit]:
            self._placement.over_share.discard(digest)
            return False
        self._no_room_since.setdefault(digest, self._clock())
        return True

    def _fail(self, digest: AdapterDigest, error: StoreError) -> None:
        self._failures[digest] = error
        self._warming.pop(digest, None)
        self._no_room_since.pop(digest, None)

    def _note_arrival(self, entry: PoolEntry) -> None:
        self._warming.pop(entry.digest, None)
        self._must_advance |= self._is_incomplete
        if entry.is_deleted:
            self._remove(entry)

    def _remove(self, entry: PoolEntry) -> None:
        self._pool.remove(entry)
        self._copier.clear(entry.slot)
        self._must_advance = True  # room for others, or a new request wants this adapter
