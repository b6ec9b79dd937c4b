"""Decides which adapters are on the device, where, and which are evicted. Knows elements, slots and references; knows
no tensors and starts no copies. One engine thread owns it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, KeysView
from dataclasses import dataclass

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import Conflict
from adapters_store.tiers.arena_allocator import ArenaAllocator
from adapters_store.tiers.entries import NO_OWNER, EntryState, Owner, PoolEntry, Reservation
from adapters_store.tiers.pool_shares import PoolShares

MAX_PINNED_RATIO = 0.5  # of the elements, and of the slots


@dataclass(frozen=True, kw_only=True)
class DevicePoolSettings:
    """capacity_elements: arena size. max_slots: rows of the device adapter table, 0..max_slots-1.

    alignment_elements: every adapter starts on a multiple of this (64 bytes; 32 elements of bfloat16).
    hold_s: how long a tenant within its share keeps an unused adapter while others want room.
    """

    capacity_elements: int
    max_slots: int
    alignment_elements: int = 32
    hold_s: float = 10.0

    def __post_init__(self) -> None:
        if self.max_slots < 1:
            raise ValueError(f"max_slots must be at least 1, got {self.max_slots}")
        if self.capacity_elements < self.alignment_elements:
            raise ValueError(
                f"capacity_elements must be at least {self.alignment_elements} elements (one alignment unit), "
                f"got {self.capacity_elements}"
            )


@dataclass(slots=True)
class DevicePoolStats:
    """hits: references given. evictions: entries removed to make room. activations: adapters that became ready."""

    hits: int = 0
    evictions: int = 0
    activations: int = 0


class DevicePool:
    """Accounting of the device arena: true sizes, reference counts, pins, LRU eviction of unused adapters."""

    def __init__(self, settings: DevicePoolSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.stats = DevicePoolStats()
        self._clock = clock
        self._arena = ArenaAllocator(settings.capacity_elements, settings.alignment_elements)
        self._entries: OrderedDict[AdapterDigest, PoolEntry] = OrderedDict()  # least recently used first
        self._ready: dict[AdapterDigest, PoolEntry] = {}
        self._free_slots = list(range(settings.max_slots - 1, -1, -1))

    @property
    def capacity_elements(self) -> int:
        return self._arena.capacity

    @property
    def num_free_elements(self) -> int:
        return self._arena.num_free

    @property
    def largest_hole(self) -> int:
        return self._arena.largest_hole

    @property
    def num_more(self) -> int:
        """How many more adapters of the mean size of those here fit into the free elements and slots."""
        num_slots, used = self.settings.max_slots - len(self._entries), self.capacity_elements - self.num_free_elements
        return min(num_slots, self.num_free_elements * len(self._entries) // used) if used else num_slots

    def get(self, digest: AdapterDigest) -> PoolEntry | None:
        return self._entries.get(digest)

    def entries(self) -> list[PoolEntry]:
        """All entries, least recently used first."""
        return list(self._entries.values())

    def ready(self) -> KeysView[AdapterDigest]:
        """Digests that can be acquired now."""
        return self._ready.keys()

    def acquire(self, digest: AdapterDigest) -> PoolEntry | None:
        """Take one reference on a ready entry; None if the adapter is not ready."""
        entry = self._ready.get(digest)
        if entry is None:
            return None
        entry.ref_count += 1
        entry.was_used = True
        entry.is_deleted = False  # the same content was published again
        self.stats.hits += 1
        self._touch(entry)
        return entry

    def release(self, digest: AdapterDigest) -> PoolEntry:
        """Give up one reference."""
        entry = self._entries[digest]
        assert entry.ref_count > 0, f"{digest} released more often than acquired"
        entry.ref_count -= 1
        self._touch(entry)
        return entry

    def shares(self, asking: Collection[Owner] = ()) -> PoolShares:
        """How much each tenant holds now. asking: tenants that wait for room."""
        oldest_s = self._clock() - self.settings.hold_s
        return PoolShares(self._entries.values(), self.capacity_elements, asking, oldest_s=oldest_s)

    def reserve(
        self,
        digest: AdapterDigest,
        num_elements: int,
        keep: Collection[AdapterDigest] = (),
        *,
        owner: Owner = NO_OWNER,
        shares: PoolShares | None = None,
    ) -> Reservation | None:
        """A range for an adapter that is about to be copied. Evicts unused adapters: first those that tenants hold
        beyond their shares, then the longest unused.

        keep: not evicted either. shares: the result of `shares()`, if nothing has changed since. Returns None, with
        nothing evicted, if no range can be freed.
        """
        assert digest not in self._entries, f"{digest} has a range already"
        victims = self._plan(num_elements, keep, owner, shares)
        if victims is None:
            return None
        for victim in victims:
            self.remove(victim)
        self.stats.evictions += len(victims)
        offset = self._arena.allocate(num_elements)
        assert offset is not None, "the plan made no room"
        entry = PoolEntry(digest, self._free_slots.pop(), offset, num_elements, self._clock(), owner)
        self._entries[digest] = entry
        return Reservation(entry, tuple(victims))

    def mark_ready(self, entry: PoolEntry) -> None:
        """The copy is complete."""
        assert entry.state is EntryState.COPYING, f"{entry.digest} was ready already"
        entry.state = EntryState.READY
        self._ready[entry.digest] = entry
        self.stats.activations += 1

    def remove(self, entry: PoolEntry) -> None:
        """Free the range and slot of an unused entry."""
        assert entry.ref_count == 0, f"{entry.digest} is in use by {entry.ref_count}"
        assert entry.state is EntryState.READY, f"{entry.digest} is being copied"
        del self._entries[entry.digest], self._ready[entry.digest]
        self._arena.free(entry.offset)
        self._free_slots.append(entry.slot)

    def could_ever_fit(self, num_elements: int) -> bool:
        """Whether there were room if only pinned entries stayed."""
        pinned = sorted((entry.offset, entry.num_elements) for entry in self._entries.values() if entry.pinned)
        if len(pinned) >= self.settings.max_slots:
            return False
        position, largest = 0, 0
        for offset, size in pinned:
            largest = max(largest, offset - position)
            position = offset + self._arena.rounded(size)
        return self._arena.rounded(num_elements) <= max(largest, self._arena.capacity - position)

    def check_pin(self, digest: AdapterDigest) -> None:
        """Whether this adapter may be pinned, so that half of the pool stays for all others.

        Raises Conflict (adapter_not_resident, pin_limit).
        """
        entry = self._ready.get(digest)
        if entry is None:
            raise Conflict("adapter_not_resident", "the adapter is not on the device; warm it first", param="name")
        pinned = [each for each in self._entries.values() if each.pinned and each is not entry] + [entry]
        num_elements = sum(self._arena.rounded(each.num_elements) for each in pinned)
        share = max(num_elements / self._arena.capacity, len(pinned) / self.settings.max_slots)
        if share > MAX_PINNED_RATIO:
            message = (
                f"pinned adapters would take {share:.0%} of the device's adapter memory or slots, "
                f"at most {MAX_PINNED_RATIO:.0%} may be pinned"
            )
            raise Conflict("pin_limit", message, param="name")

    def _touch(self, entry: PoolEntry) -> None:
        entry.last_used_s = self._clock()
        self._entries.move_to_end(entry.digest)

    def _plan(
        self, num_elements: int, keep: Collection[AdapterDigest], owner: Owner, shares: PoolShares | None
    ) -> list[PoolEntry] | None:
        """The entries to evict. Tries on a copy of the arena, then keeps those whose eviction would not help."""
        if self._free_slots and self._arena.fits(num_elements):
            return []
        evictable = [entry for entry in self._entries.values() if entry.is_evictable and entry.digest not in keep]
        candidates = (shares or self.shares([owner])).victims(evictable, owner, num_elements)
        if not self._is_enough(num_elements, candidates):
            return None
        trial, chosen = self._arena.copy(), 0
        while chosen < len(candidates) and (chosen == 0 or not trial.fits(num_elements)):
            trial.free(candidates[chosen].offset)
            chosen += 1
        offset = trial.allocate(num_elements)
        if offset is None:
            return None
        end = offset + self._arena.rounded(num_elements)
        needed = [entry for entry in candidates[:chosen] if entry.offset < end and self._end(entry) > offset]
        return needed or candidates[:1]  # none in the way: only a slot was missing

    def _is_enough(self, num_elements: int, candidates: list[PoolEntry]) -> bool:
        freed = sum(self._arena.rounded(entry.num_elements) for entry in candidates)
        return bool(candidates) and self._arena.num_free + freed >= num_elements

    def _end(self, entry: PoolEntry) -> int:
        return entry.offset + self._arena.rounded(entry.num_elements)
