"""Which actor changed which tenant, key or adapter, as rows that are only added. Knows no HTTP.

A row is written in the transaction of its change: neither exists without the other. The actor is a context variable:
it belongs to a call from the first to the last frame, threads included, and no layer between needs it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from adapters_store.storage.database import Database, now_s
from adapters_store.storage.schema import audit_log

MAX_ROWS = 200_000
MAX_AGE_S = 400 * 86_400
_MAX_TARGET_CHARS = 256


@dataclass(frozen=True, slots=True)
class Actor:
    """name: "key:7", "admin", "anyone" (auth off), "cli:uid1000" or "process"."""

    name: str
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change. id rises with time. at: Unix seconds. tenant: the tenant it concerns."""

    id: int
    at: int
    actor: str
    request_id: str | None
    action: str
    tenant: str | None
    target: str | None
    detail: dict[str, Any] = field(default_factory=dict)


_UNNAMED = Actor("process")
_actor: ContextVar[Actor] = ContextVar("multilora_actor", default=_UNNAMED)


def act_as(actor: Actor) -> None:
    """From now on, in this call and the threads it starts, changes are this actor's."""
    _actor.set(actor)


@contextmanager
def acting_as(actor: Actor) -> Iterator[None]:
    """The same until the end of the block."""
    before = _actor.set(actor)
    try:
        yield
    finally:
        _actor.reset(before)


def note(
    connection: Connection,
    action: str,
    *,
    tenant: str | None = None,
    target: str | None = None,
    max_rows: int = MAX_ROWS,
    **detail: Any,
) -> None:
    """Add a row to the caller's transaction; the oldest beyond max_rows go. detail: JSON, no secrets."""
    actor = _actor.get()
    row = {
        "at": now_s(),
        "actor": actor.name,
        "request_id": actor.request_id,
        "action": action,
        "tenant": tenant,
        "target": None if target is None else target[:_MAX_TARGET_CHARS],
        "detail": json.dumps(detail),
    }
    newest = connection.execute(insert(audit_log).values(row).returning(audit_log.c.id)).scalar_one()
    connection.execute(delete(audit_log).where(audit_log.c.id <= newest - max_rows))


class AuditLog:
    """Reads the rows, and adds rows about things outside this database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, action: str, *, tenant: str | None = None, target: str | None = None, **detail: Any) -> None:
        """A row of its own. Raises StoreError (disk_full, read_only)."""
        with self._database.write(changes_answers=False) as connection:
            note(connection, action, tenant=tenant, target=target, **detail)

    def entries(self, *, tenant: str | None = None, before: int | None = None, limit: int = 100) -> list[AuditEntry]:
        """The newest first. before: only rows with a smaller id, for the next page."""
        statement = select(audit_log).order_by(audit_log.c.id.desc()).limit(limit)
        if tenant is not None:
            statement = statement.where(audit_log.c.tenant == tenant)
        if before is not None:
            statement = statement.where(audit_log.c.id < before)
        with self._database.read() as connection:
            rows = connection.execute(statement).all()
        return [AuditEntry(**{**row._mapping, "detail": json.loads(row.detail)}) for row in rows]

    def prune(self) -> int:
        """Delete what is older than MAX_AGE_S; returns how many rows went."""
        oldest = int(time.time() - MAX_AGE_S)
        with self._database.write(changes_answers=False) as connection:
            return connection.execute(delete(audit_log).where(audit_log.c.at < oldest)).rowcount
