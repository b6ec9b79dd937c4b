"""Who may ask: tenants and their API keys. Keys are random, shown once, kept as sha256. Knows no HTTP.

A key has 32 random bytes, so a fast hash is enough: there is nothing to guess. The table is looked up by hash, and
how long that takes says nothing about any other key.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, or_, select, update

from adapters_store import registry
from adapters_store.answer_cache import AnswerCache
from adapters_store.base import AdapterDigest
from adapters_store.database import Database, now_s
from adapters_store.errors import Conflict, NotFound
from adapters_store.names import check_name
from adapters_store.records import Tenant, TenantKey
from adapters_store.schema import api_keys, tenants

_KEY_PREFIX = "ml-"
_KEY_BYTES = 32
_MAX_KEY_CHARS = 128


@dataclass(frozen=True, slots=True)
class _KnownKey:
    key_hash: str
    tenant: str
    expires_at: int | None


# Inside the class `list` is the method.
Tenants = list[Tenant]
Digests = list[AdapterDigest]


class TenantStore:
    """drop_blobs: called with the digests whose rows went, returns those no longer referenced by anyone."""

    def __init__(self, database: Database, drop_blobs: Callable[[Digests], Digests]) -> None:
        self._database = database
        self._drop_blobs = drop_blobs
        self._known_keys: AnswerCache[str, _KnownKey] = AnswerCache(database.generation)
        database.on_write(self._known_keys.clear)

    def create(self, name: str) -> TenantKey:
        """A new tenant with its first key.

        Raises:
            AdapterRejected: bad_name. Conflict: tenant_exists.
        """
        check_name("tenant", name)
        key = _new_key()
        with self._database.write() as connection:
            if connection.execute(select(tenants.c.id).where(tenants.c.name == name)).first() is not None:
                raise Conflict("tenant_exists", f"tenant {name} exists already", param="tenant")
            values = {"name": name, "created_at": now_s(), "disabled": False}
            owner = connection.execute(insert(tenants).values(values).returning(tenants.c.id)).scalar_one()
            _add_key(connection, owner, key)
        return TenantKey(name, key)

    def list(self) -> Tenants:
        """Every tenant, by name."""
        with self._database.read() as connection:
            rows = connection.execute(select(tenants).order_by(tenants.c.name))
            return [_to_tenant(row) for row in rows]

    def get(self, name: str) -> Tenant:
        """Raises NotFound (tenant_not_found)."""
        with self._database.read() as connection:
            owner = registry.tenant_id(connection, name)
            return _to_tenant(connection.execute(select(tenants).where(tenants.c.id == owner)).one())

    def rotate_key(self, name: str, overlap_s: int = 0) -> TenantKey:
        """A new key; the old ones open for `overlap_s` seconds more. Raises NotFound (tenant_not_found)."""
        if overlap_s < 0:
            raise ValueError(f"overlap_s must not be negative, got {overlap_s}")
        key, end = _new_key(), now_s() + overlap_s
        with self._database.write() as connection:
            owner = registry.tenant_id(connection, name, lock=True)
            longer = or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > end)
            connection.execute(update(api_keys).where(api_keys.c.tenant_id == owner, longer).values(expires_at=end))
            _add_key(connection, owner, key)
        return TenantKey(name, key)

    def set_disabled(self, name: str, disabled: bool) -> None:
        """Whether the tenant's keys open nothing for now. Raises NotFound (tenant_not_found)."""
        with self._database.write() as connection:
            owner = registry.tenant_id(connection, name, lock=True)
            connection.execute(update(tenants).where(tenants.c.id == owner).values(disabled=disabled))

    def delete(self, name: str) -> Digests:
        """Delete the tenant, its keys and adapters; returns the digests no longer referenced by anyone.

        Raises NotFound (tenant_not_found).
        """
        with self._database.write() as connection:
            owner = registry.tenant_id(connection, name, lock=True)
            digests = [version.digest for version in registry.find_versions(connection, tenant=name)]
            connection.execute(delete(tenants).where(tenants.c.id == owner))
        return self._drop_blobs(digests)

    def authenticate(self, api_key: str) -> str | None:
        """The tenant whose key this is; None for an unknown, expired or disabled one.

        A key revoked by another process stops opening within a second. Cheap enough for every request.
        """
        if not api_key.startswith(_KEY_PREFIX) or len(api_key) > _MAX_KEY_CHARS:
            return None
        key_hash = _hash(api_key)
        try:
            known = self._known_keys.get(key_hash, self._find_key)
        except NotFound:
            return None
        if known.expires_at is not None and time.time() >= known.expires_at:
            return None
        return known.tenant if hmac.compare_digest(known.key_hash, key_hash) else None

    def _find_key(self, key_hash: str) -> _KnownKey:
        condition = (api_keys.c.key_hash == key_hash) & tenants.c.disabled.is_(False)
        columns = (api_keys.c.key_hash, tenants.c.name, api_keys.c.expires_at)
        with self._database.read() as connection:
            row = connection.execute(select(*columns).select_from(api_keys.join(tenants)).where(condition)).first()
        if row is None:
            raise NotFound("key_not_found", "no such key")
        return _KnownKey(row.key_hash, row.name, row.expires_at)


def _new_key() -> str:
    return _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def _hash(api_key: str) -> str:
    return hashlib.sha256(api_key.encode("utf-8", "replace")).hexdigest()


def _add_key(connection: Connection, owner: int, key: str) -> None:
    connection.execute(insert(api_keys).values(tenant_id=owner, key_hash=_hash(key), created_at=now_s()))


def _to_tenant(row: Row[Any]) -> Tenant:
    return Tenant(row.name, row.created_at, row.disabled)
