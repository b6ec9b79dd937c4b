"""Tenants and their API keys: what a key opens and when it ends. Knows no HTTP.

Every change is written to the audit log in the same transaction.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Row, delete, insert, select, update

from adapters_store.accounts import keys
from adapters_store.accounts.keys import KeyGrant, KeyInfo, KeySpec
from adapters_store.accounts.records import MAX_OVERLAP_S, Tenant, TenantKey
from adapters_store.accounts.tenant_rows import digests_of, tenant_id
from adapters_store.base.description import AdapterDigest
from adapters_store.errors import Conflict, NotFound
from adapters_store.storage import audit
from adapters_store.storage.answer_cache import AnswerCache
from adapters_store.storage.database import Database, now_s
from adapters_store.storage.names import check_name
from adapters_store.storage.schema import tenants


class TenantStore:
    """drop_blobs: called with the digests of deleted rows; returns those that no row has any more."""

    def __init__(self, database: Database, drop_blobs: Callable[[list[AdapterDigest]], list[AdapterDigest]]) -> None:
        self._database = database
        self._drop_blobs = drop_blobs
        self._known_keys: AnswerCache[str, KeyGrant] = database.answers()

    def create(self, name: str) -> TenantKey:
        """A new tenant with its first key, which opens everything of the tenant.

        Raises:
            InputRefused: bad_name. Conflict: tenant_exists.
        """
        check_name("tenant", name)
        key = keys.new_key()
        with self._database.write() as connection:
            if connection.execute(select(tenants.c.id).where(tenants.c.name == name)).first() is not None:
                raise Conflict("tenant_exists", f"tenant {name} exists already", param="tenant")
            values = {"name": name, "created_at": now_s(), "disabled": False}
            owner = connection.execute(insert(tenants).values(values).returning(tenants.c.id)).scalar_one()
            key_id = keys.add(connection, owner, key, KeySpec())
            audit.note(connection, "tenant.create", tenant=name, key_id=key_id)
        return TenantKey(name, key, key_id)

    def list_tenants(self) -> list[Tenant]:
        """Every tenant, by name."""
        with self._database.read() as connection:
            rows = connection.execute(select(tenants).order_by(tenants.c.name))
            return [_to_tenant(row) for row in rows]

    def get(self, name: str) -> Tenant:
        """Raises NotFound (tenant_not_found)."""
        with self._database.read() as connection:
            owner = tenant_id(connection, name)
            return _to_tenant(connection.execute(select(tenants).where(tenants.c.id == owner)).one())

    def keys(self, name: str) -> list[KeyInfo]:
        """A tenant's keys, ended ones too. Raises NotFound (tenant_not_found)."""
        with self._database.read() as connection:
            return keys.all_of(connection, tenant_id(connection, name))

    def create_key(self, name: str, new: KeySpec) -> TenantKey:
        """One more key. Raises NotFound (tenant_not_found), InputRefused (bad_expiry, bad_label)."""
        keys.check_spec(new)
        key = keys.new_key()
        with self._database.write() as connection:
            owner = tenant_id(connection, name, lock=True)
            key_id = keys.add(connection, owner, key, new)
            scopes = None if new.scopes is None else sorted(new.scopes)
            audit.note(connection, "key.create", tenant=name, key_id=key_id, scopes=scopes, expires_at=new.expires_at)
        return TenantKey(name, key, key_id)

    def rotate_key(self, name: str, overlap_s: int = 0, key_id: int | None = None) -> TenantKey:
        """A new key that replaces one, with its scopes, label and expiry; or replaces all and opens everything.

        Replaced keys end in `overlap_s` seconds. Raises NotFound (tenant_not_found, key_not_found), InputRefused
        (bad_expiry): the key to replace has ended.
        """
        if not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise ValueError(f"overlap_s must be from 0 to {MAX_OVERLAP_S}, got {overlap_s}")
        key, ending = keys.new_key(), now_s() + overlap_s
        with self._database.write() as connection:
            owner = tenant_id(connection, name, lock=True)
            new = KeySpec() if key_id is None else keys.require(connection, owner, key_id)
            keys.check_spec(new)
            keys.end(connection, owner, ending, key_id)
            new_id = keys.add(connection, owner, key, new)
            audit.note(connection, "key.rotate", tenant=name, key_id=new_id, replaces=key_id, overlap_s=overlap_s)
        return TenantKey(name, key, new_id)

    def revoke_key(self, name: str, key_id: int) -> None:
        """The key opens nothing from now on. Raises NotFound (tenant_not_found, key_not_found)."""
        with self._database.write() as connection:
            owner = tenant_id(connection, name, lock=True)
            keys.require(connection, owner, key_id)
            keys.end(connection, owner, now_s(), key_id)
            audit.note(connection, "key.revoke", tenant=name, key_id=key_id)

    def set_disabled(self, name: str, disabled: bool) -> None:
        """Whether the tenant's keys open nothing for now. Raises NotFound (tenant_not_found)."""
        with self._database.write() as connection:
            owner = tenant_id(connection, name, lock=True)
            connection.execute(update(tenants).where(tenants.c.id == owner).values(disabled=disabled))
            audit.note(connection, "tenant.disable" if disabled else "tenant.enable", tenant=name)

    def delete(self, name: str) -> list[AdapterDigest]:
        """Delete the tenant, its keys and adapters; returns the digests that no row has any more.

        Raises NotFound (tenant_not_found).
        """
        with self._database.write() as connection:
            owner = tenant_id(connection, name, lock=True)
            digests = digests_of(connection, owner)
            connection.execute(delete(tenants).where(tenants.c.id == owner))
            audit.note(connection, "tenant.delete", tenant=name, num_versions=len(digests))
        return self._drop_blobs(digests)

    def authenticate(self, api_key: str) -> KeyGrant | None:
        """What a key opens; None for an unknown, expired or disabled one.

        A key revoked by another process stops opening within a second. Cheap enough for every request.
        """
        if not api_key.startswith(keys.KEY_PREFIX) or len(api_key) > keys.MAX_KEY_CHARS:
            return None
        key_hash = keys.hash_of(api_key)
        try:
            known = self._known_keys.get(key_hash, self._find_key)
        except NotFound:
            return None
        if known.expires_at is not None and time.time() >= known.expires_at:
            return None
        return known if hmac.compare_digest(known.key_hash, key_hash) else None

    def _find_key(self, key_hash: str) -> KeyGrant:
        with self._database.read() as connection:
            return keys.find(connection, key_hash)


def _to_tenant(row: Row[Any]) -> Tenant:
    return Tenant(row.name, row.created_at, row.disabled)
