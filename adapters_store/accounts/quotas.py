"""What each tenant may use, as an operator set it. Counts nothing itself: rates are the API's, bytes the registry's."""

from __future__ import annotations

from dataclasses import asdict

from adapters_store.accounts import quota_rows
from adapters_store.accounts.records import Quotas
from adapters_store.accounts.tenant_rows import tenant_id
from adapters_store.errors import NotFound
from adapters_store.storage import audit
from adapters_store.storage.answer_cache import AnswerCache
from adapters_store.storage.database import Database


class QuotaStore:
    """Quotas by tenant name. Safe to use from many threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: AnswerCache[str, Quotas] = AnswerCache(database.generation_if_reachable, max_age_s=database.poll_s)
        database.on_change(self._known.clear)

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
            quota_rows.write(connection, owner, quotas)
            audit.note(connection, "tenant.quota", tenant=tenant, **asdict(quotas))

    def _find(self, tenant: str) -> Quotas:
        with self._database.read() as connection:
            try:
                owner = tenant_id(connection, tenant)
            except NotFound:
                return Quotas()
            return quota_rows.read(connection, owner)
