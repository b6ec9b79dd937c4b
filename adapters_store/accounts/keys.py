"""A tenant's API keys: how they are made, kept and found, and what each opens. Knows no HTTP.

Keys are random, shown once, kept as sha256. A key has 32 random bytes, so a fast hash is enough: there is nothing to
guess. The lookup is by hash, so its time reveals nothing about other keys.
Every function with a connection works inside the caller's transaction.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, Connection, insert, or_, select, update

from adapters_store.errors import InputRefused, NotFound
from adapters_store.parsing.strict_json import shown
from adapters_store.storage.database import now_s
from adapters_store.storage.schema import api_keys, tenants

KEY_PREFIX = "ml-"
MAX_KEY_CHARS = 128
_KEY_BYTES = 32
_MAX_LABEL_CHARS = 128


class Scope(StrEnum):
    """What a key may be limited to. inference: completions. adapters, jobs: change them. read: see anything of the
    tenant."""

    INFERENCE = "inference"
    ADAPTERS = "adapters"
    JOBS = "jobs"
    READ = "read"


Scopes = frozenset[Scope]
ALL_SCOPES: Scopes = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class KeyGrant:
    """What a key opens. expires_at: Unix seconds, None for never."""

    key_id: int
    key_hash: str
    tenant: str
    scopes: Scopes
    expires_at: int | None


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as it is listed, without its secret."""

    key_id: int
    label: str | None
    scopes: Scopes
    created_at: int
    expires_at: int | None


@dataclass(frozen=True, slots=True)
class KeySpec:
    """A key to be made. scopes None: all there are, also those that come later."""

    scopes: Scopes | None = None
    expires_at: int | None = None
    label: str | None = None


def parse_scopes(names: Collection[str]) -> Scopes:
    """Raises InputRefused (bad_scope) for an unknown name, or none at all."""
    known = {scope.value for scope in Scope}
    unknown = sorted(set(names) - known)
    if unknown or not names:
        got = f"got {unknown[0][:40]!r}" if unknown else "got none"
        raise InputRefused("bad_scope", f"scopes: must be some of {', '.join(sorted(known))}; {got}", param="scopes")
    return frozenset(Scope(name) for name in names)


def check_spec(new: KeySpec) -> None:
    """Raises InputRefused (bad_expiry, bad_label)."""
    if new.expires_at is not None and new.expires_at <= now_s():
        message = f"expires_at: {new.expires_at} is not in the future, it is {now_s()} (Unix seconds)"
        raise InputRefused("bad_expiry", message, param="expires_at")
    if new.label is not None and not (new.label.isprintable() and len(new.label) <= _MAX_LABEL_CHARS):
        message = f"label: must be at most {_MAX_LABEL_CHARS} printable characters, got {shown(new.label)}"
        raise InputRefused("bad_label", message, param="label")


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def hash_of(api_key: str) -> str:
    return hashlib.sha256(api_key.encode("utf-8", "replace")).hexdigest()


def add(connection: Connection, owner: int, key: str, new: KeySpec) -> int:
    """Write a key's row; returns its id."""
    row = {
        "tenant_id": owner,
        "key_hash": hash_of(key),
        "created_at": now_s(),
        "expires_at": new.expires_at,
        "scopes": None if new.scopes is None else " ".join(sorted(new.scopes)),
        "label": new.label,
    }
    return int(connection.execute(insert(api_keys).values(row).returning(api_keys.c.id)).scalar_one())


def end(connection: Connection, owner: int, at: int, key_id: int | None = None) -> None:
    """End one key, or all of a tenant, at `at`; a key that ends sooner keeps its end."""
    condition: ColumnElement[bool] = api_keys.c.tenant_id == owner
    if key_id is not None:
        condition &= api_keys.c.id == key_id
    longer = or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > at)
    connection.execute(update(api_keys).where(condition, longer).values(expires_at=at))


def require(connection: Connection, owner: int, key_id: int) -> KeySpec:
    """What a key was made with. Raises NotFound (key_not_found)."""
    condition = (api_keys.c.tenant_id == owner) & (api_keys.c.id == key_id)
    row = connection.execute(select(api_keys).where(condition)).first()
    if row is None:
        raise NotFound("key_not_found", f"the tenant has no key {key_id}", param="key_id")
    return KeySpec(None if row.scopes is None else _scopes(row.scopes), row.expires_at, row.label)


def all_of(connection: Connection, owner: int) -> list[KeyInfo]:
    """Every key of a tenant, ended ones too, the oldest first."""
    rows = connection.execute(select(api_keys).where(api_keys.c.tenant_id == owner).order_by(api_keys.c.id))
    return [KeyInfo(row.id, row.label, _scopes(row.scopes), row.created_at, row.expires_at) for row in rows]


def find(connection: Connection, key_hash: str) -> KeyGrant:
    """The key of that hash, of a tenant that is not disabled. Raises NotFound (key_not_found)."""
    condition = (api_keys.c.key_hash == key_hash) & tenants.c.disabled.is_(False)
    columns = (api_keys.c.id, api_keys.c.key_hash, tenants.c.name, api_keys.c.scopes, api_keys.c.expires_at)
    row = connection.execute(select(*columns).select_from(api_keys.join(tenants)).where(condition)).first()
    if row is None:
        raise NotFound("key_not_found", "no such key")
    return KeyGrant(row.id, row.key_hash, row.name, _scopes(row.scopes), row.expires_at)


def _scopes(text: str | None) -> Scopes:
    return ALL_SCOPES if text is None else frozenset(Scope(name) for name in text.split())
