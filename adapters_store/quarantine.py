"""Which adapters are not served although they have rows, and why. Decides nothing: whoever finds a fault puts it here.

Keyed by digest: whatever name and tenant an adapter goes by, it is as damaged as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from adapters_store import audit
from adapters_store.base import AdapterDigest
from adapters_store.database import Database, now_s
from adapters_store.errors import NotFound
from adapters_store.schema import quarantine
from adapters_store.strict_json import shown

OF_THE_BLOB = ("blob_damaged", "blob_missing")  # what a new copy of the same bytes heals


@dataclass(frozen=True, slots=True)
class Quarantined:
    """code: blob_missing, blob_damaged, or what else was found. created_at: Unix seconds."""

    digest: AdapterDigest
    code: str
    message: str
    created_at: int


def heal(connection: Connection, digest: AdapterDigest) -> bool:
    """The blob is whole again: serve the adapter, unless it was put away for something else. Says whether it was."""
    condition = (quarantine.c.digest == digest) & quarantine.c.code.in_(OF_THE_BLOB)
    is_healed = connection.execute(delete(quarantine).where(condition)).rowcount > 0
    if is_healed:
        audit.note(connection, "adapter.release", target=digest, reason="blob_restored")
    return is_healed


class Quarantine:
    """Each change in one transaction. A running server follows within a second, whoever made the change."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, digest: AdapterDigest, code: str, message: str) -> bool:
        """Serve this adapter no more, under any name; False where it was so already.

        Raises StoreError (disk_full, read_only).
        """
        with self._database.write() as connection:
            if connection.execute(select(quarantine.c.digest).where(quarantine.c.digest == digest)).first() is not None:
                return False
            row = {"digest": digest, "code": code, "message": message, "created_at": now_s()}
            connection.execute(insert(quarantine).values(row))
            audit.note(connection, "adapter.quarantine", target=digest, code=code)
        return True

    def release(self, digest: AdapterDigest) -> None:
        """Serve it again. Raises NotFound (not_quarantined)."""
        with self._database.write() as connection:
            if connection.execute(delete(quarantine).where(quarantine.c.digest == digest)).rowcount == 0:
                raise NotFound("not_quarantined", f"digest: {shown(digest)} is not in quarantine", param="digest")
            audit.note(connection, "adapter.release", target=digest, reason="operator")

    def heal(self, digest: AdapterDigest) -> bool:
        with self._database.write() as connection:
            return heal(connection, digest)

    def entries(self) -> list[Quarantined]:
        """The newest first."""
        with self._database.read() as connection:
            rows = connection.execute(select(quarantine).order_by(quarantine.c.created_at.desc(), quarantine.c.digest))
            return [Quarantined(AdapterDigest(row.digest), row.code, row.message, row.created_at) for row in rows]
