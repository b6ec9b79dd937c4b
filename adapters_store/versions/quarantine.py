"""Which adapters are not served although they have rows, and why. Decides nothing: the code that finds a fault adds it.

A fault of an adapter's bytes is kept by digest and counts for every tenant that has them. A fault that only one
tenant's requests have shown (numbers that are not finite) counts for that tenant: others may have the same bytes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, Table, delete, insert, null, select, union_all

from adapters_store.base.description import AdapterDigest
from adapters_store.errors import NotFound, StoreError
from adapters_store.parsing.strict_json import shown
from adapters_store.storage import audit
from adapters_store.storage.database import Database, now_s
from adapters_store.storage.schema import quarantine, tenant_quarantine, tenants

_log = logging.getLogger(__name__)
OF_THE_BLOB = ("blob_damaged", "blob_missing")  # what a new copy of the same bytes heals


@dataclass(frozen=True, slots=True)
class Quarantined:
    """code: blob_missing, blob_damaged, or what else was found. created_at: Unix seconds. tenant: None for all."""

    digest: AdapterDigest
    code: str
    message: str
    created_at: int
    tenant: str | None = None


def heal(connection: Connection, digest: AdapterDigest) -> bool:
    """The blob is whole again: serve the adapter, unless it is quarantined for another reason. Returns if it was."""
    condition = (quarantine.c.digest == digest) & quarantine.c.code.in_(OF_THE_BLOB)
    is_healed = connection.execute(delete(quarantine).where(condition)).rowcount > 0
    if is_healed:
        audit.note(connection, "adapter.release", target=digest, reason="blob_restored")
    return is_healed


class Quarantine:
    """Each change in one transaction. A running server follows within a second, whichever process made the change."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, digest: AdapterDigest, code: str, message: str, *, tenant: str | None = None) -> bool:
        """Stop serving this adapter under any name: to the tenant, or (None) to all.

        False if it is quarantined already, or the tenant is gone. Raises StoreError (disk_full, read_only).
        """
        row = {"digest": digest, "code": code, "message": message, "created_at": now_s()}
        with self._database.write() as connection:
            table, condition = quarantine, quarantine.c.digest == digest
            if tenant is not None:
                owner = connection.execute(select(tenants.c.id).where(tenants.c.name == tenant)).scalar()
                if owner is None:
                    return False
                table = tenant_quarantine
                condition = (table.c.digest == digest) & (table.c.tenant_id == owner)
                row["tenant_id"] = owner
            if connection.execute(select(table.c.digest).where(condition)).first() is not None:
                return False
            connection.execute(insert(table).values(row))
            audit.note(connection, "adapter.quarantine", tenant=tenant, target=digest, code=code)
        return True

    def try_put(self, digest: AdapterDigest, code: str, message: str, *, tenant: str | None = None) -> None:
        """The same for a caller that must continue: what prevents it is logged."""
        try:
            self.put(digest, code, message, tenant=tenant)
        except StoreError as error:
            _log.warning("adapter %s could not be put into quarantine: %s", digest, error.message)

    def release(self, digest: AdapterDigest, *, tenant: str | None = None) -> None:
        """Serve it again, whatever the reason was: to the tenant, or (None) to all.

        Raises NotFound (not_quarantined).
        """
        with self._database.write() as connection:
            own = tenant_quarantine.c.digest == digest
            if tenant is not None:
                owner = select(tenants.c.id).where(tenants.c.name == tenant).scalar_subquery()
                own &= tenant_quarantine.c.tenant_id == owner
            count = connection.execute(delete(tenant_quarantine).where(own)).rowcount
            if tenant is None:
                count += connection.execute(delete(quarantine).where(quarantine.c.digest == digest)).rowcount
            if count == 0:
                raise NotFound("not_quarantined", f"digest: {shown(digest)} is not in quarantine", param="digest")
            audit.note(connection, "adapter.release", tenant=tenant, target=digest, reason="operator")

    def heal(self, digest: AdapterDigest) -> bool:
        with self._database.write() as connection:
            return heal(connection, digest)

    def is_of_the_blob(self, digest: AdapterDigest) -> bool:
        """Quarantined because its bytes are damaged or missing."""
        condition = (quarantine.c.digest == digest) & quarantine.c.code.in_(OF_THE_BLOB)
        with self._database.read() as connection:
            return connection.execute(select(quarantine.c.digest).where(condition)).first() is not None

    def entries(self) -> list[Quarantined]:
        """The newest first."""
        of_all = select(*_columns(quarantine), null().label("tenant"))
        of_one = select(*_columns(tenant_quarantine), tenants.c.name).select_from(tenant_quarantine.join(tenants))
        with self._database.read() as connection:
            rows = connection.execute(union_all(of_all, of_one)).all()
        found = [Quarantined(AdapterDigest(row[0]), *row[1:]) for row in rows]
        return sorted(found, key=lambda entry: (-entry.created_at, entry.digest, entry.tenant or ""))


def _columns(table: Table) -> list[Column[Any]]:
    return [table.c.digest, table.c.code, table.c.message, table.c.created_at]
