"""Locks between processes: of one machine by flock, of every machine by PostgreSQL's advisory locks. Knows no blob."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol
from zlib import crc32

from sqlalchemy import Connection, Engine, NullPool, create_engine, text

from adapters_store.filesystem import file_lock, tried_file_lock
from adapters_store.storage.database_errors import as_store_errors
from adapters_store.storage.sessions import connect_limits, limit_sessions

_CLASS = 0x6D6C6F72  # PostgreSQL's locks have two numbers; this one is the product's
_WAIT_S = 60


class Locks(Protocol):
    """One lock by name, between all processes of a store."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Wait for it, and hold it alone."""

    def shared(self) -> AbstractContextManager[None]:
        """Wait for it, and hold it beside others that share it."""

    def tried(self) -> AbstractContextManager[bool]:
        """Hold it alone if that is possible at once; the block runs in any case and is given whether it is held."""


class FileLocks:
    """flock on a file: for processes of one machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def exclusive(self) -> AbstractContextManager[None]:
        return file_lock(self._path, exclusive=True)

    def shared(self) -> AbstractContextManager[None]:
        return file_lock(self._path, exclusive=False)

    def tried(self) -> AbstractContextManager[bool]:
        return tried_file_lock(self._path)


class AdvisoryLocks:
    """PostgreSQL's, each on a connection of its own: one from the pool could wait for a holder that waits for the pool.

    Held by a transaction, so a lost connection or a killed process gives it back. Raises StoreUnavailable.
    """

    def __init__(self, url: str, name: str) -> None:
        self._engine = _engine(url)
        self._keys = {"of": _CLASS, "key": crc32(name.encode()) - (1 << 31)}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._connected() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:of, :key)"), self._keys)
            yield

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._connected() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock_shared(:of, :key)"), self._keys)
            yield

    @contextmanager
    def tried(self) -> Iterator[bool]:
        with self._connected() as connection:
            yield bool(connection.execute(text("SELECT pg_try_advisory_xact_lock(:of, :key)"), self._keys).scalar_one())

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        with as_store_errors(writes=False), self._engine.begin() as connection:
            yield connection


def locks_for(engine: Engine, folder: Path, name: str) -> Locks:
    """The lock `name` of a store whose rows are in `engine`; folder: where a file of this name may be."""
    if engine.dialect.name == "postgresql":
        return AdvisoryLocks(engine.url.render_as_string(hide_password=False), name)
    return FileLocks(folder / name)


def _engine(url: str) -> Engine:
    engine = create_engine(url, poolclass=NullPool, connect_args=connect_limits(url))
    limit_sessions(engine, lock_timeout=f"{_WAIT_S}s", idle_in_transaction_session_timeout="0")
    return engine
