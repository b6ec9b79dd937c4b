"""Decides which tenants' adapters are evicted when the device is full. Knows tenants, weights and elements; knows no
offsets.

Max-min fairness in bytes: a tenant's share is the capacity divided by weight among the tenants that use the device. One
beyond its share is evicted first, so a tenant that cycles through a thousand adapters evicts its own. An adapter unused
for `hold_s` may be evicted for any tenant, and a tenant always keeps one adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from adapters_store.tiers.entries import Owner, PoolEntry


@dataclass(slots=True)
class _Held:
    """One tenant's part of the device: elements, adapters, and elements that running requests use."""

    used: int = 0
    count: int = 0
    in_use: int = 0


class PoolShares:
    """How much each tenant holds at one moment. asking: tenants that wait for room, even if they hold nothing."""

    def __init__(
        self, entries: Iterable[PoolEntry], capacity_elements: int, asking: Collection[Owner], *, oldest_s: float
    ) -> None:
        self._held: dict[str, _Held] = {}
        self._oldest_s = oldest_s
        weights = {owner.tenant: owner.weight for owner in asking}
        for entry in entries:
            tenant, weight = entry.owner
            held = self._held.get(tenant)
            if held is None:
                held = self._held[tenant] = _Held()
            held.used += entry.num_elements
            held.count += 1
            if entry.ref_count:
                held.in_use += entry.num_elements
            if not self._is_stale(entry):
                weights.setdefault(tenant, weight)
        self._element_share = capacity_elements / sum(weights.values()) if weights else 0.0
        self._weights = weights
        self._over = {t: held.used for t, held in self._held.items() if held.count > 1 and held.used > self.share(t)}

    def share(self, tenant: str) -> float:
        """Elements."""
        return self._element_share * self._weights.get(tenant, 0.0)

    def allows(self, owner: Owner, num_elements: int) -> bool:
        """Whether the tenant stays within its share with `num_elements` more. Its first adapter always does."""
        held = self._held.get(owner.tenant)
        return held is None or held.used + num_elements <= self.share(owner.tenant)

    def over_share_tenants(self) -> frozenset[str]:
        """Tenants whose running requests alone hold more than the share, on more than one adapter."""
        over = (t for t, held in self._held.items() if held.count > 1 and held.in_use > self.share(t))
        return frozenset(over)

    def victims(self, evictable: Sequence[PoolEntry], owner: Owner, num_elements: int) -> list[PoolEntry]:
        """Entries that may be evicted for an adapter of this owner, in order. evictable: the longest unused first."""
        over = self._over.copy()
        left = {tenant: self._held[tenant].count for tenant in over}
        first: list[PoolEntry] = []
        rest: list[PoolEntry] = []
        for entry in evictable:
            tenant = entry.owner.tenant
            if tenant in over and left[tenant] > 1 and over[tenant] > self.share(tenant):
                over[tenant] -= entry.num_elements
                left[tenant] -= 1
                first.append(entry)
            else:
                (first if self._is_stale(entry) else rest).append(entry)
        if self.allows(owner, num_elements):
            return first + rest
        return first + [entry for entry in rest if entry.owner.tenant == owner.tenant]

    def _is_stale(self, entry: PoolEntry) -> bool:
        return entry.ref_count == 0 and entry.last_used_s < self._oldest_s
