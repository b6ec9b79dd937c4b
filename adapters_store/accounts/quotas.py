"""What each tenant may use, as an operator set it. Counts no rates: those are the API's.

Every function with a connection works inside the caller's transaction.
"""

from __future__ import annotations

from dataclasses import asdict

from sqlalchemy import Connection, delete, func, insert, select

from adapters_store.accounts.records import Quotas
from adapters_store.accounts.tenant_rows import tenant_id
from adapters_store.errors import Conflict, NotFound
from adapters_store.storage import audit
from adapters_store.storage.answer_cache import AnswerCache
from adapters_store.storage.database import Database
from adapters_store.storage.schema import adapter_versions, adapters, tenant_quotas

_COLUMNS = [column for column in tenant_quotas.c if column.name != "tenant_id"]


class QuotaStore:
    """Quotas by tenant name. Safe to use from many threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: AnswerCache[str, Quotas] = database.answers()

    def get(self, tenant: str) -> Quotas:
        """Cheap enough for every request; another process's change counts within a second. Unlimited for a name that
        is no tenant, as names are if auth is off."""
        return self._known.get(tenant, self._find)

    def peek(self, tenant: str) -> Quotas | None:
        """The same if it is known without asking the database; else None. Never waits."""
        return self._known.peek(tenant)

    def set(self, tenant: str, quotas: Quotas) -> None:
        """Replace a tenant's quotas. Raises NotFound (tenant_not_found)."""
        with self._database.write() as connection:
            owner = tenant_id(connection, tenant, lock=True)
            connection.execute(delete(tenant_quotas).where(tenant_quotas.c.tenant_id == owner))
            connection.execute(insert(tenant_quotas).values(tenant_id=owner, **asdict(quotas)))
            audit.note(connection, "tenant.quota", tenant=tenant, **asdict(quotas))

    def _find(self, tenant: str) -> Quotas:
        with self._database.read() as connection:
            try:
                owner = tenant_id(connection, tenant)
            except NotFound:
                return Quotas()
            return _read(connection, owner)


def _read(connection: Connection, owner: int) -> Quotas:
    """What this tenant may use; unlimited if nothing was set."""
    row = connection.execute(select(*_COLUMNS).where(tenant_quotas.c.tenant_id == owner)).first()
    return Quotas() if row is None else Quotas(**row._mapping)


def check_room(connection: Connection, owner: int, num_bytes: int, *, max_versions: int) -> None:
    """Raises Conflict (too_many_adapters, quota_adapters, quota_bytes) if one more version of `num_bytes` is too much.

    max_versions: of any tenant.
    """
    quotas = _read(connection, owner)
    owned = select(func.count(), func.coalesce(func.sum(adapter_versions.c.num_bytes), 0))
    of_tenant = owned.select_from(adapter_versions.join(adapters)).where(adapters.c.tenant_id == owner)
    count, used = connection.execute(of_tenant).one()
    if count >= max_versions:
        message = f"the tenant has {count} adapter versions, the limit is {max_versions}"
        raise Conflict("too_many_adapters", message, param="name")
    if quotas.max_adapters is not None and count >= quotas.max_adapters:
        message = f"the tenant has {count} adapter versions, its quota is {quotas.max_adapters}"
        raise Conflict("quota_adapters", message, param="name")
    if quotas.max_adapter_bytes is not None and used + num_bytes > quotas.max_adapter_bytes:
        message = f"the adapter takes {num_bytes} bytes, {used} of the tenant's {quotas.max_adapter_bytes} are used"
        raise Conflict("quota_bytes", message, param="weights")
