"""Checks if a directory and a database from before store ids belong together. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Column, Connection, select

from adapters_store.errors import StoreError
from adapters_store.storage.schema import adapter_versions, few_at_a_time, files, jobs


def require_ownership(connection: Connection, root: Path) -> bool:
    """If the directory is empty. Raises StoreError (wrong_store) if one holds what the other does not know."""
    held = [
        (adapter_versions.c.digest, _digests(root / "blobs")),
        (files.c.digest, _digests(root / "files")),
        (jobs.c.id, [folder.name for folder in (root / "runs").glob("ftjob-*")]),
    ]
    if any(_knows_any(connection, column, names) for column, names in held):
        return False
    if any(names for _, names in held):
        message = "the data directory holds adapters, files or runs, and the database knows none of them"
        raise StoreError("wrong_store", f"{message}; is it the right database? If so: multilora adopt")
    if not _lies_in(connection, root) and any(_has_rows(connection, column) for column, _ in held):
        message = "the database has adapters, files or jobs, and the data directory holds none of them"
        raise StoreError("wrong_store", f"{message}; is it the right directory? If so: multilora adopt")
    return True


def holds_blobs(root: Path) -> bool:
    """If the directory has adapters or files."""
    return any(_digests(root / folder) for folder in ("blobs", "files"))


def has_blob_rows(connection: Connection) -> bool:
    """If the database has adapters or files."""
    return any(_has_rows(connection, column) for column in (adapter_versions.c.digest, files.c.digest))


def _lies_in(connection: Connection, root: Path) -> bool:
    """The database is SQLite's own file in the directory, so they belong together."""
    url = connection.engine.url
    return url.get_backend_name() == "sqlite" and Path(str(url.database)).resolve().parent == root.resolve()


def _digests(folder: Path) -> list[str]:
    return [f"sha256:{each.name}" for each in folder.glob("??/*")]


def _has_rows(connection: Connection, column: Column[str]) -> bool:
    return connection.execute(select(column).limit(1)).first() is not None


def _knows_any(connection: Connection, column: Column[str], names: Sequence[str]) -> bool:
    some = (select(column).where(column.in_(few)).limit(1) for few in few_at_a_time(names))
    return any(connection.execute(statement).first() is not None for statement in some)
