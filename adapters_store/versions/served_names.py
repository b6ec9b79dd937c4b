"""Which names mean an adapter, for all its owners. Reads rows; remembers them until any process writes."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import func, select

from adapters_store.base.description import AdapterDigest
from adapters_store.packed.mix import is_mix
from adapters_store.storage.database import Database
from adapters_store.storage.schema import adapter_versions, adapters, few_at_a_time, tenants


@dataclass(frozen=True, slots=True)
class ServedName:
    """One version in service. is_active: the bare name means it. is_only: no other tenant has this name."""

    tenant: str
    name: str
    version: int
    is_active: bool
    is_only: bool
    rank: int


class ServedNames:
    """Safe to use from many threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._generation: int | None = None
        self._known: dict[AdapterDigest, tuple[ServedName, ...]] = {}

    def of(self, digests: Collection[AdapterDigest]) -> dict[AdapterDigest, tuple[ServedName, ...]]:
        """Every version in service of each digest; a mix has none. Raises StoreUnavailable if the database does not
        answer."""
        with self._lock:
            generation = self._database.generation()
            if generation != self._generation:
                self._generation, self._known = generation, {}
            missing = [digest for digest in dict.fromkeys(digests) if digest not in self._known and not is_mix(digest)]
            for few in few_at_a_time(missing):
                self._known |= self._read(few)
            return {digest: self._known.get(digest, ()) for digest in digests}

    def last_known(self, digests: Collection[AdapterDigest]) -> dict[AdapterDigest, tuple[ServedName, ...]]:
        """The same without the database: what was read last."""
        known = self._known
        return {digest: known.get(digest, ()) for digest in digests}

    def _read(self, digests: Collection[AdapterDigest]) -> dict[AdapterDigest, tuple[ServedName, ...]]:
        rows = (
            select(
                adapter_versions.c.digest,
                tenants.c.name.label("tenant"),
                adapters.c.name,
                adapter_versions.c.number,
                adapter_versions.c.rank,
                (adapters.c.active_number == adapter_versions.c.number).label("is_active"),
            )
            .select_from(adapter_versions.join(adapters).join(tenants))
            .where(adapter_versions.c.digest.in_(digests), adapter_versions.c.unloaded.is_(False))
            .order_by(tenants.c.name, adapters.c.name, adapter_versions.c.number)
        )
        found: dict[AdapterDigest, list[ServedName]] = {digest: [] for digest in digests}
        with self._database.read() as connection:
            versions = list(connection.execute(rows))
            names = list({row.name for row in versions})
            shared: set[str] = set()
            for few in few_at_a_time(names):
                owners = func.count(adapters.c.tenant_id.distinct())
                query = (
                    select(adapters.c.name).select_from(adapter_versions.join(adapters)).where(adapters.c.name.in_(few))
                )
                shared.update(connection.execute(query.group_by(adapters.c.name).having(owners > 1)).scalars())
        for row in versions:
            served = ServedName(row.tenant, row.name, row.number, bool(row.is_active), row.name not in shared, row.rank)
            found[AdapterDigest(row.digest)].append(served)
        return {digest: tuple(served) for digest, served in found.items()}
