"""The rows about quotas. Every function works inside the caller's transaction. Knows no tenant by name."""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import Connection, delete, func, insert, select

from adapters_store.accounts.records import Quotas
from adapters_store.errors import Conflict
from adapters_store.storage.schema import adapter_versions, adapters, tenant_quotas

_COLUMNS = [column for column in tenant_quotas.c if column.name != "tenant_id"]


def read(connection: Connection, owner: int) -> Quotas:
    """What this tenant may use; unlimited if nothing was set."""
    row = connection.execute(select(*_COLUMNS).where(tenant_quotas.c.tenant_id == owner)).first()
    return Quotas() if row is None else Quotas(**row._mapping)


def write(connection: Connection, owner: int, quotas: Quotas) -> None:
    connection.execute(delete(tenant_quotas).where(tenant_quotas.c.tenant_id == owner))
    connection.execute(insert(tenant_quotas).values(tenant_id=owner, **asdict(quotas)))


def check_room(connection: Connection, owner: int, num_bytes: int) -> None:
    """Raises Conflict (quota_adapters, quota_bytes) if one more version of `num_bytes` is too much."""
    quotas = read(connection, owner)
    if quotas.max_adapters is None and quotas.max_adapter_bytes is None:
        return
    owned = select(func.count(), func.coalesce(func.sum(adapter_versions.c.num_bytes), 0))
    of_tenant = owned.select_from(adapter_versions.join(adapters)).where(adapters.c.tenant_id == owner)
    count, used = connection.execute(of_tenant).one()
    if quotas.max_adapters is not None and count >= quotas.max_adapters:
        message = f"the tenant has {count} adapter versions, its quota is {quotas.max_adapters}"
        raise Conflict("quota_adapters", message, param="name")
    if quotas.max_adapter_bytes is not None and used + num_bytes > quotas.max_adapter_bytes:
        message = f"the adapter takes {num_bytes} bytes, {used} of the tenant's {quotas.max_adapter_bytes} are used"
        raise Conflict("quota_bytes", message, param="weights")
