"""Decides which wanted adapters get room on the device in one pass, and which are denied for lack of share. Knows
digests, owners and elements; knows no host memory and starts no copies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import AdapterUnavailable, StoreError
from adapters_store.tiers.device_pool import DevicePool
from adapters_store.tiers.entries import NO_OWNER, Owner, Reservation
from adapters_store.tiers.pool_shares import PoolShares

if TYPE_CHECKING:
    from adapters_store.packed.layout import PackedAdapter


class Placement:
    """Passes over the wanted list, the most urgent first: begin(), then reserve() for each, then end().

    owners: of the wanted adapters. over_share: those denied because their own tenant has used up its share.
    over_share_tenants: tenants whose running requests hold more than the share while an adapter
    of a tenant within its share finds no room.
    """

    def __init__(self, pool: DevicePool) -> None:
        self.owners: Mapping[AdapterDigest, Owner] = {}
        self.over_share: set[AdapterDigest] = set()
        self.over_share_tenants: frozenset[str] = frozenset()
        self._pool = pool
        self._too_much = 0  # a reservation of this many elements has failed for lack of room
        self._denied: dict[str, int] = {}  # the same for one tenant, for lack of share
        self._unused: dict[AdapterDigest, str] = {}  # not used yet -> their tenant
        self._shares: PoolShares | None = None  # until an adapter gets room

    def begin(self, may_take_room: Iterable[AdapterDigest]) -> None:
        """Start a pass."""
        self._too_much = self._pool.capacity_elements + 1
        self._denied.clear()
        self.over_share.clear()
        self._shares = None
        self._unused = self._find_unused(may_take_room)

    def reserve(
        self,
        digest: AdapterDigest,
        num_elements: int,
        more_urgent: Collection[AdapterDigest],
        unnamed: Owner = NO_OWNER,
    ) -> Reservation | None:
        """A range, or None. Within one pass room only shrinks, so a size that failed once fails for every later
        adapter. unnamed: the owner of one that no request wants."""
        owner = self.owners.get(digest, unnamed)
        if num_elements >= min(self._too_much, self._denied.get(owner.tenant, self._too_much)):
            self._note_denied(digest, owner)
            return None
        if owner.tenant in self.over_share_tenants:  # it may not run more either, until the others have had their share
            self._denied[owner.tenant] = 0
            self._note_denied(digest, owner)
            return None
        shares = self._current_shares()
        keep = {*more_urgent, *(unused for unused, tenant in self._unused.items() if tenant != owner.tenant)}
        reservation = self._pool.reserve(digest, num_elements, keep, owner=owner, shares=shares)
        if reservation is not None:
            self._shares = None
        elif shares.allows(owner, num_elements):
            self._too_much = num_elements
        else:
            self._denied[owner.tenant] = num_elements
            self._note_denied(digest, owner)
        return reservation

    def refusal(self, adapter: PackedAdapter, *, has_pins: bool) -> StoreError | None:
        """Why it could not have room even if all others were evicted; None: it must wait."""
        num_elements = adapter.buffer.numel()
        limit = self._pool.capacity_elements * adapter.buffer.element_size()
        if num_elements > self._pool.capacity_elements:
            message = f"adapter has {adapter.num_bytes} bytes, device memory for adapters is {limit}"
            return AdapterUnavailable("adapter_too_large_for_pool", message)
        if has_pins and not self._pool.could_ever_fit(num_elements):
            message = f"adapter has {adapter.num_bytes} bytes, pinned adapters leave no such room in {limit}"
            return AdapterUnavailable("adapter_pool_pinned", message)
        return None

    def end(self, num_without_room: int) -> None:
        """End the pass. num_without_room: adapters that found no room."""
        is_short = num_without_room > len(self.over_share)
        self.over_share_tenants = self._current_shares().over_share_tenants() if is_short else frozenset()

    def _find_unused(self, digests: Iterable[AdapterDigest]) -> dict[AdapterDigest, str]:
        """Adapters loaded for a request that has not run yet, and their tenant. The load was charged to that tenant, so
        other tenants come first and would evict the adapter before it is used.

        The tenant an adapter was loaded for may be gone. It then belongs to the tenant that wants it now; reserving it
        for the absent one could deadlock both.
        """
        unused: dict[AdapterDigest, str] = {}
        for digest in digests:
            entry = self._pool.get(digest)
            if entry is None or entry.was_used:
                continue
            entry.owner = self.owners.get(digest, entry.owner)
            if entry.owner.tenant not in self.over_share_tenants:
                unused[digest] = entry.owner.tenant
        return unused

    def _note_denied(self, digest: AdapterDigest, owner: Owner) -> None:
        if owner.tenant in self._denied:
            self.over_share.add(digest)

    def _current_shares(self) -> PoolShares:
        if self._shares is None:
            self._shares = self._pool.shares(self.owners.values())
        return self._shares
