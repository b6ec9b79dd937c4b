"""The row of a tenant, and what belongs to it. Every function works inside the caller's transaction."""

from __future__ import annotations

from sqlalchemy import Connection, select

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import NotFound
from adapters_store.parsing.strict_json import shown
from adapters_store.storage.names import is_name
from adapters_store.storage.schema import adapter_versions, adapters, tenants


def tenant_id(connection: Connection, tenant: str, *, lock: bool = False) -> int:
    """Raises NotFound (tenant_not_found). lock: one writer per tenant at a time, if rows can be locked."""
    statement = select(tenants.c.id).where(tenants.c.name == tenant)
    if lock:
        statement = statement.with_for_update()
    # A driver raises for text that is no name, as a lone surrogate.
    found = connection.execute(statement).scalar() if is_name(tenant) else None
    if found is None:
        raise NotFound("tenant_not_found", f"no tenant {shown(tenant)}", param="tenant")
    return int(found)


def digests_of(connection: Connection, owner: int) -> list[AdapterDigest]:
    """The digest of each of the tenant's versions."""
    owned = select(adapter_versions.c.digest).select_from(adapter_versions.join(adapters))
    rows = connection.execute(owned.where(adapters.c.tenant_id == owner).order_by(adapter_versions.c.id))
    return [AdapterDigest(digest) for digest in rows.scalars()]
